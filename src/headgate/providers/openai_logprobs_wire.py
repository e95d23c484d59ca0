"""Log probabilities as OpenAI-like upstreams send them, in the legacy form or the chat form, read into ours.

Some upstreams answer completions in the chat form, so either form is taken from either endpoint.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from headgate.core.completion import TokenLogprob
from headgate.core.errors import UpstreamFailed

LOWEST, HIGHEST = -9999.0, 0.01
"""A log probability is at most 0, give or take a rounding. OpenAI says -9999 for no chance at all; what others say
for it (-3.4e38, a number beyond all floats, null) is read as that."""
MAX_BYTES_PER_ENTRY = 8192

_Byte = Annotated[int, Meta(ge=0, le=255)]
_PART_OF_CHARACTER = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2}|[\x20-\x5b\x5d-\x7e])*)")
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


class _Token(Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[_Byte] | None = None


class _Alternative(Struct, frozen=True, gc=False):
    token: str
    logprob: float | None
    bytes: list[_Byte] | None = None


class _ChatEntry(_Token, frozen=True, gc=False):
    top_logprobs: list[_Alternative] | None = None


class _Reported(Struct, frozen=True, gc=False):
    """Both forms: `content` and `refusal` are the chat's, the rest the legacy one's, as parallel arrays."""

    content: list[_ChatEntry] | None = None
    refusal: list[_ChatEntry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Placed(Struct, frozen=True, gc=False):
    text_offset: list[int] | None = None


_decode: Callable[[bytes | msgspec.Raw], _Reported | None] = msgspec.json.Decoder(_Reported | None).decode
_decode_places = msgspec.json.Decoder(_Placed).decode


def entries(provider: str, raw: msgspec.Raw, alternatives: int, most: int) -> tuple[TokenLogprob, ...]:
    """The entries in a choice's `logprobs`, with at most so many alternatives each; none for null or no field.

    UpstreamFailed when they cannot be read or are more than `most`.
    """
    size = memoryview(raw).nbytes
    if not size:
        return ()
    try:
        if size > (most + 1) * MAX_BYTES_PER_ENTRY:
            raise ValueError("more than any answer needs")
        reported = _reported(raw)
        if reported is None:
            return ()
        said = reported.content
        if reported.refusal:
            said = [*(said or ()), *reported.refusal]
        if len(said or reported.tokens or ()) > most:
            raise ValueError("more entries than tokens")
        if said is not None:
            read = [_chat_entry(entry, alternatives) for entry in said]
        else:
            read = _legacy_entries(reported, alternatives)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError) as error:
        raise UpstreamFailed(
            f"The provider {provider} sent log probabilities that cannot be read."
        ) from error
    return tuple(read)


def offsets(raw: msgspec.Raw, count: int) -> list[int] | None:
    """Where in the text each of `count` tokens begins, in characters; None where that is not given properly."""
    try:
        places = _decode_places(raw).text_offset
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    if not places or len(places) != count or any(later < earlier for earlier, later in pairwise(places)):
        return None
    return places


def _reported(raw: msgspec.Raw) -> _Reported | None:
    try:
        return _decode(raw)
    except msgspec.ValidationError:
        # Numbers beyond a float's range are refused there; here they are infinite.
        lenient = json.loads(bytes(raw), parse_int=_whole_number)
        reported: _Reported | None = msgspec.convert(lenient, _Reported | None)
        return reported


def _whole_number(digits: str) -> float:
    return int(digits) if len(digits) < 20 else float(digits)


def _legacy_entries(reported: _Reported, alternatives: int) -> list[TokenLogprob]:
    tokens, logprobs, tops = reported.tokens, reported.token_logprobs, reported.top_logprobs
    if tokens is None and logprobs is None:
        return []  # the chat form with null in it: a refusal, or thoughts
    if tokens is None or logprobs is None:
        raise ValueError("arrays are missing")
    if tops is None:
        if alternatives and any(logprob is not None for logprob in logprobs):
            raise ValueError("the alternatives are missing")
        tops = [None] * len(tokens)
    return [
        _legacy_entry(token, logprob, top, alternatives)
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    ]


def _legacy_entry(
    token: str, logprob: float | None, top: dict[str, float | None] | None, alternatives: int
) -> TokenLogprob:
    data = _bytes_of(token)
    if logprob is None:
        return TokenLogprob(data, None, None)
    if not alternatives:
        return TokenLogprob(data, _checked(logprob))
    if top is None:
        raise ValueError("an entry's alternatives are missing")
    pairs = [(_bytes_of(other), _alternative(value)) for other, value in top.items()]
    return TokenLogprob(data, _checked(logprob), _best(pairs, alternatives))


def _chat_entry(entry: _ChatEntry, alternatives: int) -> TokenLogprob:
    data, logprob = _chat_bytes(entry), _checked(entry.logprob)
    if not alternatives:
        return TokenLogprob(data, logprob)
    if entry.top_logprobs is None:
        raise ValueError("an entry's alternatives are missing")
    pairs = [(_chat_bytes(other), _alternative(other.logprob)) for other in entry.top_logprobs]
    return TokenLogprob(data, logprob, _best(pairs, alternatives))


def _best(pairs: list[tuple[bytes, float]], alternatives: int) -> tuple[tuple[bytes, float], ...]:
    """Best first. OpenAI adds the sampled token where it is none of the best: that one goes."""
    return tuple(sorted(pairs, key=lambda pair: pair[1], reverse=True)[:alternatives])


def _checked(logprob: float) -> float:
    if not logprob <= HIGHEST:
        raise ValueError("not the logarithm of a probability")
    return max(logprob, LOWEST)


def _alternative(logprob: float | None) -> float:
    return LOWEST if logprob is None else _checked(logprob)


def _chat_bytes(token: _Token | _Alternative) -> bytes:
    return bytes(token.bytes) if token.bytes is not None else _bytes_of(token.token)


def _bytes_of(token: str) -> bytes:
    r"""A token's bytes: part of a character is written `bytes:\xf0\x9f`, anything else as it is."""
    if token.startswith("bytes:") and "\\x" in token:
        part = _PART_OF_CHARACTER.fullmatch(token)
        if part is not None:
            return _ESCAPE.sub(lambda escape: bytes.fromhex(escape[1].decode()), part[1].encode())
    return token.encode()
