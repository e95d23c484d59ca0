"""A conversation in Cohere's words: plain messages go as they are, those with images or tool calls in its form."""

from msgspec import Struct

from headgate.core.completion import Image, Job, Message, ToolCall
from headgate.core.errors import InvalidRequest
from headgate.providers.image_bodies import InBase64, data_url


class Text(Struct, frozen=True, tag="text", gc=False):
    text: str


class ImageURL(Struct, frozen=True, omit_defaults=True, gc=False):
    url: str | InBase64
    detail: str | None = None


class Picture(Struct, frozen=True, tag="image_url", gc=False):
    image_url: ImageURL


class Function(Struct, frozen=True, gc=False):
    name: str
    arguments: str


class Use(Struct, frozen=True, tag="function", gc=False):
    id: str
    function: Function


class Said(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that is more than a role and a text."""

    role: str
    content: str | tuple[Text | Picture, ...] | None = None
    tool_calls: tuple[Use, ...] = ()
    tool_call_id: str | None = None


def messages_of(job: Job) -> tuple[Message | Said, ...]:
    """InvalidRequest for an image where Cohere takes none."""
    messages = job.messages
    if messages is None:
        return (Message(role="user", content=job.prompt if isinstance(job.prompt, str) else ""),)
    if all(message.is_plain for message in messages):
        return messages
    return tuple(
        message if message.is_plain else _said(message, index) for index, message in enumerate(messages)
    )


def _said(message: Message, index: int) -> Said:
    images = any(isinstance(part, Image) for part in message.parts)
    if images and message.role != "user":
        raise InvalidRequest(
            f"messages[{index}] must hold no image: this model takes them from users only.",
            param=f"messages[{index}].content",
            allowed="text",
        )
    content: str | tuple[Text | Picture, ...] | None = message.content
    if images:
        content = tuple(
            _picture(part) if isinstance(part, Image) else Text(part) for part in message.parts if part
        )
    elif message.tool_calls and not message.content:
        content = None
    return Said(
        role=message.role,
        content=content,
        tool_calls=tuple(_use(call) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
    )


def _picture(image: Image) -> Picture:
    return Picture(ImageURL(data_url(image), image.detail))


def _use(call: ToolCall) -> Use:
    return Use(call.id, Function(call.name, call.arguments if call.arguments.strip() else "{}"))
