"""The frame that completions, chat and Thiggle share: how a body becomes a request, and how a stream opens and ends."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from headgate.core.completion import CompletionRequest, StreamEnd
from headgate.core.errors import GatewayError, InvalidRequest
from headgate.dialects.base import BearerDialect, Caps, ErrorResponse, RequestContext, decode_body
from headgate.dialects.openai_errors import (
    STATUSES,
    StatusTable,
    at_endpoint,
    error_event,
    error_response,
    stream_stopped,
)
from headgate.dialects.openai_wire import chunk_close, chunk_head, whole_answer
from headgate.dialects.sse import DONE, event

W = TypeVar("W")


class OpenAIForm(BearerDialect, ABC, Generic[W]):
    """A dialect whose errors have OpenAI's form and name its endpoint."""

    endpoint: str
    body: type[W]
    statuses: StatusTable = STATUSES

    def __init__(self, caps: Caps) -> None:
        self._caps = caps

    def decode(self, body: bytes) -> W:
        return decode_body(body, self.body, endpoint=self.endpoint)

    def parse(self, wire: W, context: RequestContext) -> CompletionRequest:
        try:
            return self._parse(wire, context)
        except InvalidRequest as error:
            raise at_endpoint(error, self.endpoint) from None

    @abstractmethod
    def _parse(self, wire: W, context: RequestContext) -> CompletionRequest: ...

    def render_error(self, error: GatewayError) -> ErrorResponse:
        return error_response(error, self.statuses)


class OpenAIStream:
    """One stream but for its chunks: how each opens and closes, the usage where it is asked for, then `[DONE]`."""

    def __init__(self, request: CompletionRequest, model: str, id_: str, object_: str) -> None:
        self._request = request
        self._id = id_
        self._object = object_
        # What is the same in every chunk is encoded once; a chunk costs one string and three joins.
        self._open = b"data: " + chunk_head(id_, request.created, model, object_)
        self._close = chunk_close(request.include_usage)

    def end(self, end: StreamEnd) -> bytes:
        if end.kind == "aborted":
            return self.error(stream_stopped(end.error))
        if not self._request.include_usage:
            return DONE
        return event(whole_answer(end.answer, self._id, self._object, ())) + DONE

    def error(self, error: GatewayError) -> bytes:
        return error_event(error)
