"""The calls of functions in an OpenAI-like answer, whole or in streamed pieces.

Upstreams disagree on what tells the calls of one answer apart: OpenAI numbers them by `index`; some send no index, or 0
for all; some send no ids, or the same; some repeat the id and the name with every piece.
"""

from collections.abc import Callable
from secrets import token_hex

import msgspec
from msgspec import Struct

from headgate.core.completion import ToolCall, ToolCallPiece
from headgate.core.errors import UpstreamFailed
from headgate.providers.bounded_list import at_most
from headgate.providers.openai_wire import ABSENT
from headgate.providers.tool_calls import MAX_CALLS, StreamedCalls, whole_call


class CalledFunction(Struct, frozen=True, gc=False):
    """`arguments` should be a string of JSON; from some it is the JSON itself."""

    name: str | None = None
    arguments: msgspec.Raw = ABSENT


class ReportedCall(Struct, frozen=True, gc=False):
    index: int | None = None
    id: str | None = None
    function: CalledFunction | None = None


class _Object(Struct, frozen=True, gc=False):
    """Any JSON object; nothing of it is kept."""


MAX_WAITING = 64 * 1024
"""Characters of arguments whose function has no name yet; the name should come first."""

_NO_FUNCTION = CalledFunction()
_read = at_most(MAX_CALLS, ReportedCall)
_object = msgspec.json.Decoder(_Object).decode
_text: Callable[[msgspec.Raw], str] = msgspec.json.Decoder(str).decode


def tool_calls(provider: str, raw: msgspec.Raw) -> tuple[ToolCall, ...]:
    """The calls of a blocking answer. UpstreamFailed."""
    calls: dict[str, ToolCall] = {}
    for position, reported in enumerate(_reported(provider, raw)):
        function = reported.function or _NO_FUNCTION
        arguments = _arguments(provider, function.arguments)
        id_ = reported.id if reported.id and reported.id not in calls else _new_id()
        calls[id_] = whole_call(provider, position, id_, function.name or "", arguments)
    return tuple(calls.values())


class _Call:
    """One streamed call. It has begun once its `name` is known; until then its arguments wait.

    `theirs`: its id as the upstream told it; `id` is the one it goes by. `whole`: its arguments came in one piece, as
    an object: nothing can go on with that.
    """

    __slots__ = ("id", "name", "number", "said", "theirs", "waiting", "waiting_size", "whole")

    def __init__(self, number: int) -> None:
        self.number = number
        self.theirs: str | None = None
        self.id: str | None = None
        self.name: str | None = None
        self.said = False
        self.whole = False
        self.waiting: list[str] = []
        self.waiting_size = 0


class CallPieces:
    """The calls of one streamed choice. Positions count from 0 in the order in which their names come."""

    __slots__ = ("_by_id", "_by_index", "_calls", "_provider", "_told")

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._told = StreamedCalls(provider)
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_id: dict[str, _Call] = {}

    @property
    def any(self) -> bool:
        return bool(self._calls)

    def take(self, raw: msgspec.Raw) -> list[ToolCallPiece]:
        """The pieces in a delta's `tool_calls`. UpstreamFailed."""
        pieces = [self._piece(reported) for reported in _reported(self._provider, raw)]
        return [piece for piece in pieces if piece is not None]

    def end(self) -> list[ToolCallPiece]:
        """What is still to be said when nothing more comes. UpstreamFailed where a call never got its name."""
        if not all(call.name for call in self._calls):
            raise self._nameless()
        return self._told.end_all()

    def _piece(self, reported: ReportedCall) -> ToolCallPiece | None:
        function = reported.function or _NO_FUNCTION
        name = function.name or None
        arguments = _arguments(self._provider, function.arguments)
        call = self._continued(reported, name, arguments) or self._new()
        if reported.index is not None and len(self._by_index) <= MAX_CALLS:
            self._by_index[reported.index] = call
        if reported.id and call.theirs is None:
            self._identify(call, reported.id)
        if arguments.strip():
            call.whole = not call.said and _is_object(arguments)
            call.said = True
        if call.name is not None:
            return self._told.go_on(call.number, arguments)
        call.waiting.append(arguments)
        if name is None:
            call.waiting_size += 1 + len(arguments)
            if call.waiting_size > MAX_WAITING:
                raise self._nameless()
            return None
        call.name = name
        first = self._told.begin(call.number, call.id or _new_id(), name)
        more = self._told.go_on(call.number, "".join(call.waiting))
        call.waiting.clear()
        return first if more is None else ToolCallPiece(first.position, more.arguments, first.id, first.name)

    def _continued(self, reported: ReportedCall, name: str | None, arguments: str) -> _Call | None:
        """The call that this is a further piece of, or None where it begins one.

        The id tells first, then the index, then that it comes next. Where a name comes again, it begins another call
        unless it is the same one in every respect and that call can go on. An id that is new, without a name, is made
        up anew for each piece.
        """
        given, index = reported.id or None, reported.index
        known = self._by_id.get(given) if given else None
        call = known
        if call is None and index is not None:
            call = self._by_index.get(index)
        elif call is None and given is None and self._calls:
            call = self._calls[-1]
        if call is None or call.name is None or name is None:
            return call
        if known is None:
            is_another = given is not None and call.theirs is not None
        else:
            is_another = index is not None and index not in self._by_index
        is_over = call.whole and bool(arguments.strip())
        return None if name != call.name or is_another or is_over else call

    def _identify(self, call: _Call, given: str) -> None:
        """Clients answer calls by their ids: what an earlier call has does not do as another's."""
        call.theirs = given
        call.id = None if given in self._by_id else given
        self._by_id[given] = call

    def _new(self) -> _Call:
        if len(self._calls) == MAX_CALLS:
            raise UpstreamFailed(f"The provider {self._provider} asked for too many tool calls.")
        call = _Call(len(self._calls))
        self._calls.append(call)
        return call

    def _nameless(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} asked for a tool call without a name.")


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


def _is_object(arguments: str) -> bool:
    if not (arguments.startswith("{") and arguments.endswith("}")):
        return False
    try:
        _object(arguments)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False
    return True


def _new_id() -> str:
    return f"call_{token_hex(12)}"


def _unreadable(provider: str) -> UpstreamFailed:
    return UpstreamFailed(f"The provider {provider} sent tool calls that cannot be read.")
