"""A chat's conversation: what each message says, what it shows, which calls it asks for or answers.

https://platform.openai.com/docs/api-reference/chat/create#chat_create-messages
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from headgate.core.completion import Image, Message, Role, ToolCall
from headgate.core.errors import InvalidRequest
from headgate.core.media import MAX_IMAGES
from headgate.dialects.base import unsupported
from headgate.dialects.chat_format import identifier
from headgate.dialects.chat_images import image_of
from headgate.dialects.chat_tools import check_function_type
from headgate.dialects.chat_wire import CallBody, ChatMessage, ContentPart

MOST_MESSAGES = 2048
ROLES: Mapping[str, Role] = MappingProxyType(
    {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
)
ROLES_IN_WORDS = "system, developer, user, assistant or tool"

_OTHER_PARTS = frozenset({"input_audio", "file", "refusal"})


def messages_of(wire: Sequence[ChatMessage] | None) -> tuple[Message, ...]:
    if wire is None:
        raise InvalidRequest("messages is required.", param="messages")
    if not 1 <= len(wire) <= MOST_MESSAGES:
        allowed = f"a list of 1 to {MOST_MESSAGES} messages"
        raise InvalidRequest(f"messages must be {allowed}.", param="messages", allowed=allowed)
    messages = tuple([_message(message, f"messages[{index}]") for index, message in enumerate(wire)])
    if not all([message.is_plain for message in messages]):
        _check_calls_answered(messages)
        _check_images(messages)
    return messages


def _check_calls_answered(messages: Sequence[Message]) -> None:
    """Every call is answered by the tool messages right after it, and they answer nothing else.

    OpenAI refuses anything else. Some upstreams do not, each in its own way, so a conversation that only they
    would take is refused for all of them. An id may come again once its call is answered: not every model
    makes up new ones.
    """
    unanswered: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.tool_call_id is not None:
            if unanswered.pop(message.tool_call_id, None) is None:
                param = f"{where}.tool_call_id"
                allowed = "the id of a call in the assistant message before it, answered by no other message"
                raise InvalidRequest(f"{param} must be {allowed}.", param=param, allowed=allowed)
            continue
        if unanswered:
            raise _not_answered(unanswered, f"before {where}")
        for place, call in enumerate(message.tool_calls):
            call_at = f"{where}.tool_calls[{place}]"
            if call.id in unanswered:
                param = f"{call_at}.id"
                raise InvalidRequest(
                    f"{param} is that of an earlier call of the message; ids must differ.",
                    param=param,
                    allowed="an id that no other call of the message has",
                )
            unanswered[call.id] = call_at
    if unanswered:
        raise _not_answered(unanswered, "after it")


def _check_images(messages: Sequence[Message]) -> None:
    images = sum(isinstance(part, Image) for message in messages for part in message.parts)
    if images > MAX_IMAGES:
        allowed = f"at most {MAX_IMAGES} images"
        raise InvalidRequest(
            f"messages must hold {allowed}, not {images}.", param="messages", allowed=allowed
        )


def _not_answered(unanswered: Mapping[str, str], when: str) -> InvalidRequest:
    param = next(iter(unanswered.values()))
    return InvalidRequest(
        f"{param} is not answered: a message of the role tool with its id must come {when}.",
        param=param,
        allowed="a call that is answered by a tool message",
    )


def _message(message: ChatMessage, where: str) -> Message:
    role = ROLES.get(message.role or "")
    if role is None:
        if message.role == "function":
            raise unsupported(f"{where}.role", f"as function by this version; give {ROLES_IN_WORDS}")
        raise InvalidRequest(
            f"{where}.role must be {ROLES_IN_WORDS}.", param=f"{where}.role", allowed=ROLES_IN_WORDS
        )
    for name, value in (
        # A tool message has no documented name. Many clients repeat the function's there, and its call has it.
        ("name", None if role == "tool" else message.name),
        ("function_call", message.function_call),
        ("audio", message.audio),
        ("refusal", message.refusal),
    ):
        if value is not None and value != []:
            raise unsupported(
                f"{where}.{name}", "by this version, whose messages have a role, content and tool calls alone"
            )
    calls: tuple[ToolCall, ...] = ()
    if message.tool_calls:
        calls = _calls(message.tool_calls, role, f"{where}.tool_calls")
    if role == "tool" or message.tool_call_id is not None:
        _check_call_id(message.tool_call_id, role, f"{where}.tool_call_id")
    content = message.content
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(role=role, content=content, tool_calls=calls, tool_call_id=message.tool_call_id)
    parts = _parts(content, role, f"{where}.content")
    texts = [part for part in parts if isinstance(part, str)]
    return Message(
        role=role,
        content="".join(texts),  # with nothing of ours between them
        parts=parts if len(texts) < len(parts) else (),
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
    )


def _calls(wire: Sequence[CallBody], role: Role, where: str) -> tuple[ToolCall, ...]:
    if role != "assistant":
        allowed = "null or [] where the role is not assistant"
        raise InvalidRequest(f"{where} is for assistant messages only.", param=where, allowed=allowed)
    return tuple([_call(call, f"{where}[{index}]") for index, call in enumerate(wire)])


def _call(wire: CallBody, where: str) -> ToolCall:
    if not wire.id:
        raise InvalidRequest(f"{where}.id is required.", param=f"{where}.id")
    check_function_type(wire.type, f"{where}.type")
    function, where = wire.function, f"{where}.function"
    if function is None:
        raise InvalidRequest(f"{where} is required.", param=where)
    name = identifier(function.name, f"{where}.name")
    if function.arguments is None:
        raise InvalidRequest(
            f"{where}.arguments is required.", param=f"{where}.arguments", allowed="a string"
        )
    return ToolCall(id=wire.id, name=name, arguments=function.arguments)


def _check_call_id(id_: str | None, role: Role, where: str) -> None:
    if role != "tool":
        raise InvalidRequest(
            f"{where} is for tool messages only.", param=where, allowed="null where the role is not tool"
        )
    if not id_:
        raise InvalidRequest(f"{where} is required.", param=where, allowed="the id of the call it answers")


def _parts(parts: Sequence[ContentPart] | None, role: Role, where: str) -> tuple[str | Image, ...]:
    if not parts:
        kinds = "text and image_url" if role == "user" else "text"
        allowed = f"a string or a non-empty list of {kinds} parts"
        raise InvalidRequest(f"{where} must be {allowed}.", param=where, allowed=allowed)
    return tuple([_part(part, role, f"{where}[{index}]") for index, part in enumerate(parts)])


def _part(part: ContentPart, role: Role, where: str) -> str | Image:
    if part.prompt_cache_breakpoint is not None:
        raise unsupported(f"{where}.prompt_cache_breakpoint", "by this version; leave it out")
    if part.type == "text":
        return _text(part, where)
    if part.type == "image_url" and role == "user":
        if part.text is not None:
            raise _mixed(f"{where}.text", "text")
        return image_of(part.image_url, f"{where}.image_url")
    if part.type in _OTHER_PARTS:
        raise unsupported(where, f"as {part.type} by this version, which takes text and images only")
    if part.type == "image_url":
        raise InvalidRequest(
            f"{where}.type must be text; images are for user messages only.",
            param=f"{where}.type",
            allowed="text",
        )
    allowed = "text or image_url" if role == "user" else "text"
    raise InvalidRequest(f"{where}.type must be {allowed}.", param=f"{where}.type", allowed=allowed)


def _text(part: ContentPart, where: str) -> str:
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required.", param=f"{where}.text", allowed="a string")
    if part.image_url is not None:
        raise _mixed(f"{where}.image_url", "image_url")
    return part.text


def _mixed(where: str, kind: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where} goes with parts of the type {kind} only.",
        param=where,
        allowed="null in parts of other types",
    )
