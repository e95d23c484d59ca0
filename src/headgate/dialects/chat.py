"""OpenAI's chat: POST /v1/chat/completions.

https://platform.openai.com/docs/api-reference/chat/create
Text in, text out. What else the API documents (tools, images, audio, ...) is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from headgate.core.completion import (
    Answer,
    Choice,
    CompletionRequest,
    Message,
    ResponseFormat,
    Role,
)
from headgate.core.errors import InvalidRequest
from headgate.dialects.base import (
    RequestContext,
    integer,
    token_limit,
    unsupported,
)
from headgate.dialects.chat_stream import ChatStream
from headgate.dialects.chat_wire import (
    COMPLETION,
    AnswerMessage,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ContentPart,
    FormatBody,
    SchemaFormat,
    completion_id,
)
from headgate.dialects.openai import sampling_of
from headgate.dialects.openai_form import OpenAIForm
from headgate.dialects.openai_logprobs import chat_logprobs
from headgate.dialects.openai_wire import usage_object, whole_answer

ENDPOINT = "/v1/chat/completions"
MOST_MESSAGES = 2048
ROLES: Mapping[str, Role] = MappingProxyType(
    {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
)
ROLES_IN_WORDS = "system, developer, user or assistant"

_NOTHING_ASKED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
"""The documented parameters that are not honoured, and their values besides null that ask for nothing."""
_INSTEAD: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("tools", "functions"),
        "by this version; describe the functions in a message, or ask for JSON with response_format",
    )
)
_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OTHER_PARTS = frozenset({"image_url", "input_audio", "file", "refusal"})

_encode = msgspec.json.Encoder().encode


class OpenAIChat(OpenAIForm[ChatBody]):
    name = "chat"
    endpoint = ENDPOINT
    body = ChatBody

    def _parse(self, wire: ChatBody, context: RequestContext) -> CompletionRequest:
        if not wire.model:
            raise InvalidRequest("model is required.", param="model")
        messages = _messages(wire.messages)
        n = integer(wire.n, "n", 1, 128) or 1
        if n > self._caps.max_choices:
            allowed = f"at most {self._caps.max_choices} choices in all"
            raise InvalidRequest(f"n is {n}; {allowed}.", param="n", allowed=allowed)
        max_tokens, max_tokens_param = token_limit(
            wire.max_tokens, wire.max_completion_tokens, alias="max_completion_tokens", low=1
        )
        sampling = sampling_of(wire, self._caps)
        logprobs = _logprobs(wire)
        response_format = _response_format(wire.response_format)
        _refuse_unsupported(wire)
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(wire.model,),
            messages=messages,
            n=n,
            logprobs=logprobs,
            response_format=response_format,
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            sampling=sampling,
            stream=bool(wire.stream),
            include_usage=wire.includes_usage,
            user=wire.user,
            app=context.principal.app,
        )

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        most = request.logprobs
        if most is not None:
            choices = [_encode(_choice(choice, most)) for choice in answer.choices]
            return whole_answer(answer, completion_id(request), COMPLETION, choices)
        return _encode(
            ChatCompletion(
                id=completion_id(request),
                created=request.created,
                model=answer.models[0].model,
                choices=tuple([_choice(choice, None) for choice in answer.choices]),
                usage=usage_object(answer.usage),
            )
        )

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> ChatStream:
        return ChatStream(request, (served or request.models)[0])


def _choice(choice: Choice, most: int | None) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=AnswerMessage(content=choice.text),
        logprobs=None if most is None else chat_logprobs(choice.logprobs or (), most),
        finish_reason=choice.finish_reason,
    )


def _messages(messages: Sequence[ChatMessage] | None) -> tuple[Message, ...]:
    if messages is None:
        raise InvalidRequest("messages is required.", param="messages")
    if not 1 <= len(messages) <= MOST_MESSAGES:
        allowed = f"a list of 1 to {MOST_MESSAGES} messages"
        raise InvalidRequest(f"messages must be {allowed}.", param="messages", allowed=allowed)
    return tuple([_message(message, f"messages[{index}]") for index, message in enumerate(messages)])


def _message(message: ChatMessage, where: str) -> Message:
    role = ROLES.get(message.role or "")
    if role is None:
        if message.role in ("tool", "function"):
            raise unsupported(f"{where}.role", f"as {message.role} by this version; give {ROLES_IN_WORDS}")
        raise InvalidRequest(
            f"{where}.role must be {ROLES_IN_WORDS}.", param=f"{where}.role", allowed=ROLES_IN_WORDS
        )
    for name in ("name", "tool_calls", "function_call", "tool_call_id", "audio", "refusal"):
        if getattr(message, name) not in (None, []):
            raise unsupported(
                f"{where}.{name}", "by this version, whose messages have a role and content alone"
            )
    content = message.content
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        content = _joined(content, f"{where}.content")
    return Message(role=role, content=content)


def _joined(parts: Sequence[ContentPart] | None, where: str) -> str:
    """The text of all parts, with nothing of ours between them."""
    if not parts:
        allowed = "a string or a non-empty list of text parts"
        raise InvalidRequest(f"{where} must be {allowed}.", param=where, allowed=allowed)
    return "".join([_text(part, f"{where}[{index}]") for index, part in enumerate(parts)])


def _text(part: ContentPart, where: str) -> str:
    if part.type in _OTHER_PARTS:
        raise unsupported(where, f"as {part.type} by this version, which takes text parts only")
    if part.type != "text":
        raise InvalidRequest(f"{where}.type must be text.", param=f"{where}.type", allowed="text")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required.", param=f"{where}.text", allowed="a string")
    return part.text


def _logprobs(wire: ChatBody) -> int | None:
    """How many alternatives to show with each token; None: no log probabilities at all."""
    most = integer(wire.top_logprobs, "top_logprobs", 0, 20)
    if wire.logprobs:
        return most or 0
    if most:
        raise InvalidRequest(
            "top_logprobs needs logprobs to be true.", param="top_logprobs", allowed="0 without logprobs"
        )
    return None


def _response_format(wire: FormatBody | None) -> ResponseFormat | None:
    if wire is None:
        return None
    if wire.json_schema is not None and wire.type != "json_schema":
        allowed = "null where response_format.type is not json_schema"
        raise InvalidRequest(
            "response_format.json_schema goes with response_format.type json_schema only.",
            param="response_format.json_schema",
            allowed=allowed,
        )
    if wire.type == "text":
        return None
    if wire.type == "json_object":
        return ResponseFormat(kind="json_object")
    if wire.type == "json_schema":
        return _schema_format(wire.json_schema)
    allowed = "text, json_object or json_schema"
    raise InvalidRequest(
        f"response_format.type must be {allowed}.", param="response_format.type", allowed=allowed
    )


def _schema_format(wire: SchemaFormat | None) -> ResponseFormat:
    where = "response_format.json_schema"
    if wire is None:
        raise InvalidRequest(f"{where} is required with type json_schema.", param=where)
    if not _SCHEMA_NAME.fullmatch(wire.name or ""):
        allowed = "1 to 64 letters, digits, underscores or dashes"
        raise InvalidRequest(f"{where}.name must be {allowed}.", param=f"{where}.name", allowed=allowed)
    return ResponseFormat(
        kind="json_schema",
        schema=_schema(wire.schema, f"{where}.schema"),
        name=wire.name,
        description=wire.description,
        strict=wire.strict,
    )


def _schema(raw: msgspec.Raw, where: str) -> bytes:
    """The schema as JSON text. Its values were skipped when the body was read, so they are looked at here."""
    try:
        schema = msgspec.json.decode(raw) if raw else None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{where} cannot be read: {error}.", param=where) from None
    if not isinstance(schema, dict):
        allowed = "an object (a JSON schema)"
        raise InvalidRequest(f"{where} must be {allowed}.", param=where, allowed=allowed)
    return bytes(raw)


def _refuse_unsupported(wire: ChatBody) -> None:
    """Documented, but not honoured: ignoring them would give another answer than the one asked for."""
    for name, neutral in _NOTHING_ASKED.items():
        value = getattr(wire, name)
        if value is not None and value not in neutral:
            raise unsupported(name, _INSTEAD.get(name, "by this version; leave it out"))
