"""The genstack dialect (seed 1): a conversation in, text and credits out.

`POST /` and `POST /stream` share one body, so there are two instances of one class; the path a client posts to
says whether the answer streams. The credential is a JWT inside the body.
"""

import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal

import msgspec

from headgate.core import money
from headgate.core.completion import Answer, Chunk, CompletionRequest, Message, Sampling, StreamEnd
from headgate.core.errors import GatewayError, InsufficientFunds, InvalidRequest
from headgate.core.money import Credits
from headgate.dialects.base import ErrorResponse, RequestContext, decode_body, integer
from headgate.dialects.genstack_wire import (
    ROLES,
    AbortedEvent,
    CompletedEvent,
    ErrorBody,
    ErrorEnvelope,
    ErrorType,
    ShutdownRequest,
    WireCredential,
    WireMessage,
    WireRequest,
    WireResponse,
    WireUsage,
)
from headgate.dialects.retry_after import retry_after
from headgate.dialects.sse import COMMENT_PING, event

ERRORS: Mapping[str, tuple[int, ErrorType]] = {
    "invalid_request": (400, "InvalidRequest"),
    "invalid_credentials": (401, "InvalidCredentials"),
    "permission_denied": (403, "InvalidCredentials"),
    "unknown_model": (400, "InvalidRequest"),
    "insufficient_funds": (402, "InsufficientFunds"),
    "body_too_large": (413, "InvalidRequest"),
    "unsupported_content_type": (415, "InvalidRequest"),
    "not_found": (404, "InvalidRequest"),
    "stream_not_found": (404, "InvalidRequest"),
    "method_not_allowed": (405, "InvalidRequest"),
    "idempotency_mismatch": (422, "InvalidRequest"),
    "idempotency_conflict": (409, "InvalidRequest"),
    "rate_limited": (429, "GatewayError"),
    "model_unavailable": (503, "GatewayError"),
    "overloaded": (503, "GatewayError"),
    "ledger_unavailable": (503, "InternalError"),
    "upstream_failed": (502, "GatewayError"),
    "upstream_auth": (502, "GatewayError"),
    "upstream_unavailable": (503, "GatewayError"),
    "upstream_timeout": (504, "GatewayError"),
    "upstream_rate_limited": (429, "GatewayError"),
    "upstream_rejected": (400, "InvalidRequest"),
    "internal": (500, "InternalError"),
}
"""Status and type of every error kind."""

SHUTDOWN_DONE = b'{"success":true}'
SHUTDOWN_ENDPOINT = "/stream/shutdown"
ROLES_IN_WORDS = "system, user or assistant"
MARGIN_IN_WORDS = "a number from 0 to 99 with at most four decimals"
MARGIN_STEP = Decimal("0.0001")

_encoder = msgspec.json.Encoder()
_credential_decoder = msgspec.json.Decoder(WireCredential)


class Genstack:
    """`POST /` (`streams` False) or `POST /stream` (True). One request is one choice."""

    name = "genstack"
    ping = COMMENT_PING

    def __init__(self, credits: Credits, *, streams: bool) -> None:
        self._credits = credits
        self._streams = streams
        self._endpoint = "/stream" if streams else "/"

    def decode(self, body: bytes) -> WireRequest:
        return decode_body(body, WireRequest, endpoint=self._endpoint)

    def credential(self, authorization: str | None, body: bytes) -> str | None:
        """`genstackToken`. One that is not a string is a bad credential, not a missing one: its text form."""
        try:
            return _token(_credential_decoder.decode(body).genstack_token)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def decode_shutdown(self, body: bytes) -> str:
        """The stream id of `POST /stream/shutdown`. InvalidRequest when it is missing.

        A token is checked before the fields: ask `credential` first.
        """
        wire = decode_body(body, ShutdownRequest, endpoint=SHUTDOWN_ENDPOINT)
        if not wire.stream_id:
            raise InvalidRequest(f"streamId is required (POST {SHUTDOWN_ENDPOINT}).", param="streamId")
        return wire.stream_id

    def parse(self, wire: WireRequest, context: RequestContext) -> CompletionRequest:
        if not wire.model:
            raise InvalidRequest("model is required.", param="model", allowed="the name of a model")
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(wire.model,),
            messages=_messages(wire.messages),
            plain=True,
            max_tokens_param="maxOutputTokens",
            max_tokens=integer(wire.max_output_tokens, "maxOutputTokens", 1),
            sampling=Sampling(temperature=_temperature(wire.temperature)),
            stream=self._streams,
            developer_id=wire.developer_id,
            application_id=wire.application_id,
            margin_override=_margin(bytes(wire.override_gross_margin_percent)),
        )

    def stream_headers(self, request: CompletionRequest) -> tuple[tuple[str, str], ...]:
        return (("X-Stream-Id", request.stream_id),)

    def render(self, answer: Answer) -> bytes:
        return _encoder.encode(self.response(answer))

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> "GenstackRenderer":
        return GenstackRenderer(self)

    def response(self, answer: Answer) -> WireResponse:
        """The answer as blocking clients get it, and as the last event of a stream carries it."""
        served = answer.models[0]
        charge = served.charge
        return WireResponse(
            model=served.model,
            output=served.choices[0].text if served.choices else "",
            usage=WireUsage(
                prompt_tokens=charge.usage.prompt_tokens,
                completion_tokens=charge.usage.completion_tokens,
                input_cost=money.femto_text(charge.exact_input),
                output_cost=money.femto_text(charge.exact_output),
                price=money.usd_text(answer.price),
                gross_margin_percent=money.text(money.margin_percent(charge.margin)),
            ),
            balance_before=self._credits.text(answer.balance_before),
            balance_after=self._credits.text(answer.balance_after),
        )

    def render_error(self, error: GatewayError) -> ErrorResponse:
        status, kind = ERRORS[error.kind]
        body = ErrorBody(type=kind, message=error.message, details=self._details(error, kind))
        return ErrorResponse(
            status=status,
            body=_encoder.encode(ErrorEnvelope(error=body)),
            headers=retry_after(error, status),
        )

    def _details(self, error: GatewayError, kind: ErrorType) -> dict[str, object]:
        if isinstance(error, InsufficientFunds):
            return {
                "required": self._credits.text(error.required_nano),
                "available": self._credits.text(error.available_nano),
            }
        if kind != "InvalidRequest":
            return {}
        allowed = error.allowed if isinstance(error, InvalidRequest) else None
        return {"field": error.param, "problem": error.message, "allowed": allowed}


class GenstackRenderer:
    """Token events, then exactly one `completed`, `aborted` or error event."""

    def __init__(self, dialect: Genstack) -> None:
        self._dialect = dialect

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        encode = _encoder.encode
        return b"".join([b'data: {"token":' + encode(chunk.text) + b"}\n\n" for chunk in batch if chunk.text])

    def end(self, end: StreamEnd) -> bytes:
        response = self._dialect.response(end.answer)
        if end.kind == "completed":
            return event(_encoder.encode(CompletedEvent(response=response)))
        return event(_encoder.encode(AbortedEvent(response=response)))

    def error(self, error: GatewayError) -> bytes:
        return event(self._dialect.render_error(error).body)


def render_health(env: str, ui_url: str) -> bytes:
    """The body of `GET /` when the database answered."""
    return _encoder.encode({"status": "healthy", "env": env, "ui": ui_url})


def _token(value: object) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else str(value)


def _messages(wire: tuple[WireMessage, ...]) -> tuple[Message, ...]:
    if not wire:
        raise InvalidRequest(
            "messages must hold at least one message.", param="messages", allowed="a non-empty array"
        )
    messages = []
    for index, message in enumerate(wire):
        role = message.role
        if role not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role must be {ROLES_IN_WORDS}.",
                param=f"messages[{index}].role",
                allowed=ROLES_IN_WORDS,
            )
        messages.append(Message(role=role, content=message.content))
    return tuple(messages)


def _temperature(value: float | None) -> float | None:
    # Only the sign: how high it may be is the model's own affair, and the service knows the model.
    if value is None:
        return None
    if value < 0:
        allowed = "a number of at least 0"
        raise InvalidRequest(f"temperature must be {allowed}.", param="temperature", allowed=allowed)
    return float(min(value, sys.float_info.max))


def _margin(raw: bytes) -> Decimal | None:
    """The margin in percent, exactly as written; `raw` is its JSON, b"" or b"null" when not given."""
    if not raw or raw == b"null":
        return None
    error = InvalidRequest(
        f"overrideGrossMarginPercent must be {MARGIN_IN_WORDS}.",
        param="overrideGrossMarginPercent",
        allowed=MARGIN_IN_WORDS,
    )
    if raw[:1] not in b"-0123456789":
        raise error
    try:
        percent = money.decimal(raw.decode("ascii"))
    except ValueError:
        raise error from None
    # The range first: rounding an absurd number would overflow.
    if not 0 <= percent <= 99 or percent != percent.quantize(MARGIN_STEP):
        raise error
    return money.plain(percent.quantize(MARGIN_STEP))
