"""Functions that a model may ask for: how an OpenAI-compatible upstream is told of them, and what it answers.

The fixtures are what such upstreams send; the real SDK reads them as well.
"""

import json
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from tests.support.asking import KEY, nothing, streamed, text_before_failure
from tests.support.jobs import job
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.completion import Choice, Chunk, Job, Message, Tool, ToolCall, ToolCallPiece, Tools
from headgate.core.errors import InvalidRequest, UpstreamFailed
from headgate.providers.openai_compatible import OpenAICompatible
from headgate.providers.openai_stream import StreamedAnswer

SCHEMA = b'{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
WEATHER = Tool(name="get_weather", description="Of a city.", parameters=SCHEMA, strict=True)
HELLO = (Message(role="user", content="Weather in Rom?"),)
EVENTS = {"Content-Type": "text/event-stream"}
ROME = ToolCall(id="call_1", name="get_weather", arguments='{"city":"Rom"}')
OSLO = ToolCall(id="call_2", name="get_weather", arguments='{"city":"Oslo"}')


def asking(**fields: Any) -> Job:
    return job(messages=HELLO, **{"tools": Tools(tools=(WEATHER,))} | fields)


def reported(call: ToolCall, **more: Any) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    } | more


def whole(message: dict[str, Any], finish: str = "tool_calls") -> Script:
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
    }
    return Script(body=answer)


def event(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return json.dumps(head | {"choices": [choice]}).encode()


def called(*calls: dict[str, Any]) -> bytes:
    return event({"tool_calls": list(calls)})


def piece(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "function": {"arguments": arguments}} | more


PARALLEL = (
    event({"role": "assistant", "content": None}),
    event({"content": "Let me "}),
    event({"content": "look."}),
    called(reported(ROME, index=0, function={"name": "get_weather", "arguments": ""})),
    called(piece(0, '{"city"')),
    called(piece(0, ':"Rom"}')),
    called(reported(OSLO, index=1, function={"name": "get_weather", "arguments": ""})),
    called(piece(1, '{"city":')),
    called(piece(1, '"Oslo"}')),
    event({}, "tool_calls"),
)


def stream_of(*events: bytes) -> Script:
    body = b"".join(b"data: " + data + b"\n\n" for data in (*events, b"[DONE]"))
    return Script(body=body.decode(), headers=EVENTS)


def put_together(chunks: list[Chunk], index: int = 0) -> Choice:
    """One choice of a stream, as its pieces say it is."""
    calls: list[dict[str, Any]] = []
    mine = [chunk for chunk in chunks if chunk.index == index]
    for found in (found for chunk in mine for found in chunk.tool_calls or ()):
        if found.position == len(calls):
            calls.append({"id": found.id, "name": found.name, "arguments": ""})
        else:
            assert (found.id, found.name) == (None, None)
        calls[found.position]["arguments"] += found.arguments
    [finish] = [chunk.finish_reason for chunk in mine if chunk.finish_reason]
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in mine),
        finish_reason=finish,
        tool_calls=tuple(ToolCall(**call) for call in calls),
    )


def read(*events: bytes, n: int = 1) -> list[Chunk]:
    answer = StreamedAnswer("acme", n, None, has_tools=True)
    chunks = [chunk for data in (*events, b"[DONE]") for chunk in answer.take([data])]
    assert answer.failure is None, answer.failure
    return chunks


def failure(*events: bytes) -> str:
    answer = StreamedAnswer("acme", 1, None, has_tools=True)
    answer.take([*events, b"[DONE]"])
    assert isinstance(answer.failure, UpstreamFailed)
    return answer.failure.message


# --- what goes out ----------------------------------------------------------------------------------------------


async def test_tools_are_sent_as_they_were_given(upstream: Upstream, provider: OpenAICompatible) -> None:
    tools = Tools(tools=(WEATHER, Tool(name="now")), choice="required", parallel=False)
    await provider.complete(asking(tools=tools), nothing)
    assert upstream.requests[0].json == {
        "model": "plain",
        "messages": [{"role": "user", "content": "Weather in Rom?"}],
        "max_tokens": 64,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Of a city.",
                    "parameters": json.loads(SCHEMA),
                    "strict": True,
                },
            },
            {"type": "function", "function": {"name": "now"}},
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


async def test_what_is_not_said_of_tools_is_not_sent(upstream: Upstream, provider: OpenAICompatible) -> None:
    await provider.complete(asking(), nothing)
    assert not {"tool_choice", "parallel_tool_calls"} & set(upstream.requests[0].json)


async def test_a_tool_is_chosen_by_its_name(upstream: Upstream, provider: OpenAICompatible) -> None:
    await streamed(provider, asking(tools=Tools(tools=(WEATHER,), choice="named", name="get_weather")))
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    assert upstream.requests[0].json["tool_choice"] == chosen


async def test_calls_and_their_results_go_back_in_the_conversation(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    messages = (
        *HELLO,
        Message(role="assistant", content="", tool_calls=(ROME,)),
        Message(role="tool", content='{"c": 21}', tool_call_id="call_1"),
        Message(role="assistant", content="Also:", tool_calls=(OSLO,)),
        Message(role="tool", content="", tool_call_id="call_2"),
    )
    await provider.complete(job(messages=messages), nothing)
    assert upstream.requests[0].json["messages"] == [
        {"role": "user", "content": "Weather in Rom?"},
        {"role": "assistant", "content": None, "tool_calls": [reported(ROME)]},
        {"role": "tool", "content": '{"c": 21}', "tool_call_id": "call_1"},
        {"role": "assistant", "content": "Also:", "tool_calls": [reported(OSLO)]},
        {"role": "tool", "content": "", "tool_call_id": "call_2"},
    ]


async def test_a_completion_has_no_words_for_tools(provider: OpenAICompatible) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(job(tools=Tools(tools=(WEATHER,))))
    assert (raised.value.param, raised.value.code) == ("tools", "unsupported_parameter")


# --- a whole answer ---------------------------------------------------------------------------------------------


async def test_calls_of_a_whole_answer(upstream: Upstream, provider: OpenAICompatible) -> None:
    upstream.on("plain", whole({"content": None, "tool_calls": [reported(ROME), reported(OSLO)]}))
    completion = await provider.complete(asking(), nothing)
    assert completion.choices == (
        Choice(index=0, text="", finish_reason="tool_calls", tool_calls=(ROME, OSLO)),
    )
    client = AsyncOpenAI(base_url=upstream.url, api_key=KEY)
    answer = await client.chat.completions.create(model="plain", messages=[])
    found = answer.choices[0].message.tool_calls
    assert found is not None
    assert [call.model_dump(exclude_unset=True) for call in found] == [reported(ROME), reported(OSLO)]
    await client.close()


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": "Hm.", "tool_calls": [reported(ROME)]}, "stop", ("Hm.", "tool_calls", (ROME,))),
        ({"content": "Hm.", "tool_calls": [reported(ROME)]}, "length", ("Hm.", "length", (ROME,))),
        ({"content": "Hm.", "tool_calls": []}, "stop", ("Hm.", "stop", ())),
        ({"content": "Hm.", "tool_calls": None}, "tool_calls", ("Hm.", "stop", ())),
        ({"content": "Hm."}, "tool_calls", ("Hm.", "stop", ())),
        ({"content": None}, "stop", ("", "stop", ())),
        ({}, "stop", ("", "stop", ())),
        ({"content": None, "reasoning_content": "Let me think.", "reasoning": {}}, "stop", ("", "stop", ())),
    ],
)
async def test_the_finish_reason_says_whether_there_are_calls(
    upstream: Upstream,
    provider: OpenAICompatible,
    message: dict[str, Any],
    finish: str,
    expected: tuple[str, str, tuple[ToolCall, ...]],
) -> None:
    upstream.on("plain", whole(message, finish))
    [choice] = (await provider.complete(asking(), nothing)).choices
    assert (choice.text, choice.finish_reason, choice.tool_calls) == expected


async def test_arguments_that_are_no_string_are_taken_as_json_and_none_as_an_empty_object(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    given = [
        {"id": "a", "function": {"name": "f", "arguments": {"x": [1]}}},
        {"id": "b", "function": {"name": "f", "arguments": "not json"}},
        {"id": "c", "function": {"name": "f", "arguments": ""}},
        {"id": "d", "function": {"name": "f"}},
        {"function": {"name": "f", "arguments": None}},
    ]
    upstream.on("plain", whole({"content": None, "tool_calls": given}))
    [choice] = (await provider.complete(asking(), nothing)).choices
    arguments = [call.arguments for call in choice.tool_calls]
    assert arguments == ['{"x": [1]}', "not json", "{}", "{}", "{}"]
    assert [call.id for call in choice.tool_calls[:4]] == ["a", "b", "c", "d"]
    assert choice.tool_calls[4].id.startswith("call_")


@pytest.mark.parametrize(
    "given",
    [
        [{"id": "a", "function": {"arguments": "{}"}}],
        [{"id": "a"}],
        [{"id": "a", "function": {"name": "", "arguments": "{}"}}],
        [{"id": 7, "function": {"name": "f"}}],
        [{"id": "a", "function": {"name": "f" * 300}}],
        [reported(ROME)] * 129,
        {"id": "a"},
        "none",
    ],
)
async def test_calls_that_are_none_are_a_failure_both_ways(
    upstream: Upstream, provider: OpenAICompatible, given: Any
) -> None:
    upstream.script(whole({"content": None, "tool_calls": given}))
    upstream.script(stream_of(event({"tool_calls": given}), event({}, "tool_calls")))
    with pytest.raises(UpstreamFailed, match="tool call") as raised:
        await provider.complete(asking(), nothing)
    assert raised.value.usage is not None
    _, error = await text_before_failure(provider, asking(), UpstreamFailed)
    assert "tool call" in error.message


async def test_calls_that_nobody_asked_for_are_not_looked_at_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.script(whole({"content": "Hm.", "tool_calls": "none"}), stream_of(*PARALLEL))
    [choice] = (await provider.complete(job(messages=HELLO), nothing)).choices
    assert choice == Choice(index=0, text="Hm.", finish_reason="stop")
    assert put_together(await streamed(provider, job(messages=HELLO))) == Choice(
        index=0, text="Let me look.", finish_reason="stop"
    )


# --- a streamed answer ------------------------------------------------------------------------------------------


async def test_streamed_calls_after_a_text_are_what_the_sdk_makes_of_them(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.script(stream_of(*PARALLEL))
    expected = Choice(index=0, text="Let me look.", finish_reason="tool_calls", tool_calls=(ROME, OSLO))
    assert put_together(await streamed(provider, asking())) == expected
    state = ChatCompletionStreamState()
    for data in PARALLEL:
        state.handle_chunk(ChatCompletionChunk.model_validate_json(data))
    [choice] = state.get_final_completion().choices
    assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
    made = [
        (call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()
    ]
    assert made == [(call.id, call.name, call.arguments) for call in (ROME, OSLO)]


def test_the_first_piece_of_a_call_has_its_id_and_name_and_the_others_have_not() -> None:
    assert [found for chunk in read(*PARALLEL) for found in chunk.tool_calls or ()] == [
        ToolCallPiece(0, "", "call_1", "get_weather"),
        ToolCallPiece(0, '{"city"'),
        ToolCallPiece(0, ':"Rom"}'),
        ToolCallPiece(1, "", "call_2", "get_weather"),
        ToolCallPiece(1, '{"city":'),
        ToolCallPiece(1, '"Oslo"}'),
    ]


BARE = {"function": {"name": "get_weather", "arguments": '{"city":'}}


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([called(reported(ROME, index=0)), called(reported(OSLO, index=1))], id="whole at once"),
        pytest.param([called(reported(ROME, index=0), reported(OSLO, index=1))], id="both in one event"),
        pytest.param(
            [called(reported(ROME, index=0)), called(reported(OSLO, index=0))], id="index 0 for all"
        ),
        pytest.param([called(reported(ROME)), called(reported(OSLO))], id="no index"),
        pytest.param([called(reported(ROME, index=5)), called(reported(OSLO, index=9))], id="other numbers"),
        pytest.param(
            [
                called(BARE | {"id": "call_1"}),
                called({"function": {"arguments": '"Rom"}'}}),
                called(BARE | {"id": "call_2"}),
                called({"id": "", "function": {"name": "", "arguments": '"Oslo"}'}}),
            ],
            id="no index, in pieces",
        ),
        pytest.param(
            [
                called(BARE | {"id": "call_1"}, BARE | {"id": "call_2"}),
                called({"id": "call_2", "function": {"arguments": '"Oslo"}'}}),
                called({"id": "call_1", "function": {"arguments": '"Rom"}'}}),
            ],
            id="told apart by id alone",
        ),
        pytest.param(
            [
                called(BARE | {"id": "call_1", "index": 0}, BARE | {"id": "call_2", "index": 1}),
                called(piece(1, '"Oslo"}', id="call_2"), piece(0, '"Rom"}', id="call_1")),
            ],
            id="interleaved, ids repeated",
        ),
        pytest.param(
            [
                called(BARE | {"id": "call_1", "index": 0}),
                called(
                    {"id": "call_1", "index": 0, "function": {"name": "get_weather", "arguments": '"Rom"}'}}
                ),
                called(BARE | {"id": "call_2", "index": 1}),
                called(piece(1, '"Oslo"}', id="chatcmpl-tool-77")),
            ],
            id="name repeated, id made up anew",
        ),
        pytest.param(
            [
                called({"index": 0, "id": "call_1"}),
                called(piece(0, '{"city":')),
                called({"index": 0, "function": {"name": "get_weather", "arguments": '"Rom"}'}}),
                called(reported(OSLO, index=1)),
            ],
            id="name last",
        ),
        pytest.param(
            [
                called(BARE | {"id": "call_1", "index": 0}),
                called(BARE | {"id": "call_2", "index": 0}),
                called(piece(0, '"Rom"}', id="call_1")),
                called(piece(0, '"Oslo"}', id="call_2")),
            ],
            id="index 0 for all, in turn",
        ),
        pytest.param(
            [
                called(BARE | {"id": "call_1", "index": 0}),
                called(BARE | {"id": "call_2", "index": 1}),
                called(piece(1, '"Rom"}', id="call_1")),
                called(piece(0, '"Oslo"}', id="call_2")),
            ],
            id="the id before the index",
        ),
    ],
)
def test_calls_are_told_apart_however_they_are_numbered(events: list[bytes]) -> None:
    assert put_together(read(*events, event({}, "tool_calls"))) == Choice(
        index=0, text="", finish_reason="tool_calls", tool_calls=(ROME, OSLO)
    )


@pytest.mark.parametrize("given", [{"index": 0, "id": ""}, {"index": 0}, {"id": None}, {}], ids=str)
@pytest.mark.parametrize("names", [("f", "g"), ("f", "f")])
@pytest.mark.parametrize("together", [True, False])
def test_whole_calls_that_nothing_tells_apart_are_as_many_as_their_names(
    given: dict[str, Any], names: tuple[str, str], together: bool
) -> None:
    calls = [
        given | {"function": {"name": name, "arguments": f'{{"a":{k}}}'}} for k, name in enumerate(names)
    ]
    events = [called(*calls)] if together else [called(call) for call in calls]
    found = put_together(read(*events)).tool_calls
    assert [(call.name, call.arguments) for call in found] == [(names[0], '{"a":0}'), (names[1], '{"a":1}')]
    assert len({call.id for call in found}) == 2


@pytest.mark.parametrize("given", [{"index": 0}, {}, {"index": 0, "id": "call_1"}, {"id": "call_1"}], ids=str)
def test_a_name_that_comes_with_every_piece_begins_no_other_call(given: dict[str, Any]) -> None:
    pieces = ('{"city":', "", '"Rom', '"}', " ")
    events = [called(given | {"function": {"name": "f", "arguments": text}}) for text in pieces]
    [call] = put_together(read(*events)).tool_calls
    assert call.arguments == '{"city":"Rom"} '


def test_another_name_begins_another_call_though_the_first_is_not_whole() -> None:
    events = [
        called({"index": 0, "id": "x", "function": {"name": name, "arguments": ""}}) for name in ("f", "g")
    ]
    assert [call.name for call in put_together(read(*events)).tool_calls] == ["f", "g"]


def test_an_id_that_comes_after_its_call_began_goes_on_with_it() -> None:
    begun = called({"index": 0, "function": {"name": "f", "arguments": ""}})
    [call] = put_together(
        read(begun, called(piece(0, "{", id="a")), called(piece(0, "}", id="a")))
    ).tool_calls
    assert call.arguments == "{}"


async def test_ids_that_come_twice_are_told_apart_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    twice = [reported(ROME), reported(OSLO, id=ROME.id)]
    numbered = [call | {"index": index} for index, call in enumerate(twice)]
    upstream.script(whole({"content": None, "tool_calls": twice}), stream_of(called(*numbered)))
    [choice] = (await provider.complete(asking(), nothing)).choices
    for found in (choice, put_together(await streamed(provider, asking()))):
        first, second = found.tool_calls
        assert (first, second.arguments) == (ROME, OSLO.arguments)
        assert second.id.startswith("call_") and second.id != ROME.id


def test_calls_without_ids_get_some() -> None:
    bare = {"index": 0, "function": {"name": "f"}}
    chunks = read(called(bare), called(bare | {"index": 1}))
    choice = put_together(chunks)
    assert [call.arguments for call in choice.tool_calls] == ["{}", "{}"]
    first, second = (call.id for call in choice.tool_calls)
    assert first != second
    assert first.startswith("call_")


@pytest.mark.parametrize("finish", ["stop", "tool_calls", "function_call", None])
def test_a_proper_end_after_calls_is_tool_calls(finish: str | None) -> None:
    events = [called(reported(ROME, index=0))] + ([event({}, finish)] if finish else [])
    assert put_together(read(*events)).finish_reason == "tool_calls"


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_calls_that_were_cut_off_say_so(finish: str) -> None:
    choice = put_together(
        read(called(piece(0, '{"ci', id="x", function={"name": "f", "arguments": '{"ci'})), event({}, finish))
    )
    assert (choice.finish_reason, choice.tool_calls[0].arguments) == (finish, '{"ci')


def test_each_choice_has_calls_of_its_own() -> None:
    chunks = read(
        event({"tool_calls": [reported(ROME, index=0)]}, index=0),
        event({"tool_calls": [reported(OSLO, index=0)]}, index=1),
        event({}, "tool_calls", index=1),
        event({"content": "Done."}, "stop", index=0),
        n=2,
    )
    assert put_together(chunks, 0).tool_calls == (ROME,)
    assert put_together(chunks, 0).text == "Done."
    assert put_together(chunks, 1).tool_calls == (OSLO,)


def test_thoughts_are_passed_over() -> None:
    chunks = read(
        event({"role": "assistant", "content": "", "reasoning_content": ""}),
        event({"content": None, "reasoning_content": "Let me think."}),
        event({"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text"}]}),
        event({"content": "Yes."}),
        event({"content": ""}, "stop"),
    )
    assert chunks == [Chunk(0, "Yes."), Chunk(0, "", "stop")]


def test_a_flood_of_calls_is_a_failure() -> None:
    flood = [called({"index": k, "id": f"c{k}", "function": {"name": "f"}}) for k in range(129)]
    assert "too many tool calls" in failure(*flood)
    unnamed = [called({"index": k, "id": f"c{k}"}) for k in range(129)]
    assert "too many tool calls" in failure(*unnamed)


def test_a_call_that_never_got_a_name_is_a_failure() -> None:
    assert "without a name" in failure(called(piece(0, "{}")), event({}, "tool_calls"))
    assert "without a name" in failure(called({"function": {"arguments": "{}"}}))


def test_arguments_are_not_kept_for_long_while_the_name_does_not_come() -> None:
    text = called(piece(0, "x" * 1000))
    name = called({"index": 0, "function": {"name": "f"}})
    [call] = put_together(read(*[text] * 60, name)).tool_calls
    assert call.arguments == "x" * 60_000
    assert "without a name" in failure(*[text] * 70, name)
    empty = called(piece(0, ""))
    assert "without a name" in failure(*[empty] * 70_000, name)


def test_what_came_before_a_bad_call_is_kept() -> None:
    answer = StreamedAnswer("acme", 1, None, has_tools=True)
    bad = event({"tool_calls": 7})
    assert answer.take([event({"content": "a"}), called(reported(ROME, index=0)), bad]) == [
        Chunk(0, "a"),
        Chunk(0, tool_calls=(ToolCallPiece(0, ROME.arguments, ROME.id, ROME.name),)),
    ]
    assert isinstance(answer.failure, UpstreamFailed)


async def test_log_probabilities_and_calls_go_together_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    scores = {"content": [{"token": "Hm.", "logprob": -0.5, "bytes": [72, 109, 46], "top_logprobs": []}]}
    body = whole({"content": "Hm.", "tool_calls": [reported(ROME)]})
    assert isinstance(body.body, dict)
    body.body["choices"][0]["logprobs"] = scores
    said = json.loads(event({"content": "Hm."}))
    said["choices"][0]["logprobs"] = scores
    end = event({}, "tool_calls")
    upstream.script(body, stream_of(json.dumps(said).encode(), called(reported(ROME, index=0)), end))
    asked = asking(logprobs=0)
    [choice] = (await provider.complete(asked, nothing)).choices
    chunks = await streamed(provider, asked)
    assert (choice.text, choice.finish_reason, choice.tool_calls) == ("Hm.", "tool_calls", (ROME,))
    assert put_together(chunks) == Choice(index=0, text="Hm.", finish_reason="tool_calls", tool_calls=(ROME,))
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert entries == list(choice.logprobs or ())
    assert [entry.data for entry in entries] == [b"Hm."]
