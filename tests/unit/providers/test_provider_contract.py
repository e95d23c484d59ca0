"""What every provider promises, tried on the real one and on the fake alike."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import pytest
from tests.support.jobs import job, model
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Job, Message, TokenLogprob, Usage
from headgate.core.errors import GatewayError, UpstreamFailed
from headgate.core.ports import Provider
from headgate.providers.fake import Fake, FakeAnswer
from headgate.providers.openai_compatible import OpenAICompatible

WORDS = ("one", " two", " three", " four")
USAGE = Usage(prompt_tokens=11, completion_tokens=4, cached_tokens=3)


class Stage(Protocol):
    """A provider, and the say over what its upstream does next."""

    provider: Provider

    def plain(self) -> None: ...
    def counted(self) -> None:
        """The answer is the same, and its tokens are really counted."""
        ...

    def ending(self) -> None:
        """The end token is scored too."""
        ...

    def held(self, at: int) -> None: ...
    def release(self) -> None: ...
    def broken(self, at: int) -> None: ...
    async def abandoned(self) -> None:
        """Returns once the upstream knows that its only call so far was given up."""
        ...


class FakeStage:
    def __init__(self) -> None:
        self.fake = Fake("acme")
        self.provider: Provider = self.fake
        self.gate = asyncio.Event()

    def plain(self) -> None:
        self.fake.default = FakeAnswer(text="".join(WORDS), usage=USAGE)

    def counted(self) -> None:
        self.fake.default = FakeAnswer(text="".join(WORDS))

    def ending(self) -> None:
        self.fake.default = FakeAnswer(text="".join(WORDS), usage=USAGE, end_token=True)

    def held(self, at: int) -> None:
        self.fake.default = FakeAnswer(text="".join(WORDS), usage=USAGE, gate=self.gate, gate_at=at)

    def release(self) -> None:
        self.gate.set()

    def broken(self, at: int) -> None:
        self.fake.default = FakeAnswer(text="".join(WORDS), error=UpstreamFailed("broke"), error_at=at)

    async def abandoned(self) -> None:
        [call] = self.fake.calls
        await call.ended.wait()
        assert call.state == "abandoned"


class UpstreamStage:
    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        settings = ProviderSettings(kind="openai", base_url=upstream.url, api_key_env="ACME_KEY")
        self.provider: Provider = OpenAICompatible("acme", settings, "secret-key")

    def _play(self, **fields: object) -> None:
        reported = {
            "prompt_tokens": 11,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        self.upstream.on("plain", Script(pieces=WORDS, usage=reported, **fields))  # type: ignore[arg-type]

    def plain(self) -> None:
        self._play()

    def counted(self) -> None:
        self.upstream.on("plain", Script(pieces=WORDS))

    def ending(self) -> None:
        self._play(end_token="<|endoftext|>")

    def held(self, at: int) -> None:
        self._play(hold_at=at)

    def release(self) -> None:
        self.upstream.release()

    def broken(self, at: int) -> None:
        self._play(close_at=at)

    async def abandoned(self) -> None:
        [request] = self.upstream.requests
        await request.closed.wait()
        assert not request.answered.is_set()


@pytest.fixture(params=["fake", "openai"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    if request.param == "fake":
        yield FakeStage()
        return
    async with Upstream() as upstream:
        stage = UpstreamStage(upstream)
        yield stage
        await stage.provider.aclose()


class Sent:
    """Counts on_sent."""

    def __init__(self) -> None:
        self.times = 0
        self.once = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self.once.set()


async def collected(provider: Provider, asked: Job, sent: Sent) -> list[Chunk]:
    return [chunk async for batch in provider.stream(asked, sent) for chunk in batch]


def text(chunks: list[Chunk], index: int) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def test_a_blocking_answer_has_its_text_finish_reason_and_usage(stage: Stage) -> None:
    stage.plain()
    sent = Sent()
    completion = await stage.provider.complete(job(), sent)
    [choice] = completion.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "one two three four", "stop")
    assert completion.usage == USAGE
    assert sent.times == 1


async def test_a_stream_says_the_same_as_the_blocking_answer(stage: Stage) -> None:
    stage.plain()
    sent = Sent()
    chunks = await collected(stage.provider, job(), sent)
    assert text(chunks, 0) == "one two three four"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [USAGE]
    assert sent.times == 1


async def test_conversations_are_answered_both_ways(stage: Stage) -> None:
    stage.plain()
    asked = job(messages=(Message(role="system", content="Be brief."), Message(role="user", content="Hi")))
    completion = await stage.provider.complete(asked, Sent())
    assert completion.choices[0].text == text(await collected(stage.provider, asked, Sent()), 0)


async def test_n_choices_come_numbered_from_0_both_ways(stage: Stage) -> None:
    stage.plain()
    completion = await stage.provider.complete(job(n=3), Sent())
    expected = [f"{index}:one two three four" for index in range(3)]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.text for choice in completion.choices] == expected
    chunks = await collected(stage.provider, job(n=3), Sent())
    assert [text(chunks, index) for index in range(3)] == expected
    finished = sorted(chunk.index for chunk in chunks if chunk.finish_reason is not None)
    assert finished == [0, 1, 2]


async def both(provider: Provider, asked: Job) -> tuple[tuple[Choice, ...], list[Chunk]]:
    """The choices of the blocking answer and the chunks of the stream, which say the same."""
    completion = await provider.complete(asked, Sent())
    chunks = await collected(provider, asked, Sent())
    for choice in completion.choices:
        assert choice.text == text(chunks, choice.index)
        assert [choice.finish_reason] == [
            chunk.finish_reason for chunk in chunks if chunk.index == choice.index and chunk.finish_reason
        ]
        assert (choice.logprobs or ()) == entries(chunks, choice.index)
    return completion.choices, chunks


def entries(chunks: list[Chunk], index: int) -> tuple[TokenLogprob, ...]:
    return tuple(entry for chunk in chunks if chunk.index == index for entry in chunk.logprobs or ())


def joined(found: tuple[TokenLogprob, ...] | None) -> str:
    return b"".join(entry.data for entry in found or ()).decode()


ECHOES = [
    job(prompt="say héllo", echo=True),
    job(prompt="say héllo", echo=True, n=2),
    job(prompt="say héllo", echo=True, logprobs=0),
    job(prompt="say héllo", echo=True, logprobs=2, n=3),
    job(prompt="say héllo", echo=True, logprobs=2, max_tokens=0),
    job(prompt="say héllo", echo=True, shape="chat", n=2),
]
SCORED = [
    job(logprobs=0),
    job(logprobs=3, n=2),
    job(logprobs=2, shape="chat"),
    job(logprobs=1, prompt=(5, 6, 7)),
    job(logprobs=1, prompt=(5, 6, 7), echo=True),
    *(asked for asked in ECHOES if asked.logprobs is not None),
]


@pytest.mark.parametrize("asked", SCORED)
async def test_log_probabilities_cover_the_text_and_are_the_same_both_ways(stage: Stage, asked: Job) -> None:
    stage.plain()
    choices, _ = await both(stage.provider, asked)
    assert len(choices) == asked.n
    for choice in choices:
        assert choice.logprobs
        assert joined(choice.logprobs) == choice.text
        unscored = [entry for entry in choice.logprobs if entry.logprob is None]
        assert unscored == ([choice.logprobs[0]] if asked.echo else [])
        for entry in choice.logprobs:
            if entry.logprob is None:
                assert entry.top is None
                continue
            assert entry.logprob <= 0
            assert entry.top is not None
            assert len(entry.top) == asked.logprobs
            assert list(entry.top) == sorted(entry.top, key=lambda pair: -pair[1])


@pytest.mark.parametrize("asked", [job(), job(n=2), job(echo=True), job(prompt=(1, 2)), job(best_of=2)])
async def test_nobody_gets_log_probabilities_unasked(stage: Stage, asked: Job) -> None:
    stage.ending()
    choices, chunks = await both(stage.provider, asked)
    assert [choice.logprobs for choice in choices] == [None] * asked.n
    assert {chunk.logprobs for chunk in chunks} == {None}


async def test_an_end_token_is_scored_without_text(stage: Stage) -> None:
    stage.ending()
    [choice], _ = await both(stage.provider, job(logprobs=1))
    assert choice.logprobs is not None
    *others, last = choice.logprobs
    assert (last.data, last.end) == (b"", True)
    assert last.logprob is not None
    assert not any(entry.end for entry in others)
    assert joined(choice.logprobs) == choice.text == "one two three four"


@pytest.mark.parametrize("asked", ECHOES)
async def test_an_echoed_prompt_comes_first_in_every_choice(stage: Stage, asked: Job) -> None:
    stage.plain()
    choices, chunks = await both(stage.provider, asked)
    for choice in choices:
        assert choice.text.startswith("say héllo")
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        echoed = [chunk for chunk in own if chunk.echoed]
        assert own[: len(echoed)] == echoed
        assert text(echoed, choice.index) == "say héllo"
        assert {chunk.tokens for chunk in echoed} == {0}
        if asked.logprobs is not None:
            assert joined(entries(echoed, choice.index)) == "say héllo"


async def test_a_prompt_alone_finishes_with_length(stage: Stage) -> None:
    stage.plain()
    [choice], _ = await both(stage.provider, job(echo=True, logprobs=0, max_tokens=0))
    assert (choice.text, choice.finish_reason) == ("say hello", "length")


async def test_all_candidates_are_counted_and_the_best_answered(stage: Stage) -> None:
    stage.counted()
    completion = await stage.provider.complete(job(n=2, best_of=4), Sent())
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4 * len(WORDS)


async def test_token_ids_are_a_prompt_whose_length_is_known(stage: Stage) -> None:
    stage.counted()
    asked = job(prompt=(5, 6, 7))
    assert await stage.provider.count_prompt(asked) == 3
    completion = await stage.provider.complete(asked, Sent())
    assert completion.choices[0].text == "one two three four"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3


async def test_batches_are_never_empty(stage: Stage) -> None:
    stage.plain()
    assert all([batch async for batch in stage.provider.stream(job(), Sent())])


async def test_sent_is_said_before_the_answer_comes(stage: Stage) -> None:
    stage.held(0)
    sent = Sent()
    call = asyncio.create_task(stage.provider.complete(job(), sent))
    await sent.once.wait()
    assert not call.done()
    stage.release()
    assert (await call).choices[0].text == "one two three four"
    assert sent.times == 1


async def test_what_came_before_a_failure_is_given_and_then_the_failure_is_raised(stage: Stage) -> None:
    stage.broken(2)
    chunks: list[Chunk] = []
    with pytest.raises(UpstreamFailed):
        async for batch in stage.provider.stream(job(), Sent()):
            chunks.extend(batch)
    assert text(chunks, 0) == "one two"
    assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks)


async def test_a_blocking_failure_is_raised(stage: Stage) -> None:
    stage.broken(0)
    with pytest.raises(UpstreamFailed):
        await stage.provider.complete(job(), Sent())


async def test_cancelling_a_blocking_call_ends_it_upstream(stage: Stage) -> None:
    stage.held(0)
    sent = Sent()
    call = asyncio.create_task(stage.provider.complete(job(), sent))
    await sent.once.wait()
    if isinstance(stage, UpstreamStage):
        await stage.upstream.request(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(1):
        await stage.abandoned()


async def test_cancelling_a_stream_between_chunks_ends_it_upstream(stage: Stage) -> None:
    stage.held(2)
    given: asyncio.Queue[str] = asyncio.Queue()

    async def consume() -> None:
        async for batch in stage.provider.stream(job(), Sent()):
            for chunk in batch:
                given.put_nowait(chunk.text)

    call = asyncio.create_task(consume())
    assert [await given.get(), await given.get()] == ["one", " two"]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(1):
        await stage.abandoned()


async def test_closing_a_stream_ends_it_upstream(stage: Stage) -> None:
    stage.held(1)
    chunks = stage.provider.stream(job(), Sent())
    assert [chunk.text for chunk in await anext(chunks)] == ["one"]
    await chunks.aclose()
    async with asyncio.timeout(1):
        await stage.abandoned()


async def test_a_broken_model_says_so_and_others_are_available(stage: Stage) -> None:
    assert stage.provider.unavailable(model()) is None
    assert stage.provider.unavailable(model(broken="its file is cut")) == "its file is cut"


async def test_prompts_are_not_counted_without_a_tokenizer(stage: Stage) -> None:
    assert await stage.provider.count_prompt(job()) is None


async def test_closing_twice_is_fine(stage: Stage) -> None:
    stage.plain()
    await stage.provider.complete(job(), Sent())
    await stage.provider.aclose()
    await stage.provider.aclose()


async def test_a_failure_is_an_error_clients_may_see(stage: Stage) -> None:
    stage.broken(0)
    with pytest.raises(GatewayError) as raised:
        await collected(stage.provider, job(), Sent())
    assert "secret-key" not in str(raised.value)
    assert "127.0.0.1" not in str(raised.value)
