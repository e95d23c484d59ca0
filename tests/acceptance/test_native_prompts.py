"""Prompt lists in front of services that take lists: one call, the choices in their places, the price of one call."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from tests.support.house import ACME, House, model_row, open_house
from tests.support.script import Script

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

CONFIG = ACME + 'variant = "vllm"\n' + model_row("lists", mode="completion")
PROMPTS = ["one", "two", "three"]
USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
PRICE = 9 * 500 + 12 * 1500


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("lists")) as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        yield client


def answer(count: int) -> dict[str, Any]:
    choices = [
        {"index": i, "text": f"text {i}", "logprobs": None, "finish_reason": "stop"} for i in range(count)
    ]
    head = {"id": "cmpl-u", "object": "text_completion", "created": 1, "model": "lists"}
    return head | {"choices": choices[::-1], "usage": USAGE}


@pytest.mark.parametrize("n", [1, 2])
async def test_a_list_of_prompts_is_one_call(house: House, client: AsyncOpenAI, n: int) -> None:
    asked, before = len(house.up.requests), house.balance()
    house.up.script(Script(body=answer(3 * n)))
    completion = await client.completions.create(model="lists", prompt=PROMPTS, n=n, max_tokens=8)
    (call,) = house.up.requests[asked:]
    assert call.json["prompt"] == PROMPTS
    assert call.json.get("n") == (n if n > 1 else None)
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (index, f"text {index}") for index in range(3 * n)
    ]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (9, 12)
    assert before - house.balance() == PRICE


async def test_a_stream_too(house: House, client: AsyncOpenAI) -> None:
    asked, before = len(house.up.requests), house.balance()
    events = [
        {
            "id": "u",
            "object": "text_completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": None,
        }
        for index in (2, 0, 1)
        for choice in (
            {"index": index, "text": f"text {index}", "logprobs": None, "finish_reason": None},
            {"index": index, "text": "", "logprobs": None, "finish_reason": "stop"},
        )
    ]
    last = {"id": "u", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": USAGE}
    house.up.script(events_script([*events, last]))
    texts: dict[int, str] = {}
    async for chunk in await client.completions.create(
        model="lists", prompt=PROMPTS, max_tokens=8, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {index: f"text {index}" for index in range(3)}
    assert len(house.up.requests) == asked + 1
    assert before - house.balance() == PRICE


async def test_fewer_answers_than_prompts_are_an_error_that_costs_nothing(
    house: House, client: AsyncOpenAI
) -> None:
    before = house.balance()
    house.up.script(Script(body=answer(2)))
    with pytest.raises(Exception, match="other choices than were asked for"):
        await client.completions.create(model="lists", prompt=PROMPTS, max_tokens=8)
    assert house.balance() == before


def events_script(events: list[dict[str, Any]]) -> Script:
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return Script(body=lines + "data: [DONE]\n\n", headers={"Content-Type": "text/event-stream"})
