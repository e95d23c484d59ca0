"""Noticing that a client left while its request runs.

Our own connection (`connection.py`) tells at once and for nothing; under another ASGI server a task waits for the
disconnect message instead.
"""

import asyncio

from headgate.service.streams import Running
from headgate.web.wire import Receive, Scope

LEAVING = "headgate.leaving"
"""Scope key of the connection's Leaving."""


class Leaving:
    """The running requests that a connection stops when it is lost; one that begins later is stopped at once."""

    def __init__(self) -> None:
        self._running: set[Running] = set()
        self._lost = False

    def add(self, running: Running) -> None:
        if self._lost:
            running.stop("disconnected")
        else:
            self._running.add(running)

    def discard(self, running: Running) -> None:
        self._running.discard(running)

    def lost(self) -> None:
        self._lost = True
        for running in tuple(self._running):
            running.stop("disconnected")


class DisconnectWatch:
    """Stops `running` when its client leaves, until `end` is called."""

    def __init__(self, scope: Scope, receive: Receive, running: Running) -> None:
        self._running = running
        self._leaving: Leaving | None = scope.get(LEAVING)
        self._task: asyncio.Task[None] | None = None
        if self._leaving is not None:
            self._leaving.add(running)
        else:
            self._task = asyncio.ensure_future(_wait(receive, running))

    def end(self) -> None:
        if self._leaving is not None:
            self._leaving.discard(self._running)
        if self._task is not None:
            self._task.cancel()


async def _wait(receive: Receive, running: Running) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            running.stop("disconnected")
            return
