"""One streamed answer of Cohere's, event by event, and whether it came to a proper end.

Only `message-end` ends it. What Cohere thinks, cites or plans on the way is passed over, as is every event that may
be added to the format, and tool calls where the job has no tools.
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, ToolCallPiece, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.cohere_wire import (
    DONE,
    CallEvent,
    End,
    Event,
    Piece,
    failed,
    finish_reason,
    is_text,
    tells_something,
    usage_of,
)
from headgate.providers.tool_calls import StreamedCalls

TEXTUAL = frozenset(("content-delta", "content-start"))
CALLING = frozenset(("tool-call-start", "tool-call-delta", "tool-call-end"))

_decode = msgspec.json.Decoder(Event).decode
_decode_piece = msgspec.json.Decoder(Piece).decode
_decode_call = msgspec.json.Decoder(CallEvent).decode
_decode_end = msgspec.json.Decoder(End).decode


class StreamedAnswer:
    """Collects one choice. Chunks that came before a failure are still given.

    `preface`: the prompt, where it is to come first. `tools`: tool calls are read.
    """

    __slots__ = ("_calls", "_preface", "_provider", "_usage", "ended", "failure")

    def __init__(self, provider: str, preface: str = "", *, tools: bool = False) -> None:
        self.ended = False
        self.failure: UpstreamError | None = None
        self._provider = provider
        self._preface = preface
        self._calls = StreamedCalls(provider) if tools else None
        self._usage: Usage | None = None

    @property
    def whole(self) -> bool:
        """True once the last event has come."""
        return self.ended and self.failure is None

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        """The chunks in these events, the last of them with the usage."""
        batch: list[Chunk] = []
        try:
            for data in events:
                if data == DONE:
                    raise self._too_early()
                event = _decode(data)
                if event.type in TEXTUAL:
                    piece = _decode_piece(event.delta).message
                    if piece is not None and piece.content is not None and piece.content.text:
                        self._add(batch, Chunk(0, piece.content.text))
                elif event.type == "message-end":
                    self._end(batch, _decode_end(event.delta))
                    break
                elif self._calls is not None and event.type in CALLING:
                    self._call(batch, self._calls, event.type, _decode_call(data))
                elif event.message and is_text(event.message):
                    raise failed(self._provider)
        except UpstreamError as error:
            self._fail(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._fail(UpstreamFailed(f"The provider {self._provider} sent an event that cannot be read."))
        return batch + self.reported() if self.ended else batch

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that failed it counts too, and the failure
        bears it."""
        usage, self._usage = self._usage, None
        if self.failure is not None and usage is not None:
            self.failure.usage = usage
        return [] if usage is None else [Chunk(-1, usage=usage)]

    def connection_ended(self) -> None:
        if not self.ended:
            self._fail(self._too_early())

    def _add(self, batch: list[Chunk], chunk: Chunk) -> None:
        if self._preface:
            batch.append(Chunk(0, self._preface, tokens=0, echoed=True))
            self._preface = ""
        batch.append(chunk)

    def _call(self, batch: list[Chunk], calls: StreamedCalls, kind: str, event: CallEvent) -> None:
        call = event.delta.message.tool_calls
        if kind == "tool-call-end":
            self._give(batch, calls.end(event.index))
            return
        if kind == "tool-call-start":
            self._give(batch, calls.end(event.index))  # an index that comes again is another call's
            self._give(batch, calls.begin(event.index, call.id, call.function.name or ""))
        self._give(batch, calls.go_on(event.index, call.function.arguments or ""))

    def _give(self, batch: list[Chunk], piece: ToolCallPiece | None) -> None:
        if piece is not None:
            self._add(batch, Chunk(0, tool_calls=(piece,)))

    def _end(self, batch: list[Chunk], end: End) -> None:
        self._usage = usage_of(end.usage)
        calls = self._calls
        called = calls is not None and calls.count > 0
        finish = finish_reason(self._provider, end.finish_reason, called=called)
        if tells_something(end.error):
            raise failed(self._provider)
        if calls is not None:
            for piece in calls.end_all():
                self._give(batch, piece)
        self._add(batch, Chunk(0, "", finish))
        self.ended = True

    def _too_early(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} ended its answer too early.")

    def _fail(self, error: UpstreamError) -> None:
        self.ended = True
        self.failure = error
