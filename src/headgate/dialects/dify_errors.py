"""Errors as Dify says them: `{code, message, status}`."""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from headgate.core.errors import GatewayError
from headgate.dialects.base import ErrorResponse
from headgate.dialects.retry_after import retry_after

ERRORS: Mapping[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_param"),
    "invalid_credentials": (401, "unauthorized"),
    "permission_denied": (403, "forbidden"),
    "unknown_model": (400, "app_unavailable"),
    "insufficient_funds": (400, "provider_quota_exceeded"),
    "body_too_large": (413, "invalid_param"),
    "unsupported_content_type": (415, "invalid_param"),
    "not_found": (404, "not_found"),
    "stream_not_found": (404, "not_found"),
    "method_not_allowed": (405, "method_not_allowed"),
    "idempotency_mismatch": (400, "invalid_param"),
    "idempotency_conflict": (409, "invalid_param"),
    "rate_limited": (429, "too_many_requests"),
    "model_unavailable": (400, "provider_not_initialize"),
    "overloaded": (503, "completion_request_error"),
    "ledger_unavailable": (503, "internal_server_error"),
    "upstream_failed": (400, "completion_request_error"),
    "upstream_auth": (400, "completion_request_error"),
    "upstream_unavailable": (503, "completion_request_error"),
    "upstream_timeout": (504, "completion_request_error"),
    "upstream_rate_limited": (429, "too_many_requests"),
    "upstream_rejected": (400, "invalid_param"),
    "internal": (500, "internal_server_error"),
}
"""Status and code of every error kind."""

UPLOAD_CODES = frozenset({"no_file_uploaded", "too_many_files", "file_too_large", "unsupported_file_type"})
"""What Dify calls an upload's own errors; the status is that of their kind."""

CHALLENGE = ("WWW-Authenticate", 'Bearer realm="api"')


class ErrorBody(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    status: int


def status_and_code(error: GatewayError) -> tuple[int, str]:
    status, code = ERRORS[error.kind]
    return status, error.code if error.code in UPLOAD_CODES else code


def render_error(error: GatewayError) -> ErrorResponse:
    status, code = status_and_code(error)
    headers = (CHALLENGE,) if status == 401 else retry_after(error, status)
    body = ErrorBody(code=code, message=error.message, status=status)
    return ErrorResponse(status=status, body=msgspec.json.encode(body), headers=headers)
