"""What clients of the chat form send and get: the types field by field, and the stream."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, field

from headgate.core.completion import Chunk, CompletionRequest, FinishReason, StreamEnd
from headgate.core.errors import GatewayError
from headgate.dialects.openai_errors import error_event, stream_stopped
from headgate.dialects.openai_logprobs import ChatLogprobs, chat_logprobs
from headgate.dialects.openai_wire import (
    FINISH_REASONS,
    Number,
    SamplingBody,
    UsageObject,
    choice_tail,
    chunk_close,
    chunk_head,
    finish_tail,
    usage_object,
)
from headgate.dialects.sse import DONE, event

CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"

_encode = msgspec.json.Encoder().encode


class ContentPart(Struct, frozen=True, kw_only=True, gc=False):
    """One part of a message's content. Only text is taken; what else a part may hold is not looked at."""

    type: Annotated[str | None, Meta(extra_json_schema={"enum": ["text"]})] = None
    text: str | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message. The fields after `content` are known in order to refuse them."""

    # A plain string, so that the error can say what a role may be.
    role: Annotated[
        str | None, Meta(extra_json_schema={"enum": ["system", "developer", "user", "assistant"]})
    ] = None
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


class SchemaFormat(Struct, frozen=True, kw_only=True):
    """`schema` stays JSON text: it is the provider that reads it."""

    name: str | None = None
    description: str | None = None
    schema: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(default_factory=Raw)
    strict: bool | None = None


class FormatBody(Struct, frozen=True, kw_only=True):
    type: Annotated[str | None, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})] = (
        None
    )
    json_schema: SchemaFormat | None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions` as sent. The fields after `top_logprobs` are known in order to
    refuse what they ask for."""

    messages: list[ChatMessage] | None = None
    logprobs: bool | None = None
    response_format: FormatBody | None = None
    top_logprobs: Number | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: bool | None = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class AnswerMessage(Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: UsageObject


class UsageChunk(Struct, frozen=True, kw_only=True):
    """The last chunk of a stream that includes its usage."""

    id: str
    object: Literal["chat.completion.chunk"] = CHUNK
    created: int
    model: str
    choices: tuple[()] = ()
    usage: UsageObject


class ChatStream:
    """Renders one stream: for each choice its role, its content as it comes, its finish reason; then `[DONE]`."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        # What is the same in every chunk is encoded once; a chunk costs one string and three joins.
        self._open = b"data: " + chunk_head(completion_id(request), request.created, request.models[0], CHUNK)
        self._close = chunk_close(request.include_usage)
        self._heads: dict[int, bytes] = {}
        self._tail = b"}" + choice_tail(None) + self._close
        self._scored_tail = finish_tail(None) + self._close
        self._finishes = {reason: b"{}" + choice_tail(reason) + self._close for reason in FINISH_REASONS}

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        most = self._request.logprobs
        parts: list[bytes] = []
        for chunk in batch:
            if chunk.index < 0:  # usage only
                continue
            head = self._heads.get(chunk.index)
            if head is None:
                head = self._heads[chunk.index] = self._open + b'{"index":%d,"delta":' % chunk.index
                parts += (head, b'{"role":"assistant","content":""', self._tail)
            scores = chat_logprobs(chunk.logprobs, most) if most is not None and chunk.logprobs else None
            if scores is not None and scores.content:
                logprobs = b'},"logprobs":' + _encode(scores)
                parts += (head, b'{"content":', _encode(chunk.text), logprobs, self._scored_tail)
            elif chunk.text:
                parts += (head, b'{"content":', _encode(chunk.text), self._tail)
            if chunk.finish_reason is not None:
                parts += (head, self._finishes[chunk.finish_reason])
        return b"".join(parts)

    def end(self, end: StreamEnd) -> bytes:
        if end.kind == "aborted":
            return self.error(stream_stopped(end.error))
        if not self._request.include_usage:
            return DONE
        request = self._request
        last = UsageChunk(
            id=completion_id(request),
            created=request.created,
            model=end.answer.models[0].model,
            usage=usage_object(end.answer.usage),
        )
        return event(_encode(last)) + DONE

    def error(self, error: GatewayError) -> bytes:
        return error_event(error)


def completion_id(request: CompletionRequest) -> str:
    return f"chatcmpl-{request.answer_id.replace('-', '')}"
