"""Tools in Anthropic's format: how they are offered, called and answered."""

import json
from typing import Any

import pytest
from anthropic.types import (
    TextBlockParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from pydantic import TypeAdapter
from tests.support.anthropic_asking import both, chat, client_of, streamed
from tests.support.anthropic_upstream import (
    STOP,
    AnthropicUpstream,
    argued,
    closed,
    ending,
    message,
    opened,
    piece,
    start,
    streaming,
    text_block,
    tool_block,
)
from tests.support.asking import nothing
from tests.support.script import Script

from headgate.core.completion import Chunk, Message, Tool, ToolCall, Tools
from headgate.core.errors import InvalidRequest, UpstreamFailed
from headgate.providers.anthropic import Anthropic

WEATHER = Tool(
    name="weather",
    description="The weather somewhere.",
    parameters=b'{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
    strict=True,
)
CLOCK = Tool(name="clock")
TOOLS = Tools(tools=(WEATHER, CLOCK))
ASKED = (Message(role="user", content="Weather in Ulm and Kiel?"),)
CALLS = (
    ToolCall(id="call_1", name="weather", arguments='{"city": "Ulm",  "days": 12345678901234567890}'),
    ToolCall(id="call_2", name="weather", arguments='{"city":"Kiel"}'),
)
CALLED = (*ASKED, Message(role="assistant", content="I will look.", tool_calls=CALLS))
ANSWERED = (
    *CALLED,
    Message(role="tool", content="rain", tool_call_id="call_1"),
    Message(role="tool", content=" ", tool_call_id="call_2"),
)


async def sent(upstream: AnthropicUpstream, provider: Anthropic, **fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"messages": ASKED, "tools": TOOLS}
    asked = chat(**given | fields)
    assert await provider.count_prompt(asked) is None
    await provider.complete(asked, nothing)
    body = upstream.requests[-1].json
    assert isinstance(body, dict)
    return body


# --- what goes out ----------------------------------------------------------------------------------------------


async def test_tools_are_offered_with_their_schemas(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    body = await sent(upstream, provider)
    assert body["tools"] == [
        {
            "name": "weather",
            "description": "The weather somewhere.",
            "input_schema": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
            "strict": True,
        },
        {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert "tool_choice" not in body
    TypeAdapter(list[ToolParam]).validate_python(body["tools"])


async def test_a_strict_tool_that_takes_nothing_says_that_there_is_nothing_else(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    tools = (Tool(name="now", strict=True), Tool(name="then", strict=False))
    strict, loose = (await sent(upstream, provider, tools=Tools(tools=tools)))["tools"]
    assert strict["input_schema"] == {"type": "object", "properties": {}, "additionalProperties": False}
    assert loose["input_schema"] == {"type": "object", "properties": {}}


async def test_a_schema_without_a_type_becomes_an_object_s(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    tool = Tool(name="any", parameters=b'{"additionalProperties": false}', strict=False)
    [offered] = (await sent(upstream, provider, tools=Tools(tools=(tool,))))["tools"]
    assert offered == {
        "name": "any",
        "input_schema": {"type": "object", "additionalProperties": False},
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"choice": "auto"}, {"type": "auto"}),
        ({"choice": "none"}, {"type": "none"}),
        ({"choice": "required"}, {"type": "any"}),
        ({"choice": "named", "name": "clock"}, {"type": "tool", "name": "clock"}),
        ({"choice": "none", "parallel": False}, {"type": "none"}),
        ({"parallel": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"choice": "required", "parallel": False},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
        ({"choice": "required", "parallel": True}, {"type": "any"}),
        ({"parallel": True}, None),
    ],
)
async def test_the_choice_of_tools_has_its_word(
    upstream: AnthropicUpstream, provider: Anthropic, asked: dict[str, Any], expected: Any
) -> None:
    body = await sent(upstream, provider, tools=Tools(tools=(CLOCK,), **asked))
    assert body.get("tool_choice") == expected
    if expected is not None:
        TypeAdapter(ToolChoiceParam).validate_python(expected)


async def test_calls_and_their_results_are_blocks(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    more = Message(role="user", content="And?")
    body = await sent(upstream, provider, messages=(*ANSWERED, more))
    assert body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Weather in Ulm and Kiel?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I will look."},
                {
                    "type": "tool_use",
                    "id": "call_1",
                    "name": "weather",
                    "input": {"city": "Ulm", "days": 12345678901234567890},
                },
                {"type": "tool_use", "id": "call_2", "name": "weather", "input": {"city": "Kiel"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "call_1",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"type": "tool_result", "tool_use_id": "call_2"},
                {"type": "text", "text": "And?"},
            ],
        },
    ]


async def test_the_official_client_s_types_take_the_blocks_and_it_sends_the_same(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    body = await sent(upstream, provider, messages=ANSWERED)
    blocks = [block for turn in body["messages"] for block in turn["content"]]
    TypeAdapter(list[TextBlockParam | ToolUseBlockParam | ToolResultBlockParam]).validate_python(blocks)
    async with client_of(upstream) as client:
        await client.messages.create(**body)
    assert upstream.requests[-1].json == body


async def test_results_come_first_though_the_user_spoke_before_them(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    said = (*CALLED, Message(role="user", content="Hurry!"), *ANSWERED[2:])
    turn = (await sent(upstream, provider, messages=said))["messages"][-1]
    assert [block["type"] for block in turn["content"]] == ["tool_result", "tool_result", "text"]


async def test_ids_of_other_upstreams_stay_pairs(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    call = ToolCall(id="functions.clock:0", name="clock", arguments="")
    said = (
        *ASKED,
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="noon", tool_call_id=call.id),
    )
    _, assistant, user = (await sent(upstream, provider, messages=said))["messages"]
    assert assistant["content"] == [
        {"type": "tool_use", "id": "functions_clock_0", "name": "clock", "input": {}}
    ]
    assert user["content"][0]["tool_use_id"] == "functions_clock_0"


@pytest.mark.parametrize(
    "arguments",
    [
        "{",
        "[]",
        "null",
        '"city"',
        '{"a":1}x',
        '{"a":NaN}',
        '{"a":1}, "b":{}',
        '{"a":"\\ud800"}',
        '{"a":' + "[" * 9999,
    ],
)
async def test_arguments_that_are_no_object_are_refused_by_their_place(
    provider: Anthropic, arguments: str
) -> None:
    ill = ToolCall(id="call_2", name="clock", arguments=arguments)
    said = (*ASKED, Message(role="assistant", content="", tool_calls=(CALLS[0], ill)))
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(messages=said, tools=TOOLS))
    assert raised.value.param == "messages[1].tool_calls[1].function.arguments"


@pytest.mark.parametrize(
    "said",
    [
        CALLED,
        ANSWERED[:-1],
        (*CALLED, *ASKED, Message(role="assistant", content="Hm."), *ANSWERED[2:]),
        (*ANSWERED, ANSWERED[-1]),
        (*ASKED, Message(role="tool", content="rain", tool_call_id="call_1")),
        ANSWERED[2:],
    ],
)
async def test_calls_without_their_results_and_results_without_their_calls_are_refused(
    provider: Anthropic, said: tuple[Message, ...]
) -> None:
    with pytest.raises(InvalidRequest, match="tool call") as raised:
        await provider.count_prompt(chat(messages=said, tools=TOOLS))
    assert raised.value.param == "messages"


# --- what comes back --------------------------------------------------------------------------------------------


def called_stream(*pieces: str, stop_reason: str | None = "tool_use") -> Script:
    """Some text, then a call whose arguments come in these pieces, then one without any."""
    return streaming(
        start(),
        opened(0, text_block("")),
        piece(0, "Let me see."),
        closed(0),
        opened(1, tool_block("weather", "toolu_1")),
        argued(1, ""),
        *(argued(1, text) for text in pieces),
        closed(1),
        opened(2, tool_block("clock", "toolu_2")),
        argued(2, ""),
        closed(2),
        ending(stop_reason),
        STOP,
    )


CALLED_ANSWER = Script(
    body=message(
        text_block("Let me see."),
        tool_block("weather", "toolu_1", city="Ulm"),
        tool_block("clock", "toolu_2"),
        stop_reason="tool_use",
    )
)
EXPECTED = (
    ToolCall(id="toolu_1", name="weather", arguments='{"city": "Ulm"}'),
    ToolCall(id="toolu_2", name="clock", arguments="{}"),
)


async def test_calls_are_answered_both_ways(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    blocking = await upstream_says(upstream, provider, CALLED_ANSWER, called_stream('{"city', '": "Ulm"}'))
    assert blocking.text == "Let me see."
    assert [call.id for call in blocking.tool_calls] == ["toolu_1", "toolu_2"]
    assert [call.name for call in blocking.tool_calls] == ["weather", "clock"]
    assert [json.loads(call.arguments) for call in blocking.tool_calls] == [{"city": "Ulm"}, {}]
    assert blocking.finish_reason == "tool_calls"


async def upstream_says(
    upstream: AnthropicUpstream, provider: Anthropic, whole: Script, pieces: Script
) -> Any:
    upstream.script(whole, pieces)
    return (await both(provider, chat(tools=TOOLS))).choices[0]


async def test_an_upstream_that_gives_arguments_at_the_start_is_understood(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    begun = streaming(
        start(),
        opened(0, tool_block("weather", "toolu_1", city="Ulm")),
        closed(0),
        ending(None),
        STOP,
    )
    whole = message(tool_block("weather", "toolu_1", city="Ulm"), stop_reason=None)
    written = Script(body=json.dumps(whole, separators=(",", ":")))
    choice = await upstream_says(upstream, provider, written, begun)
    assert choice.tool_calls == (ToolCall(id="toolu_1", name="weather", arguments='{"city":"Ulm"}'),)
    assert choice.finish_reason == "tool_calls"


async def test_a_call_cut_by_the_limit_stays_as_it_was_cut(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(
        streaming(
            start(),
            opened(0, tool_block("weather")),
            argued(0, '{"ci'),
            closed(0),
            ending("max_tokens"),
            STOP,
        )
    )
    chunks = await streamed(provider, chat(tools=TOOLS))
    pieces = [piece for chunk in chunks for piece in chunk.tool_calls or ()]
    assert [piece.arguments for piece in pieces] == ["", '{"ci']
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


async def test_a_call_cut_before_its_arguments_has_none_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    whole = Script(body=message(tool_block("weather"), stop_reason="max_tokens"))
    begun = streaming(start(), opened(0, tool_block("weather")), ending("max_tokens"), STOP)
    choice = await upstream_says(upstream, provider, whole, begun)
    assert (choice.tool_calls[0].arguments, choice.finish_reason) == ("{}", "length")


async def test_an_index_that_comes_again_is_another_call_s(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(
        streaming(
            start(),
            opened(0, tool_block("clock", "toolu_1")),
            opened(0, tool_block("weather", "toolu_2")),
            argued(0, '{"city": "Ulm"}'),
            closed(0),
            ending("tool_use"),
            STOP,
        )
    )
    pieces = [
        piece for chunk in await streamed(provider, chat(tools=TOOLS)) for piece in chunk.tool_calls or ()
    ]
    assert [(piece.position, piece.name, piece.arguments) for piece in pieces] == [
        (0, "clock", ""),
        (0, None, "{}"),
        (1, "weather", ""),
        (1, None, '{"city": "Ulm"}'),
    ]


async def test_tools_of_the_upstream_s_own_are_passed_over(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    own = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
    upstream.script(
        streaming(
            start(),
            opened(0, own),
            argued(0, '{"query": "x"}'),
            closed(0),
            opened(1, tool_block("clock")),
            closed(1),
            ending("tool_use"),
            STOP,
        ),
    )
    chunks = await streamed(provider, chat(tools=TOOLS))
    pieces = [piece for chunk in chunks for piece in chunk.tool_calls or ()]
    assert [(piece.position, piece.name, piece.arguments) for piece in pieces] == [
        (0, "clock", ""),
        (0, None, "{}"),
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_use", "id": "", "name": "clock", "input": {}},
        {"type": "tool_use", "id": "toolu_1", "input": {}},
        {"type": "tool_use", "id": "toolu_1", "name": "x" * 257, "input": {}},
        {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": ["noon"]},
        {"type": "tool_use", "id": ["toolu_1"], "name": "clock", "input": {}},
    ],
)
async def test_a_call_that_is_none_fails_the_answer_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic, block: Any
) -> None:
    upstream.script(
        Script(body=message(block)), streaming(start(), opened(0, block), closed(0), ending(), STOP)
    )
    with pytest.raises(UpstreamFailed):
        await provider.complete(chat(tools=TOOLS), nothing)
    with pytest.raises(UpstreamFailed):
        await streamed(provider, chat(tools=TOOLS))


async def test_calls_without_end_fail_the_answer_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    blocks = [tool_block("clock", f"toolu_{nth}") for nth in range(129)]
    begun = (opened(nth, block) for nth, block in enumerate(blocks))
    upstream.script(Script(body=message(*blocks)), streaming(start(), *begun, ending("tool_use"), STOP))
    with pytest.raises(UpstreamFailed, match="too many"):
        await provider.complete(chat(tools=TOOLS), nothing)
    with pytest.raises(UpstreamFailed, match="too many"):
        await streamed(provider, chat(tools=TOOLS))


async def test_a_call_after_the_end_of_the_message_is_a_failure(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(streaming(start(), ending(), opened(0, tool_block("clock")), STOP))
    with pytest.raises(UpstreamFailed, match="went on"):
        await streamed(provider, chat(tools=TOOLS))


async def test_arguments_nobody_counted_are_estimated_when_the_stream_breaks_off(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(streaming(start(), opened(0, tool_block("clock")), argued(0, '{"zone":"Europe/Kiel"}')))
    chunks: list[Chunk] = []
    with pytest.raises(UpstreamFailed) as raised:
        async for batch in provider.stream(chat(tools=TOOLS), nothing):
            chunks += batch
    usage = chunks[-1].usage
    assert usage is not None
    # 27 bytes
    assert (usage.completion_tokens, usage.source) == (7, "estimate")
    assert raised.value.usage == usage


async def test_the_official_client_reads_the_calls_as_we_do(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(CALLED_ANSWER, called_stream('{"city": ', '"Ulm"}'))
    asked: dict[str, Any] = {
        "model": "plain",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "say hello"}],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
    }
    async with client_of(upstream) as client:
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            read = [event async for event in stream]
            collected = await stream.get_final_message()
    assert type(whole).model_validate(whole.model_dump()) == whole
    assert "input_json" in {event.type for event in read}
    answers: tuple[Any, ...] = (whole, collected)
    for answer in answers:
        assert answer.stop_reason == "tool_use"
        assert [
            ToolCall(id=block.id, name=block.name, arguments=json.dumps(block.input))
            for block in answer.content
            if block.type == "tool_use"
        ] == list(EXPECTED)
