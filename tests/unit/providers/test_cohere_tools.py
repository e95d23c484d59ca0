"""Tools, images and schemas in Cohere's format: what is asked, and what the answers come to."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import cohere
import msgspec
import pytest
from pydantic import TypeAdapter
from tests.support.asking import KEY, nothing
from tests.support.called import called
from tests.support.cohere_upstream import (
    CohereUpstream,
    answered,
    call_delta,
    call_end,
    call_start,
    counts,
    delta,
    message_end,
    message_start,
    tool_call,
    tool_plan,
)
from tests.support.jobs import job as any_job
from tests.support.script import Script

from headgate.config import ProviderSettings
from headgate.core.completion import (
    Chunk,
    Image,
    Job,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    Tools,
    Usage,
)
from headgate.core.errors import InvalidRequest, UpstreamFailed, UpstreamTimeout
from headgate.providers.cohere import Cohere
from headgate.providers.cohere_wire import call

HEADERS = {"Content-Type": "text/event-stream"}
WEATHER = Tool(
    name="weather",
    description="The weather somewhere.",
    parameters=b'{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
    strict=True,
)
CLOCK = Tool(name="clock")
TOOLS = Tools(tools=(WEATHER, CLOCK))
LOOSE = Tools(tools=(CLOCK,))
ASKED = Message(role="user", content="Weather in Ulm?")
CALL = ToolCall(id="call_1", name="weather", arguments='{"city": "Ulm"}')
PNG = bytes(range(256))


def job(**fields: Any) -> Job:
    return any_job("command", **{"shape": "chat", "messages": (ASKED,)} | fields)


@pytest.fixture
async def upstream() -> AsyncIterator[CohereUpstream]:
    async with CohereUpstream() as up:
        yield up


@pytest.fixture
async def provider(upstream: CohereUpstream) -> AsyncIterator[Cohere]:
    settings = ProviderSettings(kind="cohere", base_url=upstream.url, api_key_env="ACME_KEY")
    made = Cohere("acme", settings, KEY)
    yield made
    await made.aclose()


async def sent(upstream: CohereUpstream, provider: Cohere, **fields: Any) -> dict[str, Any]:
    asked = job(**fields)
    assert await provider.count_prompt(asked) is None
    await provider.complete(asked, nothing)
    body = upstream.requests[-1].json
    assert isinstance(body, dict)
    return body


async def streamed(provider: Cohere, asked: Job) -> list[Chunk]:
    return [chunk async for batch in provider.stream(asked, nothing) for chunk in batch]


def streaming(*events: bytes) -> Script:
    return Script(body=b"".join(events).decode(), headers=HEADERS)


class TestOffering:
    async def test_tools_are_offered_with_their_schemas(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        body = await sent(upstream, provider, tools=LOOSE)
        function = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
        assert body["tools"] == [{"type": "function", "function": function}]
        assert {"tool_choice", "strict_tools"}.isdisjoint(body)

    async def test_strict_tools_are_strict(self, upstream: CohereUpstream, provider: Cohere) -> None:
        body = await sent(upstream, provider, tools=Tools(tools=(WEATHER,)))
        assert body["strict_tools"] is True
        [tool] = body["tools"]
        assert tool["function"] == {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        }

    @pytest.mark.parametrize(
        ("choice", "expected"), [(None, None), ("auto", None), ("required", "REQUIRED"), ("none", "NONE")]
    )
    async def test_the_choice_of_tools_has_its_word(
        self, upstream: CohereUpstream, provider: Cohere, choice: Any, expected: str | None
    ) -> None:
        body = await sent(upstream, provider, tools=Tools(tools=(CLOCK,), choice=choice))
        assert body.get("tool_choice") == expected

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": Tools(tools=(CLOCK,), choice="named", name="clock")}, "tool_choice"),
            ({"tools": Tools(tools=(CLOCK,), parallel=False)}, "parallel_tool_calls"),
            ({"tools": TOOLS}, "tools"),
            (
                {"tools": LOOSE, "response_format": ResponseFormat(kind="json_object")},
                "response_format",
            ),
        ],
    )
    async def test_what_cohere_cannot_do_with_tools_is_refused_by_name(
        self, provider: Cohere, fields: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await provider.count_prompt(job(**fields))
        assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")

    def test_calls_and_their_results_are_messages(self) -> None:
        bare = ToolCall(id="call_2", name="clock", arguments="")
        said = (
            ASKED,
            Message(role="assistant", content="I will look.", tool_calls=(CALL,)),
            Message(role="tool", content="rain", tool_call_id="call_1"),
            Message(role="assistant", content="", tool_calls=(bare,)),
            Message(role="tool", content="noon", tool_call_id="call_2"),
        )
        body = msgspec.json.encode(call(job(messages=said, tools=LOOSE), stream=False))
        messages = msgspec.json.decode(body)["messages"]
        TypeAdapter(list[cohere.ChatMessageV2]).validate_python(messages)
        assert messages == [
            {"role": "user", "content": "Weather in Ulm?"},
            {
                "role": "assistant",
                "content": "I will look.",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "call_1",
                        "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                    }
                ],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"type": "function", "id": "call_2", "function": {"name": "clock", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
        ]

    async def test_cohere_s_own_client_asks_as_we_do(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        said = (
            ASKED,
            Message(role="assistant", content="I will look.", tool_calls=(CALL,)),
            Message(role="tool", content="rain", tool_call_id="call_1"),
            Message(role="user", content="", parts=("And here?", Image(data=PNG, media_type="image/png"))),
        )
        choice = Tools(tools=(WEATHER,), choice="required")
        ours = await sent(upstream, provider, messages=said, tools=choice)
        async with cohere.AsyncClientV2(api_key=KEY, base_url=upstream.origin) as client:
            await client.chat(
                model=ours["model"],
                messages=TypeAdapter(list[cohere.ChatMessageV2]).validate_python(ours["messages"]),
                tools=TypeAdapter(list[cohere.ToolV2]).validate_python(ours["tools"]),
                max_tokens=ours["max_tokens"],
                tool_choice="REQUIRED",
                strict_tools=True,
            )
        assert upstream.requests[-1].json == ours | {"stream": False}


class TestCalls:
    async def test_they_are_answered(self, upstream: CohereUpstream, provider: Cohere) -> None:
        calls = tool_call("weather", '{"city":"Ulm"}', "call_1"), tool_call("clock", "", "call_2")
        upstream.script(Script(body=answered(*calls)))
        completion = await provider.complete(job(tools=LOOSE), nothing)
        [choice] = completion.choices
        assert (choice.text, choice.finish_reason) == ("", "tool_calls")
        assert choice.tool_calls == (
            ToolCall(id="call_1", name="weather", arguments='{"city":"Ulm"}'),
            ToolCall(id="call_2", name="clock", arguments="{}"),
        )
        assert completion.usage == Usage(prompt_tokens=9, completion_tokens=5)

    async def test_they_are_streamed(self, upstream: CohereUpstream, provider: Cohere) -> None:
        upstream.script(
            streaming(
                message_start(),
                tool_plan("I will look it up."),
                call_start(0, tool_call("weather", "", "call_1")),
                call_delta(0, '{"city"'),
                call_delta(0, ':"Ulm"}'),
                call_end(0),
                call_start(1, tool_call("clock", "", "call_2")),
                call_end(1),
                message_end("TOOL_CALL", counts(9, 5)),
            )
        )
        chunks = await streamed(provider, job(tools=LOOSE))
        assert called(chunks) == [
            ToolCall(id="call_1", name="weather", arguments='{"city":"Ulm"}'),
            ToolCall(id="call_2", name="clock", arguments="{}"),
        ]
        assert not any(chunk.text for chunk in chunks)
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
        assert chunks[-1].usage == Usage(prompt_tokens=9, completion_tokens=5)

    async def test_arguments_that_come_with_the_start_count(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        upstream.script(
            streaming(call_start(0, tool_call("weather", '{"city":"Ulm"}')), message_end("TOOL_CALL"))
        )
        [whole] = called(await streamed(provider, job(tools=LOOSE)))
        assert whole.arguments == '{"city":"Ulm"}'

    async def test_a_call_cut_by_the_limit_stays_as_it_was_cut(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        upstream.script(
            streaming(call_start(0, tool_call("weather")), call_delta(0, '{"ci'), message_end("MAX_TOKENS"))
        )
        chunks = await streamed(provider, job(tools=LOOSE))
        assert [cut.arguments for cut in called(chunks)] == ['{"ci']
        assert chunks[-1].finish_reason == "length"

    async def test_without_tools_they_are_passed_over(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        upstream.script(
            Script(body=answered({"strange": True})),
            streaming(call_start(0, tool_call("clock")), call_end(0), delta("a"), message_end("TOOL_CALL")),
        )
        [choice] = (await provider.complete(job(), nothing)).choices
        assert (choice.tool_calls, choice.finish_reason) == ((), "stop")
        chunks = await streamed(provider, job())
        assert called(chunks) == []
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]

    @pytest.mark.parametrize(
        "given",
        [
            {"id": "", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            {"id": "call_1", "type": "function", "function": {"arguments": "{}"}},
            {"id": "x" * 257, "type": "function", "function": {"name": "clock"}},
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": {"a": 1}}},
            {"id": 7, "type": "function", "function": {"name": "clock"}},
        ],
    )
    async def test_what_is_no_call_fails_the_answer_both_ways(
        self, upstream: CohereUpstream, provider: Cohere, given: Any
    ) -> None:
        upstream.script(
            Script(body=answered(given)), streaming(call_start(0, given), message_end("TOOL_CALL"))
        )
        with pytest.raises(UpstreamFailed) as raised:
            await provider.complete(job(tools=LOOSE), nothing)
        assert raised.value.usage == Usage(prompt_tokens=9, completion_tokens=5)
        with pytest.raises(UpstreamFailed):
            await streamed(provider, job(tools=LOOSE))

    async def test_calls_without_end_fail_the_answer_both_ways(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        calls = [tool_call("clock", "{}", f"call_{nth}") for nth in range(129)]
        starts = (call_start(nth, one) for nth, one in enumerate(calls))
        upstream.script(Script(body=answered(*calls)), streaming(*starts, message_end("TOOL_CALL")))
        with pytest.raises(UpstreamFailed, match="too many"):
            await provider.complete(job(tools=LOOSE), nothing)
        with pytest.raises(UpstreamFailed, match="too many"):
            await streamed(provider, job(tools=LOOSE))

    async def test_a_call_cut_before_its_arguments_has_none_both_ways(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        cut = tool_call("weather", "", "call_1")
        upstream.script(
            Script(body=answered(cut) | {"finish_reason": "MAX_TOKENS"}),
            streaming(call_start(0, cut), message_end("MAX_TOKENS")),
        )
        [choice] = (await provider.complete(job(tools=LOOSE), nothing)).choices
        assert (choice.tool_calls[0].arguments, choice.finish_reason) == ("{}", "length")
        chunks = await streamed(provider, job(tools=LOOSE))
        pieces = [piece for chunk in chunks for piece in chunk.tool_calls or ()]
        assert "".join(piece.arguments for piece in pieces) == "{}"

    async def test_an_index_that_comes_again_is_another_call_s(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        first, second = (tool_call("clock", "", f"call_{nth}") for nth in (1, 2))
        upstream.script(
            streaming(
                call_start(0, first),
                call_start(0, second),
                call_delta(0, '{"a":1}'),
                message_end("TOOL_CALL"),
            )
        )
        chunks = await streamed(provider, job(tools=LOOSE))
        pieces = [piece for chunk in chunks for piece in chunk.tool_calls or ()]
        assert [(piece.position, piece.arguments) for piece in pieces if piece.arguments] == [
            (0, "{}"),
            (1, '{"a":1}'),
        ]

    async def test_cohere_s_own_client_reads_them(self, upstream: CohereUpstream) -> None:
        upstream.script(
            Script(body=answered(tool_call("weather", '{"city":"Ulm"}', "call_1"))),
            streaming(
                message_start(),
                tool_plan("I will look it up."),
                call_start(0, tool_call("weather", "", "call_1")),
                call_delta(0, '{"city":"Ulm"}'),
                call_end(0),
                message_end("TOOL_CALL", counts(9, 5)),
            ),
        )
        asked: dict[str, Any] = {
            "model": "command",
            "messages": [cohere.UserChatMessageV2(content="Weather in Ulm?")],
        }
        async with cohere.AsyncClientV2(api_key=KEY, base_url=upstream.origin) as client:
            answer = await client.chat(**asked)
            events = [event async for event in client.chat_stream(**asked)]
        assert answer.finish_reason == "TOOL_CALL"
        assert answer.message.tool_plan == "I will look it up."
        assert answer.message.tool_calls is not None
        [read] = answer.message.tool_calls
        assert read.function is not None
        assert (read.id, read.function.name, read.function.arguments) == (
            "call_1",
            "weather",
            '{"city":"Ulm"}',
        )
        assert [event.type for event in events] == [
            "message-start",
            "tool-plan-delta",
            "tool-call-start",
            "tool-call-delta",
            "tool-call-end",
            "message-end",
        ]
        for event in events:
            assert type(event).model_validate(event.model_dump()) == event
        begun, more = events[2], events[3]
        assert begun.type == "tool-call-start"
        assert begun.delta is not None and begun.delta.message is not None
        assert begun.delta.message.tool_calls is not None
        assert begun.delta.message.tool_calls.id == "call_1"
        assert more.type == "tool-call-delta"
        assert more.delta is not None and more.delta.message is not None
        assert more.delta.message.tool_calls is not None
        assert more.delta.message.tool_calls.function is not None
        assert more.delta.message.tool_calls.function.arguments == '{"city":"Ulm"}'


class TestImages:
    async def test_text_and_images_keep_their_order(self, upstream: CohereUpstream, provider: Cohere) -> None:
        drawn = Image(data=PNG, media_type="image/png", detail="low")
        parts = ("What is", drawn, "", Image(url="https://example.org/a.png"), "and this?")
        body = await sent(upstream, provider, messages=(Message(role="user", content="x", parts=parts),))
        url = "data:image/png;base64," + b64encode(PNG).decode()
        assert body["messages"] == [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is"},
                    {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                    {"type": "text", "text": "and this?"},
                ],
            }
        ]

    @pytest.mark.parametrize("image", [Image(url="https://example.org/a.png"), Image(file_id="file-1")])
    async def test_an_image_alone_is_a_question(self, provider: Cohere, image: Image) -> None:
        seen = Message(role="user", content="", parts=(image,))
        assert await provider.count_prompt(job(messages=(seen,))) is None

    async def test_others_than_users_show_none(self, provider: Cohere) -> None:
        shown = Message(role="assistant", content="", parts=(Image(url="https://example.org/a.png"),))
        with pytest.raises(InvalidRequest) as raised:
            await provider.count_prompt(job(messages=(ASKED, shown)))
        assert raised.value.param == "messages[1].content"


class TestSchemas:
    @pytest.mark.parametrize("strict", [None, False, True])
    async def test_the_description_stands_in_the_schema(
        self, upstream: CohereUpstream, provider: Cohere, strict: bool | None
    ) -> None:
        held = ResponseFormat(
            kind="json_schema",
            schema=b'{"type": "object"}',
            name="thing",
            description="A thing.",
            strict=strict,
        )
        body = await sent(upstream, provider, response_format=held)
        assert body["response_format"] == {
            "type": "json_object",
            "json_schema": {"description": "A thing.", "type": "object"},
        }

    async def test_a_schema_s_own_description_stays(self, upstream: CohereUpstream, provider: Cohere) -> None:
        held = ResponseFormat(kind="json_schema", schema=b'{"description": "Mine."}', description="A thing.")
        body = await sent(upstream, provider, response_format=held)
        assert body["response_format"]["json_schema"] == {"description": "Mine."}


class TestFailures:
    async def test_a_deadline_is_kept_both_ways(self, upstream: CohereUpstream, provider: Cohere) -> None:
        upstream.on("command", Script(silent=True))
        soon = asyncio.get_running_loop().time() + 0.2
        with pytest.raises(UpstreamTimeout):
            await provider.complete(job(deadline=soon), nothing)
        with pytest.raises(UpstreamTimeout):
            await streamed(provider, job(deadline=soon))

    async def test_they_say_what_was_reported_both_ways(
        self, upstream: CohereUpstream, provider: Cohere
    ) -> None:
        reported = counts(3, 0)
        upstream.on("command", Script(pieces=(), finish="ERROR", usage=reported))
        for ask in (provider.complete(job(), nothing), streamed(provider, job())):
            with pytest.raises(UpstreamFailed) as raised:
                await ask
            assert raised.value.usage == Usage(prompt_tokens=3, completion_tokens=0)
