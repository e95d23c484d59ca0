"""Tools and images through the official SDK: what arrives at the upstream, and what comes back from it."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from tests.support.house import ACME, House, model_row, open_house
from tests.support.script import Script
from tests.support.upstream import Received

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

MODEL, BLIND = "caller", "plain"
CONFIG = (
    ACME + model_row(MODEL, mode="chat", tools=True, vision=True) + model_row(BLIND, mode="chat", tools=False)
)
INPUT_NANO, OUTPUT_NANO = 500, 1500
USAGE = {"prompt_tokens": 40, "completion_tokens": 9, "total_tokens": 49}
PRICE = 40 * INPUT_NANO + 9 * OUTPUT_NANO

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where; «Köln»"}},
            "required": ["city"],
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "tell_time"}}
ASK = [{"role": "user", "content": "How is it in Rome and in Köln?"}]
CALLS: list[dict[str, Any]] = [
    {
        "id": "call_a1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    },
    {
        "id": "call_b2",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'},
    },
]
PIXELS = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
PICTURE = "data:image/png;base64," + base64.b64encode(PIXELS).decode()


def answer(calls: list[dict[str, Any]], content: str | None = None) -> Script:
    """A blocking answer that asks for these calls, as OpenAI writes it."""
    message = {"role": "assistant", "content": content, "refusal": None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    head = {"id": "chatcmpl-u", "object": "chat.completion", "created": 1, "model": MODEL}
    return Script(body=head | {"choices": [choice], "usage": USAGE})


def streamed(calls: list[dict[str, Any]], size: int = 5) -> Script:
    """The same answer as a stream: each call's head, then its arguments in pieces of `size` characters."""
    deltas: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        deltas.append({"index": index, **call, "function": {"name": name, "arguments": ""}})
        pieces = (arguments[start : start + size] for start in range(0, len(arguments), size))
        deltas += [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None},
        *({"index": 0, "delta": {"tool_calls": [delta]}, "finish_reason": None} for delta in deltas),
        {"index": 0, "delta": {}, "finish_reason": "tool_calls"},
    ]
    head = {"id": "chatcmpl-u", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    events = [head | {"choices": [choice], "usage": None} for choice in choices]
    events.append(head | {"choices": [], "usage": USAGE})
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return Script(body=lines + "data: [DONE]\n\n", headers={"Content-Type": "text/event-stream"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("tools")) as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        yield client


async def ask(client: AsyncOpenAI, **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "max_tokens": 64}
    return await client.chat.completions.create(**asked | fields)


async def listen(client: AsyncOpenAI, **fields: Any) -> tuple[list[ChatCompletionChunk], Any]:
    """The chunks of a stream, and the completion that the SDK makes of them."""
    stream = await ask(client, stream=True, stream_options={"include_usage": True}, **fields)
    state = ChatCompletionStreamState[Any]()
    chunks: list[ChatCompletionChunk] = []
    async for chunk in stream:
        chunks.append(chunk)
        state.handle_chunk(chunk)
    return chunks, state.current_completion_snapshot


def calls_of(completion: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": call.type,
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in completion.choices[0].message.tool_calls or ()
    ]


def asked(house: House) -> Received:
    return house.up.requests[-1]


async def test_an_answer_asks_for_calls_and_costs_what_the_upstream_says(
    house: House, client: AsyncOpenAI
) -> None:
    before = house.balance()
    house.up.script(answer(CALLS))
    completion = await ask(client)
    (choice,) = completion.choices
    assert (choice.finish_reason, choice.message.role, choice.message.content) == (
        "tool_calls",
        "assistant",
        None,
    )
    assert calls_of(completion) == CALLS
    assert before - house.balance() == PRICE


async def test_streamed_calls_join_to_those_of_the_blocking_answer(house: House, client: AsyncOpenAI) -> None:
    before = house.balance()
    house.up.script(answer(CALLS), streamed(CALLS))
    whole = await ask(client)
    chunks, joined = await listen(client)
    assert calls_of(joined) == calls_of(whole) == CALLS
    assert joined.choices[0].message.content is whole.choices[0].message.content is None
    assert joined.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert joined.usage == whole.usage
    assert before - house.balance() == 2 * PRICE
    # The arguments came in pieces, not as one.
    pieces = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert len(pieces) > 2 * len(CALLS)
    assert [call.id for call in pieces if call.id is not None] == [call["id"] for call in CALLS]


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_arrive_at_the_upstream_as_they_were_sent(
    house: House, client: AsyncOpenAI, stream: bool
) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "tell_time"}},
        "parallel_tool_calls": False,
    }
    house.up.script(streamed(CALLS[:1]) if stream else answer(CALLS[:1]))
    await (listen if stream else ask)(client, **fields)
    sent = asked(house).json
    assert {name: sent[name] for name in fields} == fields
    assert sent["messages"] == ASK


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
async def test_the_choice_arrives_as_a_word(house: House, client: AsyncOpenAI, choice: str) -> None:
    house.up.script(answer(CALLS))
    await ask(client, tool_choice=choice)
    assert asked(house).json["tool_choice"] == choice
    assert "parallel_tool_calls" not in asked(house).json


async def test_a_conversation_goes_round_with_the_results_of_its_calls(
    house: House, client: AsyncOpenAI
) -> None:
    house.up.script(answer(CALLS), Script(pieces=("Both ", "sunny.")))
    called = (await ask(client)).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"sunny {place}"}
        for place, call in enumerate(called.tool_calls or ())
    ]
    said = await ask(client, messages=[*ASK, called, *results])
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("Both sunny.", "stop")
    assert said.choices[0].message.tool_calls is None
    assert asked(house).json["messages"] == [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        *results,
    ]


async def test_a_call_that_was_not_answered_is_refused_before_the_upstream_is_asked(
    house: House, client: AsyncOpenAI
) -> None:
    before = len(house.up.requests)
    turn = {"role": "assistant", "content": None, "tool_calls": CALLS}
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(
            client, messages=[*ASK, turn, {"role": "tool", "tool_call_id": "call_a1", "content": "sun"}]
        )
    assert caught.value.param == "messages[1].tool_calls[1]"
    assert len(house.up.requests) == before


@pytest.mark.parametrize("detail", [None, "low"])
async def test_an_image_in_the_request_arrives_at_the_upstream_as_sent(
    house: House, client: AsyncOpenAI, detail: str | None
) -> None:
    address = {"url": PICTURE} | ({} if detail is None else {"detail": detail})
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "image_url", "image_url": address},
                {"type": "text", "text": "this?"},
            ],
        },
    ]
    house.up.script(Script(pieces=("A ", "dot.")))
    said = await ask(client, messages=messages, tools=openai.NOT_GIVEN)
    assert said.choices[0].message.content == "A dot."
    assert asked(house).json["messages"] == messages


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [WEATHER]}, "tools"),
    (
        {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}],
            "tools": openai.NOT_GIVEN,
        },
        "messages[0].content[0].image_url.url",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=["tools", "image"])
async def test_a_model_that_cannot_is_refused_by_name_and_costs_nothing(
    house: House, client: AsyncOpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    before, requests = house.balance(), len(house.up.requests)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, model=BLIND, stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    assert (house.balance(), len(house.up.requests)) == (before, requests)
