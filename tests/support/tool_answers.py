"""The same tool calls as an upstream of each kind asks for them, whole and streamed, with the same usage."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from tests.support import anthropic_upstream as anthropic
from tests.support import cohere_upstream as cohere
from tests.support.catalogue import CACHED, INPUT, OUTPUT
from tests.support.script import Script
from tests.support.three_kinds import Kind

EVENT_STREAM = {"Content-Type": "text/event-stream"}
PROMPT, COMPLETION = 40, 9
FROM_CACHE: Mapping[Kind, int] = {"openai": 10, "anthropic": 9, "cohere": 0}
"""How much of the prompt each reports as read from its cache."""


class Asked(Struct, frozen=True):
    """One call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    @property
    def wire(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def price(kind: Kind) -> int:
    """What an answer of these costs, in nano-USD."""
    cached = FROM_CACHE[kind]
    return (PROMPT - cached) * INPUT + cached * CACHED + COMPLETION * OUTPUT


def usage(kind: Kind) -> dict[str, Any]:
    cached = FROM_CACHE[kind]
    if kind == "openai":
        return {
            "prompt_tokens": PROMPT,
            "completion_tokens": COMPLETION,
            "total_tokens": PROMPT + COMPLETION,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
    if kind == "anthropic":
        return {
            "input_tokens": PROMPT - cached - 1,
            "cache_creation_input_tokens": 1,
            "cache_read_input_tokens": cached,
            "output_tokens": COMPLETION,
        }
    return cohere.counts(PROMPT, COMPLETION, unbilled=495)


def whole(kind: Kind, calls: Sequence[Asked], text: str | None = None) -> Script:
    """A blocking answer. Of Cohere's, `text` is the plan that it tells beside its calls."""
    counted = usage(kind)
    if kind == "openai":
        message = {"role": "assistant", "content": text, "tool_calls": [call.wire for call in calls]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
        head = {"id": "chatcmpl-u", "object": "chat.completion", "created": 1, "model": "m"}
        return Script(body=head | {"choices": [choice], "usage": counted})
    if kind == "anthropic":
        said = [anthropic.text_block(text)] if text else []
        uses = [
            anthropic.tool_block(call.name, call.id) | {"input": json.loads(call.arguments)} for call in calls
        ]
        return Script(body=anthropic.message(*said, *uses, stop_reason="tool_use", usage=counted))
    said_calls = [cohere.tool_call(call.name, call.arguments, call.id) for call in calls]
    plan = {} if text is None else {"tool_plan": text}
    return Script(body=cohere.answered(*said_calls, **plan) | {"usage": counted})


def streamed(kind: Kind, calls: Sequence[Asked], text: str | None = None, size: int = 5) -> Script:
    body = opening(kind) + (said(kind, text) if text else b"")
    first = 1 if text and kind == "anthropic" else 0  # it counts every block
    for index, call in enumerate(calls):
        body += b"".join(pieces(kind, index + first, call, size)) + closing(kind, index + first)
    return Script(body=(body + ending(kind)).decode(), headers=EVENT_STREAM)


def opening(kind: Kind) -> bytes:
    """What stands before all else."""
    if kind == "openai":
        return _chunk({"role": "assistant", "content": None})
    if kind == "anthropic":
        return anthropic.events(anthropic.start("m", usage(kind)), anthropic.PING).encode()
    return cohere.message_start()


def said(kind: Kind, text: str) -> bytes:
    """Words before the calls. Cohere's are its plan."""
    if kind == "openai":
        return _chunk({"content": text})
    if kind == "anthropic":
        block = anthropic.opened(0, anthropic.text_block(""))
        return anthropic.events(block, anthropic.piece(0, text), anthropic.closed(0)).encode()
    return cohere.tool_plan(text)


def pieces(kind: Kind, index: int, call: Asked, size: int = 5) -> list[bytes]:
    """The call's head, then its arguments, `size` characters at a time. `index` counts what the kind counts."""
    parts = [call.arguments[start : start + size] for start in range(0, len(call.arguments), size)]
    if kind == "openai":
        function = {"name": call.name, "arguments": ""}
        head = _chunk({"tool_calls": [{"index": index, **call.wire, "function": function}]})
        more = [_chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]}) for part in parts]
        return [head, *more]
    if kind == "anthropic":
        begun = anthropic.events(anthropic.opened(index, anthropic.tool_block(call.name, call.id)))
        return [begun.encode(), *(anthropic.events(anthropic.argued(index, part)).encode() for part in parts)]
    begun_call = cohere.call_start(index, cohere.tool_call(call.name, "", call.id))
    return [begun_call, *(cohere.call_delta(index, part) for part in parts)]


def closing(kind: Kind, index: int) -> bytes:
    if kind == "openai":
        return b""
    return (
        anthropic.events(anthropic.closed(index)).encode() if kind == "anthropic" else cohere.call_end(index)
    )


def ending(kind: Kind) -> bytes:
    """The reason to stop, the usage, and the format's last word."""
    counted = usage(kind)
    if kind == "openai":
        return _chunk({}, "tool_calls") + _event({"choices": [], "usage": counted}) + b"data: [DONE]\n\n"
    if kind == "anthropic":
        return anthropic.events(anthropic.ending("tool_use", counted), anthropic.STOP).encode()
    return cohere.message_end("TOOL_CALL", counted) + b"data: [DONE]\n\n"


def _chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _event(content: Mapping[str, Any]) -> bytes:
    head: dict[str, Any] = {"id": "chatcmpl-u", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(head | dict(content), ensure_ascii=False).encode() + b"\n\n"
