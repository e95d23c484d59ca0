"""What genstack clients send and get, field by field; OpenAPI schemas come from the same structs."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

from headgate.core.completion import Role

ErrorType = Literal[
    "InvalidRequest", "InsufficientFunds", "InvalidCredentials", "GatewayError", "InternalError"
]

ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class WireCredential(Struct, frozen=True, kw_only=True, rename="camel"):
    """Finds the token in a body whatever its other fields hold, without building them."""

    genstack_token: Any = None


class WireMessage(Struct, frozen=True, kw_only=True, gc=False):
    # A plain string, so that the error can say what a role may be.
    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str


class WireRequest(Struct, frozen=True, kw_only=True, rename="camel"):
    """The body of `POST /` and `POST /stream`."""

    genstack_token: str | None = None
    messages: tuple[WireMessage, ...]
    model: str
    developer_id: str | None = None
    application_id: str | None = None
    # Wide on purpose: an integer too long for a float is out of range, and is told which range.
    temperature: Annotated[int | float | None, Meta(extra_json_schema={"minimum": 0})] = None
    max_output_tokens: Annotated[int | float | None, Meta(extra_json_schema={"minimum": 1})] = None
    # Raw, because a float would lose the decimals and a Decimal field would take strings.
    override_gross_margin_percent: Annotated[
        Raw, Meta(extra_json_schema={"type": "number", "minimum": 0, "maximum": 99})
    ] = field(default_factory=Raw)


class ShutdownRequest(Struct, frozen=True, kw_only=True, rename="camel"):
    """The body of `POST /stream/shutdown`."""

    stream_id: str


class WireUsage(Struct, frozen=True, kw_only=True, rename="camel"):
    """Costs and price in USD, exact decimal strings."""

    type: Literal["completion"] = "completion"
    prompt_tokens: int
    completion_tokens: int
    input_cost: str
    output_cost: str
    price: str
    gross_margin_percent: str


class WireResponse(Struct, frozen=True, kw_only=True, rename="camel"):
    """An answer; balances in credits, exact decimal strings."""

    model: str
    output: str
    usage: WireUsage
    balance_before: str
    balance_after: str


class CompletedEvent(Struct, frozen=True, kw_only=True):
    completed: bool = True
    response: WireResponse


class AbortedEvent(Struct, frozen=True, kw_only=True):
    aborted: bool = True
    response: WireResponse


class ErrorBody(Struct, frozen=True, kw_only=True):
    type: ErrorType
    message: str
    details: dict[str, Any]


class ErrorEnvelope(Struct, frozen=True, kw_only=True):
    error: ErrorBody
