"""The calls of functions in an OpenAI-like answer, whole or in streamed pieces.

Upstreams disagree on what tells the calls of one answer apart: OpenAI numbers them by `index`; some send no index, or 0
for all; some repeat the id and the name with every piece. A call is new when nothing says that it goes on.
"""

from collections.abc import Callable
from secrets import token_hex

import msgspec
from msgspec import Struct

from headgate.core.completion import ToolCall, ToolCallPiece
from headgate.core.errors import UpstreamFailed
from headgate.providers.openai_wire import ABSENT, at_most
from headgate.providers.tool_calls import MAX_CALLS, StreamedCalls, whole_call


class CalledFunction(Struct, frozen=True, gc=False):
    """`arguments` should be a string of JSON; from some it is the JSON itself."""

    name: str | None = None
    arguments: msgspec.Raw = ABSENT


class ReportedCall(Struct, frozen=True, gc=False):
    index: int | None = None
    id: str | None = None
    function: CalledFunction | None = None


_NO_FUNCTION = CalledFunction()
_read = at_most(MAX_CALLS, ReportedCall)
_text: Callable[[msgspec.Raw], str] = msgspec.json.Decoder(str).decode


def tool_calls(provider: str, raw: msgspec.Raw) -> tuple[ToolCall, ...]:
    """The calls of a blocking answer. UpstreamFailed."""
    calls = []
    for position, reported in enumerate(_reported(provider, raw)):
        function = reported.function or _NO_FUNCTION
        arguments = _arguments(provider, function.arguments)
        calls.append(whole_call(provider, position, reported.id or _new_id(), function.name or "", arguments))
    return tuple(calls)


class _Call:
    """One streamed call. It has begun once its name is known; until then its arguments wait."""

    __slots__ = ("begun", "id", "number", "waiting")

    def __init__(self, number: int, given: str | None) -> None:
        self.number = number
        self.id = given
        self.begun = False
        self.waiting = ""


class CallPieces:
    """The calls of one streamed choice. Positions count from 0 in the order in which their names come."""

    __slots__ = ("_by_index", "_calls", "_provider", "_told")

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._told = StreamedCalls(provider)
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}

    @property
    def any(self) -> bool:
        return bool(self._calls)

    def take(self, raw: msgspec.Raw) -> list[ToolCallPiece]:
        """The pieces in a delta's `tool_calls`. UpstreamFailed."""
        pieces = [self._piece(reported) for reported in _reported(self._provider, raw)]
        return [piece for piece in pieces if piece is not None]

    def end(self) -> list[ToolCallPiece]:
        """What is still to be said when nothing more comes. UpstreamFailed where a call never got its name."""
        if not all(call.begun for call in self._calls):
            raise UpstreamFailed(f"The provider {self._provider} asked for a tool call without a name.")
        return self._told.end_all()

    def _piece(self, reported: ReportedCall) -> ToolCallPiece | None:
        function = reported.function or _NO_FUNCTION
        call = self._continued(reported, function.name) or self._new(reported)
        arguments = _arguments(self._provider, function.arguments)
        if call.begun:
            return self._told.go_on(call.number, arguments)
        call.waiting += arguments
        call.id = call.id or reported.id or None
        if not function.name:
            return None
        call.id = call.id or _new_id()
        call.begun = True
        first = self._told.begin(call.number, call.id, function.name)
        more = self._told.go_on(call.number, call.waiting)
        call.waiting = ""
        return first if more is None else ToolCallPiece(first.position, more.arguments, first.id, first.name)

    def _continued(self, reported: ReportedCall, name: str | None) -> _Call | None:
        """The call that this is a further piece of, or None where it begins one."""
        given = reported.id or None
        if reported.index is not None:
            call = self._by_index.get(reported.index)
            is_another = call is not None and call.begun and name and given and given != call.id
            return None if is_another else call
        if given is not None:
            return next((call for call in self._calls if call.id == given), None)
        if not self._calls or (name and self._calls[-1].begun):
            return None
        return self._calls[-1]

    def _new(self, reported: ReportedCall) -> _Call:
        if len(self._calls) == MAX_CALLS:
            raise UpstreamFailed(f"The provider {self._provider} asked for too many tool calls.")
        call = _Call(len(self._calls), reported.id or None)
        self._calls.append(call)
        if reported.index is not None:
            self._by_index[reported.index] = call
        return call


def _reported(provider: str, raw: msgspec.Raw) -> list[ReportedCall]:
    try:
        return _read(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(provider) from error


def _arguments(provider: str, raw: msgspec.Raw) -> str:
    written = bytes(raw)
    try:
        if written.startswith(b'"'):
            return _text(raw)
        return "" if written in (b"", b"null") else written.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _unreadable(provider) from error


def _new_id() -> str:
    return f"call_{token_hex(12)}"


def _unreadable(provider: str) -> UpstreamFailed:
    return UpstreamFailed(f"The provider {provider} sent tool calls that cannot be read.")
