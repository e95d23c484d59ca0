"""A provider without an upstream: deterministic, scripted, and it remembers. Tests use it, and nothing else.

It passes the same contract test as the real ones, so what holds with it holds with them.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from msgspec import Struct

from headgate.core.completion import Choice, Chunk, Completion, FinishReason, Job, Usage
from headgate.core.errors import GatewayError
from headgate.core.models import ModelSpec

_WORD = re.compile(r"\s*\S+|\s+$")
CallState = Literal["running", "finished", "failed", "abandoned"]


class FakeAnswer(Struct, frozen=True, kw_only=True):
    """How a prompt is answered, a word per chunk.

    `text` None: an echo of the prompt. With n > 1 each choice begins with its number and a colon. An answer
    longer than the job's `max_tokens` words is cut there and finishes with "length". `usage` "count": words
    count as tokens. `gate` is waited for once `gate_at` words were given, `error` is raised once `error_at`
    were (blocking: always). `sent` False: the call fails before anything has left.
    """

    text: str | None = None
    finish_reason: FinishReason = "stop"
    usage: Usage | Literal["count"] | None = "count"
    gate: asyncio.Event | None = None
    gate_at: int = 0
    error: GatewayError | None = None
    error_at: int = 0
    sent: bool = True


class FakeCall:
    """One call as it went. "abandoned": it was cancelled, or its stream was closed, before its end."""

    def __init__(self, job: Job, *, streamed: bool) -> None:
        self.job = job
        self.streamed = streamed
        self.sent = False
        self.state: CallState = "running"
        self.ended = asyncio.Event()


class Fake:
    """Answers by prompt (the last message's content in the chat shape), else with `default`.

    `reason` makes its models unavailable; `tokenizer` lets it count prompts, in words.
    """

    def __init__(
        self,
        name: str = "fake",
        answers: Mapping[str, FakeAnswer] | None = None,
        *,
        default: FakeAnswer | None = None,
        stream_only: bool = False,
        reason: str | None = None,
        tokenizer: bool = False,
    ) -> None:
        self.name = name
        self.stream_only = stream_only
        self.answers = dict(answers or {})
        self.default = default or FakeAnswer()
        self.reason = reason
        self.calls: list[FakeCall] = []
        self.closed = False
        self._tokenizer = tokenizer

    def unavailable(self, model: ModelSpec) -> str | None:
        return self.reason or model.broken

    async def count_prompt(self, job: Job) -> int | None:
        return _prompt_tokens(job) if self._tokenizer else None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        with self._call(job, streamed=False) as call:
            answer = self._send(call, on_sent)
            if answer.gate is not None:
                await answer.gate.wait()
            if answer.error is not None:
                raise answer.error
            pieces, finish_reason = _pieces(answer, job)
            return Completion(
                choices=tuple(
                    Choice(index=index, text="".join(words), finish_reason=finish_reason)
                    for index, words in enumerate(pieces)
                ),
                usage=_usage(answer, job, pieces),
            )

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        with self._call(job, streamed=True) as call:
            answer = self._send(call, on_sent)
            pieces, finish_reason = _pieces(answer, job)
            longest = max(map(len, pieces))
            for given in range(longest + 1):
                if answer.gate is not None and given == answer.gate_at:
                    await answer.gate.wait()
                if answer.error is not None and given == min(answer.error_at, longest):
                    raise answer.error
                if given < longest:
                    yield [Chunk(index, words[given]) for index, words in enumerate(pieces)]
            last = [Chunk(index, "", finish_reason) for index in range(job.n)]
            usage = _usage(answer, job, pieces)
            yield last if usage is None else [*last, Chunk(-1, usage=usage)]

    async def aclose(self) -> None:
        self.closed = True

    @contextmanager
    def _call(self, job: Job, *, streamed: bool) -> Iterator[FakeCall]:
        call = FakeCall(job, streamed=streamed)
        self.calls.append(call)
        try:
            yield call
            call.state = "finished"
        except GatewayError:
            call.state = "failed"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            call.state = "abandoned"
            raise
        finally:
            call.ended.set()

    def _send(self, call: FakeCall, on_sent: Callable[[], None]) -> FakeAnswer:
        answer = self.answers.get(_prompt(call.job), self.default)
        if not answer.sent and answer.error is not None:
            raise answer.error
        call.sent = True
        on_sent()
        return answer


def _prompt(job: Job) -> str:
    return job.messages[-1].content if job.messages else job.prompt or ""


def _prompt_tokens(job: Job) -> int:
    texts = [message.content for message in job.messages] if job.messages else [job.prompt or ""]
    return max(1, sum(len(text.split()) for text in texts))


def _pieces(answer: FakeAnswer, job: Job) -> tuple[list[list[str]], FinishReason]:
    """The words of every choice, and how they finish."""
    text = answer.text
    if text is None:
        text = " ".join(["echo:", *_prompt(job).split()])
    choices = [_WORD.findall(text if job.n == 1 else f"{index}:{text}") for index in range(job.n)]
    if max(map(len, choices)) <= job.max_tokens:
        return choices, answer.finish_reason
    return [words[: job.max_tokens] for words in choices], "length"


def _usage(answer: FakeAnswer, job: Job, pieces: list[list[str]]) -> Usage | None:
    if answer.usage != "count":
        return answer.usage
    return Usage(prompt_tokens=_prompt_tokens(job), completion_tokens=sum(map(len, pieces)))
