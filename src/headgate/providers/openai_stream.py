"""One streamed answer in the OpenAI formats, event by event, and whether it came to a proper end.

This is the hot path of every stream: one event is one decode and one Chunk.
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.openai_choice import CheckedChoice
from headgate.providers.openai_wire import DONE, Answer, finish_reason, usage_of
from headgate.providers.upstream_errors import from_report

_decode = msgspec.json.Decoder(Answer).decode


class StreamedAnswer:
    """Collects what `n` choices still owe.

    `ended` is True when nothing more is to come, `failure` then says what went wrong, if anything did. Chunks
    that came before a failure are still given. `checked`: the choices, where their pieces are to be checked.
    """

    __slots__ = ("_checked", "_key", "_provider", "_seen", "_unfinished", "_usage", "ended", "failure", "n")

    def __init__(
        self, provider: str, n: int, key: str | None, checked: Sequence[CheckedChoice] | None = None
    ) -> None:
        self.n = n
        self.ended = False
        self.failure: UpstreamError | None = None
        self._provider = provider
        self._key = key
        self._checked = checked
        self._seen: set[int] = set()
        self._unfinished = set(range(n))
        self._usage: Usage | None = None

    @property
    def whole(self) -> bool:
        """True once every choice has its finish reason."""
        return not self._unfinished

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        """The chunks in these events. The usage reported last comes with, or after, the end of the last choice."""
        batch: list[Chunk] = []
        try:
            for data in events:
                if data == DONE:
                    self._done(batch)
                    break
                answer = _decode(data)
                if answer.error is not None:
                    raise from_report(self._provider, answer.error, self._key)
                for choice in answer.choices or ():
                    index = choice.index
                    if not 0 <= index < self.n:
                        raise UpstreamFailed(f"The provider {self._provider} gave a choice nobody asked for.")
                    self._seen.add(index)
                    text = choice.text if choice.delta is None else choice.delta.content
                    if self._checked is not None:
                        batch += self._checked[index].take(text or "", choice.logprobs, choice.finish_reason)
                        if choice.finish_reason is not None:
                            self._unfinished.discard(index)
                    elif choice.finish_reason is not None:
                        self._unfinished.discard(index)
                        batch.append(Chunk(index, text or "", finish_reason(choice.finish_reason)))
                    elif text:
                        batch.append(Chunk(index, text))
                if answer.usage is not None:
                    self._usage = usage_of(answer.usage)
        except UpstreamError as error:
            self._fail(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._fail(UpstreamFailed(f"The provider {self._provider} sent an event that cannot be read."))
        if self.ended or not self._unfinished:
            batch += self.reported()
        return batch

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that broke off it counts too."""
        usage, self._usage = self._usage, None
        return [] if usage is None else [Chunk(-1, usage=usage)]

    def connection_ended(self) -> None:
        """Without `[DONE]`: that will do when every choice is whole, and not otherwise."""
        if not self.ended:
            self.ended = True
            if self._unfinished:
                self.failure = UpstreamFailed(f"The provider {self._provider} ended its answer too early.")

    def _done(self, batch: list[Chunk]) -> None:
        if len(self._seen) < self.n:
            raise UpstreamFailed(f"The provider {self._provider} gave fewer choices than were asked for.")
        # Some upstreams never give a reason; a proper end is a stop.
        for index in sorted(self._unfinished):
            if self._checked is not None:
                batch += self._checked[index].take("", msgspec.Raw(), "stop")
            else:
                batch.append(Chunk(index, "", "stop"))
        self._unfinished.clear()
        self.ended = True

    def _fail(self, error: UpstreamError) -> None:
        self.ended = True
        self.failure = error
