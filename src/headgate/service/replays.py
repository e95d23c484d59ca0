"""Keyed requests: what is kept of one, and how it is given again.

A replay is the answer itself, rendered once more, so it is the same byte for byte; a stream comes as one again, each
choice in one piece.
"""

from typing import Any, Literal

import msgspec
import structlog
from msgspec import structs

from headgate.core import errors, money
from headgate.core.accounts import Kept, Settlement
from headgate.core.completion import (
    Answer,
    Chunk,
    CompletionRequest,
    FinishReason,
    Outcome,
    Sampling,
    StreamEnd,
    ToolCallPiece,
)
from headgate.core.errors import GatewayError, IdempotencyConflict, Overloaded
from headgate.service.meter import Meter
from headgate.service.streams import Running, RunningStream

log = structlog.get_logger("headgate.replays")

MOST_SCORES = 10_000
"""Log probabilities of an answer that is kept; encoding more would hold up everybody else."""


class _Error(msgspec.Struct):
    """An error as it is kept: its class, and whatever its kind has."""

    name: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    status: int | None = None
    allowed: str | None = None
    required_nano: int = 0
    available_nano: int = 0


def outcome_of(answer: Answer, meter: Meter, running: Running, failure: GatewayError | None) -> bytes | None:
    """What is kept of a keyed request; nothing of one that came to nothing and cost nothing: it may be tried again.

    Its balances are those of the settling transaction, which keeps them beside it.
    """
    charged = any(model.charge.price for model in answer.models)
    produced = answer.request.stream and meter.produced
    if (failure is not None or running.stop_reason is not None) and not (charged or produced):
        return None
    kind: Literal["completed", "aborted", "failed"] = "aborted" if running.stop_reason else "completed"
    if answer.request.stream:
        delivered = tuple(
            structs.replace(told, choices=model.choices(answer.request))
            for told, model in zip(answer.models, meter.models, strict=True)
        )
        answer = structs.replace(answer, models=delivered)
    return encode(
        Outcome(
            kind=kind if failure is None else "failed",
            answer=answer,
            error=failure or reason_to_stop(running),
            providers=running.providers,
            served=tuple(running.served),
        )
    )


async def play(kept: Kept, running: Running) -> StreamEnd:
    """Give the answer of the same request again; nobody is asked and nothing is charged.

    Raises what the stream failed with, and IdempotencyConflict where there is nothing to give.
    """
    outcome = decode(kept)
    answer = outcome.answer
    running.replayed = answer.request
    running.admitted = True
    running.providers = outcome.providers
    running.served[:] = outcome.served
    if isinstance(running, RunningStream):
        await running.put(chunks(answer))
    elif outcome.kind != "completed":
        raise not_kept(kept)
    if outcome.kind == "failed" and outcome.error is not None:
        raise outcome.error
    kind: Literal["completed", "aborted"] = "completed" if outcome.kind == "completed" else "aborted"
    return StreamEnd(kind=kind, answer=answer, error=outcome.error)


def reason_to_stop(running: Running) -> GatewayError | None:
    """Why we stopped it; None where the client wanted it."""
    return Overloaded("The gateway is shutting down.") if running.stop_reason == "draining" else None


def encode(outcome: Outcome) -> bytes | None:
    """The outcome without what was asked: a replay does not need it, and words of clients are not kept.

    None for one that is too large or too odd to be kept; that must not keep its request from being settled.
    """
    answer = outcome.answer
    scores = sum(len(choice.logprobs or ()) for choice in answer.choices)
    if scores * (1 + (answer.request.logprobs or 0)) > MOST_SCORES:
        return None
    kept = structs.replace(answer, request=_without_words(answer.request))
    try:
        return _encoder.encode(structs.replace(outcome, answer=kept))
    except Exception:
        log.exception("an outcome could not be kept", request_id=answer.request.request_id)
        return None


def decode(kept: Kept) -> Outcome:
    """What is replayed. IdempotencyConflict where the outcome could not be kept."""
    if kept.outcome is not None:
        try:
            outcome = _decoder.decode(kept.outcome)
        except msgspec.MsgspecError:
            pass  # another version's
        else:
            return structs.replace(outcome, answer=settled(outcome.answer, kept.settlement))
    raise not_kept(kept)


def not_kept(kept: Kept) -> IdempotencyConflict:
    """What is told of a request that was charged and has no answer to give again."""
    price = money.usd_text(kept.settlement.price)
    return IdempotencyConflict(
        f"The request with this Idempotency-Key was charged {price} USD; it left no answer to be given again.",
        param="Idempotency-Key",
    )


def settled(answer: Answer, settlement: Settlement) -> Answer:
    """The answer with what its settlement came to."""
    return structs.replace(
        answer,
        price=settlement.price,
        balance_before=settlement.balance_before,
        balance_after=settlement.balance_after,
    )


def chunks(answer: Answer) -> list[Chunk]:
    """All of the answer's choices, a piece each; of several models those that failed end as they did."""
    found: list[Chunk] = []
    for position, model in enumerate(answer.models):
        for choice in model.choices:
            calls = tuple(
                ToolCallPiece(place, call.arguments, call.id, call.name)
                for place, call in enumerate(choice.tool_calls)
            )
            reason: FinishReason | None = choice.finish_reason if model.error is None else None
            found.append(
                Chunk(choice.index, choice.text, reason, logprobs=choice.logprobs, tool_calls=calls or None)
            )
        if model.error is not None and len(answer.models) > 1:
            reason = "timeout" if isinstance(model.error, errors.UpstreamTimeout) else "error"
            found.append(Chunk(position, finish_reason=reason, error=model.error))
    return found


def _without_words(request: CompletionRequest) -> CompletionRequest:
    return structs.replace(
        request,
        prompts=None,
        messages=None,
        suffix=None,
        tools=None,
        response_format=None,
        sampling=Sampling(),
        user=None,
        idempotency=None,
    )


def _encoded(value: Any) -> Any:
    if not isinstance(value, GatewayError):
        raise NotImplementedError(type(value))
    fields = {name: getattr(value, name, None) for name in _Error.__struct_fields__[1:]}
    given = {name: field for name, field in fields.items() if field is not None}
    return _Error(name=type(value).__name__, **given)


def _decoded(kind: type, value: Any) -> Any:
    if kind is not GatewayError:
        raise NotImplementedError(kind)
    kept = msgspec.convert(value, _Error)
    found = getattr(errors, kept.name, None)
    is_kind = isinstance(found, type) and issubclass(found, GatewayError)
    of: type[GatewayError] = found if is_kind and found is not None else errors.InternalError
    error = of.__new__(of)
    GatewayError.__init__(error, kept.message, param=kept.param, code=kept.code, retry_after=kept.retry_after)
    # What the classes' own constructors would have set.
    error.__dict__ |= {
        "status": kept.status,
        "allowed": kept.allowed,
        "required_nano": kept.required_nano,
        "available_nano": kept.available_nano,
        "headers": (),
    }
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=_encoded)
_decoder = msgspec.msgpack.Decoder(Outcome, dec_hook=_decoded)
