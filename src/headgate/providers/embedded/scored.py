"""A generation with log probabilities: one entry for each token, whatever the engine's events leave out.

The engine says nothing of a token that leaves a character incomplete: the event that completes the character stands
for all its tokens and has the id and the scores of the last one. The others are found again by their bytes. Stop
words and the length limit are watched here: the engine would not tell the bytes of what it holds back or cuts off.
"""

import codecs
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from msgspec import Struct

from headgate.core.completion import Chunk, FinishReason, Job, TokenLogprob, Usage
from headgate.core.errors import UpstreamFailed
from headgate.providers.embedded.generation import FAILED, FINISH_REASONS
from headgate.providers.embedded.side_door import Scores, SideDoor

Again = Callable[[int], Awaitable[Sequence[int]]]


class _Likely(Struct, frozen=True):
    id: int
    logprob: float
    bytes: list[int]


class _Token(Struct, frozen=True):
    """A generated token. Its `bytes` are those of the event's text, which may be more than its own."""

    id: int
    logprob: float
    bytes: list[int]
    top_logprobs: tuple[_Likely, ...]


class _Event(Struct, frozen=True):
    """One event: text and its last token, or, with `stop`, the end. `error` comes instead of both."""

    completion_probabilities: tuple[_Token, ...] = ()
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


class ScoredGeneration:
    """Turns events into chunks that carry their tokens' log probabilities, if the job asks for them.

    `again` gives the ids of as many generated tokens, by generating them once more; `opened` are the bytes of a
    character that the echoed prompt has begun and the answer may complete.
    """

    def __init__(
        self, job: Job, ids: Sequence[int], side: SideDoor, again: Again, opened: bytes = b""
    ) -> None:
        self._scored = job.logprobs is not None
        self._wanted = job.logprobs or 0
        self._limit = job.max_tokens
        self._stops = tuple(stop.encode() for stop in job.sampling.stop if stop)
        self._prompt_tokens = len(ids)
        self._ids = list(ids)
        self._side = side
        self._generated = 0
        self._told = 0
        self._again = again
        self._text = opened
        self._ahead = len(opened)
        self._opened = bool(opened)
        self._entries: list[TokenLogprob] = []
        self._finish: FinishReason | None = None

    async def read(self, payloads: Sequence[bytes]) -> list[Chunk]:
        """Chunks of the text in these events. UpstreamFailed where the engine reports an error."""
        chunks: list[Chunk] = []
        for payload in payloads:
            event = _decode(payload)
            if event.error is not None:
                raise UpstreamFailed(FAILED)
            if event.stop:
                self._stop(event)
            else:
                for token in event.completion_probabilities:
                    await self._take(token, event.tokens_predicted)
                chunk = self._ready()
                if chunk is not None:
                    chunks.append(chunk)
            if self.ended:
                break
        return chunks

    @property
    def ended(self) -> bool:
        return self._finish is not None

    async def last(self) -> Chunk:
        """The chunk that ends an `ended` generation, with all that was held."""
        generated = min(self._generated, self._limit)
        if self._scored and len(self._ids) < self._prompt_tokens + generated:
            self._entries += await self._untold(generated)
        return Chunk(
            0,
            self._text.decode("utf-8", "replace"),
            self._finish,
            Usage(prompt_tokens=self._prompt_tokens, completion_tokens=generated),
            max(0, generated - self._told),
            logprobs=tuple(self._entries) if self._scored else None,
        )

    def _stop(self, event: _Event) -> None:
        told_of_all = event.tokens_predicted == self._generated
        self._generated = event.tokens_predicted
        if self._generated > self._limit:
            self._finish = "length"
            return
        self._finish = FINISH_REASONS.get(event.stop_type, "stop")
        if event.stop_type == "eos" and told_of_all and self._entries:
            last = self._entries[-1]
            self._entries[-1] = TokenLogprob(last.data, last.logprob, last.top, end=True)

    async def _take(self, token: _Token, generated: int) -> None:
        """Note the tokens that one event stands for, and whether they end the generation."""
        text = bytes(token.bytes)
        lost = generated - self._generated - 1
        data = text
        entries: list[TokenLogprob] = []
        if lost > 0 and self._scored:
            (own,) = await self._side.pieces((token.id,))
            entries = await self._recover(text.removesuffix(own), lost)
            entries = entries or await self._untold(generated - 1)
            if entries:
                data = own
        self._ids.append(token.id)
        entries.append(TokenLogprob(data, token.logprob, await self._alternatives(token)))
        room = self._limit - self._generated
        self._generated = generated
        if generated > self._limit:
            # Within a character: its text is dropped, as it is without log probabilities.
            if len(entries) > lost:
                self._entries += entries[:room]
            self._finish = "length"
            return
        self._entries += entries
        self._text += text
        if (cut := _first(self._stops, self._text)) is not None:
            self._cut(cut)
            self._finish = "stop"
        elif generated == self._limit and text:
            # A token without text may be an end: the next event tells.
            self._finish = "length"

    async def _recover(self, text: bytes, count: int) -> list[TokenLogprob]:
        """Entries of `count` tokens of this text that follow all tokens known; none where they cannot be found."""
        found = await self._side.recover(self._ids, text, count, self._wanted)
        if found is None:
            return []
        self._ids += found.ids
        return _entries(found.ids, found.scores)

    async def _untold(self, generated: int) -> list[TokenLogprob]:
        """Entries of the tokens up to the number `generated` that no event told; none where they cannot be had.

        They may never have completed a character, or have had a token without text among them.
        """
        known = self._ids[self._prompt_tokens :]
        ids = await self._again(generated)
        if len(ids) < generated or [*ids[: len(known)]] != known:
            return []
        first = len(self._ids)
        self._ids += ids[len(known) : generated]
        scores = await self._side.score(tuple(self._ids), self._wanted, first, len(self._ids))
        entries = _entries(self._ids[first:], scores)
        if self._finish == "stop":  # by an end token, whose name is not in the text
            entries[-1] = TokenLogprob(b"", entries[-1].logprob, entries[-1].top, end=True)
        return entries

    async def _alternatives(self, token: _Token) -> tuple[tuple[bytes, float], ...]:
        """The most likely tokens; the engine leaves out the names of special ones."""
        top = token.top_logprobs[: self._wanted]
        nameless = [likely.id for likely in top if not likely.bytes]
        if not nameless:
            return tuple((bytes(likely.bytes), likely.logprob) for likely in top)
        names = dict(zip(nameless, await self._side.pieces(nameless), strict=True))
        return tuple((bytes(likely.bytes) or names[likely.id], likely.logprob) for likely in top)

    def _ready(self) -> Chunk | None:
        """What can be sent: whole tokens and whole characters in which no stop word may have begun."""
        if self.ended or not self._text:
            return None
        if not self._stops and not (self._opened and _open(self._text)):
            count, size = len(self._entries), len(self._text)
        else:
            count, size = self._safe()
            if not size:
                return None
        chunk = Chunk(
            0,
            self._text[:size].decode("utf-8", "replace"),
            tokens=count,
            logprobs=tuple(self._entries[:count]) if self._scored else None,
        )
        del self._entries[:count]
        self._text = self._text[size:]
        self._ahead = 0
        self._told += count
        return chunk

    def _safe(self) -> tuple[int, int]:
        """How many entries, and how many bytes, end before a stop word may have begun or a character is open."""
        text = self._text
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        if self._opened:
            held = max(held, _open(text))
        free = len(text) - held
        safe = (0, 0)
        end = self._ahead
        for index, entry in enumerate(self._entries):
            end += len(entry.data)
            if end > free:
                break
            if end == len(text) or text[end] & 0xC0 != 0x80:
                safe = (index + 1, end)
        return safe

    def _cut(self, end: int) -> None:
        """Drop the text from `end` on, and the tokens that begin there or later."""
        self._text = self._text[:end]
        begin = self._ahead
        for index, entry in enumerate(self._entries):
            if begin >= end:
                del self._entries[index:]
                return
            begin += len(entry.data)


def _entries(ids: Sequence[int], scores: Scores) -> list[TokenLogprob]:
    return [
        TokenLogprob(scores.pieces[token], logprob, tuple((scores.pieces[other], p) for other, p in top))
        for token, logprob, top in zip(ids, scores.logprobs, scores.top, strict=True)
    ]


def _open(text: bytes) -> int:
    """How many bytes at the end of the text begin a character without completing it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    return len(decoder.getstate()[0])


def _first(stops: Sequence[bytes], text: bytes) -> int | None:
    """Where the first of the stop words begins."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


def _overlap(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of the text may begin the stop word."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
