"""The prompt as the first pieces of its own answer, scored where log probabilities are asked for."""

import asyncio
import codecs
from collections.abc import Callable, Sequence
from itertools import chain
from weakref import WeakValueDictionary

from msgspec import Struct

from headgate.core.completion import Chunk, Job, TokenLogprob
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.remembered import Remembered
from headgate.providers.embedded.side_door import Alternatives, SideDoor
from headgate.providers.embedded.tokenizer import TokenIds

SLICE = 2048
"""Tokens scored at a time: what the event loop does between two turns stays short, however long the prompt is."""

REMEMBERED_PROMPTS = 128
REMEMBERED_SCORES = 250_000

_Key = tuple[str, TokenIds, int]


class Echoed(Struct, frozen=True):
    """An echoed prompt in pieces. `opened`: its last bytes, where an answer may complete their character."""

    chunks: tuple[Chunk, ...]
    opened: bytes = b""


class Echo:
    """Echoes of one engine's prompts. The jobs of one request share one scoring, and its chunks.

    At most one prompt is scored at a time, and `max_queue` wait: Overloaded beyond.
    """

    def __init__(self, side: SideDoor, max_queue: int) -> None:
        self._side = side
        self._turns = Admission(1, max_queue)
        self._scored: Remembered[_Key, Echoed] = Remembered(REMEMBERED_PROMPTS, REMEMBERED_SCORES)
        # A lock lives as long as somebody scores or waits.
        self._locks: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()

    async def echoed(self, job: Job, ids: TokenIds, mark_sent: Callable[[], None]) -> Echoed:
        """The echoed prompt of `job`, whose tokens are `ids`. `mark_sent` is called once its scoring begins."""
        if job.logprobs is None:
            text, opened = await self._text(job)
            return Echoed((Chunk(0, text, tokens=0, echoed=True),), opened)
        key = (job.request_id, ids, job.logprobs)
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            echoed = self._scored.get(key)
            if echoed is None:
                await self._turns.enter()
                try:
                    mark_sent()
                    echoed = await self._score(job, ids, job.logprobs)
                finally:
                    self._turns.leave()
                self._scored.put(key, echoed, len(ids) * (job.logprobs + 1))
        mark_sent()
        return echoed

    async def _text(self, job: Job) -> tuple[str, bytes]:
        if isinstance(job.prompt, str):
            return job.prompt, b""
        return _decoded(b"".join(await self._side.pieces(job.prompt or ())), job)

    async def _score(self, job: Job, ids: TokenIds, top: int) -> Echoed:
        if isinstance(job.prompt, str):
            text, opened = job.prompt, b""
            pieces = as_written(await self._side.pieces(ids), text.encode())
        else:
            # An empty prompt begins with a start token that nobody wrote.
            pieces = await self._side.pieces(ids) if job.prompt else [b""]
            text, opened = _decoded(b"".join(pieces), job)
        slices = [await self._slice(ids, pieces, first, top) for first in range(0, len(ids), SLICE)]
        parts = _texts(slices, text)
        return Echoed(
            tuple(
                Chunk(0, part, tokens=0, logprobs=entries, echoed=True)
                for part, entries in zip(parts, slices, strict=True)
            ),
            opened,
        )

    async def _slice(
        self, ids: TokenIds, pieces: Sequence[bytes], first: int, top: int
    ) -> tuple[TokenLogprob, ...]:
        end = min(first + SLICE, len(ids))
        logprobs: tuple[float | None, ...] = (None,)
        tops: tuple[Alternatives | None, ...] = (None,)
        names: dict[int, bytes] = {}
        if end > 1:
            scores = await self._side.score(ids, top, first, end)
            names = scores.pieces
            unscored = 1 if first == 0 else 0
            logprobs = (*logprobs[:unscored], *scores.logprobs)
            tops = (*tops[:unscored], *scores.top)
        return tuple(
            [
                TokenLogprob(piece, logprob, _named(likely, names))
                for piece, logprob, likely in zip(pieces[first:end], logprobs, tops, strict=True)
            ]
        )


def _named(top: Alternatives | None, names: dict[int, bytes]) -> tuple[tuple[bytes, float], ...] | None:
    return None if top is None else tuple((names[token], logprob) for token, logprob in top)


def _decoded(written: bytes, job: Job) -> tuple[str, bytes]:
    """The prompt's text, and the begin of a character that the answer may complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(written, final=job.max_tokens == 0)
    return text, decoder.getstate()[0]


def _texts(slices: Sequence[Sequence[TokenLogprob]], text: str) -> list[str]:
    """The part of the text that belongs to each slice; all of it to the first where a tokenizer rewrote it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(slices) - 1
    parts = [decoder.decode(b"".join([entry.data for entry in entries])) for entries in slices]
    if len("".join(parts)) < len(text):
        parts[-1] += decoder.decode(b"", final=True)
    return parts if "".join(parts) == text else [text] + [""] * last


def as_written(pieces: list[bytes], text: bytes) -> list[bytes]:
    """The pieces of a prompt's tokens without what a tokenizer adds: a start token, a blank before the first word, an
    end token. Joined they are the text; unless the tokenizer rewrites texts, then they stay as they are."""
    # A start token is added more often than an end token, where both would explain the text.
    for end in (len(pieces), len(pieces) - 1):
        for start in (0, 1):
            words = pieces[start:end]
            joined = b"".join(words)
            if joined == b" " + text and words:
                words[0] = words[0][1:]
            elif joined != text:
                continue
            return [*chain(pieces[:start] and [b""], words, pieces[end:] and [b""])]
    return pieces
