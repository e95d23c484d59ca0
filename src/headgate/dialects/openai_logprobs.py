"""Log probabilities in OpenAI's two forms: the legacy object of four parallel lists, and chat's list of tokens.

https://platform.openai.com/docs/api-reference/completions/object and .../chat/object. Both show a token as text,
and one that is only part of a character as `bytes:\\xf0\\x9f`.
"""

import codecs
import math
from collections.abc import Sequence

from msgspec import Struct

from headgate.core.completion import TokenLogprob

LOWEST = -9999.0
"""What stands for a probability of nothing, as OpenAI writes it: JSON has no infinity."""

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class LegacyLogprobs(Struct, frozen=True, kw_only=True):
    """Parallel lists, one place a token. A prompt's first token has neither a log probability nor alternatives."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    content: list[ContentLogprob]
    refusal: None = None


class LegacyScores:
    """The entries of one choice as legacy objects, piece by piece; joined they are the object of the whole.

    `most` is how many alternatives were asked for; 0 shows each token alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._decoder = _utf8_decoder("replace")
        self._characters = 0

    def add(self, entries: Sequence[TokenLogprob], within: int | None = None) -> LegacyLogprobs:
        """The next entries. `within`: the length of the whole text, once it is known: an upstream may score
        tokens that a stop sequence cut away, and these begin where the text ends."""
        tokens = [shown(entry.data) for entry in entries]
        offsets = [self._offset(entry.data) for entry in entries]
        return LegacyLogprobs(
            tokens=tokens,
            token_logprobs=[None if entry.logprob is None else _bounded(entry.logprob) for entry in entries],
            top_logprobs=list(map(self._alternatives, entries, tokens)),
            text_offset=offsets if within is None else [min(offset, within) for offset in offsets],
        )

    def _offset(self, data: bytes) -> int:
        """Where in the text the character stands that the token's first byte belongs to."""
        if not data:
            return self._characters
        decoder = self._decoder
        self._characters += len(decoder.decode(data[:1]))
        # The byte's own character is either still open, or the last one that came out.
        opened = bool(decoder.getstate()[0])
        offset = self._characters if opened else self._characters - 1
        self._characters += len(decoder.decode(data[1:]))
        return offset

    def _alternatives(self, entry: TokenLogprob, own: str) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        alternatives: dict[str, float] = {}
        # Two tokens may be written alike; the likelier one stands for both.
        for data, logprob in (entry.top or ())[: self._most]:
            # A generated special token has no text, and stands here without its name too.
            itself = not own and logprob == entry.logprob
            token, value = own if itself else shown(data), _bounded(logprob)
            alternatives[token] = max(value, alternatives.get(token, value))
        value = _bounded(entry.logprob)
        alternatives[own] = max(value, alternatives.get(own, value))
        return alternatives


def chat_logprobs(entries: Sequence[TokenLogprob], most: int) -> ChatLogprobs:
    """Chat's form, with the `most` best alternatives to each token. End tokens are no content."""
    return ChatLogprobs(
        content=[
            ContentLogprob(
                token=shown(entry.data),
                logprob=LOWEST if entry.logprob is None else _bounded(entry.logprob),
                bytes=list(entry.data),
                top_logprobs=[
                    TopLogprob(token=shown(data), logprob=_bounded(logprob), bytes=list(data))
                    for data, logprob in (entry.top or ())[:most]
                ],
            )
            for entry in entries
            if not entry.end
        ]
    )


def shown(data: bytes) -> str:
    """A token as text, or `bytes:\\xf0\\x9f` where its bytes are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in data])


def _bounded(logprob: float) -> float:
    return max(logprob, LOWEST) if math.isfinite(logprob) else LOWEST
