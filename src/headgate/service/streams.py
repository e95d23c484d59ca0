"""Running requests: how they are stopped, and how a stream's chunks reach the client.

A stream is produced by one task and read by another. Stopping cancels the producer only, so settling lives in one
place whatever happens to the client; what arrives while the reader is busy leaves together.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Literal

from headgate.core.completion import Chunk, CompletionRequest, StreamEnd

StopReason = Literal["client", "disconnected", "draining"]
STOP_SECONDS = 1.0
"""How long a stop may take until the stream is settled."""

BUFFER_CHUNKS = 1024
"""A reader this far behind makes the producer wait: memory stays bounded."""


class Running:
    """One request under way. `stop` may be called at any time, from anywhere on the loop.

    `admitted`: nothing that the client did can be refused any more. `replayed`: the earlier request whose answer
    this is.
    """

    def __init__(
        self, *, dialect: str, stream_id: str, account: str, app: str | None, user: str | None
    ) -> None:
        self.dialect = dialect
        self.stream_id = stream_id
        self.account = account
        self.app = app
        self.user = user
        self.stop_reason: StopReason | None = None
        self.settled = asyncio.Event()
        self.started_at = 0.0
        self.first_output_at: float | None = None
        self.admitted = False
        self.replayed: CompletionRequest | None = None
        self.providers = ""
        self.served: list[str] = []
        self.limit_headers: tuple[tuple[str, str], ...] = ()
        self._task: asyncio.Task[object] | None = None
        self._closing = False

    def begin(self, task: "asyncio.Task[object] | None") -> None:
        """Name the task that does the work, and that a stop cancels. Whether one came before is its to look."""
        self._task = task

    def closing(self) -> None:
        """From here on the outcome stands; a stop comes too late."""
        self._closing = True

    def stop(self, reason: StopReason) -> None:
        """End it early. The first reason counts; after `closing` nothing changes."""
        if self.stop_reason is None and not self._closing:
            self.stop_reason = reason
            if self._task is not None:
                self._task.cancel()


class RunningStream(Running):
    """A stream's chunks on their way from the producing task to the one reader."""

    def __init__(
        self, *, dialect: str, stream_id: str, account: str, app: str | None, user: str | None
    ) -> None:
        super().__init__(dialect=dialect, stream_id=stream_id, account=account, app=app, user=user)
        self._buffer: list[Chunk] = []
        self._end: StreamEnd | BaseException | None = None
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    async def put(self, batch: Sequence[Chunk]) -> None:
        """Hand chunks to the reader; waits while it is too far behind."""
        buffer = self._buffer
        buffer.extend(batch)
        if buffer:
            self._wake()
        while len(buffer) > BUFFER_CHUNKS and buffer is self._buffer:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    def finish(self, end: StreamEnd | BaseException) -> None:
        """The last thing the reader gets: an end, or an error to raise."""
        self._end = end
        self._wake()

    async def next(self, timeout: float) -> list[Chunk] | StreamEnd | None:
        """All chunks that wait, else the end; None when `timeout` seconds pass without either.

        Raises the stream's error after its last chunk; once.
        """
        if not self._buffer and self._end is None:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_future()
            timer = loop.call_later(timeout, self._wake)
            try:
                await self._reader
            finally:
                timer.cancel()
                self._reader = None
        if self._buffer:
            batch, self._buffer = self._buffer, []
            if self._room is not None:
                self._room.set_result(None)
                self._room = None
            return batch
        if isinstance(self._end, BaseException):
            # Not kept: it would keep the frames alive that it passes through, and they it.
            error, self._end = self._end, EOFError("the stream has told its end")
            try:
                raise error
            finally:
                del error
        return self._end

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Streams:
    """All running requests of this process, found by (dialect, stream id)."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Running] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Running]:
        return iter(tuple(self._running.values()))

    def add(self, running: Running) -> None:
        self._running[running.dialect, running.stream_id] = running
        self._idle.clear()

    def remove(self, running: Running) -> None:
        self._running.pop((running.dialect, running.stream_id), None)
        running.settled.set()
        if not self._running:
            self._idle.set()

    def find(
        self,
        dialect: str,
        stream_id: str,
        *,
        account: str | None = None,
        app: str | None = None,
        user: str | None = None,
    ) -> RunningStream | None:
        """The running stream with this id; each given owner must match, or it looks unknown."""
        running = self._running.get((dialect, stream_id))
        if not isinstance(running, RunningStream):
            return None
        if account is not None and running.account != account:
            return None
        if app is not None and (running.app != app or running.user != user):
            return None
        return running

    async def stop(self, running: Running, timeout: float = STOP_SECONDS) -> bool:
        """Stop it and wait until it is settled. False when that takes longer than `timeout` seconds."""
        running.stop("client")
        try:
            await asyncio.wait_for(running.settled.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing runs; False when that takes longer than `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
