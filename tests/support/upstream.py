"""A scripted upstream in the OpenAI formats, for tests.

In a test:

    async with Upstream() as up:
        up.script(Script(pieces=("Hel", "lo"), usage={"prompt_tokens": 3, "completion_tokens": 2}))
        ...                                  # a provider whose base_url is up.url asks
        request = await up.request(0)        # the first request, as soon as it is there
        assert request.json["prompt"] == "Hi"
        await request.closed.wait()          # the client's connection is gone

Which script answers a request: the next one given to `up.script(...)`, if any is left; else the one that
`up.on(model, script)` set for the upstream model name; else the name itself, if it is in `NAMED` or is
`status-<number>`; else `Script()`, which says "echo:" and the prompt, a word per chunk, and counts words as tokens.

As a process, for gateways that run in one: `python tests/support/upstream.py PORT` (0: any) prints
`ready http://127.0.0.1:PORT/v1`. Models choose scripts as above, and over HTTP:

    GET  /_requests          [{path, headers, json, received, closed, answered}], times in Unix seconds or null
    POST /_release           lets held answers go on, as up.release() does; POST /_hold holds again
    POST /_on                {"model": "x", "script": {...Script's fields}}
    POST /_script            {...Script's fields}, for the next request
"""

import asyncio
import contextlib
import json
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import msgspec

if __name__ == "__main__":  # run as a script, the folder of the project is not searched by itself
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.script import Answer, Script, script_named


class Received:
    """One request. `answered` is set when all of the answer was written, `closed` when its connection is gone.

    A connection may serve further requests; then `closed` is set for its latest only.
    """

    def __init__(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self.path = path
        self.headers = headers
        self.body = body
        self.json: Any = json.loads(body) if body else None
        self.closed = asyncio.Event()
        self.answered = asyncio.Event()
        self.received_at = time.time()
        self.closed_at: float | None = None

    @property
    def model(self) -> str:
        return str(self.json.get("model", "")) if isinstance(self.json, dict) else ""

    def summary(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "headers": self.headers,
            "json": self.json,
            "received": self.received_at,
            "closed": self.closed_at,
            "answered": self.answered.is_set(),
        }


class Upstream:
    """The server. `url` is what a provider's base_url should be; `requests` is all it was asked so far.

    `accepted` counts connections ever made, `connections` those open now.
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Received] = []
        self.accepted = 0
        self._port = port
        self._next: deque[Script] = deque()
        self._by_model: dict[str, Script] = {}
        self._released = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def connections(self) -> int:
        return len(self._connections)

    def script(self, *scripts: Script) -> None:
        """Answer the next requests with these, in order."""
        self._next.extend(scripts)

    def on(self, model: str, script: Script) -> None:
        """Answer requests for this upstream model name with this."""
        self._by_model[model] = script

    def release(self) -> None:
        """Let everything that is held, now or later, go on."""
        self._released.set()

    def hold(self) -> None:
        """From now on hold again."""
        self._released.clear()

    async def request(self, index: int) -> Received:
        """The request with this number, counted from 0, once it has come."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) > index)
        return self.requests[index]

    async def drop_connections(self) -> None:
        """Close every connection, idle ones too, and wait until that is done on this side."""
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.gather(*(connection.gone.wait() for connection in self._connections))

    async def stop(self) -> None:
        """Stop listening and close everything."""
        if self._server is not None:
            self._server.close()
        await self.drop_connections()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def _script_for(self, received: Received) -> Script:
        if self._next:
            return self._next.popleft()
        model = received.model
        if model in self._by_model:
            return self._by_model[model]
        return script_named(model)

    def _begin(self, connection: "Connection", received: Received) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(connection, received))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection.task = task

    async def _serve(self, connection: "Connection", received: Received) -> None:
        if received.path.startswith("/_"):
            connection.send_response(200, {}, self._control(received))
            connection.next_request()
            return
        script = self._script_for(received)
        self.requests.append(received)
        async with self._arrived:
            self._arrived.notify_all()
        await Answer(connection, received, script, self._released).give()

    def _control(self, received: Received) -> bytes:
        match received.path:
            case "/_requests":
                return json.dumps([request.summary() for request in self.requests]).encode()
            case "/_release":
                self.release()
            case "/_hold":
                self.hold()
            case "/_on":
                self.on(received.json["model"], msgspec.convert(received.json["script"], Script))
            case "/_script":
                self.script(msgspec.convert(received.json, Script))
        return b"{}"


class Connection(asyncio.Protocol):
    """One client connection: requests in, bytes out, and when it went away."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._buffer = bytearray()
        self._latest: Received | None = None
        self._answering = False
        self.task: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are not its subclasses
        self._upstream._connections.add(self)
        self._upstream.accepted += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._answering:
            self.next_request()

    def next_request(self) -> None:
        """Take the next whole request out of the buffer, if there is one."""
        self._answering = False
        head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._buffer = bytearray(rest[length:])
        self._latest = Received(first.split(" ")[1], headers, rest[:length])
        self._answering = True
        self._upstream._begin(self, self._latest)

    def connection_lost(self, error: Exception | None) -> None:
        self._upstream._connections.discard(self)
        self.gone.set()
        if self._latest is not None:
            self._latest.closed_at = time.time()
            self._latest.closed.set()
        if self.task is not None:
            self.task.cancel()

    def send_response(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        all_headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | dict(headers)
        self.send_head(status, all_headers)
        self.transport.write(body)

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode("latin-1"))

    def reset(self) -> None:
        """Close with a TCP reset instead of an orderly end."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


async def _main(port: int) -> None:
    async with Upstream(port) as upstream:
        print(f"ready {upstream.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
