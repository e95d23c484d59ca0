"""What each dialect says when an upstream fails: the contract's status table, from "upstream failed" down."""

from msgspec import Struct
from tests.support.doors import DialectName

Told = tuple[int, str] | tuple[int, str, str]
"""Status and kind; in the OpenAI form also the code, where the contract fixes it."""


class Cause(Struct, frozen=True, kw_only=True):
    """One row. chat is as openai, and so is thiggle where it is None. `kind` is what the usage row's `error` names."""

    kind: str
    openai: Told
    genstack: Told
    dify: Told
    thiggle: Told | None = None

    def told(self, dialect: DialectName) -> Told:
        if dialect == "genstack":
            return self.genstack
        if dialect == "dify":
            return self.dify
        return self.thiggle if dialect == "thiggle" and self.thiggle is not None else self.openai


FAILED = Cause(
    kind="upstream_failed",
    openai=(500, "server_error", "upstream_error"),
    thiggle=(502, "server_error", "upstream_error"),
    genstack=(502, "GatewayError"),
    dify=(400, "completion_request_error"),
)
REFUSED_OUR_KEY = Cause(
    kind="upstream_auth",
    openai=(500, "server_error", "upstream_auth"),
    thiggle=(502, "server_error", "upstream_auth"),
    genstack=(502, "GatewayError"),
    dify=(400, "completion_request_error"),
)
UNAVAILABLE = Cause(
    kind="upstream_unavailable",
    openai=(503, "server_error"),
    genstack=(503, "GatewayError"),
    dify=(503, "completion_request_error"),
)
TIMED_OUT = Cause(
    kind="upstream_timeout",
    openai=(504, "timeout_error"),
    genstack=(504, "GatewayError"),
    dify=(504, "completion_request_error"),
)
LIMITED = Cause(
    kind="upstream_rate_limited",
    openai=(429, "rate_limit_error"),
    genstack=(429, "GatewayError"),
    dify=(429, "too_many_requests"),
)
REJECTED = Cause(
    kind="upstream_rejected",
    openai=(400, "invalid_request_error", "upstream_rejected"),
    genstack=(400, "InvalidRequest"),
    dify=(400, "invalid_param"),
)
REJECTED_422 = Cause(
    kind="upstream_rejected",
    openai=(422, "invalid_request_error", "upstream_rejected"),
    genstack=(400, "InvalidRequest"),
    dify=(400, "invalid_param"),
)

BY_STATUS = {
    400: REJECTED,
    401: REFUSED_OUR_KEY,
    402: REFUSED_OUR_KEY,
    403: REFUSED_OUR_KEY,
    404: FAILED,
    408: FAILED,
    409: FAILED,
    413: REJECTED,
    418: FAILED,
    422: REJECTED_422,
    429: LIMITED,
    500: FAILED,
    502: FAILED,
    503: UNAVAILABLE,
    529: UNAVAILABLE,
}
