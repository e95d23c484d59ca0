"""Thiggle's completion API (seed 5): one prompt, one or several models at once, POST /v1/completion.

Beyond the seed it streams, in chunks of the OpenAI shape that name their model.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from types import MappingProxyType

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headgate.core.completion import (
    Answer,
    Chunk,
    CompletionRequest,
    FinishReason,
    ModelAnswer,
    Sampling,
    StreamEnd,
    Usage,
)
from headgate.core.errors import GatewayError, InvalidRequest, UpstreamTimeout
from headgate.dialects.base import (
    RequestContext,
    number,
    stops,
    token_limit,
)
from headgate.dialects.openai_errors import (
    STATUSES,
    StatusTable,
    error_event,
    stream_stopped,
)
from headgate.dialects.openai_form import OpenAIForm
from headgate.dialects.openai_wire import FINISH_REASONS, OBJECT, Number, choice_tail, chunk_head
from headgate.dialects.sse import DONE, event

ENDPOINT = "/v1/completion"

THIGGLE_STATUSES: StatusTable = MappingProxyType(
    {
        **STATUSES,
        "unknown_model": (400, "invalid_request_error"),
        "upstream_failed": (502, "server_error"),
        "upstream_auth": (502, "server_error"),
    }
)
"""Where its own table differs from the OpenAI form's."""

_encode = msgspec.json.Encoder().encode


class ThiggleBody(Struct, frozen=True, kw_only=True):
    """The body as sent; `max_new_tokens` is another name for `max_tokens`."""

    prompt: str | None = None
    model: str | list[str] | None = None
    max_tokens: Number | None = None
    max_new_tokens: Number | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    stream: bool | None = None


class TimedUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prediction_time_ms: int


class ChoiceError(Struct, frozen=True, kw_only=True):
    """Why one model of several failed; `type` as in the error form."""

    type: str
    message: str


class ThiggleChoice(Struct, frozen=True, kw_only=True):
    text: str
    created: int
    model: str
    finish_reason: FinishReason | None
    usage: TimedUsage
    error: ChoiceError | UnsetType = UNSET


class ThiggleCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: str = OBJECT
    created: str
    choices: tuple[ThiggleChoice, ...]
    usage: TimedUsage


class ChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    model: str
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None
    error: ChoiceError | UnsetType = UNSET


class ThiggleChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: str = OBJECT
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: TimedUsage | UnsetType = UNSET


class Thiggle(OpenAIForm[ThiggleBody]):
    name = "thiggle"
    endpoint = ENDPOINT
    body = ThiggleBody
    statuses = THIGGLE_STATUSES

    def _parse(self, wire: ThiggleBody, context: RequestContext) -> CompletionRequest:
        if wire.prompt is None:
            raise InvalidRequest("prompt is required.", param="prompt")
        max_tokens, max_tokens_param = token_limit(
            wire.max_tokens, wire.max_new_tokens, alias="max_new_tokens", low=1
        )
        stream = bool(wire.stream)
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=self._models(wire.model),
            prompts=(wire.prompt,),
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            sampling=Sampling(
                temperature=number(wire.temperature, "temperature", 0, 1),
                top_p=number(wire.top_p, "top_p", 0, 1),
                presence_penalty=number(wire.presence_penalty, "presence_penalty", -2, 2),
                frequency_penalty=number(wire.frequency_penalty, "frequency_penalty", -2, 2),
                stop=stops(wire.stop, "stop", self._caps.max_stops),
            ),
            stream=stream,
            partial_failure=True,
            app=context.principal.app,
        )

    def _models(self, model: str | list[str] | None) -> tuple[str, ...]:
        if model is None:
            raise InvalidRequest("model is required.", param="model")
        models = (model,) if isinstance(model, str) else tuple(model)
        most = self._caps.max_models
        if not 1 <= len(models) <= most or not all(models):
            allowed = f"a model's name or a list of 1 to {most} names"
            raise InvalidRequest(f"model must be {allowed}.", param="model", allowed=allowed)
        return models

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        created = datetime.fromtimestamp(request.created, UTC)
        return _encode(
            ThiggleCompletion(
                id=request.answer_id,
                created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
                choices=tuple(_choice(model) for model in answer.models),
                usage=_timed(answer.usage, answer.elapsed_s),
            )
        )

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> "ThiggleStream":
        return ThiggleStream(request, served or request.models)


class ThiggleStream:
    """Renders one stream: chunks of all models as they come, their summed usage, then `[DONE]`."""

    def __init__(self, request: CompletionRequest, served: Sequence[str]) -> None:
        self._request = request
        self._served = served
        self._heads: dict[int, bytes] = {}

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        parts: list[bytes] = []
        for chunk in batch:
            if chunk.index < 0:  # usage only
                continue
            if chunk.error is None:
                parts += (self._head(chunk.index), _encode(chunk.text), _TAILS[chunk.finish_reason])
            else:
                parts.append(self._failed(chunk.index, chunk.finish_reason, chunk.error))
        return b"".join(parts)

    def _head(self, index: int) -> bytes:
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = _chunk_head(self._request, index, self._served[index])
        return head

    def _failed(self, index: int, reason: FinishReason | None, error: GatewayError) -> bytes:
        model = self._request.models[index]
        choice = ChunkChoice(
            index=index,
            model=model,
            text="",
            finish_reason=reason or _failure(error),
            error=_choice_error(error),
        )
        return event(_encode(self._chunk(model, (choice,))))

    def _chunk(
        self, model: str, choices: tuple[ChunkChoice, ...], usage: TimedUsage | UnsetType = UNSET
    ) -> ThiggleChunk:
        request = self._request
        return ThiggleChunk(
            id=request.answer_id, created=request.created, model=model, choices=choices, usage=usage
        )

    def end(self, end: StreamEnd) -> bytes:
        if end.kind == "aborted":
            return self.error(stream_stopped(end.error))
        answer = end.answer
        failures = [model.error for model in answer.models if model.error is not None]
        if failures and len(failures) == len(answer.models):
            # Nothing was completed, so the stream must not look as if something were.
            return self.error(failures[0])
        names = dict.fromkeys(model.model for model in answer.models if model.error is None)
        usage = _timed(answer.usage, answer.elapsed_s)
        return event(_encode(self._chunk(", ".join(names), (), usage))) + DONE

    def error(self, error: GatewayError) -> bytes:
        return error_event(error, THIGGLE_STATUSES)


_TAILS = MappingProxyType({reason: choice_tail(reason) + b"]}\n\n" for reason in FINISH_REASONS})


def _chunk_head(request: CompletionRequest, index: int, model: str) -> bytes:
    """A chunk's bytes up to its text; the choice names its model, as it does in the blocking answer."""
    opened = chunk_head(request.answer_id, request.created, model)
    return b'data: %b{"index":%d,"model":%b,"text":' % (opened, index, _encode(model))


def _timed(usage: Usage, elapsed_s: float) -> TimedUsage:
    return TimedUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prediction_time_ms=round(elapsed_s * 1000),
    )


def _choice(answer: ModelAnswer) -> ThiggleChoice:
    usage = _timed(answer.charge.usage, answer.elapsed_s)
    if answer.error is not None:
        return ThiggleChoice(
            text="",
            created=answer.created,
            model=answer.model,
            finish_reason=_failure(answer.error),
            usage=usage,
            error=_choice_error(answer.error),
        )
    (choice,) = answer.choices
    return ThiggleChoice(
        text=choice.text,
        created=answer.created,
        model=answer.model,
        finish_reason=choice.finish_reason,
        usage=usage,
    )


def _failure(error: GatewayError) -> FinishReason:
    return "timeout" if isinstance(error, UpstreamTimeout) else "error"


def _choice_error(error: GatewayError) -> ChoiceError:
    _, type_ = THIGGLE_STATUSES[error.kind]
    return ChoiceError(type=type_, message=error.message)
