"""Every combination of the legacy parameters through the official SDK, on the embedded model.

Each cell asks twice, at once and as a stream: both must be right by themselves, equal, and paid for exactly.
"""

import asyncio
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, CompletionUsage
from tests.support.house import House, nano, open_house
from tests.support.legacy import Merged, assert_choice, assert_same, merged, whole

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

INPUT_NANO, OUTPUT_NANO = 100, 400
"""What a token of the embedded model costs by default, in nano-USD."""

TEXTS = ("Once upon a time 😀", "The capital of 日本 is")
KINDS = ("text", "texts", "ids", "lists of ids")
CELLS = list(product((False, True), (None, 0, 2, 5), KINDS, (1, 3), (0, 1, 8)))


class Prompt:
    """A prompt in one of the four forms, the texts it stands for, and how many tokens each of them has."""

    def __init__(self, given: Any, texts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
        self.given = given
        self.texts = texts
        self.sizes = sizes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house("", tmp_path_factory.mktemp("matrix")) as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prompts(house: House) -> dict[str, Prompt]:
    """The same texts in each form. Ids carry no start token: what is given is what is completed."""
    ids = []
    for text in TEXTS:
        reply = await house.post("/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})
        assert reply.status == 200, reply.body
        ids.append(reply.json["tokens"])
    bare = tuple(map(len, ids))
    started = tuple(size + 1 for size in bare)
    return {
        "text": Prompt(TEXTS[0], TEXTS[:1], started[:1]),
        "texts": Prompt(list(TEXTS), TEXTS, started),
        "ids": Prompt(ids[0], TEXTS[:1], bare[:1]),
        "lists of ids": Prompt(ids, TEXTS, bare),
    }


def assert_usage(usage: CompletionUsage | None, prompt: int, completion: int | None) -> None:
    assert usage is not None
    assert usage.prompt_tokens == prompt
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    if completion is not None:
        assert usage.completion_tokens == completion


def check(
    choices: list[Merged],
    usage: CompletionUsage | None,
    prompt: Prompt,
    *,
    echo: bool,
    logprobs: int | None,
    n: int,
    most: int,
) -> None:
    assert len(choices) == n * len(prompt.texts)
    counts = [
        assert_choice(
            choice,
            prompt=prompt.texts[index // n],
            prompt_tokens=prompt.sizes[index // n],
            echo=echo,
            logprobs=logprobs,
            most=most,
        )
        for index, choice in enumerate(choices)
    ]
    known = [count for count in counts if count is not None]
    assert_usage(usage, sum(prompt.sizes), sum(known) if len(known) == len(counts) else None)


@pytest.mark.parametrize(("echo", "logprobs", "kind", "n", "most"), CELLS)
async def test_a_cell_is_right_at_once_and_as_a_stream(
    house: House,
    client: AsyncOpenAI,
    prompts: dict[str, Prompt],
    echo: bool,
    logprobs: int | None,
    kind: str,
    n: int,
    most: int,
) -> None:
    prompt = prompts[kind]
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": prompt.given,
        "echo": echo,
        "logprobs": logprobs,
        "n": n,
        "max_tokens": most,
        "temperature": 0,
    }
    before = house.balance()
    raw = await client.completions.with_raw_response.create(**fields)
    completion: Completion = raw.parse()
    between = house.balance()
    usage = completion.usage
    assert usage is not None
    price = usage.prompt_tokens * INPUT_NANO + usage.completion_tokens * OUTPUT_NANO
    assert before - between == nano(raw.headers["x-headgate-price"]) == price
    at_once = whole(completion)
    check(at_once, usage, prompt, echo=echo, logprobs=logprobs, n=n, most=most)

    stream = await client.completions.create(stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, last = [chunk async for chunk in stream]
    assert between - house.balance() == price
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage == usage
    streamed = merged(chunks, len(at_once))
    check(streamed, last.usage, prompt, echo=echo, logprobs=logprobs, n=n, most=most)
    for one, other in zip(streamed, at_once, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_blocking_client_reads_it_all(house: House, prompts: dict[str, Prompt], kind: str) -> None:
    prompt = prompts[kind]
    fields: dict[str, Any] = {"model": "demo", "prompt": prompt.given, "echo": True, "logprobs": 3, "n": 2}
    fields |= {"max_tokens": 5, "temperature": 0}

    def ask() -> tuple[Completion, list[Completion]]:
        with OpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
            completion: Completion = client.completions.create(**fields)
            return completion, list(client.completions.create(stream=True, **fields))

    completion, chunks = await asyncio.to_thread(ask)
    at_once = whole(completion)
    check(at_once, completion.usage, prompt, echo=True, logprobs=3, n=2, most=5)
    for one, other in zip(merged(chunks, len(at_once)), at_once, strict=True):
        assert_same(one, other)


async def test_choices_of_a_sampled_answer_have_scores_of_their_own(
    client: AsyncOpenAI, prompts: dict[str, Prompt]
) -> None:
    prompt = prompts["texts"]
    fields: dict[str, Any] = {"model": "demo", "prompt": prompt.given, "n": 3, "max_tokens": 16, "seed": 4}
    fields |= {"echo": True, "logprobs": 5, "temperature": 2}
    completion = await client.completions.create(**fields)
    choices = whole(completion)
    check(choices, completion.usage, prompt, echo=True, logprobs=5, n=3, most=16)
    for first in (0, 3):
        assert len({choice.text for choice in choices[first : first + 3]}) == 3
    stream = await client.completions.create(stream=True, **fields)
    for one, other in zip(merged([chunk async for chunk in stream], 6), choices, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "text",
    [
        "👋🏽 and 👨‍👩‍👧‍👦 and 🏳️‍🌈",
        "日本語で、从前, 옛날",
        "e\u0301 a\u030a\u0323 قصة \u200b\u00a0",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "\n\n   \t",
        "",
    ],
)
@pytest.mark.parametrize("temperature", [0, 2])
async def test_any_text_is_echoed_whole_with_its_scores(
    house: House, client: AsyncOpenAI, text: str, temperature: int
) -> None:
    size = len((await house.post("/tokenize", {"model": "demo", "prompt": text})).json["tokens"])
    prompt = Prompt(text, (text,), (size,))
    fields: dict[str, Any] = {"model": "demo", "prompt": text, "echo": True, "logprobs": 5, "n": 2}
    fields |= {"max_tokens": 24, "temperature": temperature, "seed": 11}
    completion = await client.completions.create(**fields)
    choices = whole(completion)
    check(choices, completion.usage, prompt, echo=True, logprobs=5, n=2, most=24)
    stream = await client.completions.create(stream=True, **fields)
    for one, other in zip(merged([chunk async for chunk in stream], 2), choices, strict=True):
        assert_same(one, other)
