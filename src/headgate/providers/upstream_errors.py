"""What an upstream's refusal means to us, whether it came as a status, in a body or as an event.

Only where the upstream says that the request is wrong does the client read its words, without our key.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec

from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)

MAX_MESSAGE = 500
MAX_REPORT_BYTES = 64 * 1024
MAX_DEPTH, MAX_ERRORS = 4, 8
MIN_RETRY_AFTER, MAX_RETRY_AFTER = 1, 120

_OUR_ACCOUNT = re.compile(r"credit balance|plans & billing|organization has been disabled", re.IGNORECASE)
"""Words of a 400 that speak of our account, not of the request (Anthropic's): clients do not read them."""

STATUS_OF_CODE = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded": 503,
    "overloaded_error": 503,
    "service_unavailable": 503,
    "timeout": 504,
    "timeout_error": 504,
}
"""What upstreams call errors that come without a status of their own."""

_PLACES_OF_WORDS = ("error", "message", "msg", "detail", "errors")
"""From the outside in: OpenAI's error has a message, FastAPI's detail a list of them, Gemini sends a list of errors."""


def from_status(
    provider: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    key: str | None,
    *,
    clock: Callable[[], float] = time.time,
) -> UpstreamError:
    """The error for a response that is not a 200. `key` is cut out of any words passed on."""
    return _error(provider, status, _words_in(_decoded(body)), _retry_after(headers, clock), key)


def reported_error(raw: msgspec.Raw) -> object:
    """The `error` of a 200 answer or of an event, for `from_report`; None where it is too large or cannot be read."""
    if memoryview(raw).nbytes > MAX_REPORT_BYTES:
        return None
    return _decoded(raw)


def from_report(provider: str, reported: object, key: str | None) -> UpstreamError:
    """The error for an `error` object in a 200 answer or in an event."""
    fields = reported if isinstance(reported, dict) else {}
    return _error(provider, _status(fields.get("code"), fields.get("type")), _words_in(reported), None, key)


def _status(code: object, type_: object) -> int:
    """What is no code or type (a list, a number with a fraction) says nothing."""
    if isinstance(code, str):
        is_status = len(code) == 3 and code.isascii() and code.isdigit()
        code = int(code) if is_status else STATUS_OF_CODE.get(code)
    if not isinstance(code, int) and isinstance(type_, str):
        code = STATUS_OF_CODE.get(type_)
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def _error(provider: str, status: int, words: str, retry_after: int | None, key: str | None) -> UpstreamError:
    error: UpstreamError
    match status:
        case 400 if _OUR_ACCOUNT.search(words):
            error = UpstreamAuth(f"The provider {provider} refuses this gateway's own key or account.")
        case 400 | 413 | 422:
            return UpstreamRejected(
                _safe(words, key) or f"The provider {provider} rejects this request.", status=status
            )
        case 401 | 402 | 403 | 498:  # 498: a key that has expired, at Cohere
            error = UpstreamAuth(f"The provider {provider} refuses this gateway's own key or account.")
        case 429:
            error = UpstreamRateLimited(
                f"The provider {provider} asks for fewer requests.", retry_after=retry_after
            )
        case 503 | 529:
            error = UpstreamUnavailable(f"The provider {provider} is overloaded.", retry_after=retry_after)
        case 504:
            error = UpstreamTimeout(f"The provider {provider} did not answer in time.")
        case _:
            error = UpstreamFailed(f"The provider {provider} failed with status {status}.")
    error.status = status
    return error


def _words_in(found: object, depth: int = 0) -> str:
    """What an error says to people, wherever upstreams put it; "" where it says nothing.

    Several errors in a list are told one after the other, with the place of the field where they name one.
    """
    if isinstance(found, str):
        return found
    if depth == MAX_DEPTH:
        return ""
    if isinstance(found, list):
        return "; ".join(filter(None, [_words_in(one, depth + 1) for one in found[:MAX_ERRORS]]))
    if not isinstance(found, dict):
        return ""
    words = next(filter(None, (_words_in(found.get(name), depth + 1) for name in _PLACES_OF_WORDS)), "")
    where = found.get("loc")
    if words and isinstance(where, list):
        return f"{'.'.join(str(step) for step in where if isinstance(step, str | int))}: {words}"
    return words


def _decoded(body: bytes | msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _safe(words: str, key: str | None) -> str:
    if key:
        words = words.replace(key, "[key]")
    return words if len(words) <= MAX_MESSAGE else words[: MAX_MESSAGE - 1] + "…"


def _retry_after(headers: Mapping[str, str], clock: Callable[[], float]) -> int | None:
    """How long to wait, in whole seconds, kept within what clients accept; None where it does not say."""
    seconds = _seconds(headers.get("Retry-After"), clock)
    if seconds is None:
        milliseconds = _number(headers.get("retry-after-ms"))  # OpenAI's, and Azure's
        if milliseconds is None:
            return None
        seconds = milliseconds / 1000
    return math.ceil(min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER))


def _seconds(retry_after: str | None, clock: Callable[[], float]) -> float | None:
    seconds = _number(retry_after)
    if seconds is not None or not retry_after:
        return seconds
    try:
        then = parsedate_to_datetime(retry_after)
        return (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - clock()
    except (ValueError, OverflowError):
        return None


def _number(written: str | None) -> float | None:
    try:
        number = float(written or "")
    except ValueError:
        return None
    return None if math.isnan(number) else number
