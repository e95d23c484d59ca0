"""Anthropic's Messages format as an upstream speaks it: only the fields that are needed.

Blocking answers and events of streams are read apart: the former is one message, the latter are pieces of one.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from headgate.core.completion import FinishReason, Job, Message, ToolCall, Tools, Usage
from headgate.core.errors import UpstreamError
from headgate.providers.anthropic_turns import Turn, empty, plain_turns, turns
from headgate.providers.bounded_list import ORDINARY_BYTES, at_most
from headgate.providers.json_schema import answer_schema, arguments_schema
from headgate.providers.tool_calls import input_text, whole_call
from headgate.providers.upstream_errors import from_report, reported_error

Count = Annotated[int, Meta(ge=0, le=2**40)]
"""Tokens; more than that is nonsense, not usage."""


class Function(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool. `strict` is sent where it asks for something: without it nothing is promised anyway."""

    name: str
    input_schema: Raw
    description: str | None = None
    strict: bool | None = None


class ToolChoice(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class SchemaFormat(Struct, frozen=True, tag="json_schema"):
    schema: Raw


class OutputConfig(Struct, frozen=True):
    format: SchemaFormat


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: the upstream's own default applies."""

    model: str
    max_tokens: int
    messages: tuple[Message | Turn, ...]
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: tuple[str, ...] | None = None
    tools: tuple[Function, ...] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    stream: bool | None = None


class Block(Struct, frozen=True, gc=False):
    """A content block. Those of other types than text and tool_use (thinking, an upstream's own tools) are not read."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Raw = Raw()


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer. What is Raw here and below is decoded only where it matters: until then it costs nothing."""

    content: list[Block] | None = None
    stop_reason: str | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class _SealedAnswer(Struct, frozen=True, gc=False):
    """The same, before it is seen how many blocks it holds."""

    content: Raw = Raw()
    stop_reason: str | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class Opening(Struct, frozen=True, gc=False):
    """The message as it is when its stream begins."""

    usage: Raw = Raw()


class Delta(Struct, frozen=True, gc=False):
    """`text` comes with blocks, `stop_reason` with the message."""

    type: str = ""
    text: str | None = None
    stop_reason: str | None = None


class Event(Struct, frozen=True, gc=False):
    type: str = ""
    delta: Delta | None = None
    content_block: Block | None = None
    message: Opening | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class _InputDelta(Struct, frozen=True, gc=False):
    partial_json: str = ""


class InputEvent(Struct, frozen=True, gc=False):
    """What tells one block from another, and a piece of a tool call's arguments."""

    index: int = 0
    delta: _InputDelta = _InputDelta()


class Kind(Struct, frozen=True, gc=False):
    """An event of which nothing but its name is read."""

    type: str = ""


class Counts(Struct, frozen=True, kw_only=True, gc=False):
    """Usage as reported, here or so far; None where it was not."""

    input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    output_tokens: Count | None = None


_NULL = Raw(b"null")
MAX_BLOCKS = 512
"""Of one answer; thoughts, texts and calls take turns perhaps a tenth as often."""
_decode_ordinary = msgspec.json.Decoder(Answer).decode
_decode_sealed = msgspec.json.Decoder(_SealedAnswer).decode
_decode_counts = msgspec.json.Decoder(Counts).decode
_FINISH_REASONS: dict[str, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_CHOICES = {"auto": "auto", "required": "any", "named": "tool"}
_STATUS_OF_TYPE = {
    "billing_error": 402,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "api_error": 500,
    "overloaded_error": 529,
}
"""The status that goes with an error type which only this format knows, or knows by another one."""


def read(data: bytes) -> Answer:
    """A blocking answer. MsgspecError, UnicodeDecodeError or RecursionError for what is none."""
    if len(data) <= ORDINARY_BYTES:
        return _decode_ordinary(data)
    sealed = _decode_sealed(data)
    content = at_most(MAX_BLOCKS, Block)(sealed.content) if is_given(sealed.content) else None
    return Answer(content, sealed.stop_reason, sealed.usage, sealed.error)


def finish_reason(given: str | None, *, called: bool) -> FinishReason:
    """Ours for theirs. All but those listed (end_turn, stop_sequence, ...) mean that the model ended by itself.

    `called`: there are tool calls in the answer.
    """
    if called and given in ("tool_use", None):
        return "tool_calls"
    return _FINISH_REASONS.get(given or "", "stop")


def is_given(raw: Raw) -> bool:
    return bool(raw) and raw != _NULL


def failure(provider: str, reported: Raw, key: str | None) -> UpstreamError:
    """The error for an `error` object in a 200 answer or in an event. `key` is cut out of any words passed on."""
    error = reported_error(reported)
    kind = error.get("type") if isinstance(error, dict) else None
    if isinstance(error, dict) and isinstance(kind, str):
        error = error | {"code": _STATUS_OF_TYPE.get(kind)}
    return from_report(provider, error, key)


def call(job: Job, *, stream: bool) -> Call:
    """The body of a job's call. InvalidRequest for a conversation that the format has no words for."""
    sampling = job.sampling
    system, messages = conversation(job)
    tools = job.tools
    schema = None if job.response_format is None else answer_schema(job.response_format)
    # Some models refuse the two together; 1 is the default of both.
    top_p = None if sampling.top_p == 1 else sampling.top_p
    return Call(
        model=job.model.upstream_name,
        max_tokens=job.max_tokens,
        messages=messages,
        system=system,
        temperature=None if sampling.temperature == 1 and top_p is not None else sampling.temperature,
        top_p=top_p,
        stop_sequences=sampling.stop or None,
        tools=_functions(tools) if tools else None,
        tool_choice=_choice(tools) if tools else None,
        output_config=None if schema is None else OutputConfig(SchemaFormat(schema)),
        stream=True if stream else None,
    )


def conversation(job: Job) -> tuple[str | None, tuple[Message | Turn, ...]]:
    """The system prompt, if there is one, and the turns, which alternate and begin with the user's.

    A prompt is one user message. InvalidRequest for what the format has no words for.
    """
    messages = job.messages
    if messages is None:
        prompt = job.prompt if isinstance(job.prompt, str) else ""
        if not prompt.strip():
            raise empty("prompt")
        return None, (Message(role="user", content=prompt),)
    if all(message.is_plain for message in messages):
        return plain_turns(messages)
    return turns(messages)


def read_content(provider: str, content: list[Block], *, tools: bool) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of a blocking answer, and its tool calls where it was given `tools`."""
    text = "".join(block.text or "" for block in content if block.type == "text")
    if not tools:
        return text, ()
    uses = [block for block in content if block.type == "tool_use"]
    return text, tuple(
        whole_call(provider, nth, use.id or "", use.name or "", input_text(provider, use.input))
        for nth, use in enumerate(uses)
    )


def merged(before: Counts | None, reported: Raw) -> Counts | None:
    """What is known after this report; what it leaves out stands as before.

    None once there was a report whose figures are no token counts: the others are not believed then either.
    """
    if before is None or not is_given(reported):
        return before
    try:
        now = _decode_counts(reported)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return Counts(
        input_tokens=_latest(before.input_tokens, now.input_tokens),
        cache_creation_input_tokens=_latest(
            before.cache_creation_input_tokens, now.cache_creation_input_tokens
        ),
        cache_read_input_tokens=_latest(before.cache_read_input_tokens, now.cache_read_input_tokens),
        output_tokens=_latest(before.output_tokens, now.output_tokens),
    )


def usage_of(counts: Counts | None) -> Usage | None:
    """The usage as reported, a zero included; None where a figure is missing. Input comes in three parts.

    What was written into the upstream's cache counts as plain input, though the upstream bills it at 1.25 times that
    price (twice for an hour): our prices know no such rate. We ask for no caching, so there should be none.
    """
    if counts is None or counts.input_tokens is None or counts.output_tokens is None:
        return None
    cached = counts.cache_read_input_tokens or 0
    return Usage(
        prompt_tokens=counts.input_tokens + (counts.cache_creation_input_tokens or 0) + cached,
        completion_tokens=counts.output_tokens,
        cached_tokens=cached,
    )


def _latest(before: int | None, now: int | None) -> int | None:
    return before if now is None else now


def _functions(tools: Tools) -> tuple[Function, ...]:
    return tuple(
        Function(
            name=tool.name,
            description=tool.description,
            input_schema=arguments_schema(tool.parameters, strict=bool(tool.strict)),
            strict=tool.strict or None,
        )
        for tool in tools.tools
    )


def _choice(tools: Tools) -> ToolChoice | None:
    """None: the upstream's own way, which is auto with several calls at once."""
    if tools.choice == "none":
        return ToolChoice(type="none")
    one_at_most = True if tools.parallel is False else None
    if tools.choice is None and one_at_most is None:
        return None
    return ToolChoice(
        type=_CHOICES[tools.choice or "auto"],
        name=tools.name if tools.choice == "named" else None,
        disable_parallel_tool_use=one_at_most,
    )
