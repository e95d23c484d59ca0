"""Everything that can go wrong, as one tree. Each dialect renders status and body from `kind`.

GatewayError
├── InvalidRequest            a field is malformed, out of range or unsupported (param, problem, allowed)
│   └── AmbiguousModel        a short name that several providers bear
├── InvalidCredentials        missing, unknown, expired or revoked: one generic message
├── PermissionDenied          known, but not for this
├── UnknownModel              no such name
├── InsufficientFunds         required and available in nano-USD
├── BodyTooLarge · UnsupportedContentType · NotFound · MethodNotAllowed · StreamNotFound
├── IdempotencyMismatch · IdempotencyConflict
├── RateLimited               retry_after seconds
├── ModelUnavailable          the model's provider has no key, or its file is broken
├── Overloaded                queue full, engine down, draining (retry_after seconds)
├── LedgerUnavailable         money cannot be recorded, so nothing is done
├── UpstreamError
│   ├── UpstreamFailed        broken, 5xx, 404, other 4xx
│   │   └── ConnectionFailed  not reached, or lost on the way
│   ├── UpstreamAuth          the upstream refuses *our* key
│   ├── UpstreamUnavailable   503 or 529
│   ├── UpstreamTimeout
│   ├── UpstreamRateLimited   429, with its retry_after
│   └── UpstreamRejected      400, 413, 422: it says our request is wrong
└── InternalError             our bug
"""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from headgate.core.completion import Usage


class GatewayError(Exception):
    """Base of all errors a client may see. `message` is safe to show."""

    kind: ClassVar[str] = "internal"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after


class InvalidRequest(GatewayError):
    """A field is wrong. `param` is the field's path, `allowed` what it may be, in words."""

    kind = "invalid_request"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, allowed: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.allowed = allowed


class InvalidCredentials(GatewayError):
    kind = "invalid_credentials"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Missing or invalid credentials.")


class PermissionDenied(GatewayError):
    kind = "permission_denied"
    code = "permission_denied"


class UnknownModel(GatewayError):
    kind = "unknown_model"
    code = "model_not_found"


class AmbiguousModel(InvalidRequest):
    """A short name that several providers bear; the message names the candidates."""


class InsufficientFunds(GatewayError):
    kind = "insufficient_funds"
    code = "insufficient_funds"

    def __init__(self, required_nano: int, available_nano: int) -> None:
        super().__init__("The account's available balance does not cover this request's greatest price.")
        self.required_nano = required_nano
        self.available_nano = available_nano


class BodyTooLarge(GatewayError):
    kind = "body_too_large"
    code = "body_too_large"


class UnsupportedContentType(GatewayError):
    kind = "unsupported_content_type"
    code = "unsupported_content_type"


class NotFound(GatewayError):
    kind = "not_found"
    code = "not_found"


class StreamNotFound(GatewayError):
    kind = "stream_not_found"
    code = "not_found"


class MethodNotAllowed(GatewayError):
    kind = "method_not_allowed"
    code = "method_not_allowed"


class IdempotencyMismatch(GatewayError):
    kind = "idempotency_mismatch"
    code = "idempotency_mismatch"


class IdempotencyConflict(GatewayError):
    kind = "idempotency_conflict"
    code = "idempotency_conflict"


class RateLimited(GatewayError):
    """`headers`: the x-ratelimit ones that go with the refusal."""

    kind = "rate_limited"
    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after: int = 1, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.headers = headers


class ModelUnavailable(GatewayError):
    kind = "model_unavailable"
    code = "model_unavailable"


class Overloaded(GatewayError):
    kind = "overloaded"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, retry_after=retry_after)


class LedgerUnavailable(GatewayError):
    kind = "ledger_unavailable"
    code = "ledger_unavailable"


class UpstreamError(GatewayError):
    """Something between us and the provider. `status` is the upstream's, where there was one; `usage` what it reported
    all the same. Not `asked`: we knew better than to ask."""

    kind = "upstream_failed"
    code = "upstream_error"
    status: int | None = None
    usage: "Usage | None" = None
    asked: bool = True


class UpstreamFailed(UpstreamError):
    pass


class ConnectionFailed(UpstreamFailed):
    """The upstream could not be reached, or the connection to it broke. To clients it just failed."""


class UpstreamAuth(UpstreamError):
    kind = "upstream_auth"
    code = "upstream_auth"


class UpstreamUnavailable(UpstreamError):
    kind = "upstream_unavailable"
    code = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    kind = "upstream_timeout"
    code = "upstream_timeout"


class UpstreamRateLimited(UpstreamError):
    kind = "upstream_rate_limited"
    code = "upstream_rate_limited"


class UpstreamRejected(UpstreamError):
    kind = "upstream_rejected"
    code = "upstream_rejected"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class InternalError(GatewayError):
    kind = "internal"
    code = "internal_error"

    def __init__(self, message: str = "Something went wrong on our side.") -> None:
        super().__init__(message)
