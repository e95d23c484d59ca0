"""Who may generate now: at most as many requests as the engine has slots, the next ones in a bounded queue.

The engine itself queues without limit, so nothing is sent to it before a slot is free.
"""

import asyncio
from collections import deque

from headgate.core.errors import Overloaded


class Admission:
    """First come, first served. A waiter that is cancelled leaves the queue and has taken nothing."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self._slots = slots
        self._max_queue = max_queue
        self._free = slots
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def running(self) -> int:
        return self._slots - self._free

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Take a slot, waiting for one in turn. Overloaded when the queue is full. Each needs a `leave`."""
        if self._free:
            self._free -= 1
            return
        if len(self._waiting) >= self._max_queue:
            raise Overloaded("The embedded model is busy and its queue is full.", retry_after=1)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                # `leave` may have dropped it already.
                if turn in self._waiting:
                    self._waiting.remove(turn)
            else:
                # The slot was handed over in the moment of leaving.
                self.leave()
            raise

    def leave(self) -> None:
        """Give the slot to whoever waits longest, or back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
