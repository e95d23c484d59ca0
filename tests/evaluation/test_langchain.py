"""LangChain's completions class against the demo model."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from langchain_openai import OpenAI
from pydantic import SecretStr
from tests.support.house import House

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

STORY = "Once upon a time"


Model = Callable[..., OpenAI]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(house: House) -> AsyncIterator[Model]:
    """A client with what it should ask for, on a connection that is closed afterwards: its own never are."""
    async with httpx.AsyncClient() as http:

        def build(**fields: Any) -> OpenAI:
            settings: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12} | fields
            return OpenAI(
                base_url=f"{house.url}/v1",
                api_key=SecretStr(house.key),
                max_retries=0,
                http_async_client=http,
                **settings,
            )

        yield build


async def direct(house: House, prompt: str, **fields: Any) -> Any:
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 12} | fields
    reply = await house.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    return reply.json


async def test_it_is_invoked(house: House, model: Model) -> None:
    wanted = (await direct(house, STORY))["choices"][0]["text"]
    assert wanted
    assert await model().ainvoke(STORY) == wanted


async def test_a_batch_is_answered_in_its_order(house: House, model: Model) -> None:
    prompts = [STORY, "The capital of France is", "2, 4, 6,"]
    wanted = [(await direct(house, prompt))["choices"][0]["text"] for prompt in prompts]
    assert len(set(wanted)) == 3
    assert await model().abatch(list(prompts)) == wanted


async def test_prompts_given_together_are_one_request_with_one_usage(house: House, model: Model) -> None:
    prompts = [STORY, "The capital of France is", "2, 4, 6,"]
    alone = [await direct(house, prompt) for prompt in prompts]
    result = await model().agenerate(prompts)
    assert [row[0].text for row in result.generations] == [one["choices"][0]["text"] for one in alone]
    assert result.llm_output is not None
    usage = result.llm_output["token_usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == sum(one["usage"][name] for one in alone)


async def test_it_streams_what_it_would_have_answered(house: House, model: Model) -> None:
    wanted = (await direct(house, STORY, max_tokens=40))["choices"][0]["text"]
    pieces = [piece async for piece in model(max_tokens=40).astream(STORY)]
    assert "".join(pieces) == wanted
    assert len(pieces) > 5


async def test_several_choices_of_each_prompt_come_with_it(house: House, model: Model) -> None:
    asked = model(n=3, best_of=3, temperature=1, seed=5, max_tokens=24)
    result = await asked.agenerate([STORY, "The cat"])
    texts = [[generation.text for generation in row] for row in result.generations]
    assert [len(row) for row in texts] == [3, 3]
    assert all(len(set(row)) == 3 for row in texts)
    again = await asked.agenerate([STORY, "The cat"])
    assert [[generation.text for generation in row] for row in again.generations] == texts


async def test_the_best_of_several_is_the_likeliest(house: House, model: Model) -> None:
    fields = {"temperature": 1, "seed": 9}
    four = await direct(house, STORY, n=4, logprobs=0, **fields)

    def mean(choice: Any) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return float(sum(scores) / len(scores))

    best = max(four["choices"], key=mean)
    result = await model(n=1, best_of=4, **fields).agenerate([STORY])
    assert result.generations[0][0].text == best["text"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_log_probabilities_are_in_the_generation_s_information(
    house: House, model: Model, streamed: bool
) -> None:
    wanted = (await direct(house, STORY, logprobs=2))["choices"][0]
    if streamed:
        pieces: dict[str, list[Any]] = {name: [] for name in wanted["logprobs"]}
        reasons = []
        llm = model(logprobs=2)
        async for chunk in llm._astream(STORY):  # the public stream gives text alone
            found = chunk.generation_info or {}
            reasons.append(found.get("finish_reason"))
            for name, values in (found.get("logprobs") or {}).items():
                pieces[name] += values
        assert pieces == wanted["logprobs"]
        assert [reason for reason in reasons if reason] == [wanted["finish_reason"]]
        return
    result = await model(logprobs=2).agenerate([STORY])
    information = result.generations[0][0].generation_info
    assert information is not None
    assert information["finish_reason"] == wanted["finish_reason"]
    assert information["logprobs"] == wanted["logprobs"]


async def test_stop_words_and_biases_pass(house: House, model: Model) -> None:
    whole = (await direct(house, STORY, max_tokens=40))["choices"][0]["text"]
    stop = whole.split()[4]
    assert await model(max_tokens=40).ainvoke(STORY, stop=[stop]) == whole.partition(stop)[0]
    first = (await direct(house, STORY, logprobs=0))["choices"][0]["logprobs"]["tokens"][0]
    (token,) = (await house.post("/tokenize", {"prompt": first, "add_special_tokens": False})).json["tokens"]
    other = await model(logit_bias={str(token): -100}).ainvoke(STORY)
    assert not other.startswith(first)
