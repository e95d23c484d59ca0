"""One streamed answer in Anthropic's format, event by event, and whether it came to a proper end.

This is the hot path of every stream: one event is one decode and at most one Chunk.
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, Job, ToolCallPiece, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.anthropic_wire import (
    Block,
    Counts,
    Event,
    InputEvent,
    Kind,
    failure,
    finish_reason,
    is_given,
    merged,
    usage_of,
)
from headgate.providers.tool_calls import StreamedCalls, input_text
from headgate.providers.upstream import echoed_prompt

BYTES_PER_TOKEN = 4
_KNOWN = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    }
)
_decode = msgspec.json.Decoder(Event).decode
_decode_kind = msgspec.json.Decoder(Kind).decode
_decode_input = msgspec.json.Decoder(InputEvent).decode


class StreamedMessage:
    """The one choice of a stream, and its usage: input is reported at the start, output so far every now and then.

    `ended` is True when nothing more is to come, `failure` then says what went wrong, if anything did. Chunks
    that came before a failure are still given. An echoed prompt is put first here: the format cannot echo. Tool calls
    are read where the job has tools.
    """

    __slots__ = (
        "_begun",
        "_calls",
        "_counts",
        "_finished",
        "_given",
        "_job",
        "_key",
        "_preface",
        "_provider",
        "_recounted",
        "_uncounted",
        "ended",
        "failure",
    )

    def __init__(self, provider: str, job: Job, key: str | None) -> None:
        self.ended = False
        self.failure: UpstreamError | None = None
        self._provider = provider
        self._job = job
        self._key = key
        self._preface = echoed_prompt(job)
        self._calls = StreamedCalls(provider) if job.tools is not None else None
        self._begun = False
        self._finished = False
        self._counts: Counts | None = Counts()
        self._uncounted = 0
        self._recounted = False
        self._given: Usage | None = None

    @property
    def whole(self) -> bool:
        """True once there was a reason to stop."""
        return self._finished

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        """The chunks in these events. The usage comes with the end."""
        batch: list[Chunk] = []
        try:
            for data in events:
                event = self._read(data)
                if event is not None:
                    self._add(event, data, batch)
                if self.ended:
                    break
        except UpstreamError as error:
            self._fail(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if self._finished:
                self.ended = True  # nothing is missing
            else:
                self._fail(
                    UpstreamFailed(f"The provider {self._provider} sent an event that cannot be read.")
                )
        if self.ended:
            batch += self.reported()
        elif self._finished:  # not every client waits for the last word
            batch += self._news()
        return batch

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that broke off it counts too, and its failure
        bears it.

        Text that came after the last report of output is estimated: what was reported before it says nothing of it.
        """
        news = self._news()
        if self.failure is not None and self._given is not None:
            self.failure.usage = self._given
        return news

    def connection_ended(self) -> None:
        """Without `message_stop`: that will do after a reason to stop, and not otherwise."""
        if not self.ended:
            self.ended = True
            if not self._finished:
                self.failure = UpstreamFailed(f"The provider {self._provider} ended its answer too early.")

    def _usage(self) -> Usage | None:
        usage = usage_of(self._counts)
        if usage is None or not self._uncounted:
            return usage
        most = max(self._job.max_tokens, usage.completion_tokens)
        counted = usage.completion_tokens if self._recounted else 0
        # What the message begins with is no count of what it comes to.
        guessed = max(counted - (-self._uncounted // BYTES_PER_TOKEN), usage.completion_tokens)
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=min(guessed, most),
            cached_tokens=usage.cached_tokens,
            source="estimate",
        )

    def _news(self) -> list[Chunk]:
        usage = self._usage()
        if usage is None or usage == self._given:
            return []
        self._given = usage
        return [Chunk(-1, usage=usage)]

    def _read(self, data: bytes) -> Event | None:
        """None for an event of a kind that was invented after this was written, whatever it holds."""
        try:
            return _decode(data)
        except msgspec.ValidationError:
            if _decode_kind(data).type in _KNOWN:
                raise
            return None

    def _add(self, event: Event, data: bytes, batch: list[Chunk]) -> None:
        if (event.error and is_given(event.error)) or event.type == "error":
            raise failure(self._provider, event.error, self._key)
        match event.type:
            case "content_block_delta":
                delta = event.delta
                if delta is None:
                    return
                if delta.type == "text_delta":
                    if delta.text:
                        self._say(delta.text, batch)
                elif self._calls is not None and delta.type == "input_json_delta":
                    piece = _decode_input(data)
                    self._call(self._calls.go_on(piece.index, piece.delta.partial_json), batch)
            case "content_block_start":
                self._begun = True
                block = event.content_block
                if block is None:
                    return
                if block.type == "text":
                    if block.text:
                        self._say(block.text, batch)
                elif self._calls is not None and block.type == "tool_use":
                    self._begin_call(self._calls, block, _decode_input(data).index, batch)
            case "content_block_stop":
                if self._calls is not None:
                    self._call(self._calls.end(_decode_input(data).index), batch)
            case "message_start":
                self._begun = True
                if event.message is not None:
                    self._counts = merged(self._counts, event.message.usage)
                    self._tell_input(batch)
            case "message_delta":
                counts = self._counts = merged(self._counts, event.usage)
                if is_given(event.usage) and counts is not None and counts.output_tokens is not None:
                    self._uncounted = 0
                    self._recounted = True
                if event.delta is not None and event.delta.stop_reason is not None:
                    self._finish(event.delta.stop_reason, batch)
            case "message_stop":
                if not self._begun:
                    raise UpstreamFailed(f"The provider {self._provider} ended an answer that never began.")
                # Some upstreams give no reason; a proper end is a stop.
                self._finish(None, batch)
                self.ended = True

    def _tell_input(self, batch: list[Chunk]) -> None:
        """What the prompt came to is known from now on, should the client leave before the end."""
        usage = usage_of(self._counts)
        if usage is not None:
            batch.append(Chunk(-1, usage=msgspec.structs.replace(usage, final=False)))

    def _say(self, text: str, batch: list[Chunk]) -> None:
        if self._finished:
            raise self._goes_on()
        if self._preface:
            self._echo(batch)
        self._begun = True
        self._uncounted += len(text.encode())
        batch.append(Chunk(0, text))

    def _begin_call(self, calls: StreamedCalls, block: Block, index: int, batch: list[Chunk]) -> None:
        given = input_text(self._provider, block.input)
        self._call(calls.end(index), batch)  # an index that comes again is another call's
        self._call(calls.begin(index, block.id or "", block.name or "", given), batch)

    def _call(self, piece: ToolCallPiece | None, batch: list[Chunk]) -> None:
        if piece is None:
            return
        if self._finished:
            raise self._goes_on()
        self._uncounted += len((piece.name or "").encode()) + len(piece.arguments.encode())
        self._give(piece, batch)

    def _give(self, piece: ToolCallPiece, batch: list[Chunk]) -> None:
        if self._preface:
            self._echo(batch)
        batch.append(Chunk(0, tool_calls=(piece,)))

    def _finish(self, reason: str | None, batch: list[Chunk]) -> None:
        if self._finished:
            return
        if self._preface:
            self._echo(batch)
        calls = self._calls
        finish = finish_reason(reason, called=calls is not None and calls.count > 0)
        if calls is not None:
            for piece in calls.end_all():
                self._give(piece, batch)  # what was counted just now counts it
        self._begun = self._finished = True
        batch.append(Chunk(0, "", finish))

    def _echo(self, batch: list[Chunk]) -> None:
        batch.append(Chunk(0, self._preface, tokens=0, echoed=True))
        self._preface = ""

    def _goes_on(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} went on after the end of its answer.")

    def _fail(self, error: UpstreamError) -> None:
        self.ended = True
        self.failure = error
