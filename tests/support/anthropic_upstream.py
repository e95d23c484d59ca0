"""A scripted upstream that speaks Anthropic's Messages format; scripts and server are those of `upstream.py`.

    async with AnthropicUpstream() as up:
        up.script(Script(pieces=("Hel", "lo"), finish="max_tokens"))
        ...                                  # a provider whose base_url is up.url asks

Of a Script the fields for log probabilities and echo mean nothing here, `n` is always 1, `finish` is a stop reason
("stop" stands for `end_turn`; None: none is given), `done` is whether `message_stop` comes, `usage` "count" or an
object that both `message_start` and `message_delta` report ("none": neither), and `error` an error's type. What a
Script cannot say is put together from `message`, `events` and `refusal`.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, the folder of the project is not searched by itself
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.script import Answer, Script
from tests.support.upstream import Connection, Received, Upstream

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}
COUNTED = {
    "input_tokens": 7,
    "cache_creation_input_tokens": 1,
    "cache_read_input_tokens": 3,
    "output_tokens": 4,
}
PING = {"type": "ping"}
STOP: Mapping[str, Any] = {"type": "message_stop"}


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def thinking_block(thinking: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": thinking, "signature": "EqQBCgIYAhIM"}


def tool_block(name: str, tool_id: str = "toolu_01A09q90qw90lq917835lq9", **arguments: Any) -> dict[str, Any]:
    """A tool call. In a stream it begins without its arguments."""
    return {"type": "tool_use", "id": tool_id, "name": name, "input": arguments}


def message(
    *content: Mapping[str, Any],
    model: str = "plain",
    stop_reason: str | None = "end_turn",
    usage: Any = COUNTED,
) -> dict[str, Any]:
    """A blocking answer. `usage` None: not reported."""
    return {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": list(content),
        "stop_reason": stop_reason,
        "stop_sequence": None,
    } | ({} if usage is None else {"usage": usage})


def start(model: str = "plain", usage: Any = COUNTED) -> dict[str, Any]:
    """As in a real stream, hardly any output is counted at the start."""
    if isinstance(usage, dict) and usage.get("output_tokens"):
        usage = usage | {"output_tokens": 1}
    return {"type": "message_start", "message": message(model=model, stop_reason=None, usage=usage)}


def opened(index: int, block: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(index: int, text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}


def thought(index: int, thinking: str) -> dict[str, Any]:
    delta = {"type": "thinking_delta", "thinking": thinking}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def argued(index: int, partial_json: str) -> dict[str, Any]:
    delta = {"type": "input_json_delta", "partial_json": partial_json}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def closed(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def ending(stop_reason: str | None = "end_turn", usage: Any = COUNTED) -> dict[str, Any]:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return {"type": "message_delta", "delta": delta} | ({} if usage is None else {"usage": usage})


def error(kind: str, words: str = "Told to fail.") -> dict[str, Any]:
    """An error as a body, and as an event."""
    return {"type": "error", "error": {"type": kind, "message": words}, "request_id": "req_011CSHoEeqs5"}


def events(*contents: Mapping[str, Any]) -> str:
    """A stream's text, each event under its name."""
    return "".join(_event(content) for content in contents)


def streaming(*contents: Mapping[str, Any]) -> Script:
    """Exactly these events."""
    return Script(body=events(*contents), headers=EVENT_STREAM)


def refusal(status: int, kind: str, words: str = "Told to fail.", **headers: str) -> Script:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Script(status=status, body=error(kind, words), headers=named)


class AnthropicUpstream(Upstream):
    async def _serve(self, connection: Connection, received: Received) -> None:
        if received.path.startswith("/_"):
            await super()._serve(connection, received)
            return
        script = self._script_for(received)
        self.requests.append(received)
        async with self._arrived:
            self._arrived.notify_all()
        await AnthropicAnswer(connection, received, script, self._released).give()


class AnthropicAnswer(Answer):
    """One script being played."""

    def counted(self) -> Any:
        if self.script.usage == "none":
            return None
        if self.script.usage == "count":
            return COUNTED | {"input_tokens": max(len(self.words), 1), "output_tokens": len(self.pieces)}
        return self.script.usage

    @property
    def stop_reason(self) -> str | None:
        return "end_turn" if self.script.finish == "stop" else self.script.finish

    def blocking(self) -> dict[str, Any]:
        block = text_block("".join(self.pieces))
        return message(block, model=self.received.model, stop_reason=self.stop_reason, usage=self.counted())

    def head(self) -> dict[str, Any]:
        return start(self.received.model, self.counted())

    def texts(self) -> Iterator[bytes]:
        """The first piece comes with all that stands before it."""
        before = events(self.head(), opened(0, text_block("")), PING)
        for text in self.pieces:
            yield (before + events(piece(0, text))).encode()
            before = ""

    def trailer(self) -> bytes:
        before: Sequence[Mapping[str, Any]] = () if self.pieces else (self.head(), opened(0, text_block("")))
        last = [closed(0)]
        if self.script.finish is not None:
            last.append(ending(self.stop_reason, self.counted()))
        if self.script.done:
            last.append(dict(STOP))
        return events(*before, *last).encode()

    async def broken(self, k: int, event: bytes) -> bool:
        if self.script.error_at != k:
            return await super().broken(k, event)
        kind = self.script.error if isinstance(self.script.error, str) else "api_error"
        self.write(events(error(kind)).encode())
        self.connection.transport.write(b"0\r\n\r\n")
        self.received.answered.set()
        self.connection.next_request()
        return True


def _event(content: Mapping[str, Any]) -> str:
    return f"event: {content['type']}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _main(port: int) -> None:
    async with AnthropicUpstream(port) as upstream:
        print(f"ready {upstream.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
