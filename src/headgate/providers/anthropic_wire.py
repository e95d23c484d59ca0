"""Anthropic's Messages format as an upstream speaks it: only the fields that are needed.

Blocking answers and events of streams are read apart: the former is one message, the latter are pieces of one.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from headgate.core.completion import FinishReason, Job, Message, Usage
from headgate.core.errors import InvalidRequest, UpstreamError
from headgate.providers.upstream_errors import from_report

Count = Annotated[int, Meta(ge=0, le=2**40)]
"""Tokens; more than that is nonsense, not usage."""


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: the upstream's own default applies."""

    model: str
    max_tokens: int
    messages: tuple[Message, ...]
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: tuple[str, ...] | None = None
    stream: bool | None = None


class Block(Struct, frozen=True, gc=False):
    """A content block. Others than text (thinking, tools) are not read."""

    type: str = ""
    text: str | None = None


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer. `usage` and `error` are looked at only where they matter."""

    content: list[Block] | None = None
    stop_reason: str | None = None
    usage: Any = None
    error: Any = None


class Opening(Struct, frozen=True, gc=False):
    """The message as it is when its stream begins."""

    usage: Any = None


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
    usage: Any = None
    error: Any = None


class Kind(Struct, frozen=True, gc=False):
    """An event of which nothing but its name is read."""

    type: str = ""


class Counts(Struct, frozen=True, kw_only=True, gc=False):
    """Usage as reported, here or so far; None where it was not."""

    input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    output_tokens: Count | None = None


class _Reported(Struct, frozen=True, gc=False):
    message: str | None = None
    type: str | None = None


_FINISH_REASONS: dict[str, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_STATUS_OF_TYPE = {
    "billing_error": 402,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "api_error": 500,
    "overloaded_error": 529,
}
"""The status that goes with an error type which only this format knows, or knows by another one."""


def finish_reason(given: str | None) -> FinishReason:
    """Ours for theirs. All but those listed (end_turn, stop_sequence, ...) mean that the model ended by itself."""
    return _FINISH_REASONS.get(given or "", "stop")


def failure(provider: str, reported: object, key: str | None) -> UpstreamError:
    """The error for an `error` object in a 200 answer or in an event. `key` is cut out of any words passed on."""
    try:
        error = msgspec.convert(reported, _Reported)
    except msgspec.ValidationError:
        error = _Reported()
    status = _STATUS_OF_TYPE.get(error.type or "")
    return from_report(provider, {"message": error.message, "type": error.type, "code": status}, key)


def call(job: Job, *, stream: bool) -> Call:
    """The body of a job's call. InvalidRequest for a conversation that the format has no words for."""
    sampling = job.sampling
    system, turns = conversation(job)
    return Call(
        model=job.model.upstream_name,
        max_tokens=job.max_tokens,
        messages=turns,
        system=system,
        temperature=sampling.temperature,
        # Some models refuse the two together; 1 changes nothing.
        top_p=None if sampling.top_p == 1 else sampling.top_p,
        stop_sequences=sampling.stop or None,
        stream=True if stream else None,
    )


def conversation(job: Job) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt, if there is one, and the turns, which alternate and begin with the user's.

    The format knows one system prompt and nobody speaking twice: what belongs together is joined by blank lines. A
    prompt is one user message.
    """
    if job.messages is None:
        prompt = job.prompt if isinstance(job.prompt, str) else ""
        if not prompt.strip():
            raise _empty("prompt")
        return None, (Message(role="user", content=prompt),)
    system: list[str] = []
    turns: list[tuple[Message, list[str]]] = []
    for message in job.messages:
        if message.role == "system":
            parts = system
        elif turns and turns[-1][0].role == message.role:
            parts = turns[-1][1]
        else:
            parts = []
            turns.append((message, parts))
        if message.content.strip():
            parts.append(message.content)
    if not turns or turns[0][0].role != "user":
        raise InvalidRequest(
            "messages must begin with a user message for this model; system messages may stand before it.",
            param="messages",
            allowed="a user message first",
        )
    if not all(parts for _, parts in turns):
        raise _empty("messages")
    return "\n\n".join(system) or None, tuple(
        Message(role=first.role, content="\n\n".join(parts)) for first, parts in turns
    )


def merged(before: Counts | None, reported: object) -> Counts | None:
    """What is known after this report; what it leaves out stands as before.

    None once there was a report whose figures are no token counts: the others are not believed then either.
    """
    if before is None or reported is None:
        return before
    try:
        now = msgspec.convert(reported, Counts)
    except msgspec.ValidationError:
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
    """The usage as reported, a zero included; None where a figure is missing. Input comes in three parts."""
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


def _empty(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} must not be empty: this model answers no message without text.",
        param=param,
        allowed="text that is not blank",
    )
