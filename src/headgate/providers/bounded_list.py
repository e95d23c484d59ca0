"""Lists in what an upstream sends, read only as far as an honest answer goes: so none takes more memory than a small
multiple of its own size."""

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

ORDINARY_BYTES = 64 * 1024
"""An answer or event beyond this is read with more care: it may hold nothing but a million tiny parts."""


@cache
def at_most(most: int, item: type[Struct]) -> Callable[[bytes | msgspec.Raw], list[Any]]:
    """Reads a JSON array of up to so many of these; ValidationError at the first one more, before it takes memory."""
    places = [(f"place_{place}", item | None, None) for place in range(most)]
    row = msgspec.defstruct("Row", places, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False)
    decode = msgspec.json.Decoder(row | None).decode

    def read(raw: bytes | msgspec.Raw) -> list[Any]:
        found = decode(raw)
        return [] if found is None else [one for one in msgspec.structs.astuple(found) if one is not None]

    return read
