"""What every provider promises, tried on the real one and on the fake alike."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import pytest
from tests.support.jobs import job, model
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.config import ProviderSettings
from headgate.core.completion import Chunk, Job, Message, Usage
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
