"""What a context of llama.cpp still holds of earlier texts: several sequences of tokens over one pool of cells.

Requests take turns with the context, and each goes on where its last one ended: only what is new gets computed.
Sequences that begin alike share the cells of what they have in common.
"""

from collections.abc import Sequence
from ctypes import CDLL

MOST_SEQUENCES = 8
MOST_LOST = 32
"""Tokens after the common beginning that are given up rather than kept beside it: another try at a character."""


class Sequences:
    """The sequences in the memory of one context, which was made for MOST_SEQUENCES."""

    def __init__(self, library: CDLL, memory: int) -> None:
        self._library = library
        self._memory = memory
        # The least recently used first.
        self._held: dict[int, list[int]] = {number: [] for number in range(MOST_SEQUENCES)}

    def take(self, ids: Sequence[int], most: int) -> int:
        """The number of a sequence that now holds a beginning of ids[:most], as long as any held, and nothing else."""
        number, common = 0, -1
        for other, held in self._held.items():
            alike = shared(ids, held)
            if (alike, -len(held)) > (common, -len(self._held[number])):
                number, common = other, alike
        kept = min(common, most)
        if len(self._held[number]) - common > min(common, MOST_LOST):
            number = self._copy(number, kept)
        self._use(number)
        self.rewind(number, kept)
        return number

    def length(self, number: int) -> int:
        """How many tokens it holds."""
        return len(self._held[number])

    def extend(self, number: int, ids: Sequence[int]) -> None:
        """The context has computed these, too."""
        self._held[number].extend(ids)

    def rewind(self, number: int, most: int) -> None:
        """Keep its first `most` tokens at most; none where the model has no way back but to the start."""
        held = self._held[number]
        if most >= len(held):
            return
        if not most or not self._library.llama_memory_seq_rm(self._memory, number, most, -1):
            self._library.llama_memory_seq_rm(self._memory, number, -1, -1)
            most = 0
        del held[most:]

    def evict(self, keep: int) -> bool:
        """Drop the least recently used one but `keep`. False when there is none left."""
        for number, held in self._held.items():
            if held and number != keep:
                self.rewind(number, 0)
                return True
        return False

    def clear(self) -> None:
        """Drop all, whatever state the memory is in."""
        self._library.llama_memory_clear(self._memory, True)
        for held in self._held.values():
            held.clear()

    def _copy(self, source: int, count: int) -> int:
        """A copy of `source` up to its first `count` tokens, in an empty sequence or else the least recently used."""
        if count:
            self._use(source)
        number = min(self._held, key=lambda other: bool(self._held[other]))
        self.rewind(number, 0)
        if count:
            self._library.llama_memory_seq_cp(self._memory, source, number, 0, count)
            # A recurrent model has but the state after the last token; the next rewind finds out.
            self._held[number].extend(self._held[source])
        return number

    def _use(self, number: int) -> None:
        self._held[number] = self._held.pop(number)


def shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for count, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return count
    return min(len(ids), len(others))
