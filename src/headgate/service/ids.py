"""Random ids, from a pool of the system's randomness.

One system call serves hundreds of ids. Asking for each on its own costs little by itself, but every call lets the
ledger's thread take the interpreter, and taking it back is what shows in the profile (13 % of a request).
"""

import os
from collections.abc import Callable

POOL_BYTES = 8192
ID_BYTES = 16


class Ids:
    """128 random bits each. `source` gives that many random bytes; tests inject their own."""

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source
        self._pool = b""
        self._at = 0

    def hex(self) -> str:
        """32 hexadecimal digits."""
        at = self._at
        if at == len(self._pool):
            self._pool, at = self._source(POOL_BYTES), 0
        self._at = at + ID_BYTES
        return self._pool[at : at + ID_BYTES].hex()

    def uuid(self) -> str:
        """A version 4 UUID (122 of the bits are random)."""
        digits = self.hex()
        variant = "89ab"[int(digits[16], 16) & 3]
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
