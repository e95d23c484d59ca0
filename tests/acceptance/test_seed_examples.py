"""The documented example requests of all five APIs, as plain curl sends them, answer as documented."""

import asyncio
import json
import re
import shutil
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from typing import Any

import pytest
import pytest_asyncio
from msgspec import Struct
from openai import AsyncOpenAI
from tests.support.house import UPSTREAM_URL, House, events, model_row, nano, open_house
from tests.support.script import Script

pytestmark = [
    pytest.mark.process,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]

# The models are the built-in catalogue's; only where their providers are is changed.
CONFIG = f"""
[providers.openai]
kind = "openai"
base_url = "{UPSTREAM_URL}"
api_key_env = "OPENAI_API_KEY"

[providers.together]
kind = "openai"
base_url = "{UPSTREAM_URL}"
api_key_env = "TOGETHER_API_KEY"

[developers.developer_genstack_id]
account = "studio"
applications = ["com.example.dev.app"]
""" + model_row("your-model-name", provider="openai")
KEYS = {"OPENAI_API_KEY": "key-of-openai", "TOGETHER_API_KEY": "key-of-together"}
JSON = ("--header", "Content-Type: application/json")

GENSTACK_EXAMPLE = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Tell me about AI."},
    ],
    "model": "gpt-4-mini",
    "developerId": "developer_genstack_id",
    "applicationId": "com.example.dev.app",
    "temperature": 0.7,
    "maxOutputTokens": 500,
    "overrideGrossMarginPercent": 50,
}
ABOUT_AI = ("AI, or", " Artificial Intelligence,", " refers to...")
GENSTACK_USAGE = {"prompt_tokens": 20, "completion_tokens": 150, "total_tokens": 170}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("seeds"), env=KEYS) as house:
        yield house


class Transcript(Struct, frozen=True):
    """What curl printed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self.headers
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        assert self.headers["content-type"].startswith("text/event-stream"), self.headers
        return [data if data == "[DONE]" else json.loads(data) for data in events(self.body)]


def head_of(printed: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = printed.decode().split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(pairs), f"a header comes twice: {pairs}"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", headers["x-request-id"])
    return int(status.split(" ")[1]), headers


async def start_curl(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "curl", "--silent", "--show-error", "--no-buffer", "--include", "--noproxy", "*", *arguments,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def curl(*arguments: str) -> Transcript:
    process = await start_curl(*arguments)
    printed, _ = await process.communicate()
    assert process.returncode == 0, (arguments, process.returncode, printed)
    head, _, body = printed.partition(b"\r\n\r\n")
    return Transcript(*head_of(head), body)


async def rates(house: House, model: str) -> tuple[Decimal, Decimal]:
    """USD per token, in and out, as the gateway publishes them."""
    shown = (await house.get(f"/v1/models/{model}")).json["pricing"]
    return Decimal(shown["input"]) / 10**6, Decimal(shown["output"]) / 10**6


def plain(amount: Decimal) -> str:
    """Exact, without exponent or trailing zeros."""
    return format(amount.normalize(), "f") if amount else "0"


def price_of(cost: Decimal, margin_percent: int = 0) -> Decimal:
    """USD: the cost and its gross margin, rounded up to a nano-USD."""
    return (cost / (1 - Decimal(margin_percent) / 100)).quantize(Decimal("1e-9"), ROUND_CEILING)


def assert_charged(house: House, before: int, answer: Transcript, price: Decimal, provider: str) -> None:
    """Exactly this price, on the account, the usage rows and, where the answer is not a stream, its header."""
    assert before - house.balance() == nano(str(price))
    assert sum(row.price for row in house.rows(answer.headers["x-request-id"])) == nano(str(price))
    assert answer.headers["x-headgate-provider"] == provider
    if answer.headers["content-type"] == "application/json":
        assert answer.headers["x-headgate-price"] == plain(price)


# 1. genstack


def genstack_body(house: House, **changes: Any) -> str:
    return json.dumps({"genstackToken": house.token, **GENSTACK_EXAMPLE, **changes})


async def assert_genstack_response(house: House, response: dict[str, Any], before: int) -> Decimal:
    """Every field of the documented response for the example's usage; returns the price."""
    assert list(response) == ["model", "output", "usage", "balanceBefore", "balanceAfter"]
    assert response["model"] == "gpt-4-mini"
    assert response["output"] == "".join(ABOUT_AI)
    input_rate, output_rate = await rates(house, "gpt-4-mini")
    input_cost, output_cost = 20 * input_rate, 150 * output_rate
    price = price_of(input_cost + output_cost, 50)
    assert response["usage"] == {
        "type": "completion",
        "promptTokens": 20,
        "completionTokens": 150,
        "inputCost": plain(input_cost),
        "outputCost": plain(output_cost),
        "price": plain(price),
        "grossMarginPercent": "50",
    }
    # One credit is 0.0001 USD, a balance in nano-USD has five decimals as credits.
    credits_before = Decimal(before).scaleb(-5)
    assert response["balanceBefore"] == plain(credits_before)
    assert response["balanceAfter"] == plain(credits_before - price * 10_000)
    return price


async def test_genstack_service_information(house: House) -> None:
    answer = await curl("--url", f"{house.url}/")
    assert answer.status == 200
    assert answer.json == {"status": "healthy", "env": "production", "ui": f"{house.url}/ui"}


async def test_genstack_completion(house: House) -> None:
    asked, before, earned = len(house.up.requests), house.balance(), house.books.balance("studio").balance
    house.up.script(Script(pieces=ABOUT_AI, usage=GENSTACK_USAGE))
    answer = await curl("--request", "POST", "--url", f"{house.url}/", *JSON, "--data", genstack_body(house))
    assert answer.status == 200, answer.body
    price = await assert_genstack_response(house, answer.json, before)
    assert_charged(house, before, answer, price, "openai")
    (row,) = house.rows(answer.headers["x-request-id"])
    assert (row.developer, row.developer_share) == ("studio", row.price - row.cost)
    assert house.books.balance("studio").balance - earned == row.price - row.cost > 0
    (call,) = house.up.requests[asked:]
    assert call.headers["authorization"] == "Bearer key-of-openai"
    assert call.json["messages"] == GENSTACK_EXAMPLE["messages"]
    assert (call.json["temperature"], call.json["max_tokens"]) == (0.7, 500)


async def test_genstack_streaming_completion(house: House) -> None:
    before = house.balance()
    house.up.script(Script(pieces=ABOUT_AI, usage=GENSTACK_USAGE))
    answer = await curl(
        "--request", "POST", "--url", f"{house.url}/stream", *JSON, "--data", genstack_body(house)
    )
    assert answer.status == 200, answer.body
    assert len(answer.headers["x-stream-id"]) >= 128 / 6  # 128 bits even in base64
    *tokens, last = answer.events
    assert all(list(event) == ["token"] for event in tokens)
    assert "".join(event["token"] for event in tokens) == "".join(ABOUT_AI)
    assert list(last) == ["completed", "response"]
    assert last["completed"] is True
    price = await assert_genstack_response(house, last["response"], before)
    assert_charged(house, before, answer, price, "openai")


async def test_genstack_stream_shutdown(house: House) -> None:
    asked, before = len(house.up.requests), house.balance()
    house.up.script(Script(pieces=tuple(f" w{i}" for i in range(400)), pause_s=0.05))
    process = await start_curl("--url", f"{house.url}/stream", *JSON, "--data", genstack_body(house))
    assert process.stdout is not None
    status, headers = head_of((await process.stdout.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n"))
    assert status == 200
    first = await process.stdout.readuntil(b"\n\n")
    shutdown = ("--request", "POST", "--url", f"{house.url}/stream/shutdown", *JSON)
    name = json.dumps({"streamId": headers["x-stream-id"]})
    stopped = await curl(*shutdown, "--data", name)
    assert (stopped.status, stopped.json) == (200, {"success": True})
    rest = await process.stdout.read()
    assert await process.wait() == 0
    *tokens, last = Transcript(status, headers, first + rest).events
    assert list(last) == ["aborted", "response"]
    assert last["aborted"] is True
    response = last["response"]
    assert list(response) == ["model", "output", "usage", "balanceBefore", "balanceAfter"]
    text = "".join(event["token"] for event in tokens)
    assert response["output"] == text
    assert "".join(f" w{i}" for i in range(400)).startswith(text)
    usage = response["usage"]
    input_rate, output_rate = await rates(house, "gpt-4-mini")
    assert 0 < usage["completionTokens"] < 400
    assert usage["inputCost"] == plain(usage["promptTokens"] * input_rate)
    assert usage["outputCost"] == plain(usage["completionTokens"] * output_rate)
    price = price_of(Decimal(usage["inputCost"]) + Decimal(usage["outputCost"]), 50)
    assert usage["price"] == plain(price)
    assert before - house.balance() == nano(str(price)) > 0
    call = await house.up.request(asked)
    async with asyncio.timeout(10):
        await call.closed.wait()

    again = await curl(*shutdown, "--data", name)
    assert again.status == 404
    assert list(again.json) == ["error"]
    assert list(again.json["error"]) == ["type", "message", "details"]
    assert again.json["error"]["type"] == "InvalidRequest"
    missing = await curl(*shutdown, "--data", "{}")
    assert (missing.status, missing.json["error"]["details"]["field"]) == (400, "streamId")


async def test_genstack_web_interface(house: House) -> None:
    answer = await curl("--url", f"{house.url}/ui")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert b"<html" in answer.body.lower()


@pytest.mark.parametrize(
    ("changes", "status", "kind", "field"),
    [
        ({"genstackToken": "not a token"}, 401, "InvalidCredentials", None),
        ({"genstackToken": None}, 401, "InvalidCredentials", None),
        ({"temperature": 2.1}, 400, "InvalidRequest", "temperature"),
        ({"maxOutputTokens": 16385}, 400, "InvalidRequest", "maxOutputTokens"),
        ({"maxOutputTokens": 0}, 400, "InvalidRequest", "maxOutputTokens"),
        ({"overrideGrossMarginPercent": 100}, 400, "InvalidRequest", "overrideGrossMarginPercent"),
        ({"developerId": "nobody"}, 400, "InvalidRequest", "developerId"),
        ({"applicationId": "com.example.other"}, 400, "InvalidRequest", "applicationId"),
        ({"developerId": None}, 400, "InvalidRequest", "applicationId"),
        ({"model": "gpt-9"}, 400, "InvalidRequest", "model"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_genstack_error_responses(
    house: House, path: str, changes: dict[str, Any], status: int, kind: str, field: str | None
) -> None:
    asked, before = len(house.up.requests), house.balance()
    body = genstack_body(house, **changes)
    answer = await curl("--request", "POST", "--url", house.url + path, *JSON, "--data", body)
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"]
    error = answer.json["error"]
    assert list(error) == ["type", "message", "details"]
    assert error["type"] == kind
    assert error["message"]
    assert error["details"].get("field") == field
    assert len(house.up.requests) == asked
    assert house.balance() == before


# 2. dify


DIFY_EXAMPLE = """
{
"inputs": {
"query": "Hello, world!"
},
"response_mode": "streaming",
"user": "abc-123"
}
"""


async def test_dify_streaming_example(house: House) -> None:
    before = house.balance()
    answer = await curl(
        "--request", "POST",
        "--url", f"{house.url}/completion-messages",
        "--header", f"Authorization: Bearer {house.key}",
        *JSON,
        "--data", DIFY_EXAMPLE,
    )  # fmt: skip
    assert answer.status == 200, answer.body
    *messages, end = answer.events
    assert messages
    assert {event["event"] for event in messages} == {"message"}
    assert "".join(event["answer"] for event in messages)
    assert end["event"] == "message_end"
    usage = end["metadata"]["usage"]
    price = Decimal(usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 400).scaleb(-9)
    assert_charged(house, before, answer, price, "embedded")


async def test_dify_blocking_response_has_the_documented_fields(house: House) -> None:
    before, began = house.balance(), int(time.time())
    answer = await curl(
        "--request", "POST",
        "--url", f"{house.url}/completion-messages",
        "--header", f"Authorization: Bearer {house.key}",
        *JSON,
        "--data", DIFY_EXAMPLE.replace("streaming", "blocking"),
    )  # fmt: skip
    assert answer.status == 200, answer.body
    message = answer.json
    assert message["event"] == "message"
    assert str(uuid.UUID(message["message_id"])) == message["message_id"]
    assert message["mode"] == "completion"
    assert isinstance(message["answer"], str)
    assert began - 2 <= message["created_at"] <= time.time() + 2
    usage = message["metadata"]["usage"]
    assert list(usage) == [
        "prompt_tokens", "prompt_unit_price", "prompt_price_unit", "prompt_price",
        "completion_tokens", "completion_unit_price", "completion_price_unit", "completion_price",
        "total_tokens", "total_price", "currency", "latency",
    ]  # fmt: skip
    shown = {
        kind: (Decimal(usage[f"{kind}_tokens"]) * Decimal(unit) / 1000).quantize(
            Decimal("1e-7"), ROUND_HALF_UP
        )
        for kind, unit in (("prompt", "0.0001"), ("completion", "0.0004"))
    }
    assert usage["prompt_unit_price"] == "0.0001"
    assert usage["completion_unit_price"] == "0.0004"
    assert usage["prompt_price_unit"] == usage["completion_price_unit"] == "0.001"
    assert usage["prompt_price"] == format(shown["prompt"], "f")
    assert usage["completion_price"] == format(shown["completion"], "f")
    assert usage["total_price"] == format(shown["prompt"] + shown["completion"], "f")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["currency"] == "USD"
    assert isinstance(usage["latency"], float)
    price = Decimal(usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 400).scaleb(-9)
    assert_charged(house, before, answer, price, "embedded")


# 3. TokenHub


TOKENHUB_EXAMPLE = """{
    "model": "openai/gpt-3.5-turbo-instruct",
    "prompt": "The tallest mountain in the world is",
    "max_tokens": 64,
    "temperature": 0.5
  }"""
EVEREST = " Mount Everest, standing at 8,848 metres (29,029 ft) above sea level."


@pytest.mark.parametrize("model", ["openai/gpt-3.5-turbo-instruct", "gpt-3.5-turbo-instruct"])
async def test_tokenhub_example(house: House, model: str) -> None:
    asked, before = len(house.up.requests), house.balance()
    usage = {"prompt_tokens": 10, "completion_tokens": 18, "total_tokens": 28}
    house.up.script(Script(pieces=(EVEREST,), usage=usage))
    answer = await curl(
        f"{house.url}/v1/completions",
        "--request", "POST",
        "--header", f"Authorization: Bearer {house.key}",
        "--header", "Content-Type: application/json",
        "--data", TOKENHUB_EXAMPLE.replace("openai/gpt-3.5-turbo-instruct", model),
    )  # fmt: skip
    assert answer.status == 200, answer.body
    completion = answer.json
    assert completion["id"].startswith("cmpl-")
    assert completion["object"] == "text_completion"
    assert completion["model"] == model
    (choice,) = completion["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, EVEREST, "stop")
    assert completion["usage"] == usage
    (call,) = house.up.requests[asked:]
    assert (call.json["max_tokens"], call.json["temperature"]) == (64, 0.5)
    input_rate, output_rate = await rates(house, "gpt-3.5-turbo-instruct")
    assert_charged(house, before, answer, price_of(10 * input_rate + 18 * output_rate), "openai")


async def test_tokenhub_model_ids_come_from_the_models_list(house: House) -> None:
    answer = await curl(f"{house.url}/v1/models", "--header", f"Authorization: Bearer {house.key}")
    assert answer.status == 200
    assert answer.json["object"] == "list"
    ids = {row["id"] for row in answer.json["data"]}
    assert {"gpt-3.5-turbo-instruct", "gpt-4-mini", "llama-3.3", "demo"} <= ids
    # Their provider has no key here.
    assert "claude-3.5-sonnet" not in ids


# 4. Aqueduct


AQUEDUCT_EXAMPLE = """{
    "model": "your-model-name",
    "prompt": "Once upon a time",
    "max_tokens": 50,
    "temperature": 0.7
  }"""
AQUEDUCT_STREAM = AQUEDUCT_EXAMPLE.replace('"temperature": 0.7', '"stream": true')


@pytest.mark.parametrize("path", ["/completions", "/v1/completions"])
async def test_aqueduct_curl_example(house: House, path: str) -> None:
    asked, before = len(house.up.requests), house.balance()
    answer = await curl(
        house.url + path,
        "-H", f"Authorization: Bearer {house.key}",
        "-H", "Content-Type: application/json",
        "-d", AQUEDUCT_EXAMPLE,
    )  # fmt: skip
    assert answer.status == 200, answer.body
    completion = answer.json
    assert completion["object"] == "text_completion"
    assert completion["model"] == "your-model-name"
    assert [choice["text"] for choice in completion["choices"]] == ["echo: Once upon a time"]
    assert completion["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    (call,) = house.up.requests[asked:]
    assert call.path == "/v1/completions"
    assert call.json == {
        "model": "your-model-name", "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.7,
    }  # fmt: skip
    assert_charged(house, before, answer, Decimal(4 * 500 + 5 * 1500).scaleb(-9), "openai")


@pytest.mark.parametrize("path", ["/completions", "/v1/completions"])
async def test_aqueduct_streaming_example(house: House, path: str) -> None:
    before = house.balance()
    answer = await curl(
        house.url + path,
        "-H", f"Authorization: Bearer {house.key}",
        "-H", "Content-Type: application/json",
        "-d", AQUEDUCT_STREAM,
    )  # fmt: skip
    assert answer.status == 200, answer.body
    *chunks, done = answer.events
    assert done == "[DONE]"
    for chunk in chunks:
        assert {"id", "object", "created", "model", "choices"} == set(chunk)
        assert (chunk["object"], chunk["model"]) == ("text_completion", "your-model-name")
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "echo: Once upon a time"
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert choices[-1]["finish_reason"] == "stop"
    assert_charged(house, before, answer, Decimal(4 * 500 + 5 * 1500).scaleb(-9), "openai")


async def test_aqueduct_python_example(house: House) -> None:
    async with AsyncOpenAI(base_url=house.url, api_key=house.key) as client:
        response = await client.completions.create(
            model="your-model-name", prompt="Once upon a time", max_tokens=50, temperature=0.7
        )
    assert response.choices[0].text == "echo: Once upon a time"


# 5. thiggle


THIGGLE_EXAMPLE = """{
  "prompt": "Once upon a time",
  "model": ["gpt-4", "llama-2-70b"],
  "max_tokens": 50,
  "temperature": 0.7,
  "top_p": 0.8,
  "stop": ["."],
  "presence_penalty": 0.5,
  "frequency_penalty": -0.5
}"""


SUCCESSORS = ["gpt-4.1", "llama-3.3-70b-raw"]
"""What answers for the retired models of the example, and is named in the answer."""


async def test_thiggle_example(house: House) -> None:
    asked, before = len(house.up.requests), house.balance()
    house.up.hold()
    for answered in (" there was a king", " there lived a queen"):
        house.up.script(Script(pieces=(answered,), hold_at=0))
    asking = asyncio.ensure_future(
        curl(
            "--request", "POST",
            "--url", f"{house.url}/v1/completion",
            *JSON,
            "--header", f"Authorization: Bearer {house.key}",
            "--data", THIGGLE_EXAMPLE,
        )
    )  # fmt: skip
    async with asyncio.timeout(30):
        # Both are asked before either has answered.
        calls = [await house.up.request(asked), await house.up.request(asked + 1)]
        house.up.release()
        answer = await asking
    assert answer.status == 200, answer.body
    by_key = {call.headers["authorization"]: call for call in calls}
    gpt, llama = by_key["Bearer key-of-openai"], by_key["Bearer key-of-together"]
    said = dict(zip((id(call) for call in calls), (" there was a king", " there lived a queen"), strict=True))
    assert gpt.json["messages"] == [{"role": "user", "content": "Once upon a time"}]
    assert llama.json["prompt"] == "Once upon a time"
    settings = json.loads(THIGGLE_EXAMPLE)
    for call in calls:
        for name in ("max_tokens", "temperature", "top_p", "stop", "presence_penalty", "frequency_penalty"):
            assert call.json[name] == settings[name], name

    completion = answer.json
    assert list(completion) == ["id", "object", "created", "choices", "usage"]
    assert str(uuid.UUID(completion["id"])) == completion["id"]
    assert completion["object"] == "text_completion"
    created = datetime.fromisoformat(completion["created"])
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)
    assert [choice["model"] for choice in completion["choices"]] == SUCCESSORS
    assert [choice["text"] for choice in completion["choices"]] == [said[id(gpt)], said[id(llama)]]
    for choice in completion["choices"]:
        assert list(choice) == ["text", "created", "model", "finish_reason", "usage"]
        assert abs(choice["created"] - created.timestamp()) < 60
        assert choice["finish_reason"] == "stop"
        usage = choice["usage"]
        assert isinstance(usage.pop("prediction_time_ms"), int)
        assert usage == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    total = completion["usage"]
    assert isinstance(total.pop("prediction_time_ms"), int)
    assert total == {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}

    prices = []
    for model in ("gpt-4", "llama-2-70b"):
        input_rate, output_rate = await rates(house, model)
        prices.append(price_of(4 * input_rate + 1 * output_rate))
    assert_charged(house, before, answer, sum(prices, Decimal(0)), "openai, together")
    rows = house.rows(answer.headers["x-request-id"])
    assert [row.model for row in rows] == SUCCESSORS
    assert [row.price for row in rows] == [nano(str(price)) for price in prices]


async def test_thiggle_takes_a_single_model_name(house: House) -> None:
    body = json.loads(THIGGLE_EXAMPLE) | {"model": "llama-2-70b"}
    answer = await curl(
        f"{house.url}/v1/completion",
        *JSON,
        "--header", f"Authorization: Bearer {house.key}",
        "--data", json.dumps(body),
    )  # fmt: skip
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    assert (choice["model"], choice["text"]) == (SUCCESSORS[1], "echo: Once upon a time")
