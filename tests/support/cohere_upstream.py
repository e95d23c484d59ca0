"""The scripted upstream, speaking Cohere's v2 chat.

    async with CohereUpstream() as up:
        up.script(Script(pieces=("Hel", "lo"), finish="MAX_TOKENS"))

Scripts mean what they mean elsewhere, with Cohere's own words: `finish` ("stop" is its COMPLETE), `usage`, `error` (the
`message-end` of a stream then bears it). What is thought before the answer is `THOUGHT`, where the model's name
ends with "thinking". A count of words is what is billed; `UNBILLED` more went through the model.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.support.script import Answer, Script
from tests.support.upstream import Connection, Received, Upstream

UNBILLED = 495
THOUGHT = ("They say ", "something.")
_ID = "88492c0b-8227-4256-9b88-1ac956f43de5"
_LAST_CHUNK = b"0\r\n\r\n"


class CohereUpstream(Upstream):
    @property
    def url(self) -> str:
        return f"{self.origin}/v2"

    @property
    def origin(self) -> str:
        """What Cohere's own client takes as base_url."""
        return super().url.removesuffix("/v1")

    async def _serve(self, connection: Connection, received: Received) -> None:
        if received.path.startswith("/_"):
            await super()._serve(connection, received)
            return
        script = self._script_for(received)
        self.requests.append(received)
        async with self._arrived:
            self._arrived.notify_all()
        await CohereAnswer(connection, received, script, self._released).give()


class CohereAnswer(Answer):
    @property
    def finish(self) -> str | None:
        return "COMPLETE" if self.script.finish == "stop" else self.script.finish

    @property
    def thinks(self) -> bool:
        return self.received.model.endswith("thinking")

    def usage(self) -> dict[str, Any] | None:
        if self.script.usage == "none":
            return None
        if self.script.usage != "count":
            return self.script.usage
        return counts(max(len(self.words), 1), len(self.pieces), unbilled=UNBILLED)

    def blocking(self) -> dict[str, Any]:
        content = [{"type": "text", "text": "".join(self.pieces)}]
        if self.thinks:
            content.insert(0, {"type": "thinking", "thinking": "".join(THOUGHT)})
        message = {"role": "assistant", "content": content}
        usage = self.usage()
        answer = {"id": _ID, "message": message, "finish_reason": self.finish}
        return answer | ({} if usage is None else {"usage": usage})

    def texts(self) -> Iterator[bytes]:
        for k, piece in enumerate(self.pieces):
            yield (self.opening() if k == 0 else b"") + delta(piece, index=int(self.thinks))

    def opening(self) -> bytes:
        thought = b""
        if self.thinks:
            thought = content_start("thinking") + b"".join(delta(text, kind="thinking") for text in THOUGHT)
            thought += sse({"type": "content-end", "index": 0})
        return message_start() + thought + content_start("text", index=int(self.thinks))

    def trailer(self) -> bytes:
        events = b"" if self.pieces else self.opening()
        events += sse({"type": "content-end", "index": int(self.thinks)})
        if self.finish is not None:
            events += message_end(self.finish, self.usage())
        return events + (b"data: [DONE]\n\n" if self.script.done else b"")

    async def broken(self, k: int, event: bytes) -> bool:
        if self.script.error_at != k:
            return await super().broken(k, event)
        self.write(message_end("ERROR", self.usage(), error=self.script.error))
        self.connection.transport.write(_LAST_CHUNK)
        self.received.answered.set()
        self.connection.next_request()
        return True


def refusal(status: int, words: str, **headers: str) -> Script:
    """How Cohere refuses a request."""
    return Script(status=status, headers=headers, body={"id": _ID, "message": words})


def counts(prompt: float, completion: float, *, unbilled: int = 0, **others: float) -> dict[str, Any]:
    """A usage object; `others` are further figures beside the two pairs."""
    return {
        "billed_units": {"input_tokens": float(prompt), "output_tokens": float(completion)},
        "tokens": {"input_tokens": float(prompt + unbilled), "output_tokens": float(completion)},
        **others,
    }


def sse(content: Mapping[str, Any]) -> bytes:
    """An event as Cohere writes it: its type twice."""
    kind, words = content["type"], json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return f"event: {kind}\ndata: {words}\n\n".encode()


def message_start() -> bytes:
    empty = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}
    return sse({"type": "message-start", "id": _ID, "delta": {"message": empty}})


def content_start(kind: str, index: int = 0) -> bytes:
    content = {"type": kind, kind: ""}
    return sse({"type": "content-start", "index": index, "delta": {"message": {"content": content}}})


def delta(text: str, *, index: int = 0, kind: str = "text") -> bytes:
    return sse({"type": "content-delta", "index": index, "delta": {"message": {"content": {kind: text}}}})


def tool_plan(text: str) -> bytes:
    return sse({"type": "tool-plan-delta", "delta": {"message": {"tool_plan": text}}})


def tool_call(name: str, arguments: str = "", tool_id: str = "get_weather_1byjy32y4hvq") -> dict[str, Any]:
    """As in a blocking answer. In a stream it begins without its arguments."""
    return {"id": tool_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def call_start(index: int, call: Mapping[str, Any]) -> bytes:
    return sse({"type": "tool-call-start", "index": index, "delta": {"message": {"tool_calls": call}}})


def call_delta(index: int, arguments: str) -> bytes:
    call = {"function": {"arguments": arguments}}
    return sse({"type": "tool-call-delta", "index": index, "delta": {"message": {"tool_calls": call}}})


def call_end(index: int) -> bytes:
    return sse({"type": "tool-call-end", "index": index})


def answered(*calls: Mapping[str, Any], finish: str = "TOOL_CALL", **message: Any) -> dict[str, Any]:
    """A blocking answer that calls tools."""
    said = {"role": "assistant", "tool_plan": "I will look it up.", "tool_calls": list(calls)} | message
    return {"id": _ID, "message": said, "finish_reason": finish, "usage": counts(9, 5)}


def message_end(finish: str | None, usage: Mapping[str, Any] | None = None, **others: Any) -> bytes:
    """The last event; `others` go beside the finish reason."""
    end = {"finish_reason": finish, **others} | ({} if usage is None else {"usage": usage})
    return sse({"type": "message-end", "id": _ID, "delta": end})
