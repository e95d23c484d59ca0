"""Errors in the OpenAI form, for every dialect and route that speaks it.

One table says which status and type each kind of error has; a dialect that differs passes its own table.
https://platform.openai.com/docs/guides/error-codes
"""

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from msgspec import Struct

from headgate.core.errors import GatewayError, InvalidRequest, UpstreamRejected
from headgate.dialects.base import ErrorResponse
from headgate.dialects.retry_after import retry_after
from headgate.dialects.sse import event

StatusTable = Mapping[str, tuple[int, str]]

STATUSES: StatusTable = MappingProxyType(
    {
        "invalid_request": (400, "invalid_request_error"),
        "invalid_credentials": (401, "invalid_request_error"),
        "permission_denied": (403, "permission_denied_error"),
        "unknown_model": (404, "not_found_error"),
        "insufficient_funds": (402, "insufficient_funds"),
        "body_too_large": (413, "invalid_request_error"),
        "unsupported_content_type": (415, "invalid_request_error"),
        "not_found": (404, "invalid_request_error"),
        "stream_not_found": (404, "not_found_error"),
        "method_not_allowed": (405, "invalid_request_error"),
        "idempotency_mismatch": (422, "invalid_request_error"),
        "idempotency_conflict": (409, "conflict_error"),
        "rate_limited": (429, "rate_limit_error"),
        "model_unavailable": (503, "server_error"),
        "overloaded": (503, "server_error"),
        "ledger_unavailable": (503, "server_error"),
        "upstream_failed": (500, "server_error"),
        "upstream_auth": (500, "server_error"),
        "upstream_unavailable": (503, "server_error"),
        "upstream_timeout": (504, "timeout_error"),
        "upstream_rate_limited": (429, "rate_limit_error"),
        "upstream_rejected": (400, "invalid_request_error"),
        "internal": (500, "server_error"),
    }
)
"""Status and type by GatewayError.kind."""

# The SDK retries 429 and 5xx twice by itself; money and our own key do not come back within seconds.
_NO_RETRY = frozenset({"insufficient_funds", "upstream_auth"})


class ErrorObject(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True, kw_only=True):
    error: ErrorObject


def error_body(error: GatewayError, statuses: StatusTable = STATUSES) -> bytes:
    """`{"error": {message, type, param, code}}` as JSON."""
    _, type_ = statuses[error.kind]
    return msgspec.json.encode(
        ErrorBody(
            error=ErrorObject(message=error.message, type=type_, param=error.param, code=error.code),
        )
    )


def error_event(error: GatewayError, statuses: StatusTable = STATUSES) -> bytes:
    """The same as a stream's event: the SDK raises on it."""
    return event(error_body(error, statuses))


def error_response(error: GatewayError, statuses: StatusTable = STATUSES) -> ErrorResponse:
    status, _ = statuses[error.kind]
    if isinstance(error, UpstreamRejected) and error.status == 422:
        status = 422
    headers = retry_after(error, status)
    if status == 401:
        headers += (("WWW-Authenticate", "Bearer"),)
    if error.kind in _NO_RETRY:
        headers += (("x-should-retry", "false"),)
    return ErrorResponse(status=status, body=error_body(error, statuses), headers=headers)


def stream_stopped(error: GatewayError | None) -> GatewayError:
    """The error that ends an aborted stream: why we stopped it, else that somebody did."""
    return error or GatewayError("The stream was stopped before it was complete.", code="stream_aborted")


def at_endpoint(error: InvalidRequest, endpoint: str) -> InvalidRequest:
    """The same error, naming the endpoint: `/v1/completion` and `/v1/completions` differ by a letter."""
    message = f"{error.message.removesuffix('.')} (POST {endpoint})."
    return InvalidRequest(message, param=error.param, code=error.code, allowed=error.allowed)
