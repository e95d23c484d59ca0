"""A request streamed is the same request: same text, finish reasons, usage and charge, in every dialect."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct
from tests.support.client import texts_of
from tests.support.house import ACME, House, Reply, model_row, open_house
from tests.support.script import Script

from headgate.core.accounts import UsageRow

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

APP = """
[apps.{model}]
model = "{model}"
prompt = "{{{{query}}}}"
temperature = 0
max_tokens = {max_tokens}
gross_margin_percent = "12.5"
variables = [{{ name = "query", type = "paragraph", required = true }}]
"""
MODELS = ("demo", "acme-large", "acme-chat")
DIALECTS = ("genstack", "dify", "openai", "chat", "thiggle")
PATHS = {"openai": "/v1/completions", "chat": "/v1/chat/completions", "thiggle": "/v1/completion"}
"""Those whose answers have choices."""

CONFIG = (
    ACME
    + model_row("acme-large")
    + model_row("acme-chat", mode="chat")
    + "".join(APP.format(model=model, max_tokens=32) for model in MODELS)
)
PROMPT = "Once upon a time"


class Outcome(Struct, frozen=True, kw_only=True):
    """What a request came to, without times and ids."""

    texts: list[str]
    finish_reasons: list[str | None]
    usage: dict[str, Any]
    charged: int
    rows: list[UsageRow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("both-ways")) as house:
        yield house


@pytest.fixture(autouse=True)
def _fresh_upstream(house: House) -> None:
    for model in MODELS:
        house.up.on(model, Script())


async def ask(
    house: House, dialect: str, model: str | list[str], *, stream: bool, prompt: Any = PROMPT, **fields: Any
) -> Outcome:
    before = house.balance()
    match dialect:
        case "genstack":
            body: dict[str, Any] = {
                "genstackToken": house.token,
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "maxOutputTokens": 32,
            }
            reply = await house.post("/stream" if stream else "/", body | fields)
        case "dify":
            body = {"inputs": {"query": prompt}, "response_mode": "streaming" if stream else "blocking"}
            key = house.books.key("demo", str(model))
            reply = await house.post("/completion-messages", body | fields, key)
        case _:
            body = {"model": model, "temperature": 0, "max_tokens": 32, "stream": stream}
            if dialect == "chat":
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            if dialect != "thiggle":
                body["stream_options"] = {"include_usage": True}
            reply = await house.post(PATHS[dialect], body | fields)
    assert reply.status == 200, reply.body
    texts, finish_reasons, usage = (_streamed if stream else _whole)(dialect, reply)
    charged = before - house.balance()
    rows = house.rows(reply.request_id)
    assert {row.stream for row in rows} == {stream}
    assert sum(row.price for row in rows) == charged
    if not stream:
        assert reply.price == charged
    return Outcome(
        texts=texts,
        finish_reasons=finish_reasons,
        usage=usage,
        charged=charged,
        rows=[msgspec.structs.replace(row, request_id="", stream=False, key_id=None) for row in rows],
    )


def _whole(dialect: str, reply: Reply) -> tuple[list[str], list[str | None], dict[str, Any]]:
    answer = reply.json
    match dialect:
        case "genstack":
            return [answer["output"]], [None], answer["usage"]
        case "dify":
            return [answer["answer"]], [None], _without(answer["metadata"]["usage"], "latency")
    choices = answer["choices"]
    usage = _without(answer["usage"], "prediction_time_ms")
    return texts_of(answer), [choice["finish_reason"] for choice in choices], usage


def _streamed(dialect: str, reply: Reply) -> tuple[list[str], list[str | None], dict[str, Any]]:
    events = reply.events
    match dialect:
        case "genstack":
            *tokens, last = events
            text = "".join(event["token"] for event in tokens)
            assert last["completed"] is True
            assert last["response"]["output"] == text
            return [text], [None], last["response"]["usage"]
        case "dify":
            *messages, end = events
            assert end["event"] == "message_end"
            usage = _without(end["metadata"]["usage"], "latency")
            return ["".join(event["answer"] for event in messages)], [None], usage
    *chunks, last, done = events
    assert done == "[DONE]"
    assert last["choices"] == []
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in chunks:
        (choice,), (text,) = chunk["choices"], texts_of(chunk)
        index = choice["index"]
        assert reasons.get(index) is None, "text after the finish reason"
        texts[index] = texts.get(index, "") + text
        reasons[index] = choice["finish_reason"]
    usage = _without(last["usage"], "prediction_time_ms")
    return [texts[index] for index in sorted(texts)], [reasons[index] for index in sorted(texts)], usage


def _without(usage: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in usage.items() if key != name}


async def both(house: House, dialect: str, model: str | list[str], **fields: Any) -> Outcome:
    """Ask both ways (the embedded model twice each) and compare; returns what they have in common."""
    ways = (False, True, True, False) if "demo" in model else (False, True)
    outcomes = [await ask(house, dialect, model, stream=stream, **fields) for stream in ways]
    for other in outcomes[1:]:
        assert other == outcomes[0]
    return outcomes[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_plain_request(house: House, dialect: str, model: str) -> None:
    outcome = await both(house, dialect, model)
    assert all(outcome.texts)
    assert outcome.charged > 0
    if model != "demo":
        # A conversation reaches a model that only completes as a transcript.
        spoken = dialect in ("genstack", "chat")
        said = f"User: {PROMPT} Assistant:" if spoken and model == "acme-large" else PROMPT
        assert outcome.texts == [f"echo: {said}"]
        words = len(said.split())
        exact = words * 500 + (1 + words) * 1500
        assert outcome.charged == (exact if dialect != "dify" else -(-exact * 8 // 7))


@pytest.mark.parametrize("dialect", PATHS)
@pytest.mark.parametrize("model", MODELS)
async def test_an_answer_cut_at_its_limit(house: House, dialect: str, model: str) -> None:
    house.up.on(model, Script(pieces=("alpha", " beta"), finish="length"))
    outcome = await both(house, dialect, model, max_tokens=2)
    assert outcome.finish_reasons == ["length"]
    assert outcome.usage["completion_tokens"] == 2


@pytest.mark.parametrize("dialect", PATHS)
async def test_an_answer_that_meets_a_stop_sequence(house: House, dialect: str) -> None:
    whole = await ask(house, dialect, "demo", stream=False, max_tokens=64)
    stop = whole.texts[0].split()[4]
    outcome = await both(house, dialect, "demo", max_tokens=64, stop=[stop])
    assert outcome.texts == [whole.texts[0].partition(stop)[0]]
    assert outcome.finish_reasons == ["stop"]
    assert outcome.charged < whole.charged


@pytest.mark.parametrize("dialect", ["genstack", *PATHS])
async def test_an_answer_whose_limit_was_not_given(house: House, dialect: str) -> None:
    limit = "maxOutputTokens" if dialect == "genstack" else "max_tokens"
    outcome = await both(house, dialect, "demo", **{limit: None})
    assert outcome.texts[0]


@pytest.mark.parametrize("model", MODELS)
async def test_several_prompts_and_choices(house: House, model: str) -> None:
    prompts = [PROMPT, "The cat", "One day"]
    outcome = await both(house, "openai", model, prompt=prompts, n=2, max_tokens=12)
    assert len(outcome.texts) == 6
    assert outcome.usage["total_tokens"] == (
        outcome.usage["prompt_tokens"] + outcome.usage["completion_tokens"]
    )


@pytest.mark.parametrize("model", MODELS)
async def test_several_choices_of_a_conversation(house: House, model: str) -> None:
    outcome = await both(house, "chat", model, n=3, max_tokens=12)
    assert len(outcome.texts) == len(outcome.finish_reasons) == 3
    assert outcome.usage["completion_tokens"] == sum(row.completion_tokens for row in outcome.rows)


@pytest.mark.parametrize("dialect", ["openai", "chat"])
async def test_seeded_choices_at_full_temperature(house: House, dialect: str) -> None:
    outcome = await both(house, dialect, "demo", n=3, seed=5, temperature=1)
    assert len(set(outcome.texts)) == 3


async def test_several_models_of_both_kinds(house: House) -> None:
    models = ["demo", "acme-large", "acme-chat", "demo"]
    outcome = await both(house, "thiggle", models)
    assert outcome.texts[1:3] == [f"echo: {PROMPT}"] * 2
    assert outcome.texts[0] == outcome.texts[3]
    assert [row.model for row in outcome.rows] == models
    assert outcome.usage["completion_tokens"] == sum(row.completion_tokens for row in outcome.rows)


UPSTREAM_WAYS = {
    "finish reason of its own": Script(pieces=("alpha", " beta"), finish="eos"),
    "no finish reason": Script(pieces=("alpha", " beta"), finish=None),
    "filtered": Script(pieces=("alpha", " beta"), finish="content_filter"),
    "no usage": Script(pieces=("alpha", " beta", " gamma and", " so on"), usage="none"),
    "usage of zero": Script(pieces=("alpha",), usage={"prompt_tokens": 0, "completion_tokens": 0}),
    "cached prompt": Script(
        pieces=("alpha",),
        usage={
            "prompt_tokens": 12,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    ),
    "more than was held for": Script(
        pieces=("alpha",), usage={"prompt_tokens": 9000, "completion_tokens": 900}
    ),
    "no text": Script(pieces=("",)),
    "no done": Script(pieces=("alpha", " beta"), done=False),
    "all in one write": Script(pieces=("alpha", " beta", " gamma"), block=True),
    "characters of many bytes": Script(pieces=("日本", "語 ", "👩‍👩‍👧", " \u2028\x85 é", '"\\\n')),
}


@pytest.mark.parametrize("way", UPSTREAM_WAYS)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_whatever_the_upstream_s_way_of_answering(house: House, dialect: str, way: str) -> None:
    script = UPSTREAM_WAYS[way]
    for model in ("acme-large", "acme-chat"):
        house.up.on(model, script)
        outcome = await both(house, dialect, model)
        assert outcome.texts == ["".join(script.pieces or ())]
        if dialect in PATHS:
            reason = {"eos": "stop", None: "stop"}.get(script.finish, script.finish)
            assert outcome.finish_reasons == [reason]
        (row,) = outcome.rows
        assert row.source == ("estimate" if script.usage == "none" else "provider")
        assert (outcome.charged == 0) == (way == "usage of zero")
        assert (row.excess > 0) == (way == "more than was held for")
        if way == "cached prompt":
            assert row.cost == 7 * 500 + 5 * 250 + 7 * 1500
