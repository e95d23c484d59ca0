"""What clients of the chat form send and get, field by field."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from headgate.core.completion import CompletionRequest, FinishReason
from headgate.dialects.openai_logprobs import ChatLogprobs
from headgate.dialects.openai_wire import Number, SamplingBody, UsageObject

COMPLETION: Literal["chat.completion"] = "chat.completion"
CHUNK: Literal["chat.completion.chunk"] = "chat.completion.chunk"

# Where a field is a plain string though few values are allowed, the error can say which.
FunctionType = Annotated[str | None, Meta(extra_json_schema={"enum": ["function"]})]


class ImageBody(Struct, frozen=True, kw_only=True, gc=False):
    """Where an image is, or the image itself as a data URL."""

    url: str | None = None
    detail: Annotated[str | None, Meta(extra_json_schema={"enum": ["auto", "low", "high"]})] = None


class ContentPart(Struct, frozen=True, kw_only=True, gc=False):
    """One part of a message's content: text, or an image. `prompt_cache_breakpoint` is known in order to refuse it;
    what else a part may hold is not looked at."""

    type: Annotated[str | None, Meta(extra_json_schema={"enum": ["text", "image_url"]})] = None
    text: str | None = None
    image_url: ImageBody | None = None
    prompt_cache_breakpoint: Any = None


class CalledBody(Struct, frozen=True, kw_only=True, gc=False):
    name: str | None = None
    arguments: str | None = None


class CallBody(Struct, frozen=True, kw_only=True, gc=False):
    """A call that the model asked for in an earlier answer, handed back."""

    id: str | None = None
    type: FunctionType = None
    function: CalledBody | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message. The fields after `tool_calls` are known in order to refuse them."""

    role: Annotated[
        str | None, Meta(extra_json_schema={"enum": ["system", "developer", "user", "assistant", "tool"]})
    ] = None
    content: str | list[ContentPart] | None = None
    tool_call_id: str | None = None
    tool_calls: list[CallBody] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None


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


class FunctionBody(Struct, frozen=True, kw_only=True):
    """`parameters` stays JSON text: it is the provider that reads it."""

    name: str | None = None
    description: str | None = None
    parameters: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(default_factory=Raw)
    strict: bool | None = None


class ToolBody(Struct, frozen=True, kw_only=True):
    type: FunctionType = None
    function: FunctionBody | None = None


class ChosenFunction(Struct, frozen=True, kw_only=True):
    name: str | None = None


class ToolChoiceBody(Struct, frozen=True, kw_only=True):
    """The one function that the model must call."""

    type: FunctionType = None
    function: ChosenFunction | None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions` as sent. `prompt_cache_key` and `safety_identifier` are taken and not
    passed on. The fields after `top_logprobs` are known in order to refuse what they ask for."""

    messages: list[ChatMessage] | None = None
    logprobs: bool | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    response_format: FormatBody | None = None
    safety_identifier: str | None = None
    tool_choice: str | ToolChoiceBody | None = None
    tools: list[ToolBody] | None = None
    top_logprobs: Number | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: bool | None = None
    verbosity: Any = None
    web_search_options: Any = None


class CalledFunction(Struct, frozen=True, kw_only=True):
    """`arguments` is JSON text as the model wrote it, well-formed or not."""

    name: str
    arguments: str


class AnswerCall(Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Struct, frozen=True, kw_only=True):
    """`content` is null where the answer is calls alone."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: tuple[AnswerCall, ...] | UnsetType = UNSET


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


class CalledPiece(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallPiece(Struct, frozen=True, kw_only=True):
    """A piece of the `index`-th call of a streamed answer. `id`, `type` and the name come with the first."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledPiece


def completion_id(request: CompletionRequest) -> str:
    return f"chatcmpl-{request.answer_id.replace('-', '')}"
