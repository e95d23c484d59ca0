"""What single legacy parameters mean on the embedded model, and what of them is refused."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from tests.support.house import House, open_house
from tests.support.legacy import Merged, arrays_of, assert_same, bytes_of, merged, whole

from headgate.config import demo_model_path

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

STORY = "Once upon a time"
CONTEXT = 512
VOCABULARY = 1024
PLAIN_ROW = """
[[models]]
name = "plain"
provider = "embedded"
path = "{path}"
"""


def without_infill(folder: Path) -> str:
    """The demo model under names that no engine takes for fill-in-the-middle tokens, and its row."""
    content = demo_model_path().read_bytes()
    for name in (b"pre", b"suf", b"mid"):
        content = content.replace(b"tokenizer.ggml.fim_" + name, b"tokenizer.ggml.xim_" + name)
    for name in (b"prefix", b"suffix", b"middle"):
        content = content.replace(b"<|fim_" + name, b"<|xim_" + name)
    path = folder / "plain.gguf"
    path.write_bytes(content)
    return PLAIN_ROW.format(path=path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("semantics")
    async with open_house(without_infill(folder), folder / "server") as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        yield client


async def choices_of(client: AsyncOpenAI, **fields: Any) -> list[Merged]:
    return whole(await client.completions.create(**{"model": "demo", "prompt": STORY} | fields))


async def streamed(client: AsyncOpenAI, count: int = 1, **fields: Any) -> list[Merged]:
    create: Any = client.completions.create
    stream = await create(**{"model": "demo", "prompt": STORY, "stream": True} | fields)
    return merged([chunk async for chunk in stream], count)


async def tokens_of(house: House, text: str) -> list[int]:
    reply = await house.post("/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})
    assert reply.status == 200, reply.body
    tokens: list[int] = reply.json["tokens"]
    return tokens


def mean(choice: Merged) -> float:
    assert choice.arrays is not None
    scores = [score for score in choice.arrays.token_logprobs if score is not None]
    return sum(scores) / len(scores)


async def test_a_seed_fixes_texts_and_scores_streamed_or_not(client: AsyncOpenAI) -> None:
    fields = {"temperature": 1, "n": 4, "max_tokens": 20, "logprobs": 2}
    first = await choices_of(client, seed=7, **fields)
    assert len({choice.text for choice in first}) == 4
    for again in (await choices_of(client, seed=7, **fields), await streamed(client, 4, seed=7, **fields)):
        for one, other in zip(again, first, strict=True):
            assert_same(one, other)
    assert [choice.text for choice in await choices_of(client, seed=8, **fields)] != [
        choice.text for choice in first
    ]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
async def test_best_of_returns_the_likeliest_candidates_the_better_first(
    client: AsyncOpenAI, n: int, logprobs: int | None
) -> None:
    fields: dict[str, Any] = {"temperature": 1, "seed": 21, "max_tokens": 20}
    candidates = await client.completions.create(model="demo", prompt=STORY, n=4, logprobs=0, **fields)
    ranked = sorted(whole(candidates), key=mean, reverse=True)
    assert len({choice.text for choice in ranked}) == 4
    best = await client.completions.create(
        model="demo", prompt=STORY, n=n, best_of=4, logprobs=logprobs, **fields
    )
    chosen = whole(best)
    assert [choice.text for choice in chosen] == [choice.text for choice in ranked[:n]]
    assert [choice.finish_reason for choice in chosen] == [choice.finish_reason for choice in ranked[:n]]
    assert [choice.arrays is None for choice in chosen] == [logprobs is None] * n
    # All candidates were generated, and all are paid for; the prompt once.
    assert best.usage == candidates.usage


async def test_best_of_chooses_for_each_prompt_by_itself(client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1, "seed": 3, "max_tokens": 12}
    prompts = [STORY, "The cat"]
    candidates = await choices_of(client, prompt=prompts, n=3, logprobs=0, **fields)
    best = await choices_of(client, prompt=prompts, best_of=3, n=1, **fields)
    wanted = [max(candidates[first : first + 3], key=mean).text for first in (0, 3)]
    assert [choice.text for choice in best] == wanted


async def test_best_of_echoes_the_prompt_and_does_not_rank_by_it(client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1, "seed": 21, "max_tokens": 20, "best_of": 4, "n": 2}
    plain = await choices_of(client, logprobs=1, **fields)
    echoed = await choices_of(client, logprobs=1, echo=True, **fields)
    assert [choice.text for choice in echoed] == [STORY + choice.text for choice in plain]


async def test_stops_that_begin_and_end_within_tokens_never_leak(client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "logprobs": 0}
    (full,) = await choices_of(client, **fields)
    assert full.arrays is not None
    offsets = full.arrays.text_offset
    longer = [place for place, token in enumerate(full.arrays.tokens[:-2]) if len(token) > 2]
    assert len(longer) >= 5
    for place in longer[:8]:
        # From the last letter but one of a token, over the next, into the one after it.
        stop = full.text[offsets[place + 1] - 2 : offsets[place + 2] + 2]
        wanted = full.text.partition(stop)[0]
        (cut,) = await choices_of(client, stop=["never said", stop], **fields)
        assert (cut.text, cut.finish_reason) == (wanted, "stop")
        (live,) = await streamed(client, stop=["never said", stop], **fields)
        assert_same(live, cut)
        assert cut.arrays is not None
        # The tokens are those that were generated: the first of them make up the text.
        assert bytes_of(cut.arrays.tokens).decode().startswith(wanted)


async def test_a_stop_that_never_comes_whole_holds_nothing_back(client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    (full,) = await choices_of(client, **fields)
    teasers = [full.text[-3:] + "§", full.text[10:14] + "§"]
    for given in (
        await choices_of(client, stop=teasers, **fields),
        await streamed(client, stop=teasers, **fields),
    ):
        assert_same(given[0], full)


@pytest.mark.parametrize("max_tokens", [0, 6])
async def test_a_stop_in_the_echoed_prompt_does_not_cut_it(client: AsyncOpenAI, max_tokens: int) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    (plain,) = await choices_of(client, **fields)
    (stopped,) = await choices_of(client, stop=["upon"], **fields)
    assert_same(stopped, plain)


async def test_a_bias_bans_a_token(house: House, client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "logprobs": 0}
    (plain,) = await choices_of(client, **fields)
    assert plain.arrays is not None
    banned = plain.arrays.tokens[1]
    (token,) = await tokens_of(house, banned)
    (other,) = await choices_of(client, logit_bias={str(token): -100}, **fields)
    assert other.arrays is not None
    assert other.arrays.tokens[0] == plain.arrays.tokens[0]
    assert banned not in other.arrays.tokens


async def test_a_bias_forces_a_token_whose_score_stays_the_model_s_own(
    house: House, client: AsyncOpenAI
) -> None:
    (token,) = await tokens_of(house, " dog")
    biased: dict[str, Any] = {"logit_bias": {str(token): 100}, "max_tokens": 4, "temperature": 0}
    (forced,) = await choices_of(client, logprobs=1, **biased)
    assert forced.text == " dog" * 4
    assert forced.arrays is not None
    (echoed,) = await choices_of(
        client, prompt=STORY + " dog" * 4, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert echoed.arrays is not None
    assert forced.arrays.token_logprobs == pytest.approx(echoed.arrays.token_logprobs[-4:], abs=1e-3)


async def test_penalties_leave_the_scores_the_model_s_own(client: AsyncOpenAI) -> None:
    (punished,) = await choices_of(
        client, temperature=0, max_tokens=40, logprobs=0, frequency_penalty=2, presence_penalty=2
    )
    (echoed,) = await choices_of(
        client, prompt=STORY + punished.text, echo=True, logprobs=0, max_tokens=0, temperature=0
    )
    assert punished.arrays is not None
    assert echoed.arrays is not None
    count = len(punished.arrays.tokens)
    if punished.arrays.tokens == echoed.arrays.tokens[-count:]:
        scores = echoed.arrays.token_logprobs[-count:]
        assert punished.arrays.token_logprobs == pytest.approx(scores, abs=1e-3)
    else:
        pytest.fail("the text is not read as the tokens that were generated")


async def test_a_suffix_is_filled_up_to(house: House, client: AsyncOpenAI) -> None:
    fields: dict[str, Any] = {
        "prompt": "One day, Lily went to",
        "suffix": " and played with her red ball.",
        "temperature": 0,
        "max_tokens": 24,
        "logprobs": 2,
    }
    answer = await client.completions.create(model="demo", **fields)
    (choice,) = whole(answer)
    assert choice.text.strip()
    (open_ended,) = await choices_of(client, **{**fields, "suffix": None})
    assert choice.text != open_ended.text
    assert answer.usage is not None
    both = len(await tokens_of(house, fields["prompt"])) + len(await tokens_of(house, fields["suffix"]))
    assert both + 3 <= answer.usage.prompt_tokens <= both + 4
    (live,) = await streamed(client, **fields)
    assert_same(live, choice)
    assert choice.arrays is not None
    assert answer.usage.completion_tokens == len(choice.arrays.tokens)


async def test_logprobs_are_absent_where_they_were_not_asked_for(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=4, best_of=3)
    assert arrays_of(answer.choices[0]) is None


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("best_of", {"best_of": 2, "n": 3}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("best_of", {"best_of": 21}),
    ("logprobs", {"logprobs": 6}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": True}),
    ("echo", {"echo": "yes"}),
    ("prompt", {"prompt": [VOCABULARY]}),
    ("prompt", {"prompt": [[1, 2], [3, VOCABULARY]]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [1, "two"]}),
    ("prompt", {"prompt": [[1], "two"]}),
    ("prompt", {"prompt": [1.5]}),
    ("logit_bias", {"logit_bias": {str(VOCABULARY): 1}}),
    ("logit_bias", {"logit_bias": {"dog": 1}}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("suffix", {"suffix": " the end", "model": "plain"}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("param", "fields"), REFUSED)
async def test_what_cannot_be_done_is_refused_by_name_and_leaves_no_trace(
    house: House, param: str, fields: dict[str, Any], stream: bool
) -> None:
    before, transfers = house.balance(), house.books.check().transfers
    body = {"model": "demo", "prompt": STORY, "max_tokens": 4, "stream": stream} | fields
    reply = await house.post("/v1/completions", body)
    assert reply.status == 400, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition("[")[0] == param
    assert param in error["message"]
    assert house.balance() == before
    assert house.rows(reply.request_id) == []
    assert house.books.check().transfers == transfers


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"stream": True}])
@pytest.mark.parametrize(
    ("size", "limit"), [(300, 250), (CONTEXT, 1), (CONTEXT + 88, 0), (CONTEXT + 88, None)]
)
async def test_a_prompt_and_its_limit_beyond_the_context_are_refused_with_both_numbers(
    house: House, size: int, limit: int | None, fields: dict[str, Any]
) -> None:
    (token,) = await tokens_of(house, " dog")
    before, transfers = house.balance(), house.books.check().transfers
    body: dict[str, Any] = {"model": "demo", "prompt": [token] * size} | fields
    if limit is not None:
        body["max_tokens"] = limit
    reply = await house.post("/v1/completions", body)
    assert reply.status == 400, reply.body
    error = reply.json["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
    numbers = set(re.findall(r"\d+", error["message"]))
    assert {str(size), str(CONTEXT)} <= numbers
    assert house.balance() == before
    assert house.rows(reply.request_id) == []
    assert house.books.check().transfers == transfers


async def test_prompts_times_candidates_are_capped_before_anything_is_done(house: House) -> None:
    for fields in ({"n": 7}, {"n": 1, "best_of": 7}):
        reply = await house.post(
            "/v1/completions", {"model": "demo", "prompt": [STORY] * 20, "max_tokens": 1} | fields
        )
        assert reply.status == 400
        assert "128" in reply.json["error"]["message"]
        assert house.rows(reply.request_id) == []
