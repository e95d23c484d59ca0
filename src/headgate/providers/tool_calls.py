"""The tool calls an upstream asks for, whole or in pieces, and the bounds within which they are believed."""

import msgspec

from headgate.core.completion import ToolCall, ToolCallPiece
from headgate.core.errors import UpstreamFailed

MAX_CALLS = 128
"""Of one choice; no model asks for a tenth of it."""
MAX_NAME = 256
"""Characters of a name, and of an id."""
NO_ARGUMENTS = "{}"


def whole_call(provider: str, position: int, call_id: str, name: str, arguments: str) -> ToolCall:
    """One call of a blocking answer; without arguments they are an empty object. UpstreamFailed beyond the bounds."""
    _check(provider, position, call_id, name)
    return ToolCall(id=call_id, name=name, arguments=arguments or NO_ARGUMENTS)


def input_text(provider: str, given: msgspec.Raw) -> str:
    """Arguments that came as an object, as JSON text; empty where there are none."""
    if not given or given == _NULL:
        return ""
    try:
        text = bytes(given).decode()
    except UnicodeDecodeError as error:
        raise _unreadable(provider) from error
    if not text.startswith("{"):
        raise _unreadable(provider)
    return text


class StreamedCalls:
    """The calls of one streamed choice, which are numbered in their order whatever the upstream counts.

    `index` is the upstream's own number; what goes on with a number that never began is no call, and None.
    """

    __slots__ = ("_open", "_provider", "count")

    def __init__(self, provider: str) -> None:
        self.count = 0
        self._provider = provider
        self._open: dict[int, tuple[int, str]] = {}

    def begin(self, index: int, call_id: str, name: str, given: str = "") -> ToolCallPiece:
        """`given` are the arguments, unless others follow. UpstreamFailed for what is beyond the bounds."""
        position = self.count
        _check(self._provider, position, call_id, name)
        self.count += 1
        self._open[index] = position, given or NO_ARGUMENTS
        return ToolCallPiece(position, id=call_id, name=name)

    def go_on(self, index: int, arguments: str) -> ToolCallPiece | None:
        known = self._open.get(index)
        if known is None or not arguments:
            return None
        position, given = known
        if given:
            self._open[index] = position, ""
        return ToolCallPiece(position, arguments)

    def end(self, index: int) -> ToolCallPiece | None:
        """What a call without a single piece of its arguments still lacks: an empty object."""
        position, given = self._open.pop(index, (0, ""))
        return ToolCallPiece(position, given) if given else None

    def end_all(self) -> list[ToolCallPiece]:
        """The same for those whose end was never told."""
        pieces = [self.end(index) for index in list(self._open)]
        return [piece for piece in pieces if piece is not None]


_NULL = msgspec.Raw(b"null")


def _check(provider: str, position: int, call_id: str, name: str) -> None:
    if position >= MAX_CALLS:
        raise UpstreamFailed(f"The provider {provider} asked for too many tool calls.")
    if not (0 < len(call_id) <= MAX_NAME and 0 < len(name) <= MAX_NAME):
        raise _unreadable(provider)


def _unreadable(provider: str) -> UpstreamFailed:
    return UpstreamFailed(f"The provider {provider} sent a tool call that cannot be read.")
