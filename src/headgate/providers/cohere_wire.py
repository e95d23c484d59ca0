"""Cohere's chat format (API v2): only the fields that are needed.

Cohere reports two pairs of token counts. The bill follows `billed_units`: the words of the client and of the answer,
without the system text and turn markers that Cohere puts around them (often hundreds of tokens). So those are what
we count; `tokens`, everything that went through the model, stands in where they are missing. `cached_tokens` are a
part of `tokens`, counted from its beginning, where what is not billed stands: only those beyond it are billed ones.
"""

from typing import Literal

import msgspec
from msgspec import Raw, Struct

from headgate.core.completion import FinishReason, Job, Message, ResponseFormat, ToolCall, Tools, Usage
from headgate.core.errors import UpstreamFailed, UpstreamTimeout
from headgate.providers.bounded_list import ORDINARY_BYTES, at_most
from headgate.providers.cohere_messages import Said, messages_of
from headgate.providers.json_schema import answer_schema, arguments_schema
from headgate.providers.tool_calls import MAX_CALLS, whole_call

DONE = b"[DONE]"
LEAST_P, MOST_P = 0.01, 0.99
"""What Cohere takes; leaving `p` out would mean 0.75."""
SEEDS = 2**64
MAX_PARTS = 512
"""Of one answer's content: thoughts and texts."""
MAX_TOKENS_REPORTED = 2**40
"""A count beyond this is nonsense, not usage."""


_NULL = Raw(b"null")
_CHOICES = {"required": "REQUIRED", "none": "NONE"}
"""Left out, the model chooses."""


class Format(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    json_schema: Raw | None = None


class Function(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    parameters: Raw
    description: str | None = None


class Offered(Struct, frozen=True, tag="function"):
    """A tool."""

    function: Function


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: Cohere's own default applies."""

    model: str
    messages: tuple[Message | Said, ...]
    max_tokens: int
    temperature: float | None = None
    p: float | None = None
    stop_sequences: tuple[str, ...] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: Format | None = None
    tools: tuple[Offered, ...] | None = None
    tool_choice: str | None = None
    strict_tools: bool | None = None
    stream: bool | None = None


class Content(Struct, frozen=True, gc=False):
    """A text; what the model thought has none."""

    type: str
    text: str | None = None


class AssistantMessage(Struct, frozen=True, gc=False):
    """What is Raw here and below is decoded only where it matters: until then it costs nothing."""

    role: Literal["assistant"]
    content: list[Content] | None = None
    tool_calls: Raw = Raw()


class _SealedMessage(Struct, frozen=True, gc=False):
    """The same, before it is seen how many parts it holds."""

    role: Literal["assistant"]
    content: Raw = Raw()
    tool_calls: Raw = Raw()


class CalledFunction(Struct, frozen=True, gc=False):
    name: str | None = None
    arguments: str | None = None


class Called(Struct, frozen=True, gc=False):
    """A tool call."""

    id: str
    function: CalledFunction


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer. An error that comes as a 200 has its words as `message`."""

    message: AssistantMessage | str | None = None
    finish_reason: str | None = None
    usage: Raw = Raw()


class _SealedAnswer(Struct, frozen=True, gc=False):
    message: _SealedMessage | str | None = None
    finish_reason: str | None = None
    usage: Raw = Raw()


class Event(Struct, frozen=True, gc=False):
    """One event of a stream. What `delta` is depends on the type. `message` are an error's words; no event has any."""

    type: str = ""
    delta: Raw = Raw(b"{}")
    message: Raw = Raw()


class _Piece(Struct, frozen=True, gc=False):
    text: str | None = None


class _PieceMessage(Struct, frozen=True, gc=False):
    content: _Piece | None = None


class Piece(Struct, frozen=True, gc=False):
    """The delta of an event with text."""

    message: _PieceMessage | None = None


class _CallPiece(Struct, frozen=True, gc=False):
    id: str = ""
    function: CalledFunction = CalledFunction()


class _CallMessage(Struct, frozen=True, gc=False):
    tool_calls: _CallPiece = _CallPiece()


class _CallDelta(Struct, frozen=True, gc=False):
    message: _CallMessage = _CallMessage()


class CallEvent(Struct, frozen=True, gc=False):
    """An event that begins, goes on with or ends the `index`-th tool call."""

    index: int = 0
    delta: _CallDelta = _CallDelta()


class End(Struct, frozen=True, gc=False):
    """The delta of the last event."""

    finish_reason: str | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class _Counts(Struct, frozen=True, gc=False):
    input_tokens: float | None = None
    output_tokens: float | None = None


class _ReportedUsage(Struct, frozen=True, gc=False):
    billed_units: _Counts | None = None
    tokens: _Counts | None = None
    cached_tokens: float | None = None


_decode_usage = msgspec.json.Decoder(_ReportedUsage).decode
_decode_calls = at_most(MAX_CALLS + 1, Called)
_decode_ordinary = msgspec.json.Decoder(Answer).decode
_decode_sealed = msgspec.json.Decoder(_SealedAnswer).decode


def call(job: Job, *, stream: bool) -> Call:
    """The body of a job's call. A prompt is one user message."""
    sampling = job.sampling
    tools = job.tools
    return Call(
        model=job.model.upstream_name,
        messages=messages_of(job),
        max_tokens=job.max_tokens,
        temperature=sampling.temperature,
        p=None if sampling.top_p is None else min(max(sampling.top_p, LEAST_P), MOST_P),
        stop_sequences=sampling.stop or None,
        seed=None if sampling.seed is None else _seed(sampling.seed),
        # Some models refuse both penalties together; none is the default of either.
        frequency_penalty=sampling.frequency_penalty or None,
        presence_penalty=sampling.presence_penalty or None,
        response_format=None if job.response_format is None else _format(job.response_format),
        tools=_offered(tools) if tools else None,
        tool_choice=_CHOICES.get(tools.choice or "auto") if tools else None,
        strict_tools=True if tools and all(tool.strict for tool in tools.tools) else None,
        stream=True if stream else None,
    )


def read(data: bytes) -> Answer:
    """A blocking answer. MsgspecError, UnicodeDecodeError or RecursionError for what is none."""
    if len(data) <= ORDINARY_BYTES:
        return _decode_ordinary(data)
    sealed = _decode_sealed(data)
    message = sealed.message
    if not isinstance(message, _SealedMessage):
        return Answer(message, sealed.finish_reason, sealed.usage)
    content = at_most(MAX_PARTS, Content)(message.content) if message.content else None
    return Answer(
        AssistantMessage(message.role, content, message.tool_calls), sealed.finish_reason, sealed.usage
    )


def finish_reason(provider: str, given: str | None, *, called: bool = False) -> FinishReason:
    """Ours for theirs; UpstreamError where theirs is a failure. `called`: there are tool calls in the answer.

    All others (COMPLETE, STOP_SEQUENCE, what may come) mean that the model ended by itself.
    """
    if given == "MAX_TOKENS":
        return "length"
    if given == "TIMEOUT":
        raise UpstreamTimeout(f"The provider {provider} did not finish its answer in time.")
    if given is not None and given.startswith("ERROR"):
        raise failed(provider)
    return "tool_calls" if called and given in ("TOOL_CALL", None) else "stop"


def calls_of(provider: str, given: Raw) -> tuple[ToolCall, ...]:
    """The tool calls of a blocking answer. UpstreamFailed for what is none."""
    if not given or given == _NULL:
        return ()
    try:
        calls = _decode_calls(given)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UpstreamFailed(f"The provider {provider} sent a tool call that cannot be read.") from error
    return tuple(
        whole_call(provider, nth, call.id, call.function.name or "", call.function.arguments or "")
        for nth, call in enumerate(calls)
    )


def is_text(raw: Raw) -> bool:
    return memoryview(raw)[:1].tobytes() == b'"'


def tells_something(error: Raw) -> bool:
    return bool(error) and error not in (_NULL, Raw(b'""'))


def failed(provider: str) -> UpstreamFailed:
    """For errors without a status; their words stay here."""
    return UpstreamFailed(f"The provider {provider} answered with an error.")


def usage_of(reported: Raw) -> Usage | None:
    """The billed usage, a zero included; None where the figures are no token counts."""
    try:
        usage = _decode_usage(reported)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    billed, used = _pair(usage.billed_units), _pair(usage.tokens)
    counts = billed or used
    if counts is None:
        return None
    prompt, completion = counts
    cached = _count(usage.cached_tokens) or 0
    if billed is not None and used is not None:
        cached -= max(used[0] - billed[0], 0)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=min(max(cached, 0), prompt)
    )


def _pair(counts: _Counts | None) -> tuple[int, int] | None:
    if counts is None:
        return None
    prompt, completion = _count(counts.input_tokens), _count(counts.output_tokens)
    return None if prompt is None or completion is None else (prompt, completion)


def _count(given: float | None) -> int | None:
    """Cohere counts in floats; only a whole one is a count."""
    if given is None or not given.is_integer() or not 0 <= given <= MAX_TOKENS_REPORTED:
        return None
    return int(given)


def _seed(seed: int) -> int:
    """Cohere's seeds are unsigned and have 64 bits: others become one of them, always the same."""
    return seed if 0 <= seed < SEEDS else seed % (SEEDS // 2)


def _format(asked: ResponseFormat) -> Format:
    """Cohere knows JSON, with a schema or without one, and always holds the answer to the schema.

    That is what `strict` asks for; without it a schema may be held to as well, so `strict: false` is honoured too. The
    description goes into the schema; the schema's name changes no answer.
    """
    return Format(type="json_object", json_schema=answer_schema(asked))


def _offered(tools: Tools) -> tuple[Offered, ...]:
    return tuple(
        Offered(
            Function(
                name=tool.name,
                description=tool.description,
                parameters=arguments_schema(tool.parameters),
            )
        )
        for tool in tools.tools
    )
