"""Places that callers share, so that none of them takes all."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from headgate.core.errors import Overloaded


class Shares:
    """`together` places, at most `each` of them one caller's. A free one is for the caller who has fewest.

    Belongs to one event loop.
    """

    def __init__(self, together: int, each: int, wait_s: float) -> None:
        self._left = together
        self._each = each
        self._wait_s = wait_s
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        await self.take(caller)
        try:
            yield
        finally:
            self.give_back(caller)

    async def take(self, caller: str) -> None:
        """Overloaded when no place comes free within `wait_s` seconds."""
        given = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(given)
        self._give()
        try:
            async with asyncio.timeout(self._wait_s):
                await given
        except BaseException as error:
            if given.done() and not given.cancelled():
                self.give_back(caller)  # it came just as the caller left
            else:
                self._leave(caller, given)
            if isinstance(error, TimeoutError):
                raise Overloaded("Too many images are being fetched now; try again later.") from None
            raise

    def give_back(self, caller: str) -> None:
        self._left += 1
        self._taken[caller] -= 1
        if not self._taken[caller]:
            del self._taken[caller]
        self._give()

    def _give(self) -> None:
        while self._left:
            eligible = [caller for caller in self._waiting if self._taken.get(caller, 0) < self._each]
            if not eligible:
                return
            caller = min(eligible, key=lambda name: self._taken.get(name, 0))
            given = self._waiting[caller][0]
            self._leave(caller, given)
            if not given.done():
                self._left -= 1
                self._taken[caller] = self._taken.get(caller, 0) + 1
                given.set_result(None)

    def _leave(self, caller: str, given: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(caller)
        if queue is not None and given in queue:
            queue.remove(given)
            if not queue:
                del self._waiting[caller]
