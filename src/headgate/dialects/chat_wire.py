"""What clients of the chat form send and get, field by field."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, field

from headgate.core.completion import CompletionRequest, FinishReason
from headgate.dialects.openai_logprobs import ChatLogprobs
from headgate.dialects.openai_wire import Number, SamplingBody, UsageObject

COMPLETION: Literal["chat.completion"] = "chat.completion"
CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"


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
    object: Literal["chat.completion"] = COMPLETION
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: UsageObject


def completion_id(request: CompletionRequest) -> str:
    return f"chatcmpl-{request.answer_id.replace('-', '')}"
