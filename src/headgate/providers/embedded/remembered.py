"""What was worked out once, kept for those who ask again: little, and not for long."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """The last values put in: at most `entries` of them, of at most `size` together (the last one always).

    A value's size is what `put` is told; whoever puts it counts its key too where keys can be large.
    """

    def __init__(self, entries: int, size: int) -> None:
        self._entries = entries
        self._most = size
        self._size = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        found = self._values.get(key)
        return None if found is None else found[0]

    def put(self, key: K, value: V, size: int) -> None:
        _, replaced = self._values.pop(key, (None, 0))
        self._size += size - replaced
        self._values[key] = (value, size)
        while len(self._values) > 1 and (len(self._values) > self._entries or self._size > self._most):
            _, (_, forgotten) = self._values.popitem(last=False)
            self._size -= forgotten
