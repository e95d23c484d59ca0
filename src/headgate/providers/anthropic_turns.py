"""A conversation in Anthropic's words: turns that alternate, and blocks of text, images, tool calls and results.

The format knows one system prompt and nobody speaking twice: what belongs together is joined.
"""

import re
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from headgate.core.completion import Image, Message, ToolCall
from headgate.core.errors import InvalidRequest
from headgate.providers.image_bodies import InBase64

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_NO_ID = re.compile(r"[^A-Za-z0-9_-]")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Text(Struct, frozen=True, tag="text", gc=False):
    text: str


class InlineImage(Struct, frozen=True, tag="base64", gc=False):
    media_type: str
    data: InBase64


class LinkedImage(Struct, frozen=True, tag="url", gc=False):
    url: str


class Picture(Struct, frozen=True, tag="image", gc=False):
    source: InlineImage | LinkedImage


class ToolUse(Struct, frozen=True, tag="tool_use", gc=False):
    id: str
    name: str
    input: msgspec.Raw


class ToolResult(Struct, frozen=True, tag="tool_result", omit_defaults=True):
    tool_use_id: str
    content: tuple[Text | Picture, ...] = ()


class Turn(Struct, frozen=True):
    role: str
    content: tuple[Text | Picture | ToolUse | ToolResult, ...]


class _Growing(Struct):
    """A turn to which more may be joined. Results come first in it: the format wants them there."""

    role: str
    results: list[ToolResult] = []
    blocks: list[Text | Picture | ToolUse] = []


class _Ids:
    """Ids of other upstreams' calls may hold more than the format allows, and come again once they are answered: here
    each call of the conversation has its own. A call and its result stay a pair."""

    def __init__(self) -> None:
        self._latest: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._taken: set[str] = set()

    def new(self, given: str) -> str:
        """That of a call."""
        plain = own = _NO_ID.sub("_", given)
        while own in self._taken:
            number = self._numbers[plain] = self._numbers.get(plain, 1) + 1
            own = f"{plain}_{number}"
        self._taken.add(own)
        self._latest[given] = own
        return own

    def of(self, given: str) -> str:
        """That of the latest call which was given this id; as given where there was none."""
        return self._latest.get(given, given)


def plain_turns(messages: Sequence[Message]) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt, if there is one, and the turns of a conversation of nothing but text.

    Joined by blank lines. InvalidRequest for a conversation that the format has no words for.
    """
    system: list[str] = []
    turns: list[tuple[Message, list[str]]] = []
    for message in messages:
        if message.role == "system":
            parts = system
        elif turns and turns[-1][0].role == message.role:
            parts = turns[-1][1]
        else:
            parts = []
            turns.append((message, parts))
        if message.content.strip():
            parts.append(message.content)
    if not turns or turns[0][0].role != "user":
        raise _begins_wrongly()
    if not all(parts for _, parts in turns):
        raise empty("messages")
    return "\n\n".join(system) or None, tuple(
        Message(role=first.role, content="\n\n".join(parts)) for first, parts in turns
    )


def turns(messages: Sequence[Message]) -> tuple[str | None, tuple[Turn, ...]]:
    """The same for one with images, tool calls or their results: every text is a block."""
    system: list[str] = []
    growing: list[_Growing] = []
    ids = _Ids()
    for index, message in enumerate(messages):
        if message.role == "system":
            _only_text(message, index)
            if message.content.strip():
                system.append(message.content)
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if not growing or growing[-1].role != role:
            growing.append(_Growing(role))
        turn = growing[-1]
        if message.role == "tool":
            turn.results.append(ToolResult(ids.of(message.tool_call_id or ""), tuple(_seen(message))))
        elif role == "user":
            turn.blocks += _seen(message)
        else:
            _only_text(message, index)
            if message.content.strip():
                turn.blocks.append(Text(message.content))
            turn.blocks += (_use(call, ids, index, nth) for nth, call in enumerate(message.tool_calls))
    if not growing or growing[0].role != "user":
        raise _begins_wrongly()
    if not all(turn.results or turn.blocks for turn in growing):
        raise empty("messages")
    _check_answers(growing)
    return "\n\n".join(system) or None, tuple(
        Turn(turn.role, (*turn.results, *turn.blocks)) for turn in growing
    )


def empty(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} must not be empty: this model answers no message without text.",
        param=param,
        allowed="text that is not blank",
    )


def _check_answers(turns: Sequence[_Growing]) -> None:
    """Calls and results stand together in the format: the one turn calls, the next one answers all of it."""
    called: list[str] = []
    for turn in (*turns, _Growing("user")):
        if sorted(result.tool_use_id for result in turn.results) != sorted(called):
            raise InvalidRequest(
                "messages must answer every tool call of an assistant message, and no other, right after it.",
                param="messages",
                allowed="one tool message for each tool call, before the next user or assistant message",
            )
        called = [block.id for block in turn.blocks if isinstance(block, ToolUse)]


def _seen(message: Message) -> list[Text | Picture]:
    """Text and images in their order, without texts that are blank: those are refused."""
    parts = message.parts or (message.content,)
    return [
        _picture(part) if isinstance(part, Image) else Text(part)
        for part in parts
        if isinstance(part, Image) or part.strip()
    ]


def _picture(image: Image) -> Picture:
    if image.detail == "low":
        raise InvalidRequest(
            "This model looks at images in full only: their detail must be auto or high.",
            param=image.param,
            code="unsupported_parameter",
            allowed="detail auto or high",
        )
    if image.data is None:
        # An upload that is not read yet is only looked at, not sent.
        return Picture(LinkedImage(image.url or ""))
    if image.media_type not in IMAGE_TYPES:
        allowed = ", ".join(IMAGE_TYPES)
        raise InvalidRequest(
            f"This model looks at images of these types only: {allowed}.", param=image.param, allowed=allowed
        )
    return Picture(InlineImage(image.media_type, InBase64(image.data)))


def _use(call: ToolCall, ids: _Ids, index: int, nth: int) -> ToolUse:
    """Arguments are an object in this format; those left blank are an empty one."""
    text = call.arguments if call.arguments.strip() else "{}"
    try:
        _fields(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        param = f"messages[{index}].tool_calls[{nth}].function.arguments"
        raise InvalidRequest(
            f"{param} must be a JSON object, as text.", param=param, allowed="a JSON object, as text"
        ) from None
    return ToolUse(ids.new(call.id), call.name, msgspec.Raw(text.encode()))


def _only_text(message: Message, index: int) -> None:
    if any(isinstance(part, Image) for part in message.parts):
        raise InvalidRequest(
            f"messages[{index}] must hold no image: this model takes them from users and tools only.",
            param=f"messages[{index}].content",
            allowed="text",
        )


def _begins_wrongly() -> InvalidRequest:
    return InvalidRequest(
        "messages must begin with a user message for this model; system messages may stand before it.",
        param="messages",
        allowed="a user message first",
    )
