"""Cohere's chat format (API v2): only the fields that are needed.

Cohere reports two pairs of token counts. The bill follows `billed_units`: the words of the client and of the answer,
without the system text and turn markers that Cohere puts around them (often hundreds of tokens). So those are what
we count; `tokens`, everything that went through the model, stands in where they are missing. `cached_tokens` are a
part of `tokens`, counted from its beginning, where what is not billed stands: only those beyond it are billed ones.
"""

from typing import Any

import msgspec
from msgspec import Struct

from headgate.core.completion import FinishReason, Job, Message, ResponseFormat, Usage
from headgate.core.errors import UpstreamFailed, UpstreamTimeout

DONE = b"[DONE]"
LEAST_P, MOST_P = 0.01, 0.99
"""What Cohere takes; leaving `p` out would mean 0.75."""
SEEDS = 2**64
MAX_TOKENS_REPORTED = 2**40
"""A count beyond this is nonsense, not usage."""


class Format(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    json_schema: msgspec.Raw | None = None


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: Cohere's own default applies."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = None
    p: float | None = None
    stop_sequences: tuple[str, ...] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: Format | None = None
    stream: bool | None = None


class Content(Struct, frozen=True, gc=False):
    """A text, or a piece of one; what the model thought has none."""

    text: str | None = None


class AssistantMessage(Struct, frozen=True, gc=False):
    content: list[Content] | None = None


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer. An error that comes as a 200 has its words as `message`."""

    message: AssistantMessage | str | None = None
    finish_reason: str | None = None
    usage: Any = None


class Event(Struct, frozen=True, gc=False):
    """One event of a stream. What `delta` is depends on the type. `message` are an error's words; no event has any."""

    type: str = ""
    delta: msgspec.Raw = msgspec.Raw(b"{}")
    message: Any = None


class _PieceMessage(Struct, frozen=True, gc=False):
    content: Content | None = None


class Piece(Struct, frozen=True, gc=False):
    """The delta of an event with text."""

    message: _PieceMessage | None = None


class End(Struct, frozen=True, gc=False):
    """The delta of the last event."""

    finish_reason: str | None = None
    usage: Any = None
    error: Any = None


class _Counts(Struct, frozen=True, gc=False):
    input_tokens: float | None = None
    output_tokens: float | None = None


class _ReportedUsage(Struct, frozen=True, gc=False):
    billed_units: _Counts | None = None
    tokens: _Counts | None = None
    cached_tokens: float | None = None


def call(job: Job, *, stream: bool) -> Call:
    """The body of a job's call. A prompt is one user message."""
    sampling = job.sampling
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
        stream=True if stream else None,
    )


def messages_of(job: Job) -> tuple[Message, ...]:
    if job.messages is not None:
        return job.messages
    return (Message(role="user", content=job.prompt if isinstance(job.prompt, str) else ""),)


def finish_reason(provider: str, given: str | None) -> FinishReason:
    """Ours for theirs; UpstreamError where theirs is a failure.

    All others (COMPLETE, STOP_SEQUENCE, TOOL_CALL, what may come) mean that the model ended by itself.
    """
    if given == "MAX_TOKENS":
        return "length"
    if given == "TIMEOUT":
        raise UpstreamTimeout(f"The provider {provider} did not finish its answer in time.")
    if given is not None and given.startswith("ERROR"):
        raise failed(provider)
    return "stop"


def failed(provider: str) -> UpstreamFailed:
    """For errors without a status; their words stay here."""
    return UpstreamFailed(f"The provider {provider} answered with an error.")


def usage_of(reported: object) -> Usage | None:
    """The billed usage, a zero included; None where the figures are no token counts."""
    try:
        usage = msgspec.convert(reported, _ReportedUsage)
    except msgspec.ValidationError:
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
    """Cohere knows JSON, with a schema or without one; a schema's name and description are of no use to it."""
    return Format(type="json_object", json_schema=None if asked.schema is None else msgspec.Raw(asked.schema))
