"""One streamed answer of Cohere's, event by event, and whether it came to a proper end.

Only `message-end` ends it. What Cohere thinks, cites or plans on the way is passed over, as is every event that may
be added to the format.
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.cohere_wire import DONE, End, Event, Piece, failed, finish_reason, usage_of

TEXTUAL = frozenset(("content-delta", "content-start"))

_decode = msgspec.json.Decoder(Event).decode
_decode_piece = msgspec.json.Decoder(Piece).decode
_decode_end = msgspec.json.Decoder(End).decode


class StreamedAnswer:
    """Collects one choice. Chunks that came before a failure are still given.

    `preface`: the prompt, where it is to come first.
    """

    __slots__ = ("_preface", "_provider", "_usage", "ended", "failure")

    def __init__(self, provider: str, preface: str = "") -> None:
        self.ended = False
        self.failure: UpstreamError | None = None
        self._provider = provider
        self._preface = preface
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
                elif isinstance(event.message, str):
                    raise failed(self._provider)
        except UpstreamError as error:
            self._fail(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._fail(UpstreamFailed(f"The provider {self._provider} sent an event that cannot be read."))
        return batch + self.reported() if self.ended else batch

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that failed it counts too."""
        usage, self._usage = self._usage, None
        return [] if usage is None else [Chunk(-1, usage=usage)]

    def connection_ended(self) -> None:
        if not self.ended:
            self._fail(self._too_early())

    def _add(self, batch: list[Chunk], chunk: Chunk) -> None:
        if self._preface:
            batch.append(Chunk(0, self._preface, tokens=0, echoed=True))
            self._preface = ""
        batch.append(chunk)

    def _end(self, batch: list[Chunk], end: End) -> None:
        self._usage = usage_of(end.usage)
        finish = finish_reason(self._provider, end.finish_reason)
        if end.error:
            raise failed(self._provider)
        self._add(batch, Chunk(0, "", finish))
        self.ended = True

    def _too_early(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} ended its answer too early.")

    def _fail(self, error: UpstreamError) -> None:
        self.ended = True
        self.failure = error
