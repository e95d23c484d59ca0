"""One ASGI request under a test's control: when its body comes, when its client leaves, when it reads."""

import asyncio
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]


def scope_of(
    method: str = "POST", path: str = "/", headers: Mapping[str, str] | None = None, query: bytes = b""
) -> dict[str, Any]:
    """An HTTP request's scope as uvicorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [
            (name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


class Exchange:
    """What the client sends (`parts`, then silence until `leave`) and what it got.

    Once `stuck` is set the client takes nothing more: a send never returns.
    """

    def __init__(self, *parts: bytes, scope: dict[str, Any] | None = None) -> None:
        self.scope = scope or scope_of()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.ended = False
        self.stuck = False
        self._unsent = list(parts or (b"",))
        self._gone = asyncio.Event()
        self._progress = asyncio.Condition()

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        if self._unsent:
            body = self._unsent.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self._unsent)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        async with self._progress:
            if self.stuck:
                self._progress.notify_all()
                self._progress.release()
                try:
                    await asyncio.Event().wait()
                finally:
                    await self._progress.acquire()
            if message["type"] == "http.response.start":
                assert self.status is None, "the response began twice"
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                assert self.status is not None and not self.ended
                self.parts.append(message.get("body", b""))
                self.ended = not message.get("more_body", False)
            self._progress.notify_all()

    async def until(self, *, status: bool = False, text: bytes = b"", times: int = 1) -> None:
        """Wait until the headers have come, or until the body holds a text so many times."""
        async with asyncio.timeout(30), self._progress:
            await self._progress.wait_for(
                lambda: (not status or self.status is not None) and self.body.count(text) >= times
            )

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> Sequence[Any]:
        """The `data:` events; `[DONE]` as it is. Comments are left out."""
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: ")]
        texts = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]
