"""Dify's own Python client (`dify-client`) against the gateway: app keys, a plain key, streams and stops."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import openai
import pytest
import pytest_asyncio
from dify_client import CompletionClient
from openai import AsyncOpenAI
from tests.support.house import ACME, House, model_row, open_house
from tests.support.script import Script

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

CONFIG = (
    ACME
    + model_row("acme-chat", mode="chat")
    + """
[apps.story]
model = "demo"
prompt = "Write a story about {{topic}}."
temperature = 0.7
max_tokens = 24
description = "Tells a story."
variables = [{ name = "topic", label = "Topic", type = "text-input", required = true, max_length = 48 }]

[apps.remote]
model = "acme-chat"
prompt = "{{greeting}}, {{name}}! {{7*7}} {{unknown}}"
temperature = 0.2
max_tokens = 128
stop = ["END"]
gross_margin_percent = "20"
variables = [
  { name = "greeting", type = "select", options = ["Hello", "Bye"], default = "Hello" },
  { name = "name", type = "paragraph", required = true },
  { name = "age", type = "number" },
]
"""
)
USAGE_FIELDS = {
    "prompt_tokens",
    "prompt_unit_price",
    "prompt_price_unit",
    "prompt_price",
    "completion_tokens",
    "completion_unit_price",
    "completion_price_unit",
    "completion_price",
    "total_tokens",
    "total_price",
    "currency",
    "latency",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("dify")) as house:
        yield house


class Dify:
    """The client in a thread of its own, as the upstream lives on this loop."""

    def __init__(self, url: str, key: str) -> None:
        self._client = CompletionClient(key)
        self._client.base_url = url

    async def ask(self, inputs: Any, mode: str = "blocking", user: str = "abc-123") -> Any:
        """The whole response of the client's `requests` library."""
        return await asyncio.to_thread(self._ask, inputs, mode, user)

    def _ask(self, inputs: Any, mode: str, user: str) -> Any:
        response = self._client.create_completion_message(inputs, mode, user)
        _ = response.content
        return response

    def stream(self, inputs: Any, user: str = "abc-123") -> "Stream":
        return Stream(self._client, inputs, user)

    async def send(self, method: str, path: str, **fields: Any) -> Any:
        return await asyncio.to_thread(self._client._send_request, method, path, **fields)

    async def stop(self, task_id: str, user: str) -> Any:
        return await self.send("POST", f"/completion-messages/{task_id}/stop", json={"user": user})

    async def parameters(self) -> Any:
        return await asyncio.to_thread(self._client.get_application_parameters, "abc-123")


class Stream:
    """A streamed answer, event by event, read the way the client's README does."""

    def __init__(self, client: Any, inputs: Any, user: str) -> None:
        self._client = client
        self._asked = (inputs, "streaming", user)
        self._response: Any = None
        self._lines: Iterator[str] = iter(())

    async def __aenter__(self) -> "Stream":
        self._response = await asyncio.to_thread(self._client.create_completion_message, *self._asked)
        assert self._response.status_code == 200, self._response.text
        self._lines = self._response.iter_lines(chunk_size=None, decode_unicode=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._response.close)

    @property
    def headers(self) -> Any:
        return self._response.headers

    async def next(self) -> dict[str, Any] | None:
        """The next event; None at the end of the body."""
        while True:
            line = await asyncio.to_thread(next, self._lines, None)
            if line is None:
                return None
            if line.strip():
                content = json.loads(line.split("data:", 1)[-1])
                assert isinstance(content, dict)
                return content

    async def rest(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


def dify(house: House, app: str | None = None, base: str = "/v1") -> Dify:
    return Dify(house.url + base, house.books.key("demo", app) if app else house.key)


def assert_usage(usage: dict[str, Any], unit_prices: tuple[str, str]) -> None:
    """Every field of `usage`, and the arithmetic of the seed's example: price = tokens x unit price x unit."""
    assert set(usage) == USAGE_FIELDS
    for kind, unit in zip(("prompt", "completion"), unit_prices, strict=True):
        assert usage[f"{kind}_unit_price"] == unit
        assert usage[f"{kind}_price_unit"] == "0.001"
        exact = usage[f"{kind}_tokens"] * Decimal(unit) * Decimal("0.001")
        shown = exact.quantize(Decimal("0.0000001"), ROUND_HALF_UP)
        assert usage[f"{kind}_price"] == format(shown, "f")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    total = Decimal(usage["prompt_price"]) + Decimal(usage["completion_price"])
    assert usage["total_price"] == format(total, "f")
    assert usage["currency"] == "USD"
    assert isinstance(usage["latency"], float)
    assert usage["latency"] > 0


@pytest.mark.parametrize("base", ["/v1", ""])
async def test_an_app_key_gets_a_blocking_message(house: House, base: str) -> None:
    before = house.balance()
    response = await dify(house, "story", base).ask({"topic": "a cat"})
    assert response.status_code == 200
    message = response.json()
    assert set(message) == {
        "event", "task_id", "id", "message_id", "mode", "answer", "metadata", "created_at",
    }  # fmt: skip
    assert (message["event"], message["mode"]) == ("message", "completion")
    assert str(uuid.UUID(message["message_id"])) == message["message_id"] == message["id"]
    assert str(uuid.UUID(message["task_id"])) == message["task_id"]
    assert message["answer"]
    assert isinstance(message["created_at"], int)
    assert message["metadata"]["retriever_resources"] == []
    usage = message["metadata"]["usage"]
    assert_usage(usage, ("0.0001", "0.0004"))
    assert usage["completion_tokens"] <= 24
    charged = usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 400
    assert before - house.balance() == charged
    assert response.headers["X-Headgate-Provider"] == "embedded"
    assert Decimal(response.headers["X-Headgate-Price"]) == Decimal(charged).scaleb(-9)
    (row,) = house.rows(response.headers["X-Request-Id"])
    assert (row.app, row.user, row.price, row.dialect) == ("story", "abc-123", charged, "dify")


async def test_an_app_key_gets_a_stream_of_messages_and_their_end(house: House) -> None:
    before = house.balance()
    async with dify(house, "story").stream({"topic": "a cat"}) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        *messages, end = await stream.rest()
    assert len(messages) > 1
    for event in messages:
        assert set(event) == {"event", "task_id", "message_id", "id", "created_at", "answer"}
        assert event["event"] == "message"
    assert end["event"] == "message_end"
    assert end["metadata"]["retriever_resources"] == []
    assert_usage(end["metadata"]["usage"], ("0.0001", "0.0004"))
    for name in ("task_id", "message_id", "id", "created_at"):
        assert {event[name] for event in messages} == {end[name]}
    assert end["id"] == end["message_id"]
    usage = end["metadata"]["usage"]
    assert before - house.balance() == usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 400


async def test_the_app_fills_its_prompt_and_sends_its_own_settings(house: House) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    long = " and her friends" * 100
    house.up.script(Script(pieces=("Hello!",), usage={"prompt_tokens": 1033, "completion_tokens": 128}))
    response = await dify(house, "remote").ask({"name": f"Ann {{{{greeting}}}}{long}", "other": "unused"})
    assert response.status_code == 200, response.text
    (call,) = house.up.requests[asked:]
    prompt = f"Hello, Ann {{{{greeting}}}}{long}! {{{{7*7}}}} {{{{unknown}}}}"
    assert call.json["messages"] == [{"role": "user", "content": prompt}]
    assert call.json["temperature"] == 0.2
    assert call.json["max_tokens"] == 128
    assert call.json["stop"] == ["END"]
    # 0.50 and 1.50 USD per million, and a fifth of the price is the margin.
    usage = response.json()["metadata"]["usage"]
    assert_usage(usage, ("0.000625", "0.001875"))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1033, 128)
    assert before - house.balance() == (1033 * 500 + 128 * 1500) * 10 // 8


async def test_a_key_without_an_app_speaks_to_the_built_in_one(house: House) -> None:
    client = dify(house)
    response = await client.ask({"query": "Hello, world!"})
    assert response.status_code == 200
    assert response.json()["answer"]
    async with client.stream({"query": "Hello, world!"}) as stream:
        *messages, end = await stream.rest()
    assert {event["event"] for event in messages} == {"message"}
    assert end["event"] == "message_end"
    refused = await client.ask({"topic": "a cat"})
    assert refused.status_code == 400
    assert refused.json() == {
        "code": "invalid_param",
        "message": "query is required in input form",
        "status": 400,
    }


@pytest.mark.parametrize(
    ("app", "inputs", "message"),
    [
        ("story", {"subject": "x"}, "topic is required in input form"),
        ("story", {"topic": ""}, "topic is required in input form"),
        ("story", {"topic": 7}, "topic in input form must be a string"),
        ("story", {"topic": "x" * 49}, "topic in input form must be less than 48 characters"),
        (
            "remote",
            {"name": "Ann", "greeting": "Hi"},
            "greeting in input form must be one of the following: ['Hello', 'Bye']",
        ),
        ("remote", {"name": "Ann", "age": "old"}, "age in input form must be a valid number"),
    ],
)
@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_wrong_inputs_are_refused_in_dify_s_own_words(
    house: House, app: str, inputs: dict[str, Any], message: str, mode: str
) -> None:
    before, asked = house.balance(), len(house.up.requests)
    response = await dify(house, app).ask(inputs, mode)
    assert response.status_code == 400
    assert response.json() == {"code": "invalid_param", "message": message, "status": 400}
    assert house.balance() == before
    assert len(house.up.requests) == asked


@pytest.mark.parametrize("inputs", [{}, None, "query", ["query"]])
async def test_inputs_must_be_at_least_one_pair(house: House, inputs: Any) -> None:
    response = await dify(house, "story").ask(inputs)
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_param"
    assert "inputs" in response.json()["message"]


async def test_an_unknown_response_mode_is_refused(house: House) -> None:
    response = await dify(house, "story").ask({"topic": "a cat"}, "slow")
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_param"
    assert "response_mode" in response.json()["message"]


async def test_a_bad_key_is_unauthorized(house: House) -> None:
    client = Dify(f"{house.url}/v1", "app-wrong")
    for response in (
        await client.ask({"query": "hi"}),
        await client.ask({"query": "hi"}, "streaming"),
        await client.parameters(),
        await client.stop(str(uuid.uuid4()), "abc-123"),
    ):
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="api"'
        body = response.json()
        assert set(body) == {"code", "message", "status"}
        assert (body["code"], body["status"]) == ("unauthorized", 401)


async def test_an_app_key_opens_nothing_but_its_app(house: House) -> None:
    async with AsyncOpenAI(base_url=house.url, api_key=house.books.key("demo", "story")) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.completions.create(model="demo", prompt="hi")
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.list()
        with pytest.raises(openai.PermissionDeniedError):
            await client.get("/balance", cast_to=object)


async def test_stopping_a_stream_ends_it_with_message_end_and_closes_the_upstream(house: House) -> None:
    asked = len(house.up.requests)
    before = house.balance()
    house.up.script(Script(pieces=tuple(f" w{i}" for i in range(500)), pause_s=0.05))
    client = dify(house, "remote")
    async with client.stream({"name": "Ann"}, user="ann") as stream:
        first, second = await stream.next(), await stream.next()
        assert first is not None
        assert second is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        stopped = await client.stop(first["task_id"], "ann")
        assert (stopped.status_code, stopped.json()) == (200, {"result": "success"})
        *messages, end = await stream.rest()
        call = await house.up.request(asked)
        async with asyncio.timeout(10):
            await call.closed.wait()
        # One second by the contract; the rest of this allowance is for a busy machine.
        assert loop.time() - began < 5
    messages = [first, second, *messages]
    assert end["event"] == "message_end"
    assert {event["event"] for event in messages} == {"message"}
    text = "".join(event["answer"] for event in messages)
    assert "".join(f" w{i}" for i in range(500)).startswith(text)
    usage = end["metadata"]["usage"]
    assert_usage(usage, ("0.000625", "0.001875"))
    assert 0 < usage["completion_tokens"] < 500
    charged = -(-(usage["prompt_tokens"] * 500 + usage["completion_tokens"] * 1500) * 10 // 8)
    assert before - house.balance() == charged
    again = await client.stop(end["task_id"], "ann")
    assert (again.status_code, again.json()) == (200, {"result": "success"})


@pytest.mark.parametrize("stranger", ["another user", "no user", "another app", "another key's default app"])
async def test_only_the_task_s_own_app_and_user_stop_it(house: House, stranger: str) -> None:
    house.up.hold()
    house.up.script(Script(pieces=("alpha", " beta", " gamma", " delta"), hold_at=2))
    client = dify(house, "remote")
    async with client.stream({"name": "Ann"}, user="ann") as stream:
        first = await stream.next()
        assert first is not None
        task = first["task_id"]
        match stranger:
            case "another user":
                answer = await client.stop(task, "bob")
            case "no user":
                answer = await client.send("POST", f"/completion-messages/{task}/stop", json={})
            case "another app":
                answer = await dify(house, "story").stop(task, "ann")
            case _:
                answer = await dify(house).stop(task, "ann")
        assert (answer.status_code, answer.json()) == (200, {"result": "success"})
        house.up.release()
        *messages, end = await stream.rest()
    assert "".join(event["answer"] for event in [first, *messages]) == "alpha beta gamma delta"
    assert end["event"] == "message_end"


@pytest.mark.parametrize("task", ["unknown", str(uuid.UUID(int=1))])
async def test_stopping_an_unknown_task_is_a_success_too(house: House, task: str) -> None:
    answer = await dify(house, "story").stop(task, "ann")
    assert (answer.status_code, answer.json()) == (200, {"result": "success"})


async def test_an_upstream_failure_mid_stream_is_an_error_event_and_the_end(house: House) -> None:
    house.up.script(Script(pieces=("alpha", " beta", " gamma"), error_at=2))
    async with dify(house, "remote").stream({"name": "Ann"}) as stream:
        *messages, last = await stream.rest()
    assert "".join(event["answer"] for event in messages) == "alpha beta"
    assert set(last) == {"event", "task_id", "message_id", "created_at", "code", "message", "status"}
    assert (last["event"], last["code"], last["status"]) == ("error", "completion_request_error", 400)


async def test_the_parameters_show_the_app_s_form(house: House) -> None:
    response = await dify(house, "remote").parameters()
    assert response.status_code == 200
    form = response.json()["user_input_form"]
    assert [list(field) for field in form] == [["select"], ["paragraph"], ["number"]]
    select, paragraph, number = (next(iter(field.values())) for field in form)
    assert (select["variable"], select["options"], select["default"], select["required"]) == (
        "greeting", ["Hello", "Bye"], "Hello", False,
    )  # fmt: skip
    assert (paragraph["variable"], paragraph["required"]) == ("name", True)
    assert number["variable"] == "age"
    story = (await dify(house, "story").parameters()).json()["user_input_form"]
    assert story == [
        {
            "text-input": {
                "label": "Topic",
                "variable": "topic",
                "required": True,
                "default": "",
                "max_length": 48,
            }
        }
    ]
    default = (await dify(house).parameters()).json()["user_input_form"]
    assert [field["paragraph"]["variable"] for field in default] == ["query"]


@pytest.mark.parametrize("base", ["/v1", ""])
async def test_info_names_the_app(house: House, base: str) -> None:
    response = await dify(house, "story", base).send("GET", "/info", params={"user": "abc-123"})
    assert response.status_code == 200
    assert response.json()["name"] == "story"
    assert response.json()["description"] == "Tells a story."
    assert (await dify(house).send("GET", "/info")).json()["name"] == "default"
