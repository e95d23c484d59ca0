"""uvicorn, with a drain before its shutdown.

uvicorn closes its listeners first, so a failing /readyz would never be seen. Here a signal starts draining: the
gateway refuses new work and says so while still listening, running requests end, and only then the server goes.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any

import structlog
import uvicorn

from headgate.service.gateway import Gateway
from headgate.web.app import HeadgateApp
from headgate.web.connection import Connection

log = structlog.get_logger("headgate.server")

CLOSE_SECONDS = 2
"""How long connections may take to close after everything is settled."""


class DrainingServer(uvicorn.Server):
    """Serves one gateway until SIGTERM or SIGINT; a second signal ends the drain at once."""

    def __init__(self, app: HeadgateApp, gateway: Gateway, on_ready: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self._gateway = gateway
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def _log_started_message(self, listeners: Any) -> None:
        """The ready line says it."""

    def _signalled(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_and_exit())
        else:
            log.warning("second signal: not waiting any longer")
            for running in self._gateway.streams:
                running.stop("draining")
            self.should_exit = True

    async def _drain_and_exit(self) -> None:
        await self._gateway.drain()
        self.should_exit = True
