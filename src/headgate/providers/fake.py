"""A provider without an upstream: deterministic, scripted, and it remembers. Tests use it, and nothing else.

It passes the same contract test as the real ones, so what holds with it holds with them.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from msgspec import Struct

from headgate.core.completion import Choice, Chunk, Completion, FinishReason, Job, TokenLogprob, Usage
from headgate.core.errors import GatewayError
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer

_WORD = re.compile(r"\s*\S+|\s+$")
CallState = Literal["running", "finished", "failed", "abandoned"]


class FakeAnswer(Struct, frozen=True, kw_only=True):
    """How a prompt is answered, a word per chunk.

    `text` None: an echo of the prompt. With several candidates each begins with its number and a colon. An answer
    longer than the job's `max_tokens` words is cut there and finishes with "length". `usage` "count": words
    count as tokens. `gate` is waited for once `gate_at` words were given, `error` is raised once `error_at`
    were (blocking: always). `sent` False: the call fails before anything has left. Log probabilities come a word
    an entry, longer words are less likely; `end_token`: one that stops has an entry for that too.
    """

    text: str | None = None
    finish_reason: FinishReason = "stop"
    usage: Usage | Literal["count"] | None = "count"
    gate: asyncio.Event | None = None
    gate_at: int = 0
    error: GatewayError | None = None
    error_at: int = 0
    sent: bool = True
    end_token: bool = False


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

    `reason` makes its models unavailable; `tokenizer` lets it count prompts, in words. The token id 7 is the word t7.
    Of `best_of` candidates the likeliest are given.
    """

    tokenizer: Tokenizer | None = None

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
        return _prompt_tokens(job) if self._tokenizer or isinstance(job.prompt, tuple) else None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        with self._call(job, streamed=False) as call:
            answer = self._send(call, on_sent)
            if answer.gate is not None:
                await answer.gate.wait()
            if answer.error is not None:
                raise answer.error
            said = _said(answer, job)
            return Completion(choices=tuple(_choice(said, index) for index in range(job.n)), usage=said.usage)

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        with self._call(job, streamed=True) as call:
            answer = self._send(call, on_sent)
            said = _said(answer, job)
            longest = max(map(len, said.words))
            for given in range(longest + 1):
                if answer.gate is not None and given == answer.gate_at:
                    await answer.gate.wait()
                if answer.error is not None and given == min(answer.error_at, longest):
                    raise answer.error
                if given == 0 and said.echoed:
                    yield [said.prompt(index) for index in range(job.n)]
                if given < longest:
                    yield [
                        said.chunk(index, given) for index in range(job.n) if given < len(said.words[index])
                    ]
            last = [said.last(index) for index in range(job.n)]
            yield last if said.usage is None else [*last, Chunk(-1, usage=said.usage)]

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


class _Said(Struct, frozen=True, kw_only=True):
    """What a call is answered with: the words of the echoed prompt, the words of every choice, and how they end."""

    echoed: list[str]
    words: list[list[str]]
    finish_reason: FinishReason
    usage: Usage | None
    alternatives: int | None
    end_token: bool

    def prompt(self, index: int) -> Chunk:
        entries = self._entries(self.echoed)
        if entries:
            entries = (TokenLogprob(entries[0].data, None, None), *entries[1:])
        return Chunk(index, "".join(self.echoed), tokens=0, logprobs=entries, echoed=True)

    def chunk(self, index: int, position: int) -> Chunk:
        word = self.words[index][position]
        return Chunk(index, word, logprobs=self._entries([word]))

    def last(self, index: int) -> Chunk:
        entries = None
        if self.end_token and self.alternatives is not None and self.finish_reason == "stop":
            entries = (TokenLogprob(b"", _logprob(""), _alternatives("", self.alternatives), end=True),)
        return Chunk(index, "", self.finish_reason, logprobs=entries)

    def _entries(self, words: list[str]) -> tuple[TokenLogprob, ...] | None:
        if self.alternatives is None:
            return None
        return tuple(
            TokenLogprob(word.encode(), _logprob(word), _alternatives(word, self.alternatives))
            for word in words
        )


def _choice(said: _Said, index: int) -> Choice:
    """The choice that the chunks of a stream come to."""
    chunks = [said.chunk(index, position) for position in range(len(said.words[index]))]
    if said.echoed:
        chunks.insert(0, said.prompt(index))
    chunks.append(said.last(index))
    entries = tuple(entry for chunk in chunks for entry in chunk.logprobs or ())
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        finish_reason=said.finish_reason,
        logprobs=None if said.alternatives is None else entries,
    )


def _logprob(word: str) -> float:
    return -(len(word) + 1) / 8


def _alternatives(word: str, count: int) -> tuple[tuple[bytes, float], ...]:
    """The word itself is the likeliest."""
    likeliest = (word.encode(), _logprob(word))
    others = ((f" other{other}".encode(), _logprob(word) - other) for other in range(1, count))
    return (likeliest, *others)[:count]


def _prompt(job: Job) -> str:
    if job.messages:
        return job.messages[-1].content
    if isinstance(job.prompt, tuple):
        return " ".join(f"t{token}" for token in job.prompt)
    return job.prompt or ""


def _prompt_tokens(job: Job) -> int:
    texts = [message.content for message in job.messages] if job.messages else [_prompt(job)]
    return max(1, sum(len(text.split()) for text in texts))


def _said(answer: FakeAnswer, job: Job) -> _Said:
    text = answer.text
    if text is None:
        text = " ".join(["echo:", *_prompt(job).split()])
    several = job.candidates > 1
    candidates = [_WORD.findall(f"{index}:{text}" if several else text) for index in range(job.candidates)]
    finish_reason = answer.finish_reason
    if max(map(len, candidates)) > job.max_tokens:
        candidates = [words[: job.max_tokens] for words in candidates]
        finish_reason = "length"
    usage = answer.usage
    if usage == "count":
        usage = Usage(prompt_tokens=_prompt_tokens(job), completion_tokens=sum(map(len, candidates)))
    if job.best_of is not None:
        candidates = sorted(candidates, key=_mean_logprob, reverse=True)[: job.n]
    return _Said(
        echoed=_WORD.findall(_prompt(job)) if job.echo else [],
        words=candidates,
        finish_reason=finish_reason,
        usage=usage,
        alternatives=job.logprobs,
        end_token=answer.end_token,
    )


def _mean_logprob(words: list[str]) -> float:
    return sum(map(_logprob, words)) / max(len(words), 1)
