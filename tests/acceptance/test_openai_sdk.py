"""The official openai SDK against the gateway: the embedded model, and an upstream behind it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from tests.support.house import ACME, House, model_row, nano, open_house
from tests.support.legacy import assert_same, merged
from tests.support.legacy import whole as choices_of
from tests.support.script import Script

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

CONFIG = (
    ACME
    + model_row("acme-large")
    + model_row("acme-chat", mode="chat")
    + model_row("scoreless", logprobs=False)
    + model_row("broken-key", upstream_name="status-401")
    + model_row("gold", input_price="1000000", output_price="1000000")
)
STORY = "Once upon a time"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("sdk")) as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key) as client:
        yield client


async def streamed(client: AsyncOpenAI, **fields: Any) -> list[Completion]:
    stream = await client.completions.create(stream=True, **fields)
    return [chunk async for chunk in stream]


def text_of(chunks: list[Completion], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def texts(completion: Completion) -> list[str]:
    return [choice.text for choice in completion.choices]


async def test_the_blocking_client_reads_every_documented_field(house: House) -> None:
    def ask() -> Completion:
        with OpenAI(base_url=f"{house.url}/v1", api_key=house.key) as client:
            return client.completions.create(model="demo", prompt=STORY)

    began = int(time.time())
    completion = await asyncio.to_thread(ask)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert began - 2 <= completion.created <= time.time() + 2
    assert completion.model == "demo"
    (choice,) = completion.choices
    assert choice.index == 0
    assert choice.text
    assert choice.logprobs is None
    usage = completion.usage
    assert usage is not None
    # 16 is this API's documented default of max_tokens.
    if choice.finish_reason == "length":
        assert usage.completion_tokens == 16
    else:
        assert choice.finish_reason == "stop"
        assert usage.completion_tokens <= 16
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_the_blocking_client_streams(house: House) -> None:
    def ask() -> tuple[str, str]:
        with OpenAI(base_url=f"{house.url}/v1", api_key=house.key) as client:
            whole = client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=24)
            stream = client.completions.create(
                model="demo", prompt=STORY, temperature=0, max_tokens=24, stream=True
            )
            return whole.choices[0].text, "".join(chunk.choices[0].text for chunk in stream)

    whole, pieces = await asyncio.to_thread(ask)
    assert whole
    assert pieces == whole


async def test_several_prompts_answer_in_order_and_count_each_prompt_once(client: AsyncOpenAI) -> None:
    prompts = [STORY, "The cat", "One day, a very small boy"]
    alone = [
        await client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=8)
        for prompt in prompts
    ]
    together = await client.completions.create(model="demo", prompt=prompts, n=2, temperature=0, max_tokens=8)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3, 4, 5]
    assert texts(together) == [single.choices[0].text for single in alone for _ in range(2)]
    assert together.usage is not None
    singles = [single.usage for single in alone if single.usage is not None]
    assert together.usage.prompt_tokens == sum(usage.prompt_tokens for usage in singles)
    assert together.usage.completion_tokens == 2 * sum(usage.completion_tokens for usage in singles)


async def test_several_prompts_are_as_many_upstream_calls_of_n_choices(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    answer = await client.completions.create(model="acme-large", prompt=["a b", "c", "d e f"], n=2)
    calls = house.up.requests[asked:]
    assert sorted(call.json["prompt"] for call in calls) == ["a b", "c", "d e f"]
    assert [call.json["n"] for call in calls] == [2, 2, 2]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert texts(answer) == [f"{j}:echo: {prompt}" for prompt in ("a b", "c", "d e f") for j in (0, 1)]
    assert answer.usage is not None
    # The scripted upstream counts words: the prompt's, and per choice those and the one "echo:".
    assert answer.usage.prompt_tokens == 2 + 1 + 3
    assert answer.usage.completion_tokens == 2 * (3 + 2 + 4)
    assert before - house.balance() == 6 * 500 + 18 * 1500


async def test_every_sampling_parameter_reaches_the_upstream_as_given(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    await client.completions.create(
        model="acme-large",
        prompt="hello",
        n=2,
        max_tokens=33,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=-1.5,
        frequency_penalty=1.25,
        seed=42,
        stop=["\n", "END"],
        logit_bias={"50256": -100, "7": 12},
        logprobs=3,
        echo=True,
        best_of=4,
        user="u-1",
    )
    (call,) = house.up.requests[asked:]
    sent = call.json
    wanted = {
        "model": "acme-large",
        "prompt": "hello",
        "n": 2,
        "max_tokens": 33,
        "temperature": 0.25,
        "top_p": 0.5,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.25,
        "seed": 42,
        "stop": ["\n", "END"],
        "logit_bias": {"50256": -100, "7": 12},
        "logprobs": 3,
        "echo": True,
        "best_of": 4,
    }
    assert {name: sent.get(name) for name in wanted} == wanted
    # The suffix has no echo beside it: the text to be filled in lies between the two.
    await client.completions.create(model="acme-large", prompt="hello", suffix=" the end")
    assert house.up.requests[-1].json["suffix"] == " the end"


async def test_token_prompts_reach_the_upstream_as_they_are(house: House, client: AsyncOpenAI) -> None:
    asked = len(house.up.requests)
    alone = await client.completions.create(model="acme-large", prompt=[1, 2, 3])
    several = await client.completions.create(model="acme-large", prompt=[[1, 2], [3]])
    assert house.up.requests[asked].json["prompt"] == [1, 2, 3]
    assert sorted(call.json["prompt"] for call in house.up.requests[asked + 1 :]) == [[1, 2], [3]]
    # The scripted upstream says a token's id for its text.
    assert texts(alone) == ["echo: t1 t2 t3"]
    assert texts(several) == ["echo: t1 t2", "echo: t3"]


async def test_an_upstream_s_echo_and_scores_are_given_in_the_legacy_form(
    house: House, client: AsyncOpenAI
) -> None:
    fields: dict[str, Any] = {"model": "acme-large", "prompt": "one two", "echo": True, "logprobs": 1}
    before = house.balance()
    answer = await client.completions.create(**fields)
    assert before - house.balance() == 2 * 500 + 3 * 1500  # echoed words are not paid for as output
    (choice,) = choices_of(answer)
    assert (choice.text, choice.finish_reason) == ("one twoecho: one two", "stop")
    arrays = choice.arrays
    assert arrays is not None
    assert arrays.tokens == ["one", " two", "echo:", " one", " two"]
    assert arrays.text_offset == [0, 3, 7, 12, 16]
    # The scripted upstream's: an eighth for each letter.
    assert arrays.token_logprobs == [None, -4 / 8, -5 / 8, -4 / 8, -4 / 8]
    assert arrays.top_logprobs == [None, {" two": -0.5}, {"echo:": -0.625}, {" one": -0.5}, {" two": -0.5}]
    (live,) = merged(await streamed(client, **fields), 1)
    assert_same(live, choice)


async def test_an_upstream_that_takes_best_of_chooses_by_itself_and_is_paid_for_all(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    answer = await client.completions.create(model="acme-large", prompt="one two", n=2, best_of=5)
    (call,) = house.up.requests[asked:]
    assert (call.json["n"], call.json["best_of"]) == (2, 5)
    assert texts(answer) == ["0:echo: one two", "1:echo: one two"]
    assert before - house.balance() == 2 * 500 + 5 * 3 * 1500


async def test_what_was_not_given_is_not_sent_to_the_upstream(house: House, client: AsyncOpenAI) -> None:
    asked = len(house.up.requests)
    await client.completions.create(model="acme-large", prompt="hello")
    (call,) = house.up.requests[asked:]
    assert call.json == {"model": "acme-large", "prompt": "hello", "max_tokens": 16}


async def test_a_chat_only_model_gets_the_prompt_as_one_user_message(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    answer = await client.completions.create(model="acme-chat", prompt="Say hi", max_tokens=9)
    (call,) = house.up.requests[asked:]
    assert call.path.endswith("/chat/completions")
    assert call.json["messages"] == [{"role": "user", "content": "Say hi"}]
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "echo: Say hi"


@pytest.mark.parametrize("as_list", [False, True])
async def test_a_stop_sequence_ends_the_text_and_is_not_part_of_it(
    client: AsyncOpenAI, as_list: bool
) -> None:
    whole = (
        (await client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=40))
        .choices[0]
        .text
    )
    stop = whole.split()[5]
    assert len(stop) > 1, whole
    given: str | list[str] = ["never said", stop] if as_list else stop
    stopped = await client.completions.create(
        model="demo", prompt=STORY, temperature=0, max_tokens=40, stop=given
    )
    assert stopped.choices[0].text == whole.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = await streamed(client, model="demo", prompt=STORY, temperature=0, max_tokens=40, stop=given)
    assert text_of(chunks) == stopped.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_same_seed_gives_the_same_texts_and_choices_of_one_request_differ(
    client: AsyncOpenAI,
) -> None:
    async def ask(seed: int) -> list[str]:
        answer = await client.completions.create(model="demo", prompt=STORY, seed=seed, n=3, max_tokens=24)
        return texts(answer)

    first = await ask(7)
    assert len(set(first)) == 3, first
    assert await ask(7) == first
    assert await ask(8) != first


async def test_without_a_seed_or_a_temperature_texts_vary(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=STORY, n=4, max_tokens=24)
    assert len(set(texts(answer))) > 1


async def test_a_seeded_stream_says_what_the_seeded_answer_says(client: AsyncOpenAI) -> None:
    fields = {"model": "demo", "prompt": STORY, "seed": 11, "n": 2, "max_tokens": 24}
    whole = await client.completions.create(**fields)  # type: ignore[call-overload]
    chunks = await streamed(client, **fields)
    assert [text_of(chunks, 0), text_of(chunks, 1)] == texts(whole)


async def test_temperature_0_and_an_empty_nucleus_both_give_the_likeliest_text(client: AsyncOpenAI) -> None:
    async def ask(**fields: float) -> str:
        answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=24, **fields)  # type: ignore[call-overload]
        return str(answer.choices[0].text)

    greedy = await ask(temperature=0)
    assert await ask(temperature=0) == greedy
    assert await ask(top_p=0) == greedy
    assert await ask(temperature=2, seed=5) != greedy


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
async def test_penalties_steer_how_much_the_embedded_model_repeats_itself(
    client: AsyncOpenAI, penalty: str
) -> None:
    async def words(value: float) -> list[str]:
        answer = await client.completions.create(
            model="demo", prompt=STORY, temperature=0, max_tokens=120, extra_body={penalty: value}
        )
        return answer.choices[0].text.split()

    rewarded, plain, punished = await words(-2), await words(0), await words(2)
    assert rewarded != plain != punished
    assert len(set(rewarded)) / len(rewarded) < len(set(punished)) / len(punished)


async def test_max_tokens_bounds_each_choice(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=3, n=2, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]


async def test_no_tokens_at_all_can_be_asked_for(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=0)
    assert texts(answer) == [""]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("model", ["demo", "acme-large"])
async def test_a_stream_of_several_prompts_and_choices_is_told_apart_by_index(
    client: AsyncOpenAI, model: str
) -> None:
    fields = {"model": model, "prompt": [STORY, "The cat"], "n": 2, "temperature": 0, "max_tokens": 12}
    whole = await client.completions.create(**fields)  # type: ignore[call-overload]
    chunks = await streamed(client, **fields)
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("text_completion", model)}
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in own) == choice.text
        reasons: list[str | None] = [piece.finish_reason for piece in own]
        assert reasons[-1] == choice.finish_reason
        assert set(reasons[:-1]) <= {None}
    assert len(whole.choices) == 4


@pytest.mark.parametrize("model", ["demo", "acme-large"])
async def test_usage_comes_in_a_last_chunk_without_choices_when_asked_for(
    client: AsyncOpenAI, model: str
) -> None:
    fields = {"model": model, "prompt": STORY, "temperature": 0, "max_tokens": 12}
    whole = await client.completions.create(**fields)  # type: ignore[call-overload]
    *pieces, last = await streamed(client, stream_options={"include_usage": True}, **fields)
    assert last.choices == []
    assert last.usage == whole.usage
    assert {chunk.usage for chunk in pieces} == {None}
    silent = await streamed(client, **fields)
    assert {chunk.usage for chunk in silent} == {None}
    assert all(chunk.choices for chunk in silent)


async def test_stream_options_without_a_stream_are_accepted(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="demo", prompt=STORY, max_tokens=2, extra_body={"stream_options": {"include_usage": True}}
    )
    assert answer.usage is not None


async def test_raw_responses_say_what_was_charged_and_by_whom(house: House, client: AsyncOpenAI) -> None:
    before = house.balance()
    raw = await client.completions.with_raw_response.create(
        model="acme-large", prompt="one two three", extra_headers={"X-Request-Id": "order-66"}
    )
    completion = raw.parse()
    assert raw.headers["x-headgate-provider"] == "acme"
    assert raw.headers["x-request-id"] == "order-66"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 4)
    price = 3 * 500 + 4 * 1500
    assert raw.headers["x-headgate-price"] == "0.0000075"
    assert nano(raw.headers["x-headgate-price"]) == price
    assert before - house.balance() == price
    rows = house.rows("order-66")
    assert [(row.model, row.price, row.source) for row in rows] == [("acme-large", price, "provider")]


async def test_cached_input_is_charged_at_its_own_price(house: House, client: AsyncOpenAI) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    house.up.script(Script(usage=usage))
    raw = await client.completions.with_raw_response.create(model="acme-large", prompt="word " * 200)
    assert nano(raw.headers["x-headgate-price"]) == 40 * 500 + 60 * 250 + 10 * 1500
    parsed = raw.parse().usage
    assert parsed is not None
    assert parsed.prompt_tokens_details is not None
    assert parsed.prompt_tokens_details.cached_tokens == 60


async def test_the_raw_stream_ends_with_done(client: AsyncOpenAI) -> None:
    async with client.completions.with_streaming_response.create(
        model="demo", prompt=STORY, max_tokens=3, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-headgate-provider"] == "embedded"
        assert response.headers["x-request-id"]
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert lines.count("data: [DONE]") == 1
    assert all(line.startswith("data: {") for line in lines[:-1])


async def test_models_can_be_listed_and_looked_up(client: AsyncOpenAI) -> None:
    listed = {model.id: model async for model in client.models.list()}
    assert {"demo", "acme-large", "acme-chat"} <= set(listed)
    large = listed["acme-large"]
    assert (large.object, large.owned_by) == ("model", "acme")
    extras = large.model_extra or {}
    assert extras["context_window"] == 8192
    assert extras["max_output_tokens"] == 4096
    assert extras["capabilities"] == {
        "chat": False,
        "completions": True,
        "vision": False,
        "logprobs": True,
        "tools": False,
    }
    scoreless = (listed["scoreless"].model_extra or {})["capabilities"]
    assert scoreless == extras["capabilities"] | {"logprobs": False}
    for name, chats, completes in (("acme-chat", True, False), ("demo", True, True)):
        able = (listed[name].model_extra or {})["capabilities"]
        assert able == extras["capabilities"] | {"chat": chats, "completions": completes}
    prices = {name: nano(price) for name, price in extras["pricing"].items()}
    assert prices == {"input": nano("0.5"), "output": nano("1.5")}
    assert await client.models.retrieve("acme-large") == large
    assert await client.models.retrieve("acme/acme-large") == large


async def test_an_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as completing:
        await client.completions.create(model="no-such-model", prompt="hi")
    with pytest.raises(openai.NotFoundError) as looking_up:
        await client.models.retrieve("no-such-model")
    for caught in (completing, looking_up):
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "not_found_error"
    assert completing.value.param == "model"


async def test_a_bad_key_is_an_authentication_error(house: House) -> None:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key="hg-wrong") as stranger:
        calls: list[Callable[[], Any]] = [
            lambda: stranger.completions.create(model="demo", prompt="hi"),
            lambda: stranger.completions.create(model="demo", prompt="hi", stream=True),
            lambda: stranger.completions.create(model="demo", prompt="hi", temperature=9),
            lambda: stranger.models.retrieve("demo"),
        ]
        for call in calls:
            with pytest.raises(openai.AuthenticationError) as caught:
                await call()
            assert caught.value.code == "invalid_api_key"
            assert caught.value.type == "invalid_request_error"
            assert caught.value.request_id


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("temperature", {"temperature": 2.5}),
        ("temperature", {"temperature": -0.1}),
        ("top_p", {"top_p": 1.01}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 257}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("stop", {"stop": ["a", "b", "c", "d", "e"]}),
        ("logprobs", {"logprobs": 6}),
        ("best_of", {"best_of": 21}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": None}),
        ("model", {"model": ""}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_field_is_a_bad_request_that_names_it(
    client: AsyncOpenAI, param: str, fields: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="demo", prompt="hi", extra_body={**fields, "stream": stream})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("model", "param", "fields"),
    [
        ("acme-chat", "echo", {"echo": True, "logprobs": 1}),
        ("acme-chat", "suffix", {"suffix": "the end"}),
        ("acme-chat", "prompt", {"prompt": [1, 2, 3]}),
        ("acme-chat", "prompt", {"prompt": [[1, 2], [3]]}),
        ("scoreless", "logprobs", {"logprobs": 0}),
        ("scoreless", "logprobs", {"logprobs": 5}),
        ("scoreless", "best_of", {"best_of": 2}),
    ],
)
async def test_what_a_model_cannot_do_is_refused_by_name_and_costs_nothing(
    house: House, client: AsyncOpenAI, model: str, param: str, fields: dict[str, Any]
) -> None:
    create: Any = client.completions.create
    asked = len(house.up.requests)
    before = house.balance()
    for stream in (False,) if param == "best_of" else (False, True):  # best_of is never streamed
        with pytest.raises(openai.BadRequestError) as caught:
            await create(**{"model": model, "prompt": "hi", "stream": stream} | fields)
        assert caught.value.param == param
        assert caught.value.code == "unsupported_parameter"
        assert model in caught.value.message
    assert len(house.up.requests) == asked
    assert house.balance() == before


NEUTRAL = {
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "logprobs": None,
    "logit_bias": {},
    "n": 1,
    "stream": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
NULLS = dict.fromkeys(
    (
        "best_of",
        "echo",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "suffix",
        "top_p",
        "user",
    )
)


@pytest.mark.parametrize(
    "extra",
    [NEUTRAL, NEUTRAL | {"best_of": 0}, NULLS, {"unknown": 1, "nested": {"x": [None]}}, {"max_tokens": 8.0}],
    ids=["neutral", "best_of 0", "null", "unknown keys", "integral float"],
)
async def test_neutral_values_change_nothing(client: AsyncOpenAI, extra: dict[str, Any]) -> None:
    plain = await client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=8)
    other = await client.completions.create(
        model="demo", prompt=STORY, temperature=0, max_tokens=8, extra_body=extra
    )
    assert texts(other) == texts(plain)
    assert other.usage == plain.usage


async def test_null_limits_are_the_documented_defaults(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="acme-large", prompt="hi", extra_body={"max_tokens": None, "temperature": None}
    )
    assert texts(answer) == ["echo: hi"]


@pytest.mark.parametrize("suffix", ["/v1", "/v1/", "", "/"])
async def test_the_base_url_works_with_and_without_v1(house: House, suffix: str) -> None:
    async with AsyncOpenAI(base_url=house.url + suffix, api_key=house.key) as client:
        answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=2)
        assert answer.object == "text_completion"
        assert "demo" in {model.id async for model in client.models.list()}
        assert (await client.models.retrieve("demo")).id == "demo"


async def test_a_token_works_as_a_key(house: House) -> None:
    async with AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.token) as client:
        answer = await client.completions.create(model="demo", prompt=STORY, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"


async def test_missing_funds_are_402_and_the_sdk_asks_once(house: House, client: AsyncOpenAI) -> None:
    told, asked, before = (
        await house.responses("openai", 402),
        len(house.up.requests),
        house.balance(),
    )
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(model="gold", prompt="far too dear")
    assert caught.value.status_code == 402
    assert caught.value.code == "insufficient_funds"
    assert caught.value.type == "insufficient_funds"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert await house.responses("openai", 402) == told + 1
    assert len(house.up.requests) == asked
    assert house.balance() == before


async def test_an_upstream_that_refuses_our_key_is_not_the_client_s_401_and_not_retried(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="broken-key", prompt="hi")
    assert caught.value.status_code == 500
    assert caught.value.code == "upstream_auth"
    assert len(house.up.requests) == asked + 1
    assert house.balance() == before


async def test_the_sdk_s_retry_after_a_503_succeeds_and_is_charged_once(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    house.up.script(Script(status=503, body={"error": {"message": "Busy."}}), Script())
    answer = await client.completions.create(model="acme-large", prompt="hi there")
    assert texts(answer) == ["echo: hi there"]
    assert len(house.up.requests) == asked + 2
    assert before - house.balance() == 2 * 500 + 3 * 1500


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, openai.BadRequestError, "upstream_rejected"),
        (422, openai.UnprocessableEntityError, "upstream_rejected"),
        (404, openai.InternalServerError, "upstream_error"),
        (500, openai.InternalServerError, "upstream_error"),
        (529, openai.InternalServerError, "upstream_unavailable"),
    ],
)
async def test_upstream_errors_become_the_sdk_s_own_classes(
    house: House, client: AsyncOpenAI, status: int, kind: type[openai.APIStatusError], code: str
) -> None:
    before = house.balance()
    house.up.script(Script(status=status, body={"error": {"message": f"It says {status}."}}))
    with pytest.raises(kind) as caught:
        await client.with_options(max_retries=0).completions.create(model="acme-large", prompt="hi")
    assert caught.value.code == code
    if kind is not openai.InternalServerError:
        assert f"It says {status}." in caught.value.message
    assert house.balance() == before


@pytest.mark.parametrize(
    "script",
    [
        Script(pieces=("alpha", " beta", " gamma"), error_at=2),
        Script(pieces=("alpha", " beta", " gamma"), reset_at=2),
        Script(pieces=("alpha", " beta", " gamma"), close_at=2),
    ],
    ids=["error event", "reset", "cut"],
)
async def test_a_stream_that_breaks_raises_in_the_sdk_after_what_came(
    house: House, client: AsyncOpenAI, script: Script
) -> None:
    before = house.balance()
    house.up.script(script)
    stream = await client.completions.create(model="acme-large", prompt="hi", stream=True)
    text = ""
    with pytest.raises(openai.APIError):
        async for chunk in stream:
            text += chunk.choices[0].text
    assert text == "alpha beta"
    assert house.balance() < before  # what was delivered is owed


async def test_a_refused_stream_raises_before_its_first_chunk(house: House, client: AsyncOpenAI) -> None:
    house.up.script(Script(status=400, body={"error": {"message": "No such thing."}}))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="acme-large", prompt="hi", stream=True)
    assert caught.value.code == "upstream_rejected"


async def test_closing_a_stream_early_cancels_the_upstream_and_keeps_what_came(
    house: House, client: AsyncOpenAI
) -> None:
    asked = len(house.up.requests)
    house.up.script(Script(pieces=("alpha", " beta", " gamma"), hold_at=2))
    raw = await client.completions.with_raw_response.create(model="acme-large", prompt="hi", stream=True)
    stream = raw.parse()
    first = await anext(aiter(stream))
    assert first.choices[0].text == "alpha"
    await stream.close()
    call = await house.up.request(asked)
    async with asyncio.timeout(10):
        await call.closed.wait()
    (row,) = await house.settled(raw.headers["x-request-id"])
    assert row.prompt_tokens > 0
    assert row.completion_tokens > 0
    assert row.price == row.prompt_tokens * 500 + row.completion_tokens * 1500


async def test_the_balance_is_there_for_the_sdk_s_untyped_door(house: House, client: AsyncOpenAI) -> None:
    shown = await client.get("/balance", cast_to=object)
    assert isinstance(shown, dict)
    assert set(shown) == {"account", "balance", "held", "available"}
    assert shown["account"] == "demo"
    assert nano(shown["available"]) == nano(shown["balance"]) - nano(shown["held"])
