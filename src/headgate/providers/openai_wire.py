"""The OpenAI completion and chat formats as an upstream answers in them: only the fields that are needed.

Completions and chat, blocking and streamed, share one answer type: a choice bears `text`, `message` or `delta`.
What is not looked at in every answer stays JSON text, and lists are read only as far as an honest answer goes: so
nothing that an upstream sends takes more memory than a small multiple of its own size.
"""

from collections.abc import Callable

import msgspec
from msgspec import Struct

from headgate.core.completion import FinishReason, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.bounded_list import ORDINARY_BYTES, at_most
from headgate.providers.upstream_errors import from_report, reported_error

DONE = b"[DONE]"
ABSENT = msgspec.Raw()
NULL = msgspec.Raw(b"null")
MAX_TOKENS_REPORTED = 2**40
"""A count beyond this is nonsense, not usage."""


class Content(Struct, frozen=True, gc=False):
    """`refusal`: what the model says instead of what it was asked for."""

    content: str | None = None
    tool_calls: msgspec.Raw = ABSENT
    refusal: str | None = None


class AnswerChoice(Struct, frozen=True, gc=False):
    index: int = 0
    text: str | None = None
    delta: Content | None = None
    message: Content | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = ABSENT


class ReportedCachedTokens(Struct, frozen=True, gc=False):
    cached_tokens: int | None = None


class ReportedUsage(Struct, frozen=True, gc=False):
    """Cached tokens are told in three ways: OpenAI's details, Together's plain count, DeepSeek's cache hits."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: ReportedCachedTokens | None = None
    cached_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None


class Answer(Struct, frozen=True, gc=False):
    """A blocking answer or one event, its usage read where it is one."""

    choices: list[AnswerChoice] | None = None
    usage: ReportedUsage | None = None
    error: msgspec.Raw = ABSENT


class _SealedAnswer(Struct, frozen=True, gc=False):
    """The same, before it is seen how many choices it holds and whether its usage is one."""

    choices: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


decode_ordinary: Callable[[bytes], Answer] = msgspec.json.Decoder(Answer).decode
_decode_sealed: Callable[[bytes], _SealedAnswer] = msgspec.json.Decoder(_SealedAnswer).decode
_decode_usage = msgspec.json.Decoder(ReportedUsage).decode

_FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}
_BROKEN_OFF = ("error", "abort")
"""What OpenRouter, vLLM and SGLang call the end of an answer that they could not finish."""


def finish_reason(provider: str, given: str | None, *, refused: bool = False) -> FinishReason:
    """Ours for theirs. All but these (stop, eos, tool_calls, …) mean that the model ended by itself.

    `refused`: what it said is a refusal. UpstreamFailed where the upstream says that it broke off.
    """
    if given in _BROKEN_OFF:
        raise UpstreamFailed(f"The provider {provider} broke its answer off.")
    return _FINISH_REASONS.get(given or "", "content_filter" if refused else "stop")


def is_given(raw: msgspec.Raw) -> bool:
    """Whether a field is there and not null."""
    return raw is not ABSENT and raw != NULL


def read(data: bytes, n: int) -> Answer:
    """An answer that may have `n` choices. MsgspecError, UnicodeDecodeError or RecursionError for what is none."""
    if len(data) <= ORDINARY_BYTES:
        try:
            return decode_ordinary(data)
        except msgspec.ValidationError:
            pass  # perhaps it is only its usage that is strange
    return read_with_care(data, n)


def read_with_care(data: bytes, n: int) -> Answer:
    """The same, whatever its size: more choices than `n` are not even looked at."""
    sealed = _decode_sealed(data)
    choices = at_most(n, AnswerChoice)(sealed.choices) if sealed.choices else None
    return Answer(choices, _reported_usage(sealed.usage), sealed.error)


def _reported_usage(raw: msgspec.Raw) -> ReportedUsage | None:
    if not is_given(raw):
        return None
    try:
        return _decode_usage(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def usage_of(reported: ReportedUsage | None) -> Usage | None:
    """The usage as reported, a zero included; None where the figures are no token counts."""
    if reported is None:
        return None
    prompt, completion = reported.prompt_tokens, reported.completion_tokens
    if not (0 <= prompt <= MAX_TOKENS_REPORTED and 0 <= completion <= MAX_TOKENS_REPORTED):
        return None
    details = reported.prompt_tokens_details
    cached = details.cached_tokens if details is not None else None
    cached = cached or reported.cached_tokens or reported.prompt_cache_hit_tokens or 0
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=min(max(cached, 0), prompt)
    )


def error_of(provider: str, reported: msgspec.Raw, key: str | None) -> UpstreamError:
    """The error that an answer or an event reports. `key` is cut out of any words passed on."""
    return from_report(provider, reported_error(reported), key)
