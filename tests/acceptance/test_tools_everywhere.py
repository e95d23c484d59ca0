"""Tools in front of each kind of upstream, through the official SDK: what the upstream gets, and what it costs."""

import json
import re
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from tests.support import tool_answers
from tests.support.client import Client
from tests.support.script import Script
from tests.support.three_kinds import (
    KINDS,
    Kind,
    ThreeKinds,
    kind_model,
    model_of,
    open_three_kinds,
    provider_of,
)
from tests.support.tool_answers import COMPLETION, FROM_CACHE, PROMPT, Asked, price

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

NANO = 10**9
OTHERS: tuple[Kind, ...] = ("anthropic", "cohere")
FINISH: dict[Kind, str] = {"openai": "stop", "anthropic": "end_turn", "cohere": "COMPLETE"}
CONFIG = (
    "".join(
        kind_model(kind, tools=True) + kind_model(kind, f"{kind}-toolless", tools=False) for kind in KINDS
    )
    + kind_model("openai", "falls-back", tools=True, fallbacks=[model_of("anthropic")])
    + kind_model("anthropic", "falls-forward", tools=True, fallbacks=[model_of("openai")])
    + kind_model(
        "openai", "falls-on-toolless", tools=True, fallbacks=["anthropic-toolless", model_of("cohere")]
    )
)

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where; «Köln»"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": PARAMETERS,
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "tell_time"}}
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "How is it in Rome and in Köln?"}
ASK = [SYSTEM, QUESTION]
CALLS = (
    Asked("call_a1", "get_weather", '{"city": "Rome"}'),
    Asked("toolu_01B-2", "get_weather", '{"city": "Köln \\"\\u00e4\\" 日本"}'),
)
WIRE_CALLS = [call.wire for call in CALLS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kinds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeKinds]:
    async with open_three_kinds(CONFIG, tmp_path_factory.mktemp("tools")) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def account(kinds: ThreeKinds) -> Client:
    return await kinds.client()


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(kinds: ThreeKinds, account: Client) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{kinds.url}/v1", api_key=account.key, max_retries=0) as client:
        yield client


def asking(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": ASK, "tools": [WEATHER], "max_tokens": 64} | fields


async def ask(sdk: AsyncOpenAI, model: str, **fields: Any) -> Any:
    return await sdk.chat.completions.create(**asking(model, **fields))


async def listen(sdk: AsyncOpenAI, model: str, **fields: Any) -> tuple[list[Any], Any]:
    """The chunks of a stream, and the completion that the SDK makes of them."""
    fields = {"stream": True, "stream_options": {"include_usage": True}} | fields
    state = ChatCompletionStreamState[Any]()
    chunks = []
    async for chunk in await sdk.chat.completions.create(**asking(model, **fields)):
        chunks.append(chunk)
        state.handle_chunk(chunk)
    return chunks, state.current_completion_snapshot


async def ask_either_way(sdk: AsyncOpenAI, model: str, stream: bool, **fields: Any) -> Any:
    return (await listen(sdk, model, **fields))[1] if stream else await ask(sdk, model, **fields)


def answering(kind: Kind, stream: bool, calls: tuple[Asked, ...] = CALLS, text: str | None = None) -> Script:
    return (tool_answers.streamed if stream else tool_answers.whole)(kind, calls, text)


def assert_calls(completion: Any, calls: tuple[Asked, ...] = CALLS) -> None:
    (choice,) = completion.choices
    assert (choice.finish_reason, choice.message.role) == ("tool_calls", "assistant")
    found = [
        (call.id, call.type, call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls
    ]
    assert found == [(call.id, "function", call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_come_back_in_openais_form_and_cost_what_the_upstream_counted(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, kind: Kind, stream: bool
) -> None:
    kinds.ups[kind].script(answering(kind, stream))
    completion = await ask_either_way(sdk, model_of(kind), stream)
    assert_calls(completion)
    assert completion.choices[0].message.content is None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        PROMPT,
        COMPLETION,
        PROMPT + COMPLETION,
    )
    (row,) = await kinds.books.settled(account.account)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (
        PROMPT,
        FROM_CACHE[kind],
        COMPLETION,
    )
    assert (row.price, row.source, row.provider, row.stream) == (
        price(kind),
        "provider",
        provider_of(kind),
        stream,
    )
    assert kinds.books.balance(account.account).balance == 10 * NANO - price(kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_of_calls_says_its_price_and_who_gave_it(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, kind: Kind
) -> None:
    kinds.ups[kind].script(answering(kind, stream=False))
    raw = await sdk.chat.completions.with_raw_response.create(**asking(model_of(kind)))
    assert Decimal(raw.headers["X-Headgate-Price"]) * NANO == price(kind)
    assert raw.headers["X-Headgate-Provider"] == provider_of(kind)
    assert raw.parse().model == model_of(kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_arguments_are_streamed_as_they_come(kinds: ThreeKinds, sdk: AsyncOpenAI, kind: Kind) -> None:
    kinds.ups[kind].script(answering(kind, stream=True))
    chunks, _ = await listen(sdk, model_of(kind))
    pieces = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [piece.id for piece in pieces if piece.id is not None] == [call.id for call in CALLS]
    for index, call in enumerate(CALLS):
        own = [piece.function.arguments for piece in pieces if piece.index == index]
        assert "".join(own) == call.arguments
        assert len([part for part in own if part]) == -(-len(call.arguments) // 5)
    assert {piece.index for piece in pieces} == {0, 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_words_before_a_call_are_the_content_beside_it(
    kinds: ThreeKinds, sdk: AsyncOpenAI, stream: bool
) -> None:
    for kind in ("openai", "anthropic"):
        kinds.ups[kind].script(answering(kind, stream, CALLS[:1], "Let me look."))
        completion = await ask_either_way(sdk, model_of(kind), stream)
        assert_calls(completion, CALLS[:1])
        assert completion.choices[0].message.content == "Let me look."


@pytest.mark.parametrize("stream", [False, True])
async def test_coheres_plan_is_not_taken_for_an_answer(
    kinds: ThreeKinds, sdk: AsyncOpenAI, stream: bool
) -> None:
    kinds.ups["cohere"].script(answering("cohere", stream, CALLS[:1], "I will look."))
    completion = await ask_either_way(sdk, model_of("cohere"), stream)
    assert_calls(completion, CALLS[:1])
    assert completion.choices[0].message.content is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_without_arguments_has_an_empty_object(
    kinds: ThreeKinds, sdk: AsyncOpenAI, kind: Kind, stream: bool
) -> None:
    nothing = Asked("call_1", "tell_time", "" if kind != "anthropic" or stream else "{}")
    kinds.ups[kind].script(answering(kind, stream, (nothing,)))
    completion = await ask_either_way(sdk, model_of(kind), stream, tools=[CLOCK])
    assert_calls(completion, (Asked("call_1", "tell_time", "{}"),))


async def around(kinds: ThreeKinds, sdk: AsyncOpenAI, kind: Kind, stream: bool) -> dict[str, Any]:
    """Call, results, answer; the body of the last request."""
    kinds.ups[kind].script(answering(kind, stream), Script(pieces=("Both ", "sunny."), finish=FINISH[kind]))
    called = (await ask_either_way(sdk, model_of(kind), stream)).choices[0].message
    turn = {
        "role": "assistant",
        "content": called.content,
        "tool_calls": [call.model_dump(include={"id", "type", "function"}) for call in called.tool_calls],
    }
    for call in turn["tool_calls"]:
        call["function"] = {name: call["function"][name] for name in ("name", "arguments")}
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"sun over {place}"}
        for place, call in enumerate(called.tool_calls)
    ]
    said = await ask_either_way(sdk, model_of(kind), stream, messages=[*ASK, turn, *results])
    (choice,) = said.choices
    assert (choice.message.content, choice.finish_reason) == ("Both sunny.", "stop")
    assert not choice.message.tool_calls
    body: dict[str, Any] = kinds.latest(kind).json
    return body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_round_trip_is_tool_use_and_tool_result_at_anthropic(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, stream: bool
) -> None:
    body = await around(kinds, sdk, "anthropic", stream)
    assert body == {
        "model": model_of("anthropic"),
        "max_tokens": 64,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": QUESTION["content"]}]},
            {
                "role": "assistant",
                "content": [
                    {
                        "type": "tool_use",
                        "id": call.id,
                        "name": call.name,
                        "input": json.loads(call.arguments),
                    }
                    for call in CALLS
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": call.id,
                        "content": [{"type": "text", "text": f"sun over {place}"}],
                    }
                    for place, call in enumerate(CALLS)
                ],
            },
        ],
        "tools": [
            {
                "name": "get_weather",
                "description": "The weather now.",
                "input_schema": PARAMETERS,
                "strict": True,
            }
        ],
    } | ({"stream": True} if stream else {})
    assert len(await kinds.books.settled(account.account, 2)) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_round_trip_is_tool_messages_at_cohere(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, stream: bool
) -> None:
    body = await around(kinds, sdk, "cohere", stream)
    function = {name: WEATHER["function"][name] for name in ("name", "description", "parameters")}  # type: ignore[index]
    assert body == {
        "model": model_of("cohere"),
        "max_tokens": 64,
        "messages": [
            SYSTEM,
            QUESTION,
            {"role": "assistant", "tool_calls": WIRE_CALLS},
            *(
                {"role": "tool", "tool_call_id": call.id, "content": f"sun over {place}"}
                for place, call in enumerate(CALLS)
            ),
        ],
        "tools": [{"type": "function", "function": function}],
        "strict_tools": True,
    } | ({"stream": True} if stream else {})
    assert len(await kinds.books.settled(account.account, 2)) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "anthropic", "cohere"),
    [
        ({}, None, None),
        ({"tool_choice": "auto"}, {"type": "auto"}, None),
        ({"tool_choice": "required"}, {"type": "any"}, "REQUIRED"),
        ({"tool_choice": "none"}, {"type": "none"}, "NONE"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "tell_time"}}},
            {"type": "tool", "name": "tell_time"},
            "refused",
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"type": "any", "disable_parallel_tool_use": True},
            "refused",
        ),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}, "refused"),
        ({"tool_choice": "required", "parallel_tool_calls": True}, {"type": "any"}, "REQUIRED"),
    ],
    ids=["neither", "auto", "required", "none", "named", "required-single", "single", "required-several"],
)
async def test_the_choice_of_a_tool_is_said_in_each_format_or_refused(
    kinds: ThreeKinds,
    account: Client,
    sdk: AsyncOpenAI,
    fields: dict[str, Any],
    anthropic: Any,
    cohere: Any,
    stream: bool,
) -> None:
    fields = fields | {"tools": [WEATHER, CLOCK | {"function": CLOCK["function"] | {"strict": True}}]}  # type: ignore[operator]
    kinds.ups["anthropic"].script(answering("anthropic", stream))
    assert_calls(await ask_either_way(sdk, model_of("anthropic"), stream, **fields))
    body = kinds.latest("anthropic").json
    assert body.get("tool_choice") == anthropic
    assert body["tools"][1] == {
        "name": "tell_time",
        "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
        "strict": True,
    }
    before = kinds.asked
    if cohere == "refused":
        with pytest.raises(openai.BadRequestError) as caught:
            await ask_either_way(sdk, model_of("cohere"), stream, **fields)
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.param == (
            "parallel_tool_calls" if "parallel_tool_calls" in fields else "tool_choice"
        )
        assert kinds.asked == before
        await kinds.books.settled(account.account, 1)
        return
    kinds.ups["cohere"].script(answering("cohere", stream))
    assert_calls(await ask_either_way(sdk, model_of("cohere"), stream, **fields))
    body = kinds.latest("cohere").json
    assert body.get("tool_choice") == cohere
    assert body["tools"][1]["function"] == {
        "name": "tell_time",
        "parameters": {"type": "object", "properties": {}},
    }


HISTORY = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": WIRE_CALLS[:1]},
    {"role": "tool", "tool_call_id": CALLS[0].id, "content": "sun"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"tools": openai.NOT_GIVEN, "messages": HISTORY}, "messages[1].tool_calls"),
    ],
    ids=["tools", "history"],
)
async def test_a_model_without_tools_refuses_them_by_name_and_asks_nobody(
    kinds: ThreeKinds,
    account: Client,
    sdk: AsyncOpenAI,
    kind: Kind,
    fields: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    before = kinds.asked
    with pytest.raises(openai.BadRequestError) as caught:
        await ask_either_way(sdk, f"{kind}-toolless", stream, **fields)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    assert kinds.asked == before
    assert kinds.untouched(account)


@pytest.mark.parametrize("arguments", ['{"city": ', "Rome", '["Rome"]', "null", '{"a":1} x', "\ud800"])
async def test_arguments_in_a_history_that_are_no_object_are_refused_where_they_must_be_one(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, arguments: str
) -> None:
    before = kinds.asked
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    history = [
        QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    body = asking(model_of("anthropic"), messages=history)
    status, answer = await account.post(
        "/v1/chat/completions", body, {"Authorization": f"Bearer {account.key}"}
    )
    assert status == 400, answer
    if arguments.isascii():  # the other one is no text at all, wherever it stands
        assert answer["error"]["param"] == "messages[1].tool_calls[0].function.arguments"
    assert kinds.asked == before
    assert kinds.untouched(account)


BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "unknown"}}},
        "tool_choice.function.name",
    ),
    (
        {"messages": [QUESTION, {"role": "tool", "tool_call_id": "x", "content": "?"}]},
        "messages[1].tool_call_id",
    ),
    ({"messages": HISTORY[:2]}, "messages[1].tool_calls[0]"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS, ids=[param for _, param in BAD_TOOLS])
async def test_tools_that_are_none_are_refused_in_front_of_every_kind(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, kind: Kind, fields: dict[str, Any], param: str
) -> None:
    before = kinds.asked
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, model_of(kind), **fields)
    assert caught.value.param == param
    assert kinds.asked == before
    assert kinds.untouched(account)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_falls_back_to_another_kind_and_goes_on_at_the_first(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, stream: bool
) -> None:
    kinds.ups["openai"].script(Script(status=503, body={"error": {"message": "Down."}}))
    kinds.ups["anthropic"].script(answering("anthropic", stream))
    called = await ask_either_way(sdk, "falls-back", stream)
    assert_calls(called)
    assert called.model == model_of("anthropic")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in CALLS]
    turn = {"role": "assistant", "content": None, "tool_calls": WIRE_CALLS}
    kinds.ups["openai"].script(Script(pieces=("Sunny.",)))
    said = await ask_either_way(sdk, "falls-back", stream, messages=[*ASK, turn, *results])
    assert (said.choices[0].message.content, said.model) == ("Sunny.", "falls-back")
    # Calls that one kind made are the other's history, under their own ids.
    assert kinds.latest("openai").json["messages"] == [*ASK, turn, *results]
    fallen, direct = await kinds.books.settled(account.account, 2)
    assert (fallen.provider, fallen.price) == (provider_of("anthropic"), price("anthropic"))
    assert direct.provider == provider_of("openai")


@pytest.mark.parametrize("stream", [False, True])
async def test_ids_of_any_make_are_a_pair_wherever_the_conversation_falls_to(
    kinds: ThreeKinds, sdk: AsyncOpenAI, stream: bool
) -> None:
    """Some upstreams make ids that others would refuse."""
    odd = ("functions.get_weather:0", "functions.get_weather:1", "ü/ß?", "ü/ß!")
    turn = {"role": "assistant", "content": None, "tool_calls": [CALLS[0].wire | {"id": id_} for id_ in odd]}
    results = [{"role": "tool", "tool_call_id": id_, "content": id_} for id_ in reversed(odd)]
    kinds.ups["openai"].script(Script(status=503, body={"error": {"message": "Down."}}))
    kinds.ups["anthropic"].script(Script(pieces=("Sunny.",), finish="end_turn"))
    said = await ask_either_way(sdk, "falls-back", stream, messages=[QUESTION, turn, *results])
    assert said.choices[0].message.content == "Sunny."
    _, asked, answered = kinds.latest("anthropic").json["messages"]
    ids = [block["id"] for block in asked["content"]]
    assert len(set(ids)) == len(odd)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", id_) for id_ in ids)
    told = {block["tool_use_id"]: block["content"][0]["text"] for block in answered["content"]}
    assert told == dict(zip(ids, odd, strict=True))


async def test_ids_that_come_again_in_a_conversation_are_told_apart_at_anthropic(
    kinds: ThreeKinds, sdk: AsyncOpenAI
) -> None:
    """Not every model makes up new ones; Anthropic wants each call to have its own."""
    history: list[dict[str, Any]] = [QUESTION]
    for turn in range(3):
        history += [
            {"role": "assistant", "content": None, "tool_calls": [CALLS[0].wire | {"id": "get_weather:0"}]},
            {"role": "tool", "tool_call_id": "get_weather:0", "content": f"sun {turn}"},
        ]
    kinds.ups["anthropic"].script(Script(pieces=("Sunny.",), finish="end_turn"))
    await ask(sdk, model_of("anthropic"), messages=history)
    turns = kinds.latest("anthropic").json["messages"][1:]
    ids = [block["id"] for turn in turns[::2] for block in turn["content"]]
    assert len(set(ids)) == 3
    results = [block for turn in turns[1::2] for block in turn["content"]]
    assert [(block["tool_use_id"], block["content"][0]["text"]) for block in results] == [
        (id_, f"sun {turn}") for turn, id_ in enumerate(ids)
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_anthropic_fails_at_is_asked_of_openai_with_the_same_tools(
    kinds: ThreeKinds, account: Client, sdk: AsyncOpenAI, stream: bool
) -> None:
    kinds.ups["anthropic"].script(
        Script(status=529, body={"type": "error", "error": {"type": "overloaded_error", "message": "Busy."}})
    )
    kinds.ups["openai"].script(answering("openai", stream))
    called = await ask_either_way(sdk, "falls-forward", stream, tool_choice="required")
    assert_calls(called)
    assert called.model == model_of("openai")
    assert kinds.latest("anthropic").json["tool_choice"] == {"type": "any"}
    assert kinds.latest("openai").json["tool_choice"] == "required"
    assert kinds.latest("openai").json["tools"] == [WEATHER]
    (row,) = await kinds.books.settled(account.account)
    assert (row.price, row.provider) == (price("openai"), provider_of("openai"))


async def test_a_fallback_without_tools_is_passed_over(kinds: ThreeKinds, sdk: AsyncOpenAI) -> None:
    kinds.ups["openai"].script(Script(status=503, body={"error": {"message": "Down."}}))
    kinds.ups["cohere"].script(answering("cohere", stream=False))
    before = len(kinds.ups["anthropic"].requests)
    called = await ask(sdk, "falls-on-toolless")
    assert_calls(called)
    assert called.model == model_of("cohere")
    assert len(kinds.ups["anthropic"].requests) == before


@pytest.mark.parametrize("kind", OTHERS)
async def test_a_call_cut_by_the_limit_finishes_with_length(
    kinds: ThreeKinds, sdk: AsyncOpenAI, kind: Kind
) -> None:
    for stream in (False, True):
        script = answering(kind, stream, CALLS[:1])
        reason, limit = {"anthropic": ("tool_use", "max_tokens"), "cohere": ("TOOL_CALL", "MAX_TOKENS")}[kind]
        text = script.body if isinstance(script.body, str) else json.dumps(script.body)
        quoted = f'"{reason}"'
        # The reason stands last: Anthropic's blocks bear the same word as a type.
        before, _, after = text.rpartition(quoted)
        kinds.ups[kind].script(Script(body=f'{before}"{limit}"{after}', headers=script.headers))
        completion = await ask_either_way(sdk, model_of(kind), stream)
        assert completion.choices[0].finish_reason == "length"
        assert len(completion.choices[0].message.tool_calls) == 1
