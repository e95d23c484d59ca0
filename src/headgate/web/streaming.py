"""A stream on its way out.

The first chunk is awaited before 200 is sent, so refusals keep their real status. `first_chunk_wait` after the request
was admitted the headers go out anyway, and what fails later is an event in the dialect's form. What arrived together
leaves in one write. A client that does not read for `write_timeout` is taken for gone.
"""

import asyncio
from functools import cached_property
from typing import Any

from msgspec import Struct

from headgate.core.completion import Chunk, CompletionRequest, StreamEnd
from headgate.core.errors import GatewayError
from headgate.dialects.base import Dialect, Renderer
from headgate.service.streams import Running, RunningStream
from headgate.web.disconnect import DisconnectWatch
from headgate.web.wire import ClientGone, Headers, Receive, Scope, Send, encoded


class StreamTimes(Struct, frozen=True, kw_only=True):
    """Seconds: until headers go out without a chunk, between pings, and for one write to be taken."""

    first_chunk_wait: float
    ping_interval: float
    write_timeout: float


async def send_stream(
    dialect: Dialect[Any],
    request: CompletionRequest,
    running: RunningStream,
    times: StreamTimes,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> int:
    """Send the running stream to its end; returns 200.

    Raises the stream's error while nothing has been sent yet, and ClientGone when the client left.
    """
    out = _Out(dialect, request, running, times, send)
    watch = DisconnectWatch(scope, receive, running)
    try:
        await out.run()
    except TimeoutError:
        raise ClientGone from None
    except GatewayError:
        if running.stop_reason == "disconnected":
            raise ClientGone from None
        raise
    finally:
        watch.end()
        running.stop("disconnected")  # does nothing to a stream that came to its end
    if running.stop_reason == "disconnected":
        raise ClientGone
    return 200


class _Out:
    def __init__(
        self,
        dialect: Dialect[Any],
        request: CompletionRequest,
        running: RunningStream,
        times: StreamTimes,
        send: Send,
    ) -> None:
        self._dialect = dialect
        self._request = request
        self._running = running
        self._times = times
        self._send = send
        self._started = False

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        begin_by = clock() + self._times.first_chunk_wait
        # Models that fail before any output wait here: should all of them fail, the refusal keeps its status.
        failed: list[Chunk] = []
        while True:
            if not (self._started or self._running.admitted):
                begin_by = (
                    clock() + self._times.first_chunk_wait
                )  # looking at a request is no part of that wait
            wait = self._times.ping_interval if self._started else max(0.0, begin_by - clock())
            try:
                item = await self._running.next(wait)
            except GatewayError as error:
                if not self._started:
                    raise
                await self._write(self._renderer.error(error), last=True)
                return
            if isinstance(item, StreamEnd):
                await self._end(item)
                return
            if item is None and not (self._started or self._running.admitted):
                continue
            if item is None:
                waiting = self._dialect.ping if self._started else b""
                await self._write(self._renderer.chunks(failed) if failed and not self._started else waiting)
            elif not self._started and all(chunk.error is not None for chunk in item):
                failed += item
            else:
                await self._write(self._renderer.chunks(item if self._started else [*failed, *item]))

    @cached_property
    def _renderer(self) -> Renderer:
        """Made when there is something to render: what serves the request is known only then."""
        return self._dialect.renderer(self._running.replayed or self._request, self._running.served)

    async def _end(self, end: StreamEnd) -> None:
        if end.error is not None and not self._started:
            raise end.error
        await self._write(self._renderer.end(end), last=True)

    async def _start(self) -> None:
        self._started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", self._request.request_id.encode()),
            (b"x-headgate-provider", self._running.providers.encode()),
            *encoded(self._dialect.stream_headers(self._running.replayed or self._request)),
            *encoded(replay_headers(self._running)),
            *encoded(self._running.limit_headers),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        if self._started and not data and not last:
            return
        async with asyncio.timeout(self._times.write_timeout):
            if not self._started:
                await self._start()
            if data or last:
                await self._send({"type": "http.response.body", "body": data, "more_body": not last})


def replay_headers(running: Running) -> Headers:
    """What tells a replay from the answer itself."""
    return () if running.replayed is None else (("idempotent-replayed", "true"),)
