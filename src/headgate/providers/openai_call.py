"""A request in the OpenAI completion and chat formats: the body of a job's call, and nothing that was not asked for."""

from typing import Any, Literal

import msgspec
from msgspec import Struct

from headgate.config.variants import Variant
from headgate.core.completion import Image, Job, Message, Prompt, ResponseFormat, Role, Tool, ToolCall, Tools
from headgate.providers.image_bodies import InBase64, data_url


class JSONSchema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw | None = None
    strict: bool | None = None


class Format(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    json_schema: JSONSchema | None = None


class Function(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool's definition; of a call its `arguments`, of a choice only the name."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw | None = None
    strict: bool | None = None
    arguments: str | None = None


class FunctionTool(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool, a call of one (with its `id`), or the choice of one: what is common is that it is a function."""

    id: str | None = None
    type: Literal["function"]
    function: Function


class TextPart(Struct, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str


class ImageURL(Struct, frozen=True, kw_only=True, omit_defaults=True):
    url: str | InBase64
    detail: str | None = None


class ImagePart(Struct, frozen=True, kw_only=True):
    type: Literal["image_url"]
    image_url: ImageURL


class RichMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that is more than a role and a text. `content` is sent even where it is null."""

    role: Role
    content: str | tuple[TextPart | ImagePart, ...] | None
    tool_calls: tuple[FunctionTool, ...] | None = None
    tool_call_id: str | None = None


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request body. What is None is not sent: the upstream's own default applies."""

    model: str
    prompt: Prompt | tuple[str, ...] | None = None
    messages: tuple[Message | RichMessage, ...] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: Format | None = None
    tools: tuple[FunctionTool, ...] | None = None
    tool_choice: str | FunctionTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None


def call(job: Job, variant: Variant, *, stream: bool) -> Call:
    """The body of a job's call. A prompt in the chat shape is one user message."""
    sampling = job.sampling
    chat = job.shape == "chat"
    renamed = chat and variant.chat_limit != "max_tokens"
    plain = Call(
        model=job.model.upstream_name,
        prompt=None if chat else job.prompt,
        messages=_messages(job) if chat else None,
        max_tokens=None if renamed else job.max_tokens,
        max_completion_tokens=job.max_tokens if renamed else None,
        n=job.n if job.n > 1 else None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        stop=sampling.stop or None,
        stream=True if stream else None,
        stream_options={"include_usage": True} if stream and variant.stream_usage else None,
    )
    # What few jobs ask for is added afterwards: a call of more than 15 keywords costs Python three times as much.
    rare = _rare(job, variant)
    return msgspec.structs.replace(plain, **rare) if rare else plain


def _rare(job: Job, variant: Variant) -> dict[str, Any]:
    """A chat has no words for echo; there the prompt is put first afterwards."""
    chat = job.shape == "chat"
    asked: dict[str, Any] = {}
    if job.more_prompts:
        prompts = (job.prompt, *job.more_prompts)
        asked["prompt"] = prompts
        asked["n"] = job.n // len(prompts) if job.n > len(prompts) else None
    if job.logprobs is not None:
        if chat and variant.chat_logprobs == "flag":
            asked["logprobs"] = True
            if job.logprobs:
                asked["top_logprobs"] = job.logprobs
        else:
            asked["logprobs"] = job.logprobs
    if job.echo and not chat:
        asked["echo"] = True
    if job.best_of is not None:
        asked["n"], asked["best_of"] = job.n, job.best_of
    if job.suffix:
        asked["suffix"] = job.suffix
    if job.sampling.logit_bias:
        asked["logit_bias"] = {str(token): bias for token, bias in job.sampling.logit_bias}
    if job.response_format is not None:
        asked["response_format"] = _format(job.response_format)
    if job.tools is not None:
        asked |= _tools(job.tools)
    return asked


def _tools(asked: Tools) -> dict[str, Any]:
    fields: dict[str, Any] = {"tools": tuple(map(_tool, asked.tools))}
    if asked.choice == "named":
        fields["tool_choice"] = FunctionTool(type="function", function=Function(name=asked.name or ""))
    elif asked.choice is not None:
        fields["tool_choice"] = asked.choice
    if asked.parallel is not None:
        fields["parallel_tool_calls"] = asked.parallel
    return fields


def _tool(tool: Tool) -> FunctionTool:
    return FunctionTool(
        type="function",
        function=Function(
            name=tool.name,
            description=tool.description,
            parameters=None if tool.parameters is None else msgspec.Raw(tool.parameters),
            strict=tool.strict,
        ),
    )


def _messages(job: Job) -> tuple[Message | RichMessage, ...]:
    messages = job.messages
    if not messages:
        return (Message(role="user", content=job.prompt if isinstance(job.prompt, str) else ""),)
    for message in messages:
        if message.parts or message.tool_calls or message.tool_call_id is not None:
            return tuple(map(_message, messages))
    return messages


def _message(message: Message) -> Message | RichMessage:
    if message.is_plain:
        return message
    content: str | tuple[TextPart | ImagePart, ...] | None = message.content
    if message.parts:
        content = tuple(map(_part, message.parts))
    elif message.tool_calls and not message.content:
        content = None
    return RichMessage(
        role=message.role,
        content=content,
        tool_calls=tuple(map(_called, message.tool_calls)) or None,
        tool_call_id=message.tool_call_id,
    )


def _called(made: ToolCall) -> FunctionTool:
    return FunctionTool(
        id=made.id, type="function", function=Function(name=made.name, arguments=made.arguments)
    )


def _part(part: str | Image) -> TextPart | ImagePart:
    if isinstance(part, str):
        return TextPart(type="text", text=part)
    return ImagePart(type="image_url", image_url=ImageURL(url=data_url(part), detail=part.detail))


def _format(asked: ResponseFormat) -> Format:
    if asked.kind == "json_object":
        return Format(type=asked.kind)
    schema = None if asked.schema is None else msgspec.Raw(asked.schema)
    return Format(
        type=asked.kind,
        json_schema=JSONSchema(
            name=asked.name, description=asked.description, schema=schema, strict=asked.strict
        ),
    )
