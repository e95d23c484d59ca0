"""One account's client that asks the same question in each of the dialects, and reads their streams."""

import json
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from msgspec import Struct
from tests.support.books import Books

Dialect = Literal["genstack", "dify", "openai", "chat", "thiggle"]
Ending = Literal["completed", "aborted", "error", "cut"]

DIALECTS: tuple[Dialect, ...] = ("genstack", "dify", "openai", "chat", "thiggle")
BOTH_WAYS: tuple[tuple[Dialect, bool], ...] = tuple(
    (dialect, stream) for dialect in DIALECTS for stream in (False, True)
)
"""Every dialect, blocking and streamed."""

MAX_TOKENS = 64
PATIENCE = 30.0


class Ask(Struct, frozen=True, kw_only=True):
    """A question as one dialect puts it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Client:
    """`async with Client(url, books, account) as client:`.

    Dify's questions go to the app that bears the model's name; keys for apps are made as they are needed.
    """

    def __init__(self, url: str, books: Books, account: str) -> None:
        self.url = url
        self.account = account
        self.key = books.key(account)
        self.token = books.token(account)
        self._books = books
        self._app_keys: dict[str, str] = {}
        self.session = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    def app_key(self, app: str) -> str:
        if app not in self._app_keys:
            self._app_keys[app] = self._books.key(self.account, app)
        return self._app_keys[app]

    def ask(
        self,
        dialect: Dialect,
        model: str | list[str],
        *,
        stream: bool = False,
        text: str | list[str] = "one two three",
        max_tokens: int = MAX_TOKENS,
        **fields: Any,
    ) -> Ask:
        """The question in the dialect's form. Dify's `model` and `max_tokens` are its app's."""
        bearer = {"Authorization": f"Bearer {self.key}"}
        match dialect:
            case "genstack":
                body: dict[str, Any] = {
                    "genstackToken": self.token,
                    "model": model,
                    "messages": [{"role": "user", "content": text}],
                    "maxOutputTokens": max_tokens,
                }
                return Ask(path="/stream" if stream else "/", headers={}, body=body | fields)
            case "dify":
                body = {
                    "inputs": {"query": text},
                    "response_mode": "streaming" if stream else "blocking",
                    "user": "somebody",
                }
                bearer = {"Authorization": f"Bearer {self.app_key(str(model))}"}
                return Ask(path="/completion-messages", headers=bearer, body=body | fields)
            case "chat":
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": max_tokens,
                } | ({"stream": True} if stream else {})
                return Ask(path="/v1/chat/completions", headers=bearer, body=body | fields)
            case "openai" | "thiggle":
                body = {"model": model, "prompt": text, "max_tokens": max_tokens} | (
                    {"stream": True} if stream else {}
                )
                path = "/v1/completions" if dialect == "openai" else "/v1/completion"
                return Ask(path=path, headers=bearer, body=body | fields)

    async def send(self, ask: Ask) -> aiohttp.ClientResponse:
        return await self.session.post(ask.path, json=ask.body, headers=ask.headers)

    async def blocking(self, dialect: Dialect, model: str | list[str], **fields: Any) -> tuple[int, Any]:
        """Status and JSON of the blocking answer."""
        async with await self.send(self.ask(dialect, model, **fields)) as response:
            return response.status, await response.json()

    async def stream(self, dialect: Dialect, model: str | list[str], **fields: Any) -> "Listener":
        """The stream, once its headers are there."""
        response = await self.send(self.ask(dialect, model, stream=True, **fields))
        return Listener(dialect, response)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self.session.get(path, headers=headers) as response:
            return response.status, await response.json()

    async def post(
        self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        async with self.session.post(path, json=body, headers=headers) as response:
            return response.status, await response.json()


class Listener:
    """Reads a stream event by event.

    `texts` are the pieces that came, `events` the JSON of all events, `pings` the keep-alives, `last` the JSON
    of the event that ended the stream (None for `[DONE]`). Anything after that event is an error.
    """

    def __init__(self, dialect: Dialect, response: aiohttp.ClientResponse) -> None:
        self.dialect = dialect
        self.response = response
        self.status = response.status
        self.texts: list[str] = []
        self.events: list[Any] = []
        self.pings: list[str] = []
        self.ending: Ending | None = None
        self.last: Any = None
        self._blocks = self._read()

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def task_id(self) -> str:
        """Dify's name for the stream."""
        return str(self.events[0]["task_id"])

    @property
    def stream_id(self) -> str:
        """Genstack's."""
        return self.response.headers["X-Stream-Id"]

    async def until(self, enough: Callable[["Listener"], bool]) -> None:
        """Read until it is enough; the stream must not end before."""
        while not enough(self):
            await self._next()
            assert self.ending is None or enough(self), (self.ending, self.last, self.texts)

    async def hear(self, pieces: int) -> None:
        """Read until so many pieces of text came."""
        await self.until(lambda listener: len(listener.texts) >= pieces)

    async def finish(self) -> Ending:
        """Read to the end and say which it was; "cut" when the body ended without one."""
        assert self.status == 200, (self.status, await self.response.text())
        while await self._next():
            pass
        return self.ending or "cut"

    def leave(self) -> None:
        """Close the connection at once."""
        self.response.close()

    async def _read(self) -> AsyncIterator[list[str]]:
        block: list[str] = []
        async for raw in self.response.content:
            line = raw.decode().rstrip("\n")
            if line:
                block.append(line)
            else:
                yield block
                block = []
        assert not block, f"the body ends within an event: {block}"

    async def _next(self) -> bool:
        block = await anext(self._blocks, None)
        if block is None:
            return False
        assert len(block) == 1, block
        (line,) = block
        if line.startswith(":") or line == "event: ping":
            self.pings.append(line)
            return True
        assert self.ending is None, f"after the end: {line}"
        data = line.removeprefix("data: ")
        assert data != line, line
        if data == "[DONE]":
            self.ending = "completed"
            return True
        event = json.loads(data)
        self.events.append(event)
        self._take(event)
        return True

    def _take(self, event: dict[str, Any]) -> None:
        for text in texts_of(event):
            if text:
                self.texts.append(text)
        ending = _ending_of(event)
        if ending is not None:
            self.ending, self.last = ending, event


def texts_of(answer: dict[str, Any]) -> list[str]:
    """The text in a blocking answer, or in one event of a stream."""
    if "choices" in answer:
        return [_text_of(choice) for choice in answer["choices"]]
    for name in ("output", "token", "answer"):
        if name in answer:
            return [answer[name]]
    return []


def _text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    part = choice["message"] if "message" in choice else choice["delta"]
    return part.get("content") or ""


def _ending_of(event: dict[str, Any]) -> Ending | None:
    if "error" in event or event.get("event") == "error":
        return "error"
    if event.get("completed") or event.get("event") == "message_end":
        return "completed"
    return "aborted" if event.get("aborted") else None


def error_of(dialect: Dialect, answer: dict[str, Any]) -> str:
    """What kind of error a dialect's error form names: genstack's and openai's type, dify's code."""
    return str(answer["code"] if dialect == "dify" else answer["error"]["type"])
