"""One streamed answer in the OpenAI formats, event by event, and whether it came to a proper end.

This is the hot path of every stream: one event is one decode and one Chunk.
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, FinishReason, ToolCallPiece, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.bounded_list import ORDINARY_BYTES
from headgate.providers.openai_choice import CheckedChoice
from headgate.providers.openai_tools import CallPieces
from headgate.providers.openai_wire import (
    ABSENT,
    DONE,
    NULL,
    AnswerChoice,
    decode_ordinary,
    error_of,
    finish_reason,
    read_with_care,
    usage_of,
)


class StreamedAnswer:
    """Collects what `n` choices still owe.

    `ended` is True when nothing more is to come, `failure` then says what went wrong, if anything did. Chunks
    that came before a failure are still given. `checked`: the choices, where their pieces are to be checked. Calls of
    tools are looked at only where the job `has_tools`.
    """

    __slots__ = (
        "_calls",
        "_checked",
        "_key",
        "_latest",
        "_plain",
        "_provider",
        "_refused",
        "_seen",
        "_told",
        "_unfinished",
        "_usage",
        "ended",
        "failure",
        "n",
    )

    def __init__(
        self,
        provider: str,
        n: int,
        key: str | None,
        checked: Sequence[CheckedChoice] | None = None,
        *,
        has_tools: bool = False,
    ) -> None:
        self.n = n
        self.ended = False
        self.failure: UpstreamError | None = None
        self._provider = provider
        self._key = key
        self._checked = checked
        self._calls = [CallPieces(provider) for _ in range(n)] if has_tools else None
        self._plain = checked is None and not has_tools
        self._seen: set[int] = set()
        self._refused: set[int] = set()
        self._unfinished = set(range(n))
        self._usage: Usage | None = None
        self._latest: Usage | None = None
        self._told: Usage | None = None

    @property
    def whole(self) -> bool:
        """True once every choice has its finish reason."""
        return not self._unfinished

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        """The chunks in these events. The usage reported last comes with, or after, the end of the last choice; what
        was reported until then comes as it is known."""
        batch: list[Chunk] = []
        n, seen, plain = self.n, self._seen, self._plain
        try:
            for data in events:
                if data == DONE:
                    self._done(batch)
                    break
                try:  # as in openai_wire.read, without a call
                    answer = decode_ordinary(data) if len(data) <= ORDINARY_BYTES else read_with_care(data, n)
                except msgspec.ValidationError:
                    answer = read_with_care(data, n)
                if answer.usage is not None:
                    self._usage = self._latest = usage_of(answer.usage)
                if answer.error is not ABSENT and answer.error != NULL:
                    raise error_of(self._provider, answer.error, self._key)
                for choice in answer.choices or ():
                    index = choice.index
                    if not 0 <= index < n:
                        raise UpstreamFailed(f"The provider {self._provider} gave a choice nobody asked for.")
                    seen.add(index)
                    delta = choice.delta
                    text = choice.text if delta is None else delta.content
                    if not text and delta is not None and delta.refusal:
                        text = delta.refusal
                        self._refused.add(index)
                    if not plain:
                        batch += self._looked_into(choice, text or "")
                    elif choice.finish_reason is not None:
                        self._unfinished.discard(index)
                        refused = index in self._refused
                        finish = finish_reason(self._provider, choice.finish_reason, refused=refused)
                        batch.append(Chunk(index, text or "", finish))
                    elif text:
                        batch.append(Chunk(index, text))
        except UpstreamError as error:
            self._fail(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if self._unfinished:
                self._fail(
                    UpstreamFailed(f"The provider {self._provider} sent an event that cannot be read.")
                )
            else:
                self.ended = True  # nothing is missing
        if self.ended or not self._unfinished:
            batch += self.reported()
        elif self._usage is not None and events:
            self._tell(self._usage, batch, counts_all=answer.usage is not None)
        return batch

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that broke off it counts too."""
        usage, self._usage = self._usage, None
        return [] if usage is None or usage == self._told else [Chunk(-1, usage=usage)]

    def _tell(self, usage: Usage, batch: list[Chunk], *, counts_all: bool) -> None:
        """What is known of the usage in the middle of an answer, should the client leave before its end."""
        told = Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            final=counts_all,
        )
        if told != self._told:
            self._told = told
            batch.append(Chunk(-1, usage=told))

    def connection_ended(self) -> None:
        """Without `[DONE]`: that will do when every choice is whole, and not otherwise."""
        if not self.ended:
            self.ended = True
            if self._unfinished:
                self._fail(UpstreamFailed(f"The provider {self._provider} ended its answer too early."))

    def _looked_into(self, choice: AnswerChoice, text: str) -> list[Chunk]:
        """The chunks of a piece that may be more than its text."""
        index, given = choice.index, choice.finish_reason
        ended: FinishReason | None = None
        if given is not None:
            ended = finish_reason(self._provider, given, refused=index in self._refused)
            self._unfinished.discard(index)
        pieces: list[ToolCallPiece] = []
        if self._calls is not None:
            calls = self._calls[index]
            if choice.delta is not None and choice.delta.tool_calls is not ABSENT:
                pieces += calls.take(choice.delta.tool_calls)
            if ended is not None and calls.any:
                pieces += calls.end()
                ended = "tool_calls" if ended == "stop" else ended
        if self._checked is None:
            said = text or pieces or ended
            return [Chunk(index, text, ended, tool_calls=tuple(pieces) or None)] if said else []
        chunks = self._checked[index].take(text, choice.logprobs, ended)
        if pieces:
            chunks.insert(0, Chunk(index, tool_calls=tuple(pieces)))
        return chunks

    def _done(self, batch: list[Chunk]) -> None:
        if len(self._seen) < self.n:
            raise UpstreamFailed(f"The provider {self._provider} gave fewer choices than were asked for.")
        # Some upstreams never give a reason; a proper end is a stop.
        for index in sorted(self._unfinished):
            batch += self._looked_into(AnswerChoice(index, finish_reason="stop"), "")
        self.ended = True

    def _fail(self, error: UpstreamError) -> None:
        self.ended = True
        self.failure = error
        error.usage = self._latest
