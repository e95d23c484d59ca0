"""The model's vocabulary, read through llama.cpp's C interface: which ids mean something, and what tokens are made of.

A file opened for its vocabulary alone costs little, so that is done at the first question. Questions here never wait
for a score.
"""

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL

from headgate.providers.embedded.failures import Failed, Refused

MOST_WAYS = 64
"""Each has to be scored."""


class Vocabulary:
    """The vocabulary of the model in `file`."""

    def __init__(self, library: CDLL, file: str) -> None:
        self._library = library
        self._file = file
        self._lock = threading.RLock()
        self._model = 0
        self._vocab = 0
        self._size = 0
        self._words: dict[bytes, list[int]] | None = None
        self._longest_word = 0

    @property
    def size(self) -> int:
        with self._opened():
            return self._size

    def marks(self) -> dict[str, object]:
        """The size and the ids that mean something; -1 where the model has none."""
        with self._opened():
            library, vocab = self._library, self._vocab
            return {
                "size": self._size,
                "start": library.llama_vocab_bos(vocab),
                "end": library.llama_vocab_eos(vocab),
                "adds_start": library.llama_vocab_get_add_bos(vocab),
                "infill_prefix": library.llama_vocab_fim_pre(vocab),
                "infill_suffix": library.llama_vocab_fim_suf(vocab),
                "infill_middle": library.llama_vocab_fim_mid(vocab),
            }

    def check(self, ids: Iterable[int]) -> None:
        """Refused when one of them is not in the vocabulary."""
        size = self.size
        for id in ids:
            if not 0 <= id < size:
                raise Refused(f"token id {id} is outside the vocabulary of {size}")

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Each token's bytes; of special tokens their text. The ids must have been checked."""
        with self._opened():
            return [self._piece(id, special=True) for id in ids]

    def spellings(self, text: bytes, count: int) -> list[list[int]]:
        """Ways to write `text` with `count` tokens, at most MOST_WAYS, those that begin with long tokens first."""
        with self._opened():
            words = self._index()
        # (at, left): no way from there to the end with so many tokens.
        dead: set[tuple[int, int]] = set()
        ways: list[list[int]] = []

        def spell(at: int, way: Sequence[int]) -> bool:
            left = count - len(way)
            if at == len(text) and not left:
                ways.append(list(way))
                return True
            if not left or len(text) - at < left or (at, left) in dead:
                return False
            found = False
            for end in range(min(len(text) - left + 1, at + self._longest_word), at, -1):
                for id in words.get(text[at:end], ()):
                    if len(ways) >= MOST_WAYS:
                        return True
                    found |= spell(end, (*way, id))
            if not found:
                dead.add((at, left))
            return found

        spell(0, ())
        return ways

    def move(self, model: int) -> None:
        """Read it from the same model, opened with its weights, from now on: one copy is enough."""
        with self._lock:
            before = self._model
            self._use(model)
            if before:
                self._library.llama_model_free(before)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        with self._lock:
            if not self._model:
                library = self._library
                library.llama_backend_init()
                params = library.llama_model_default_params()
                params.vocab_only = True
                model = library.llama_model_load_from_file(os.fsencode(self._file), params)
                if not model:
                    raise Failed("the model's vocabulary cannot be read")
                self._use(model)
            yield

    def _use(self, model: int) -> None:
        self._model = model
        self._vocab = self._library.llama_model_get_vocab(model)
        self._size = self._library.llama_vocab_n_tokens(self._vocab)

    def _piece(self, id: int, *, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = self._library.llama_token_to_piece(self._vocab, id, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def _index(self) -> dict[bytes, list[int]]:
        """Tokens by the text that a generation shows of them: control tokens have none."""
        if self._words is None:
            words: dict[bytes, list[int]] = {}
            for id in range(self._size):
                if piece := self._piece(id, special=False):
                    words.setdefault(piece, []).append(id)
            self._longest_word = max(map(len, words), default=0)
            self._words = words
        return self._words
