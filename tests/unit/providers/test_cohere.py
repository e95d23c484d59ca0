"""Cohere over real HTTP: what is asked of it, and what its answers come to. Its own client reads the same answers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import cohere
import pytest
from tests.support.asking import KEY, nothing
from tests.support.called import called
from tests.support.cohere_upstream import THOUGHT, UNBILLED, CohereUpstream, counts
from tests.support.jobs import job as any_job
from tests.support.jobs import model
from tests.support.script import Script

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Job, Message, ResponseFormat, Sampling, Usage
from headgate.core.errors import InvalidRequest, ModelUnavailable
from headgate.providers.cohere import Cohere

WORDS = ("one", " two", " three", " fouré")
TALK = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hi"),
    Message(role="assistant", content="Hello"),
    Message(role="user", content="Who are you?"),
)


def job(upstream_name: str = "command", **fields: Any) -> Job:
    return any_job(upstream_name, **{"shape": "chat"} | fields)


def provider_for(url: str, key: str | None = KEY, **settings: Any) -> Cohere:
    return Cohere(
        "acme", ProviderSettings(kind="cohere", base_url=url, api_key_env="ACME_KEY", **settings), key
    )


@pytest.fixture
async def upstream() -> AsyncIterator[CohereUpstream]:
    async with CohereUpstream() as up:
        yield up


@pytest.fixture
async def provider(upstream: CohereUpstream) -> AsyncIterator[Cohere]:
    made = provider_for(upstream.url)
    yield made
    await made.aclose()


async def streamed(provider: Cohere, asked: Job) -> list[Chunk]:
    return [chunk async for batch in provider.stream(asked, nothing) for chunk in batch]


async def both(provider: Cohere, asked: Job) -> tuple[Choice, Usage | None, list[Chunk]]:
    """The choice and usage of the blocking answer and the chunks of the stream, which say the same."""
    completion = await provider.complete(asked, nothing)
    chunks = await streamed(provider, asked)
    [choice] = completion.choices
    assert choice.index == 0
    assert choice.text == "".join(chunk.text for chunk in chunks)
    assert list(choice.tool_calls) == called(chunks)
    assert [choice.finish_reason] == [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    assert [chunk.usage for chunk in chunks if chunk.usage] == (
        [completion.usage] if completion.usage else []
    )
    return choice, completion.usage, chunks


async def body_of(upstream: CohereUpstream, provider: Cohere, asked: Job) -> dict[str, Any]:
    """What is sent for the job: the same for both ways, but for `stream`."""
    first = len(upstream.requests)
    await both(provider, asked)
    blocking, streaming = upstream.requests[first:]
    assert streaming.json == blocking.json | {"stream": True}
    assert isinstance(blocking.json, dict)
    return blocking.json


class TestRequest:
    async def test_it_goes_to_chat_with_our_key(self, upstream: CohereUpstream, provider: Cohere) -> None:
        await provider.complete(job(), nothing)
        request = await upstream.request(0)
        assert request.path == "/v2/chat"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["content-type"] == "application/json"

    async def test_a_prompt_is_one_user_message_and_nothing_unasked_is_sent(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        assert await body_of(upstream, provider, job(prompt="say héllo")) == {
            "model": "command",
            "messages": [{"role": "user", "content": "say héllo"}],
            "max_tokens": 64,
        }

    async def test_a_conversation_keeps_its_roles(self, upstream: CohereUpstream, provider: Cohere) -> None:
        body = await body_of(upstream, provider, job(messages=TALK))
        assert body["messages"] == [{"role": said.role, "content": said.content} for said in TALK]

    async def test_everything_that_steers_has_its_word(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        sampling = Sampling(
            temperature=0.0,
            top_p=0.5,
            presence_penalty=1.0,
            frequency_penalty=0.25,
            seed=42,
            stop=("\n", "END", "a", "b", "c"),
        )
        body = await body_of(upstream, provider, job(sampling=sampling, max_tokens=7))
        del body["model"], body["messages"]
        assert body == {
            "max_tokens": 7,
            "temperature": 0.0,
            "p": 0.5,
            "presence_penalty": 1.0,
            "frequency_penalty": 0.25,
            "seed": 42,
            "stop_sequences": ["\n", "END", "a", "b", "c"],
        }

    @pytest.mark.parametrize(
        ("asked", "sent"), [(0, 0.01), (0.005, 0.01), (0.01, 0.01), (0.99, 0.99), (1, 0.99)]
    )
    async def test_p_is_kept_in_its_range(
        self, upstream: CohereUpstream, provider: Cohere, asked: float, sent: float
    ) -> None:
        body = await body_of(upstream, provider, job(sampling=Sampling(top_p=asked)))
        assert body["p"] == sent

    @pytest.mark.parametrize(
        ("asked", "sent"),
        [
            (0, 0),
            (2**63, 2**63),
            (2**64 - 1, 2**64 - 1),
            (2**64, 0),
            (-1, 2**63 - 1),
            (-(2**63), 0),
            (-(2**63) + 5, 5),
        ],
    )
    async def test_seeds_are_unsigned(
        self, upstream: CohereUpstream, provider: Cohere, asked: int, sent: int
    ) -> None:
        body = await body_of(upstream, provider, job(sampling=Sampling(seed=asked)))
        assert body["seed"] == sent

    async def test_penalties_of_zero_are_the_default_and_stay_out(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        asked = job(sampling=Sampling(presence_penalty=0.0, frequency_penalty=0.0))
        assert await provider.count_prompt(asked) is None
        assert {"presence_penalty", "frequency_penalty"}.isdisjoint(await body_of(upstream, provider, asked))

    async def test_json_is_asked_for_with_and_without_a_schema(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        free = await body_of(upstream, provider, job(response_format=ResponseFormat(kind="json_object")))
        assert free["response_format"] == {"type": "json_object"}
        schema = b'{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
        held = ResponseFormat(kind="json_schema", schema=schema, name="thing", strict=True)
        body = await body_of(upstream, provider, job(response_format=held))
        assert body["response_format"] == {
            "type": "json_object",
            "json_schema": {
                "type": "object",
                "properties": {"a": {"type": "integer"}},
                "required": ["a"],
            },
        }


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            (job(shape="completion"), "model"),
            (job(prompt=(5, 6, 7)), "prompt"),
            (job(logprobs=0), "logprobs"),
            (job(best_of=2), "best_of"),
            (job(n=2), "n"),
            (job(suffix="end"), "suffix"),
            (job(messages=TALK, echo=True), "echo"),
            (job(sampling=Sampling(logit_bias=((5, -1.0),))), "logit_bias"),
            (job(sampling=Sampling(presence_penalty=-0.1)), "presence_penalty"),
            (job(sampling=Sampling(frequency_penalty=1.1)), "frequency_penalty"),
            (job(sampling=Sampling(stop=tuple("abcdef"))), "stop"),
        ],
    )
    async def test_what_cohere_cannot_do_is_refused_by_name(
        self, upstream: CohereUpstream, provider: Cohere, asked: Job, param: str
    ) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await provider.count_prompt(asked)
        assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")
        assert "acme-large" in raised.value.message
        assert upstream.requests == []

    @pytest.mark.parametrize("messages", [(), TALK[:1], (TALK[0], TALK[2])])
    async def test_a_conversation_needs_a_user(self, provider: Cohere, messages: tuple[Message, ...]) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await provider.count_prompt(job(messages=messages))
        assert raised.value.param == "messages"

    @pytest.mark.parametrize("asked", [job(), job(echo=True), job(messages=TALK), job(suffix="")])
    async def test_all_else_is_let_through_uncounted(self, provider: Cohere, asked: Job) -> None:
        assert await provider.count_prompt(asked) is None


class TestAnswer:
    @pytest.mark.parametrize("upstream_name", ["command", "command-thinking"])
    async def test_both_ways_say_the_same_and_no_thoughts(
        self, upstream: CohereUpstream, provider: Cohere, upstream_name: str
    ) -> None:
        upstream.on(upstream_name, Script(pieces=WORDS))
        choice, usage, chunks = await both(provider, job(upstream_name))
        assert (choice.text, choice.finish_reason) == ("one two three fouré", "stop")
        assert usage == Usage(prompt_tokens=2, completion_tokens=4)
        assert [chunk.text for chunk in chunks if chunk.text] == list(WORDS)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("COMPLETE", "stop"),
            ("STOP_SEQUENCE", "stop"),
            ("TOOL_CALL", "stop"),
            ("MAX_TOKENS", "length"),
            ("WHAT_COMES_NEXT", "stop"),
        ],
    )
    async def test_finish_reasons(
        self, upstream: CohereUpstream, provider: Cohere, given: str, expected: str
    ) -> None:
        upstream.on("command", Script(pieces=WORDS, finish=given))
        choice, _, _ = await both(provider, job())
        assert choice.finish_reason == expected

    @pytest.mark.parametrize(
        ("reported", "expected"),
        [
            (counts(5, 2, unbilled=UNBILLED, cached_tokens=448), Usage(prompt_tokens=5, completion_tokens=2)),
            (
                counts(100, 2, unbilled=UNBILLED, cached_tokens=512.0),
                Usage(prompt_tokens=100, completion_tokens=2, cached_tokens=17),
            ),
            (
                {"tokens": {"input_tokens": 7, "output_tokens": 3}},
                Usage(prompt_tokens=7, completion_tokens=3),
            ),
            ({"billed_units": {"input_tokens": 0.5, "output_tokens": 1}}, None),
            ("none", None),
        ],
    )
    async def test_usage_is_what_is_billed(
        self, upstream: CohereUpstream, provider: Cohere, reported: Any, expected: Usage | None
    ) -> None:
        upstream.on("command", Script(pieces=WORDS, usage=reported))
        assert (await both(provider, job()))[1] == expected

    async def test_an_echoed_prompt_comes_first(self, upstream: CohereUpstream, provider: Cohere) -> None:
        upstream.on("command", Script(pieces=WORDS))
        choice, _, chunks = await both(provider, job(prompt="say héllo", echo=True))
        assert choice.text == "say hélloone two three fouré"
        assert chunks[0] == Chunk(0, "say héllo", tokens=0, echoed=True)
        assert not any(chunk.echoed for chunk in chunks[1:])

    @pytest.mark.parametrize("content", [[], None])
    async def test_an_answer_without_text_is_empty(
        self, upstream: CohereUpstream, provider: Cohere, content: object
    ) -> None:
        message = {"role": "assistant", "content": content, "tool_plan": "I will look."}
        upstream.script(Script(body={"id": "x", "message": message, "finish_reason": "TOOL_CALL"}))
        [choice] = (await provider.complete(job(), nothing)).choices
        assert (choice.text, choice.finish_reason) == ("", "stop")
        upstream.script(Script(pieces=()))
        chunks = await streamed(provider, job())
        assert [(chunk.text, chunk.finish_reason) for chunk in chunks if chunk.index == 0] == [("", "stop")]

    async def test_text_in_several_parts_is_joined(self, upstream: CohereUpstream, provider: Cohere) -> None:
        parts = [
            {"type": "text", "text": "a"},
            {"type": "thinking", "thinking": "x"},
            {"type": "text", "text": "b"},
        ]
        answer = {"message": {"role": "assistant", "content": parts}, "finish_reason": "COMPLETE"}
        upstream.script(Script(body=answer))
        assert (await provider.complete(job(), nothing)).choices[0].text == "ab"

    async def test_what_arrives_together_is_given_together(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        upstream.script(Script(pieces=WORDS, block=True))
        batches = [batch async for batch in provider.stream(job(), nothing)]
        assert all(batches)
        assert sum(map(len, batches)) == len(WORDS) + 2
        assert len(batches) < len(WORDS)

    async def test_a_connection_serves_again_after_either_way(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        for _ in range(3):
            await both(provider, job())
        assert upstream.accepted <= 2

    async def test_sent_is_said_once_before_the_answer_comes(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        upstream.script(Script(hold_at=0))
        sent: list[bool] = []
        gone = asyncio.Event()

        def on_sent() -> None:
            sent.append(True)
            gone.set()

        call = asyncio.create_task(provider.complete(job(), on_sent))
        await gone.wait()
        assert not call.done()
        upstream.release()
        await call
        assert sent == [True]


class TestAvailability:
    async def test_without_its_key_nothing_is_asked(self, upstream: CohereUpstream) -> None:
        provider = provider_for(upstream.url, None)
        assert provider.unavailable(model()) == "set ACME_KEY"
        with pytest.raises(ModelUnavailable):
            await provider.complete(job(), nothing)
        assert upstream.requests == []
        await provider.aclose()

    async def test_a_broken_model_says_so_and_others_are_available(self, provider: Cohere) -> None:
        assert provider.unavailable(model()) is None
        assert provider.unavailable(model(broken="no such price")) == "no such price"

    async def test_closing_twice_is_fine(self, provider: Cohere) -> None:
        await provider.complete(job(), nothing)
        await provider.aclose()
        await provider.aclose()


class TestCoheresOwnClient:
    """The scripted answers are Cohere's real format: its own client reads them."""

    @pytest.fixture
    async def client(self, upstream: CohereUpstream) -> AsyncIterator[cohere.AsyncClientV2]:
        async with cohere.AsyncClientV2(api_key=KEY, base_url=upstream.origin) as client:
            yield client

    async def test_it_reads_the_blocking_answer(
        self, upstream: CohereUpstream, client: cohere.AsyncClientV2
    ) -> None:
        upstream.script(Script(pieces=WORDS, finish="MAX_TOKENS"))
        answer = await client.chat(
            model="command-thinking", messages=[cohere.UserChatMessageV2(content="say hello")]
        )
        assert answer.finish_reason == "MAX_TOKENS"
        assert answer.message.content is not None
        thought, text = answer.message.content
        assert thought.type == "thinking"
        assert thought.thinking == "".join(THOUGHT)
        assert text.type == "text"
        assert text.text == "one two three fouré"
        assert answer.usage is not None
        assert answer.usage.billed_units == cohere.UsageBilledUnits(input_tokens=2, output_tokens=4)
        assert answer.usage.tokens == cohere.UsageTokens(input_tokens=2 + UNBILLED, output_tokens=4)

    async def test_it_reads_the_stream(self, upstream: CohereUpstream, client: cohere.AsyncClientV2) -> None:
        upstream.script(Script(pieces=WORDS))
        events = [
            event
            async for event in client.chat_stream(
                model="command-thinking", messages=[cohere.UserChatMessageV2(content="say hello")]
            )
        ]
        assert list(dict.fromkeys(event.type for event in events)) == [
            "message-start",
            "content-start",
            "content-delta",
            "content-end",
            "message-end",
        ]
        texts, thoughts = "", ""
        for event in events:
            if event.type == "content-delta":
                assert event.delta is not None
                assert event.delta.message is not None
                assert event.delta.message.content is not None
                texts += event.delta.message.content.text or ""
                thoughts += event.delta.message.content.thinking or ""
        assert (texts, thoughts) == ("one two three fouré", "".join(THOUGHT))
        last = events[-1]
        assert last.type == "message-end"
        assert last.delta is not None
        assert last.delta.finish_reason == "COMPLETE"
        assert last.delta.usage is not None
        assert last.delta.usage.billed_units == cohere.UsageBilledUnits(input_tokens=2, output_tokens=4)

    async def test_it_asks_as_we_do(
        self, upstream: CohereUpstream, client: cohere.AsyncClientV2, provider: Cohere
    ) -> None:
        schema = {"type": "object"}
        await client.chat(
            model="command",
            messages=[
                cohere.SystemChatMessageV2(content="Be brief."),
                cohere.UserChatMessageV2(content="Hi"),
            ],
            max_tokens=64,
            temperature=0.5,
            p=0.5,
            seed=7,
            stop_sequences=["END"],
            frequency_penalty=0.5,
            presence_penalty=0.25,
            response_format=cohere.JsonObjectResponseFormatV2(json_schema=schema),
        )
        sampling = Sampling(
            temperature=0.5, top_p=0.5, seed=7, stop=("END",), frequency_penalty=0.5, presence_penalty=0.25
        )
        held = ResponseFormat(kind="json_schema", schema=b'{"type": "object"}')
        await provider.complete(job(messages=TALK[:2], sampling=sampling, response_format=held), nothing)
        theirs, ours = upstream.requests
        assert theirs.path == ours.path
        assert theirs.headers["authorization"] == ours.headers["authorization"]
        assert theirs.json == ours.json | {"stream": False}
