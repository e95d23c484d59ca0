"""dialects/chat_tools.py and chat_messages.py: tools, calls and their answers, and calls in what is rendered."""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as SDKCompletion
from openai.types.chat import ChatCompletionChunk as SDKChunk
from tests.support.rendering import answered, context, events

from headgate.core import errors
from headgate.core.completion import (
    Choice,
    Chunk,
    CompletionRequest,
    FinishReason,
    Message,
    StreamEnd,
    Tool,
    ToolCall,
    ToolCallPiece,
    Tools,
)
from headgate.dialects.base import Caps, Dialect, MalformedBody
from headgate.dialects.chat import OpenAIChat
from headgate.dialects.chat_tools import MOST_TOOLS
from headgate.dialects.chat_wire import ChatBody

CONTEXT = context()
DIALECT: Dialect[ChatBody] = OpenAIChat(Caps())
HELLO: dict[str, object] = {"role": "user", "content": "Hello"}
SCHEMA: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}}


def parse_body(body: bytes) -> CompletionRequest:
    return DIALECT.parse(DIALECT.decode(body), CONTEXT)


def parse(**fields: object) -> CompletionRequest:
    return parse_body(json.dumps({"model": "demo", "messages": [HELLO], **fields}).encode())


def refused(fields: Mapping[str, object]) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def tool(name: object = "look", **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **fields}}


def call(id_: object = "c1", name: object = "look", arguments: object = "{}") -> dict[str, object]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def asks(*calls: Mapping[str, object], **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def result(id_: object = "c1", **fields: object) -> dict[str, object]:
    return {"role": "tool", "tool_call_id": id_, "content": "sunny", **fields}


# --- tools


def test_tools_arrive_with_all_that_is_said_about_them() -> None:
    request = parse(
        tools=[
            tool("get_weather-2", description="Now.", parameters=SCHEMA, strict=True),
            tool("stop", description=None, parameters=None, strict=None),
            tool("empty", parameters={}),
        ],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    assert request.tools == Tools(
        tools=(
            Tool(
                name="get_weather-2",
                description="Now.",
                parameters=json.dumps(SCHEMA).encode(),
                strict=True,
            ),
            Tool(name="stop"),
            Tool(name="empty", parameters=b"{}"),
        ),
        choice="required",
        parallel=False,
    )


@pytest.mark.parametrize("choice", [None, "none", "auto", "required"])
def test_the_choice_is_kept_and_left_to_the_model_where_it_is_not_given(choice: str | None) -> None:
    tools = parse(tools=[tool()], tool_choice=choice).tools
    assert tools is not None
    assert (tools.choice, tools.name, tools.parallel) == (choice, None, None)


def test_one_function_may_be_chosen_by_its_name() -> None:
    tools = parse(tools=[tool("a"), tool("b")], tool_choice=tool("b"), parallel_tool_calls=True).tools
    assert tools is not None
    assert (tools.choice, tools.name, tools.parallel) == ("named", "b", True)


def test_parameters_are_kept_as_they_were_sent() -> None:
    schema = '{ "type":"object" , "properties": {"é": {"type": "string"}}}'
    body = (
        '{"model": "demo", "messages": [{"role": "user", "content": "?"}], '
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + schema + "}}]}"
    )
    tools = parse_body(body.encode()).tools
    assert tools is not None
    assert tools.tools[0].parameters == schema.encode()


def test_as_many_tools_as_allowed_are_taken() -> None:
    tools = parse(tools=[tool(f"f{index}") for index in range(MOST_TOOLS)]).tools
    assert tools is not None
    assert len(tools.tools) == MOST_TOOLS
    assert parse(tools=[tool("a" * 64)]).tools is not None


NAMED = "tool_choice.function.name"
WRONG_TOOLS: list[tuple[dict[str, object], str, str]] = [
    ({"tools": [tool(f"f{i}") for i in range(MOST_TOOLS + 1)]}, "tools", "at most 128"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", "must be function"),
    ({"tools": [tool(), {"type": "retrieval"}]}, "tools[1].type", "must be function"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": [tool(None)]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("")]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("a" * 65)]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("get weather")]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("é")]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("f\n")]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [tool("f"), tool("g"), tool("f")]}, "tools[2].function.name", "must differ"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "an object"),
    ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters", "an object"),
    ({"tools": [tool(parameters=False)]}, "tools[0].function.parameters", "an object"),
    ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "none, auto, required"),
    ({"tools": [tool()], "tool_choice": ""}, "tool_choice", "none, auto, required"),
    ({"tools": [tool()], "tool_choice": {}}, "tool_choice.type", "must be function"),
    ({"tools": [tool()], "tool_choice": {"type": "tool"}}, "tool_choice.type", "must be function"),
    ({"tools": [tool()], "tool_choice": {"type": "function"}}, NAMED, "one of the tools"),
    ({"tools": [tool()], "tool_choice": tool(None)}, NAMED, "one of the tools"),
    ({"tools": [tool()], "tool_choice": tool("other")}, NAMED, "one of the tools"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG_TOOLS, ids=lambda value: str(value)[:60])
def test_a_wrong_tool_is_refused_with_its_place_and_what_it_may_be(
    fields: dict[str, object], param: str, words: str
) -> None:
    error = refused(fields)
    assert (error.param, error.code) == (param, None)
    assert error.message.startswith(param.split("[", maxsplit=1)[0].split(".", maxsplit=1)[0])
    assert words in error.message
    assert error.message.endswith("(POST /v1/chat/completions).")


OTHER_KINDS: list[tuple[dict[str, object], str]] = [
    ({"tools": [tool(), {"type": "custom", "custom": {"name": "sql"}}]}, "tools[1].type"),
    ({"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "sql"}}}, "tool_choice"),
    (
        {
            "tools": [tool()],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool()]}},
        },
        "tool_choice",
    ),
    (
        {
            "messages": [
                asks({"id": "c1", "type": "custom", "custom": {"name": "sql", "input": "x"}}),
                result(),
            ]
        },
        "messages[0].tool_calls[0].type",
    ),
]


@pytest.mark.parametrize(("fields", "param"), OTHER_KINDS, ids=lambda value: str(value)[:60])
def test_other_kinds_of_tools_are_refused_by_name(fields: dict[str, object], param: str) -> None:
    error = refused(fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message.startswith(f"{param} is not supported as ")


@pytest.mark.parametrize("choice", ["required", "any", tool(), {"type": "allowed_tools"}], ids=str)
@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_none_can_be_chosen(choice: object, tools: object) -> None:
    error = refused({"tools": tools, "tool_choice": choice})
    assert (error.param, error.code) == ("tool_choice", "unsupported_parameter")
    assert "without tools" in error.message


WRONG_TYPES: list[tuple[dict[str, object], str]] = [
    ({"tools": tool()}, "tools"),
    ({"tools": [tool(), "f"]}, "tools[1]"),
    ({"tools": [tool(5)]}, "tools[0].function.name"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [tool()], "tool_choice": 1}, "tool_choice"),
    ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [asks(call(1))]}, "messages[0].tool_calls[0].id"),
    ({"messages": [asks(call(arguments={}))]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [result(1)]}, "messages[0].tool_call_id"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_TYPES, ids=lambda value: str(value)[:60])
def test_a_field_of_a_wrong_type_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    assert refused(fields).param == param


def test_parameters_whose_numbers_cannot_be_held_are_refused_by_name() -> None:
    body = json.dumps({"model": "demo", "messages": [HELLO], "tools": [tool(parameters={"maximum": "M"})]})
    with pytest.raises(errors.InvalidRequest, match="out of range") as caught:
        parse_body(body.replace('"M"', "1e999").encode())
    assert caught.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize("parameters", [b"{]", b'{"a":"\\ud800"}', b'{"a":"\xff"}', b"[" * 70 + b"]" * 70])
def test_what_is_not_json_is_malformed_even_inside_parameters(parameters: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_body(b'{"tools":[{"type":"function","function":{"parameters":%b}}]}' % parameters)


# --- calls and their answers


def test_calls_and_their_answers_arrive_in_order() -> None:
    request = parse(
        messages=[
            HELLO,
            asks(call("c1", "look", '{"city": "Röm"}'), call("c2", "hear", "not json")),
            result("c2", content=[{"type": "text", "text": "no"}, {"type": "text", "text": "ise"}]),
            result("c1", content=""),
            asks(call("c1", arguments=""), content="Let me see."),
            result("c1", name="look"),
            {"role": "user", "content": "And?"},
        ],
        tools=[tool("look"), tool("hear")],
    )
    assert request.messages == (
        Message(role="user", content="Hello"),
        Message(
            role="assistant",
            content="",
            tool_calls=(
                ToolCall(id="c1", name="look", arguments='{"city": "Röm"}'),
                ToolCall(id="c2", name="hear", arguments="not json"),
            ),
        ),
        Message(role="tool", content="noise", tool_call_id="c2"),
        Message(role="tool", content="", tool_call_id="c1"),
        Message(
            role="assistant",
            content="Let me see.",
            tool_calls=(ToolCall(id="c1", name="look", arguments=""),),
        ),
        Message(role="tool", content="sunny", tool_call_id="c1"),
        Message(role="user", content="And?"),
    )
    assert not request.looks


def test_a_conversation_with_calls_needs_no_tools() -> None:
    request = parse(messages=[HELLO, asks(call(), content=""), result()])
    assert request.tools is None
    assert request.messages is not None
    assert [message.role for message in request.messages] == ["user", "assistant", "tool"]


def test_an_assistant_message_without_calls_is_plain() -> None:
    (message,) = parse(messages=[asks(tool_calls=[])]).messages or ()
    assert message == Message(role="assistant", content="")


FIRST = "messages[0].tool_calls[0]"
WRONG_TURNS: list[tuple[list[dict[str, object]], str, str]] = [
    ([result()], "messages[0].tool_call_id", "the id of a call"),
    ([HELLO, result()], "messages[1].tool_call_id", "the id of a call"),
    ([asks(call()), result("c2")], "messages[1].tool_call_id", "the id of a call"),
    ([asks(call()), result(), result()], "messages[2].tool_call_id", "answered by no other"),
    ([asks(call()), result(), HELLO, result()], "messages[3].tool_call_id", "the id of a call"),
    ([asks(call()), result(None)], "messages[1].tool_call_id", "required"),
    ([asks(call()), result("")], "messages[1].tool_call_id", "required"),
    ([asks(call()), result(content=None)], "messages[1].content", "list of text parts"),
    ([asks(call()), result(content=[])], "messages[1].content", "list of text parts"),
    ([asks(call()), result(tool_calls=[call()])], "messages[1].tool_calls", "assistant messages only"),
    ([asks(call())], FIRST, "must come after it"),
    ([asks(call()), HELLO], FIRST, "must come before messages[1]"),
    ([asks(call()), {"role": "system", "content": "x"}, result()], FIRST, "before messages[1]"),
    ([asks(call()), asks(call("c2")), result("c2")], FIRST, "before messages[1]"),
    ([asks(call(), call("c2")), result("c1")], "messages[0].tool_calls[1]", "after it"),
    ([asks(call(), call("c2")), result("c2"), HELLO], FIRST, "before messages[2]"),
    ([asks(call(), call()), result()], "messages[0].tool_calls[1].id", "must differ"),
    ([HELLO | {"tool_calls": [call()]}], "messages[0].tool_calls", "assistant messages only"),
    ([HELLO | {"tool_call_id": "c1"}], "messages[0].tool_call_id", "tool messages only"),
    ([asks(call(), tool_call_id="c0")], "messages[0].tool_call_id", "tool messages only"),
    ([asks(call(None)), result()], f"{FIRST}.id", "required"),
    ([asks(call("")), result("")], f"{FIRST}.id", "required"),
    ([asks({"id": "c1", "function": {"name": "f", "arguments": ""}})], f"{FIRST}.type", "function"),
    ([asks({"id": "c1", "type": "function"}), result()], f"{FIRST}.function", "required"),
    ([asks(call(name=None)), result()], f"{FIRST}.function.name", "1 to 64"),
    ([asks(call(name="a b")), result()], f"{FIRST}.function.name", "1 to 64"),
    ([asks(call(arguments=None)), result()], f"{FIRST}.function.arguments", "required"),
]


@pytest.mark.parametrize(("messages", "param", "words"), WRONG_TURNS, ids=lambda value: str(value)[:60])
def test_a_wrong_turn_is_refused_with_its_place(
    messages: list[dict[str, object]], param: str, words: str
) -> None:
    error = refused({"messages": messages, "tools": [tool()]})
    assert (error.param, error.code) == (param, None)
    assert error.message.startswith(param)
    assert words in error.message


REFUSED_FIELDS: list[tuple[dict[str, object], str]] = [
    (asks(call(), name="Bob"), "name"),
    (asks(call(), refusal="No."), "refusal"),
    (asks(call(), function_call={"name": "look", "arguments": "{}"}), "function_call"),
    (asks(call(), audio={"id": "a"}), "audio"),
]


@pytest.mark.parametrize(("message", "field"), REFUSED_FIELDS, ids=lambda value: str(value)[:60])
def test_other_fields_of_a_calling_message_are_refused_by_name(
    message: dict[str, object], field: str
) -> None:
    error = refused({"messages": [message, result()]})
    assert (error.param, error.code) == (f"messages[0].{field}", "unsupported_parameter")


# --- answers

CALLS = (
    ToolCall(id="call_1", name="look", arguments='{"city": "Rö\\"m"}\n'),
    ToolCall(id="call_2", name="hear", arguments=""),
)
SHOWN: list[dict[str, Any]] = [
    {
        "id": "call_1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"city": "Rö\\"m"}\n'},
    },
    {"id": "call_2", "type": "function", "function": {"name": "hear", "arguments": ""}},
]


@pytest.mark.parametrize(("text", "content"), [("", None), ("Let me see.", "Let me see.")])
@pytest.mark.parametrize("logprobs", [False, True])
def test_calls_come_with_the_message_and_alone_leave_its_content_null(
    text: str, content: str | None, logprobs: bool
) -> None:
    choices = (
        Choice(index=0, text=text, finish_reason="tool_calls", tool_calls=CALLS),
        Choice(index=1, text="", finish_reason="stop"),
    )
    body = DIALECT.render(answered(parse(n=2, tools=[tool()], logprobs=logprobs), choices))
    calling, plain = json.loads(body)["choices"]
    assert calling["message"] == {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "tool_calls": SHOWN,
    }
    assert calling["finish_reason"] == "tool_calls"
    assert plain["message"] == {"role": "assistant", "content": "", "refusal": None}
    parsed = SDKCompletion.model_validate_json(body, strict=True).choices[0]
    assert [one.to_dict() for one in parsed.message.tool_calls or ()] == SHOWN


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_its_arguments() -> None:
    request = parse(stream=True, tools=[tool()])
    chunks = [
        Chunk(0, tool_calls=(ToolCallPiece(0, "", "call_1", "look"),)),
        Chunk(0, tool_calls=(ToolCallPiece(0, '{"city"'),)),
        Chunk(0, tool_calls=(ToolCallPiece(0, ': "Rome"}'), ToolCallPiece(1, "{}", "call_2", "hear"))),
        Chunk(0, "", "tool_calls"),
    ]
    rendered = events(DIALECT.renderer(request).chunks(chunks))
    for event in rendered:
        SDKChunk.model_validate(event, strict=True)
    assert [event["choices"][0]["delta"] for event in rendered] == [
        {"role": "assistant", "content": None},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "look", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": ': "Rome"}'}},
                {
                    "index": 1,
                    "id": "call_2",
                    "type": "function",
                    "function": {"name": "hear", "arguments": "{}"},
                },
            ]
        },
        {},
    ]
    reasons = [event["choices"][0]["finish_reason"] for event in rendered]
    assert reasons == [None] * 4 + ["tool_calls"]
    assert all(event["choices"][0]["logprobs"] is None for event in rendered)


def test_text_calls_and_the_end_of_one_chunk_come_in_this_order() -> None:
    piece = ToolCallPiece(0, "{}", "call_1", "look")
    chunk = Chunk(0, "Let me see.", "tool_calls", tool_calls=(piece,))
    rendered = events(DIALECT.renderer(parse(stream=True, tools=[tool()])).chunks([chunk]))
    deltas = [event["choices"][0]["delta"] for event in rendered]
    assert [[*delta] for delta in deltas] == [["role", "content"], ["content"], ["tool_calls"], []]
    assert deltas[0]["content"] == ""
    assert rendered[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_with_include_usage_chunks_of_calls_have_null_usage() -> None:
    request = parse(stream=True, tools=[tool()], stream_options={"include_usage": True})
    renderer = DIALECT.renderer(request)
    piece = ToolCallPiece(0, "{}", "call_1", "look")
    chunks = events(renderer.chunks([Chunk(0, tool_calls=(piece,)), Chunk(0, "", "tool_calls")]))
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    last, done = events(renderer.end(StreamEnd(kind="completed", answer=answered(request))))
    assert (last["choices"], last["usage"]["total_tokens"], done) == ([], 7, "[DONE]")


def _pieces(calls: list[ToolCall], cuts: list[int]) -> list[ToolCallPiece]:
    pieces = []
    for position, one in enumerate(calls):
        bounds = sorted({0, len(one.arguments), *(min(cut, len(one.arguments)) for cut in cuts)})
        pieces.append(ToolCallPiece(position, "", one.id, one.name))
        pieces += [ToolCallPiece(position, one.arguments[start:end]) for start, end in pairwise(bounds)]
    return pieces


_calls = st.lists(
    st.builds(
        ToolCall,
        id=st.text(min_size=1, max_size=8),
        name=st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True),
        arguments=st.text(max_size=30),
    ),
    min_size=1,
    max_size=3,
)


@given(
    calls=_calls,
    texts=st.lists(st.text(min_size=1, max_size=5), max_size=2),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    reason=st.sampled_from(["tool_calls", "stop", "length"]),
)
def test_a_stream_of_calls_joined_is_the_blocking_answer(
    calls: list[ToolCall], texts: list[str], cuts: list[int], reason: FinishReason
) -> None:
    chunks = [
        *(Chunk(0, text) for text in texts),
        *(Chunk(0, tool_calls=(piece,)) for piece in _pieces(calls, cuts)),
        Chunk(0, "", reason),
    ]
    content: str | None = None
    joined: dict[int, dict[str, Any]] = {}
    for event in events(DIALECT.renderer(parse(stream=True, tools=[tool()])).chunks(chunks)):
        delta = event["choices"][0]["delta"]
        if delta.get("content") is not None:
            content = (content or "") + delta["content"]
        for piece in delta.get("tool_calls", ()):
            index = piece.pop("index")
            if index not in joined:
                joined[index] = piece
            else:
                assert piece.keys() == {"function"}
                joined[index]["function"]["arguments"] += piece["function"]["arguments"]
    choice = Choice(index=0, text="".join(texts), finish_reason=reason, tool_calls=tuple(calls))
    (whole,) = json.loads(DIALECT.render(answered(parse(tools=[tool()]), (choice,))))["choices"]
    assert content == whole["message"]["content"]
    assert [joined[index] for index in sorted(joined)] == whole["message"]["tool_calls"]
