"""The five APIs, and chat, as doors to one gateway: how each is asked the same thing, and what each calls an error."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

DialectName = Literal["genstack", "dify", "openai", "chat", "thiggle"]
JSON = {"Content-Type": "application/json"}
OPENAI_FORM: tuple[DialectName, ...] = ("openai", "chat", "thiggle")
"""The dialects whose errors have OpenAI's form."""


class Caller(Struct, frozen=True, kw_only=True):
    """One account's credentials. `app_keys` are by app; an app bears the name of the model behind it."""

    account: str
    key: str
    token: str
    app_keys: dict[str, str] = {}


class Problem(Struct, frozen=True, kw_only=True):
    """An error in any dialect's form. `kind` is genstack's and OpenAI's type and Dify's code."""

    status: int
    kind: str
    message: str
    code: str | None = None
    field: str | None = None
    allowed: str | None = None


class Reply(Struct, frozen=True, kw_only=True):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The `data:` events of a stream; `[DONE]` as it is."""
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: ")]
        texts = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    def problem(self, dialect: DialectName) -> Problem:
        """The error, which must have exactly this dialect's form."""
        assert self.headers["content-type"] == "application/json", (self.status, self.headers)
        return problem_of(dialect, self.status, self.json)


def problem_of(dialect: DialectName, status: int, body: Any) -> Problem:
    if dialect == "dify":
        assert body.keys() == {"code", "message", "status"}, body
        assert body["status"] == status
        return Problem(status=status, kind=body["code"], message=body["message"], code=body["code"])
    assert body.keys() == {"error"}, body
    error = body["error"]
    assert error["message"]
    if dialect == "genstack":
        assert error.keys() == {"type", "message", "details"}, body
        details = error["details"]
        assert isinstance(details, dict)
        return Problem(
            status=status,
            kind=error["type"],
            message=error["message"],
            field=details.get("field"),
            allowed=details.get("allowed"),
        )
    assert error.keys() == {"message", "type", "param", "code"}, body
    return Problem(
        status=status, kind=error["type"], message=error["message"], code=error["code"], field=error["param"]
    )


class Door(Struct, frozen=True, kw_only=True):
    """One way to a completion. `streams`: this door is asked for a stream."""

    name: str
    dialect: DialectName
    path: str
    streams: bool = False

    def question(
        self, caller: Caller, text: Any = "say hello", *, model: Any = "large", **fields: Any
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Headers and body of a request that is right in every way, with `fields` put over it."""
        headers, body = dict(JSON), dict[str, Any]()
        if self.dialect == "genstack":
            messages = [{"role": "user", "content": text}]
            body = {
                "genstackToken": caller.token,
                "messages": messages,
                "model": model,
                "maxOutputTokens": 8,
            }
        elif self.dialect == "dify":
            key = caller.key if model == "large" else caller.app_keys[model]
            headers["Authorization"] = f"Bearer {key}"
            mode = "streaming" if self.streams else "blocking"
            body = {"inputs": {"query": text}, "response_mode": mode, "user": "u1"}
        elif self.dialect == "chat":
            headers["Authorization"] = f"Bearer {caller.key}"
            messages = [{"role": "user", "content": text}]
            body = {"model": model, "messages": messages, "max_tokens": 8, "stream": self.streams}
        else:
            headers["Authorization"] = f"Bearer {caller.key}"
            body = {"model": model, "prompt": text, "max_tokens": 8, "stream": self.streams}
        return headers, body | fields

    def with_credential(
        self, headers: dict[str, str], body: dict[str, Any], credential: str | None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The same question, with another credential or (None) without one."""
        if self.dialect == "genstack":
            rest = {name: value for name, value in body.items() if name != "genstackToken"}
            return headers, rest if credential is None else rest | {"genstackToken": credential}
        others = {name: value for name, value in headers.items() if name != "Authorization"}
        return others if credential is None else others | {"Authorization": f"Bearer {credential}"}, body

    def complete(self, reply: Reply) -> bool:
        """Whether a stream's body looks as if all of it had come."""
        return any(
            event == "[DONE]" or "completed" in event or event.get("event") == "message_end"
            for event in reply.events
        )

    def error_event(self, reply: Reply) -> Problem:
        """The error that a stream ended with."""
        last = reply.events[-1]
        if self.dialect == "dify":
            assert last["event"] == "error"
            kept = {name: last[name] for name in ("code", "message", "status")}
            return problem_of("dify", last["status"], kept)
        return problem_of(self.dialect, reply.status, last)


DOORS = (
    Door(name="genstack", dialect="genstack", path="/"),
    Door(name="genstack-stream", dialect="genstack", path="/stream", streams=True),
    Door(name="dify", dialect="dify", path="/completion-messages"),
    Door(name="dify-stream", dialect="dify", path="/completion-messages", streams=True),
    Door(name="openai", dialect="openai", path="/v1/completions"),
    Door(name="openai-stream", dialect="openai", path="/v1/completions", streams=True),
    Door(name="thiggle", dialect="thiggle", path="/v1/completion"),
    Door(name="thiggle-stream", dialect="thiggle", path="/v1/completion", streams=True),
    Door(name="chat", dialect="chat", path="/v1/chat/completions"),
    Door(name="chat-stream", dialect="chat", path="/v1/chat/completions", streams=True),
)
BY_NAME = {door.name: door for door in DOORS}
BLOCKING = tuple(door for door in DOORS if not door.streams)
STREAMING = tuple(door for door in DOORS if door.streams)
