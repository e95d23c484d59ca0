"""The OpenAI completion and chat formats as an upstream speaks them: only the fields that are needed.

Completions and chat, blocking and streamed, share one answer type: a choice bears `text`, `message` or `delta`.
"""

from typing import Any

import msgspec
from msgspec import Struct

from headgate.core.completion import FinishReason, Job, Message, Usage

DONE = b"[DONE]"
MAX_TOKENS_REPORTED = 2**40
"""A count beyond this is nonsense, not usage."""


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: the upstream's own default applies."""

    model: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    max_tokens: int
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None


class Content(Struct, frozen=True, gc=False):
    content: str | None = None


class AnswerChoice(Struct, frozen=True, gc=False):
    index: int = 0
    text: str | None = None
    delta: Content | None = None
    message: Content | None = None
    finish_reason: str | None = None


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer or one event. `usage` and `error` are looked at only where they are."""

    choices: list[AnswerChoice] | None = None
    usage: Any = None
    error: Any = None


class _CachedTokens(Struct, frozen=True, gc=False):
    cached_tokens: int | None = None


class _ReportedUsage(Struct, frozen=True, gc=False):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _CachedTokens | None = None


_FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}


def finish_reason(given: str | None) -> FinishReason:
    """Ours for theirs. All but two (stop, eos, tool_calls, ...) mean that the model ended by itself."""
    return _FINISH_REASONS.get(given or "", "stop")


def call(job: Job, *, stream: bool) -> Call:
    """The body of a job's call. A prompt in the chat shape is one user message."""
    sampling = job.sampling
    messages = None
    if job.shape == "chat":
        messages = job.messages or (Message(role="user", content=job.prompt or ""),)
    return Call(
        model=job.model.upstream_name,
        prompt=job.prompt if messages is None else None,
        messages=messages,
        max_tokens=job.max_tokens,
        n=job.n if job.n > 1 else None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        stop=sampling.stop or None,
        stream=True if stream else None,
        stream_options={"include_usage": True} if stream else None,
    )


def usage_of(reported: object) -> Usage | None:
    """The usage as reported, a zero included; None where the figures are no token counts."""
    try:
        usage = msgspec.convert(reported, _ReportedUsage)
    except msgspec.ValidationError:
        return None
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if not (0 <= prompt <= MAX_TOKENS_REPORTED and 0 <= completion <= MAX_TOKENS_REPORTED):
        return None
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details is not None else 0
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=min(max(cached, 0), prompt)
    )
