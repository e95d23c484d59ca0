"""Keyed requests: what is kept of one, and how it is given again.

A replay is the answer itself, rendered once more, so it is the same byte for byte; a stream comes as one again, each
choice in one piece.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import structs

from headgate.core import errors, money
from headgate.core.accounts import Kept, Settlement
from headgate.core.completion import Answer, Chunk, CompletionRequest, Outcome, ToolCallPiece
from headgate.core.errors import GatewayError, IdempotencyConflict, RateLimited, UpstreamRejected

_KINDS: Mapping[str, type[GatewayError]] = {
    kind.kind: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GatewayError) and "kind" in vars(kind)
}


class _Error(msgspec.Struct):
    """An error as it is kept."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None


def encode(outcome: Outcome) -> bytes:
    """The outcome without what was asked: a replay does not need it, and words of clients are not kept."""
    answer = structs.replace(outcome.answer, request=_without_words(outcome.answer.request))
    return _encoder.encode(structs.replace(outcome, answer=answer))


def decode(kept: Kept) -> Outcome:
    """What is replayed. IdempotencyConflict where the outcome could not be kept."""
    if kept.outcome is not None:
        try:
            outcome = _decoder.decode(kept.outcome)
        except msgspec.MsgspecError:
            pass  # another version's
        else:
            return structs.replace(outcome, answer=settled(outcome.answer, kept.settlement))
    price = money.usd_text(kept.settlement.price)
    raise IdempotencyConflict(
        f"The request with this Idempotency-Key was charged {price} USD, but its answer could not be kept.",
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
    """All of the answer's choices, a piece each."""
    return [
        Chunk(
            choice.index,
            choice.text,
            choice.finish_reason,
            logprobs=choice.logprobs,
            tool_calls=tuple(
                ToolCallPiece(position, call.arguments, call.id, call.name)
                for position, call in enumerate(choice.tool_calls)
            )
            or None,
        )
        for choice in answer.choices
    ]


def _without_words(request: CompletionRequest) -> CompletionRequest:
    return structs.replace(
        request, prompts=None, messages=None, suffix=None, tools=None, response_format=None, idempotency=None
    )


def _encoded(value: Any) -> Any:
    if isinstance(value, GatewayError):
        return _Error(
            kind=value.kind,
            message=value.message,
            param=value.param,
            code=value.code,
            retry_after=value.retry_after,
        )
    raise NotImplementedError(type(value))


def _decoded(kind: type, value: Any) -> Any:
    if kind is not GatewayError:
        raise NotImplementedError(kind)
    kept = msgspec.convert(value, _Error)
    error = GatewayError.__new__(_KINDS.get(kept.kind, errors.InternalError))
    GatewayError.__init__(error, kept.message, param=kept.param, code=kept.code, retry_after=kept.retry_after)
    if isinstance(error, RateLimited):
        error.headers = ()
    if isinstance(error, UpstreamRejected):
        error.status = 400
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=_encoded)
_decoder = msgspec.msgpack.Decoder(Outcome, dec_hook=_decoded)
