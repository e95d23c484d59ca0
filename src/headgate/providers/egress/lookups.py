"""Names looked up in the system's way, which cannot be stopped: a name that is slow keeps its thread for long.

So each caller may keep a few threads busy, and nobody waits for a thread longer than for an answer.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from headgate.providers.egress.shares import Shares

MAX_LOOKUPS = 32
MAX_LOOKUPS_EACH = 4
LOOKUP_S = 3.0
"""The longest wait for a thread, and then for the answer."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host and port, as text. OSError where there are none."""


class Lookups:
    """`resolve` replaces the system's way."""

    def __init__(self, resolve: Resolve | None = None) -> None:
        self._resolve = resolve or self._ask_system
        self._shares = Shares(MAX_LOOKUPS, MAX_LOOKUPS_EACH, LOOKUP_S)
        self._running: set[asyncio.Task[Sequence[str]]] = set()
        self._threads: ThreadPoolExecutor | None = None

    async def begin(self, host: str, port: int, caller: str) -> "Lookup":
        """Ask for the addresses as soon as the caller has a place for it; Overloaded where that takes too long."""
        await self._shares.take(caller)
        task = asyncio.ensure_future(self._run(host, port))
        self._running.add(task)
        task.add_done_callback(partial(self._ended, caller))
        return Lookup(task)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, caller: str, task: asyncio.Task[Sequence[str]]) -> None:
        """The place is free now, not when those who asked gave up."""
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, for where nobody waits any more
        self._shares.give_back(caller)

    async def _run(self, host: str, port: int) -> Sequence[str]:
        return await self._resolve(host, port)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="image-names")
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(where[0]) for *_, where in found]


class Lookup:
    """One that has begun."""

    def __init__(self, task: "asyncio.Task[Sequence[str]]") -> None:
        self._task = task

    async def answer(self) -> Sequence[str]:
        """TimeoutError when it takes too long; it goes on by itself then."""
        await asyncio.wait((self._task,), timeout=LOOKUP_S)
        if not self._task.done() or self._task.cancelled():
            raise TimeoutError
        return self._task.result()
