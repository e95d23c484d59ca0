"""The OpenAI completion and chat formats as an upstream speaks them: only the fields that are needed.

Completions and chat, blocking and streamed, share one answer type: a choice bears `text`, `message` or `delta`.
"""

from typing import Any

import msgspec
from msgspec import Struct

from headgate.core.completion import FinishReason, Job, Message, Prompt, ResponseFormat, Usage

DONE = b"[DONE]"
MAX_TOKENS_REPORTED = 2**40
"""A count beyond this is nonsense, not usage."""


class JSONSchema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw | None = None
    strict: bool | None = None


class Format(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    json_schema: JSONSchema | None = None


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: the upstream's own default applies."""

    model: str
    prompt: Prompt | None = None
    messages: tuple[Message, ...] | None = None
    max_tokens: int
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: Format | None = None
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
    logprobs: msgspec.Raw = msgspec.Raw()


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer or one event. `usage`, `error` and `logprobs` are looked at only where they matter."""

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
    chat = job.shape == "chat"
    plain = Call(
        model=job.model.upstream_name,
        prompt=None if chat else job.prompt,
        messages=_messages(job) if chat else None,
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
    # What few jobs ask for is added afterwards: a call of more than 15 keywords costs Python three times as much.
    rare = _rare(job)
    return msgspec.structs.replace(plain, **rare) if rare else plain


def _rare(job: Job) -> dict[str, Any]:
    """A chat has no words for echo; there the prompt is put first afterwards."""
    chat = job.shape == "chat"
    asked: dict[str, Any] = {}
    if job.logprobs is not None:
        asked["logprobs"] = True if chat else job.logprobs
        if chat and job.logprobs:
            asked["top_logprobs"] = job.logprobs
    if job.echo and not chat:
        asked["echo"] = True
    if job.best_of is not None:
        asked["n"], asked["best_of"] = job.n, job.best_of
    if job.suffix:
        asked["suffix"] = job.suffix
    if job.sampling.logit_bias:
        asked["logit_bias"] = {str(token): bias for token, bias in job.sampling.logit_bias}
    if job.response_format is not None:
        asked["response_format"] = _format(job.response_format)
    return asked


def _messages(job: Job) -> tuple[Message, ...]:
    if job.messages:
        return job.messages
    return (Message(role="user", content=job.prompt if isinstance(job.prompt, str) else ""),)


def _format(asked: ResponseFormat) -> Format:
    if asked.kind == "json_object":
        return Format(type=asked.kind)
    schema = None if asked.schema is None else msgspec.Raw(asked.schema)
    return Format(
        type=asked.kind,
        json_schema=JSONSchema(
            name=asked.name, description=asked.description, schema=schema, strict=asked.strict
        ),
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
