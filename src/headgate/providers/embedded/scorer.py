"""How likely a text's own tokens are: what llama.cpp's server does not tell.

The model is opened a second time through llama.cpp's C interface, at the first score; its weights are mapped, so their
pages are shared with the server's. Log probabilities come from the raw logits, in float64 from there on. One context,
one lock: a score uses the threads it is given, and two at once would only share them. The context keeps what several
texts came to, for those that go on from there.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from typing import Any

from headgate.providers.embedded import native
from headgate.providers.embedded.failures import Failed, Gone, HasLeft, Refused
from headgate.providers.embedded.sequences import MOST_SEQUENCES, Sequences, shared
from headgate.providers.embedded.vocabulary import Vocabulary

HEADROOM = 4
"""Tokens beyond the context that still have room, as in the server."""

MOST_CELLS = 8192
"""Tokens that all sequences together may hold, unless one alone needs more."""

MOST_LOGIT_BYTES = 64 * 1024 * 1024
MOST_BATCH = 512
MOST_TOP = 1000
MOST_TEXT = 256
MOST_COUNT = 32
LOOK_AGAIN_S = 0.2
LEAST_LOGPROB = -1e30
"""Stands for minus infinity, which JSON does not have."""

_ROW_BYTES_AT_ONCE = 8 * 1024 * 1024
_NO_ROOM = 1

Top = list[tuple[int, float]]
Scores = tuple[list[float], list[Top]]
"""For each position the log probability of its token, and the likeliest tokens there, best first."""


def _stays() -> bool:
    return False


class Scorer:
    """Scores for the model in `file`, texts of at most `context` tokens. `exact`: in 32-bit floats throughout."""

    def __init__(self, library: CDLL, file: str, context: int, threads: int, exact: bool) -> None:
        self._library = library
        self._file = file
        self._longest = context + HEADROOM
        self._threads = threads
        self._exact = exact
        self._vocabulary = Vocabulary(library, file)
        self._lock = threading.Lock()
        self._model = 0
        self._context = 0
        self._batch: Any = None
        self._batch_size = 0
        self._sequences: Any = None
        self.computed = 0
        """Tokens that went through the model so far."""

    def vocabulary(self) -> dict[str, object]:
        """The vocabulary's size and the ids that mean something; -1 where the model has none."""
        return self._vocabulary.marks()

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Each token's bytes; of special tokens their text. Refused for unknown ids."""
        self._vocabulary.check(ids)
        return self._vocabulary.pieces(ids)

    def score(
        self,
        ids: Sequence[int],
        first: int,
        top: int,
        *,
        end: int | None = None,
        has_left: HasLeft = _stays,
    ) -> dict[str, object]:
        """Natural log probabilities of ids[max(1, first):end], and the `top` likeliest ids at each position.

        A long text may be asked for in slices, one after the other: each goes on from the one before.

        `has_left` is asked between batches, and Gone raised when it says so. Refused for what cannot be scored.
        """
        self._check(ids, len(ids), top)
        with self._alone(has_left):
            begin, wanted = max(1, first), ids[:end]
            scores: Scores = [], []
            if begin < len(wanted):
                sequence = self._sequences.take(ids, begin - 1)
                scores = self._score(sequence, wanted, begin, top, has_left)
        return self._answer(wanted[first:], scores)

    def recover(
        self, ids: Sequence[int], text: bytes, count: int, top: int, *, has_left: HasLeft = _stays
    ) -> dict[str, object]:
        """Which `count` tokens that spell `text` followed `ids`: the most probable ones, scored like `score`.

        Refused when no such tokens exist.
        """
        if not (0 < len(text) <= MOST_TEXT and 0 < count <= MOST_COUNT):
            raise Refused(f"text must have 1 to {MOST_TEXT} bytes, and count be from 1 to {MOST_COUNT}")
        self._check(ids, len(ids) + count, top)
        ways = self._vocabulary.spellings(text, count)
        if not ways:
            raise Refused(f"no {count} tokens spell this text")
        with self._alone(has_left):
            way, scores = self._likeliest(ids, ways, top, has_left)
        return {"ids": way, **self._answer(way, scores)}

    def _likeliest(
        self, ids: Sequence[int], ways: Sequence[Sequence[int]], top: int, has_left: HasLeft
    ) -> tuple[Sequence[int], Scores]:
        """The most probable one of the ways to go on from `ids`. Neighbours begin alike: that is scored once."""
        sequence = self._sequences.take(ids, len(ids) - 1)
        scored: list[tuple[Sequence[int], Scores]] = []
        for way in ways:
            alike = 0
            known: Scores = [], []
            if scored:
                before, (logprobs, tops) = scored[-1]
                alike = shared(way, before)
                known = logprobs[:alike], tops[:alike]
            begin = len(ids) + alike
            self._sequences.rewind(sequence, begin - 1)
            found = self._score(sequence, [*ids, *way], begin, top, has_left)
            scored.append((way, (known[0] + found[0], known[1] + found[1])))
        return max(scored, key=lambda one: sum(one[1][0]))

    def _check(self, ids: Sequence[int], length: int, top: int) -> None:
        if not ids:
            raise Refused("ids must not be empty")
        if length > self._longest:
            raise Refused(f"{length} tokens are more than the context of {self._longest - HEADROOM}")
        most = min(MOST_TOP, self._vocabulary.size)
        if not 0 <= top <= most:
            raise Refused(f"top must be from 0 to {most}")
        self._vocabulary.check(ids)

    def _answer(self, ids: Sequence[int], scores: Scores) -> dict[str, object]:
        logprobs, tops = scores
        named = list(dict.fromkeys([*ids, *(id for top in tops for id, _ in top)]))
        pieces = self._vocabulary.pieces(named)
        return {
            "logprobs": logprobs,
            "top": tops,
            "pieces": {str(id): piece.decode("latin-1") for id, piece in zip(named, pieces, strict=True)},
        }

    @contextmanager
    def _alone(self, has_left: HasLeft) -> Iterator[None]:
        """Holds the lock, the context open. Gone when the client has left while others were served."""
        while not self._lock.acquire(timeout=LOOK_AGAIN_S):
            if has_left():
                raise Gone
        try:
            if has_left():
                raise Gone
            if not self._context:
                self._open()
            yield
        finally:
            self._lock.release()

    def _open(self) -> None:
        library = self._library
        if not self._model:
            params = library.llama_model_default_params()
            # Weights in another order would be a copy of their own instead of shared pages.
            params.use_extra_bufts = False
            if self._exact:
                # Graphics processors multiply 32-bit floats as shorter ones.
                params.n_gpu_layers = 0
            model = library.llama_model_load_from_file(os.fsencode(self._file), params)
            if not model:
                raise Failed("the model cannot be opened a second time")
            self._model = model
            self._vocabulary.move(model)
        if (
            library.llama_model_has_encoder(self._model)
            or not library.llama_model_has_decoder(self._model)
            or library.llama_model_is_diffusion(self._model)
        ):
            raise Refused("this model does not continue a text token by token, so it has no scores")
        size = max(1, min(MOST_BATCH, MOST_LOGIT_BYTES // (4 * self._vocabulary.size)))
        params = library.llama_context_default_params()
        params.n_ctx = max(self._longest, min(MOST_SEQUENCES * self._longest, MOST_CELLS))
        params.n_seq_max = MOST_SEQUENCES
        params.kv_unified = True
        params.n_batch = params.n_ubatch = size
        params.n_threads = params.n_threads_batch = self._threads
        if self._exact:
            params.type_k = params.type_v = native.F32
            params.flash_attn_type = native.FLASH_ATTENTION_OFF
            params.op_offload = False
        context = library.llama_init_from_model(self._model, params)
        if not context:
            raise Failed("there is no memory for scores")
        memory = library.llama_get_memory(context)
        if not memory:
            library.llama_free(context)
            raise Refused("this model does not continue a text token by token, so it has no scores")
        self._batch = library.llama_batch_init(size, 0, 1)
        self._batch_size = size
        self._sequences = Sequences(library, memory)
        self._context = context

    def _score(self, sequence: int, ids: Sequence[int], first: int, top: int, has_left: HasLeft) -> Scores:
        """Entries for ids[first:], `first` >= 1. The sequence holds a beginning of ids[: first - 1], then all but the
        last."""
        logprobs: list[float] = []
        tops: list[Top] = []
        # What follows a position is in its logits, so the last one's are not wanted.
        last = len(ids) - 1
        at = self._sequences.length(sequence)
        while at < last:
            if has_left():
                raise Gone
            end = min(last, at + self._batch_size)
            self._decode(sequence, ids, at, end, first - 1)
            scored = range(max(at, first - 1), end)
            if scored:
                rows = self._logits(scored.start - at, len(scored))
                self._read(rows, ids[scored.start + 1 : end + 1], top, logprobs, tops)
            at = end
        return logprobs, tops

    def _decode(self, sequence: int, ids: Sequence[int], at: int, end: int, first: int) -> None:
        """Compute ids[at:end] of the sequence, with logits from the position `first` on."""
        batch = self._batch
        batch.n_tokens = end - at
        for slot, position in enumerate(range(at, end)):
            batch.token[slot] = ids[position]
            batch.pos[slot] = position
            batch.n_seq_id[slot] = 1
            batch.seq_id[slot][0] = sequence
            batch.logits[slot] = position >= first
        while status := self._library.llama_decode(self._context, batch):
            if status != _NO_ROOM or not self._sequences.evict(keep=sequence):
                self._sequences.clear()
                raise Failed(f"the engine could not compute the scores (status {status})")
        self._sequences.extend(sequence, ids[at:end])
        self.computed += end - at

    def _logits(self, slot: int, count: int) -> Any:
        """`count` rows of logits from that slot of the batch on, in place: read them before the next batch."""
        import numpy as np  # late: an engine that never scores is spared its memory

        rows = self._library.llama_get_logits_ith(self._context, slot)
        if not rows:
            raise Failed("the engine gave no scores")
        return np.ctypeslib.as_array(rows, (count, self._vocabulary.size))

    def _read(
        self, rows: Any, followers: Sequence[int], top: int, logprobs: list[float], tops: list[Top]
    ) -> None:
        """Append what the rows say of the tokens that followed."""
        import numpy as np  # late: as above

        size = rows.shape[1]
        step = max(1, _ROW_BYTES_AT_ONCE // (4 * size))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            highest = part.max(axis=1, keepdims=True)
            if not np.isfinite(highest).all():
                raise Failed("the engine computed scores that are no numbers")
            total = np.exp(part - highest).sum(axis=1, dtype=np.float64)
            # float64 from here on: the same logit always gives the same log probability.
            level = highest[:, 0].astype(np.float64) + np.log(total)
            numbers = np.arange(len(part))
            own = part[numbers, list(followers[start : start + step])].astype(np.float64) - level
            logprobs.extend(np.maximum(own, LEAST_LOGPROB).tolist())
            if not top:
                tops.extend([] for _ in numbers)
                continue
            best = np.argpartition(part, size - top, axis=1)[:, size - top :]
            for row, candidates, normal in zip(part, best, level, strict=True):
                # The lower id first where two are alike.
                order = candidates[np.lexsort((candidates, -row[candidates]))]
                values = np.maximum(row[order].astype(np.float64) - normal, LEAST_LOGPROB)
                tops.append(list(zip(order.tolist(), values.tolist(), strict=True)))
