"""The fake provider beyond the contract: what tests rely on it to do and to remember."""

import asyncio

import pytest
from tests.support.jobs import job, model

from headgate.core.completion import Message, TokenLogprob, Usage
from headgate.core.errors import UpstreamTimeout
from headgate.providers.fake import Fake, FakeAnswer


def nothing() -> None:
    pass


async def test_it_echoes_and_counts_words_where_nothing_is_scripted() -> None:
    completion = await Fake().complete(job(prompt="say hello twice"), nothing)
    assert completion.choices[0].text == "echo: say hello twice"
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=4)


async def test_prompts_and_last_messages_choose_their_answers() -> None:
    fake = Fake(answers={"Hi": FakeAnswer(text="Hello!", usage=None)})
    talk = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    for asked in (job(prompt="Hi"), job(messages=talk)):
        completion = await fake.complete(asked, nothing)
        assert (completion.choices[0].text, completion.usage) == ("Hello!", None)


async def test_the_limit_on_tokens_cuts_the_answer() -> None:
    completion = await Fake().complete(job(prompt="a b c d", max_tokens=2), nothing)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("echo: a", "length")
    chunks = [c async for batch in Fake().stream(job(prompt="a b c", max_tokens=2), nothing) for c in batch]
    assert "".join(chunk.text for chunk in chunks) == "echo: a"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


async def test_a_gate_holds_the_stream_where_it_should() -> None:
    gate = asyncio.Event()
    fake = Fake(default=FakeAnswer(gate=gate, gate_at=1))
    stream = fake.stream(job(), nothing)
    assert [chunk.text for chunk in await anext(stream)] == ["echo:"]
    following = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not following.done()
    gate.set()
    assert [chunk.text for chunk in await following] == [" say"]
    await stream.aclose()
    assert fake.calls[0].state == "abandoned"


async def test_a_call_that_fails_before_it_left_was_not_sent() -> None:
    fake = Fake(default=FakeAnswer(error=UpstreamTimeout("connecting took too long"), sent=False))
    sent: list[bool] = []
    with pytest.raises(UpstreamTimeout):
        await fake.complete(job(), lambda: sent.append(True))
    assert (sent, fake.calls[0].sent, fake.calls[0].state) == ([], False, "failed")


async def test_calls_are_remembered_as_they_went() -> None:
    fake = Fake()
    await fake.complete(job(prompt="one"), nothing)
    assert [b async for b in fake.stream(job(prompt="two"), nothing)]
    seen = [(call.job.prompt, call.streamed, call.sent, call.state) for call in fake.calls]
    assert seen == [("one", False, True, "finished"), ("two", True, True, "finished")]
    assert fake.calls[1].ended.is_set()


async def test_it_can_be_unavailable_and_count_prompts() -> None:
    assert Fake(reason="set FAKE_KEY").unavailable(model()) == "set FAKE_KEY"
    assert await Fake(tokenizer=True).count_prompt(job(prompt="a b c")) == 3


async def test_token_ids_are_words_of_their_own() -> None:
    fake = Fake()
    completion = await fake.complete(job(prompt=(7, 11), echo=True), nothing)
    assert completion.choices[0].text == "t7 t11echo: t7 t11"
    assert completion.usage == Usage(prompt_tokens=2, completion_tokens=3)
    assert await fake.count_prompt(job(prompt=(7, 11))) == 2


async def test_longer_words_are_less_likely_and_the_end_may_have_an_entry() -> None:
    fake = Fake(default=FakeAnswer(text="a bcd", end_token=True))
    found = (await fake.complete(job(logprobs=1), nothing)).choices[0].logprobs
    assert found == (
        TokenLogprob(b"a", -0.25, ((b"a", -0.25),)),
        TokenLogprob(b" bcd", -0.625, ((b" bcd", -0.625),)),
        TokenLogprob(b"", -0.125, ((b"", -0.125),), end=True),
    )
    cut = await fake.complete(job(logprobs=0, max_tokens=1), nothing)
    assert cut.choices[0].logprobs == (TokenLogprob(b"a", -0.25),)


async def test_of_several_candidates_the_likeliest_are_given_and_all_are_counted() -> None:
    completion = await Fake(default=FakeAnswer(text="a b")).complete(job(n=2, best_of=11), nothing)
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "0:a b"), (1, "1:a b")]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 22


async def test_only_a_scored_prompt_can_be_asked_for() -> None:
    completion = await Fake().complete(job(prompt="a b", echo=True, logprobs=0, max_tokens=0), nothing)
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason) == ("a b", "length")
    assert choice.logprobs == (TokenLogprob(b"a", None, None), TokenLogprob(b" b", -0.375))
