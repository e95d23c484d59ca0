"""The prompt as the first piece of its own answer, scored where log probabilities are asked for."""

import asyncio
from itertools import chain
from weakref import WeakValueDictionary

from headgate.core.completion import Chunk, Job, TokenLogprob
from headgate.providers.embedded.remembered import Remembered
from headgate.providers.embedded.side_door import Scores, SideDoor
from headgate.providers.embedded.tokenizer import TokenIds

REMEMBERED_PROMPTS = 128
REMEMBERED_SCORES = 250_000

_Key = tuple[str, TokenIds, int]


class Echo:
    """Echoes of one engine's prompts. The jobs of one request share one scoring."""

    def __init__(self, side: SideDoor) -> None:
        self._side = side
        self._scores: Remembered[_Key, Scores] = Remembered(REMEMBERED_PROMPTS, REMEMBERED_SCORES)
        # A lock lives as long as somebody scores or waits.
        self._locks: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()

    async def chunk(self, job: Job, ids: TokenIds) -> Chunk:
        """The echoed prompt of `job`, whose tokens are `ids`."""
        if job.logprobs is None:
            return Chunk(0, await self._text(job), tokens=0, echoed=True)
        scores = await self._scored(job, ids)
        pieces = [scores.pieces[token] for token in ids]
        if isinstance(job.prompt, str):
            text = job.prompt
            pieces = as_written(pieces, text.encode())
        else:
            # An empty prompt begins with a start token that nobody wrote.
            pieces = pieces if job.prompt else [b""]
            text = b"".join(pieces).decode("utf-8", "replace")
        first = TokenLogprob(pieces[0], None, None)
        others = (
            TokenLogprob(piece, logprob, tuple((scores.pieces[token], likely) for token, likely in top))
            for piece, logprob, top in zip(pieces[1:], scores.logprobs, scores.top, strict=True)
        )
        return Chunk(0, text, tokens=0, logprobs=(first, *others), echoed=True)

    async def _text(self, job: Job) -> str:
        if isinstance(job.prompt, str):
            return job.prompt
        return b"".join(await self._side.pieces(job.prompt or ())).decode("utf-8", "replace")

    async def _scored(self, job: Job, ids: TokenIds) -> Scores:
        top = job.logprobs or 0
        key = (job.request_id, ids, top)
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            scores = self._scores.get(key)
            if scores is None:
                scores = await self._side.score(ids, top)
                self._scores.put(key, scores, len(ids) * (top + 1))
        return scores


def as_written(pieces: list[bytes], text: bytes) -> list[bytes]:
    """The pieces of a prompt's tokens without what a tokenizer adds: a start token, a blank before the first word, an
    end token. Joined they are the text; unless the tokenizer rewrites texts, then they stay as they are."""
    for start in (0, 1):
        for end in (len(pieces), len(pieces) - 1):
            words = pieces[start:end]
            joined = b"".join(words)
            if joined == b" " + text and words:
                words[0] = words[0][1:]
            elif joined != text:
                continue
            return [*chain(pieces[:start] and [b""], words, pieces[end:] and [b""])]
    return pieces
