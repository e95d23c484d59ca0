"""Every dialect in front of upstreams that speak neither OpenAI's format: Anthropic's and Cohere's."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.support.anthropic_upstream import AnthropicUpstream
from tests.support.catalogue import CACHED, INPUT, OUTPUT, model, provider
from tests.support.client import BOTH_WAYS, Client, Dialect, texts_of
from tests.support.cohere_upstream import CohereUpstream
from tests.support.script import Script
from tests.support.site import Site, open_site
from tests.support.until import until
from tests.support.upstream import Upstream

from headgate.core.accounts import UsageRow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

KINDS: dict[str, type[Upstream]] = {"anthropic": AnthropicUpstream, "cohere": CohereUpstream}
LIMITS: dict[str, str] = {"anthropic": "max_tokens", "cohere": "MAX_TOKENS"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    kind: str = request.param

    def toml(url: str) -> str:
        rows = provider("acme", url).replace('"openai"', f'"{kind}"')
        return rows + "".join(model(name, mode="chat") for name in ("plain", "held-after-2", "status-529"))

    async with open_site(toml, tmp_path_factory.mktemp(kind), KINDS[kind]) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def client(site: Site) -> AsyncIterator[Client]:
    site.mark()
    yield await site.client()


def limit_of(site: Site) -> str:
    return LIMITS[next(kind for kind, speaks in KINDS.items() if isinstance(site.up, speaks))]


def price_of(row: UsageRow) -> int:
    fresh = row.prompt_tokens - row.cached_tokens
    return fresh * INPUT + row.cached_tokens * CACHED + row.completion_tokens * OUTPUT


async def text_of(client: Client, dialect: Dialect, stream: bool, name: str = "plain", **fields: Any) -> str:
    if stream:
        listener = await client.stream(dialect, name, **fields)
        assert await listener.finish() == "completed"
        return listener.text
    status, answer = await client.blocking(dialect, name, **fields)
    assert status == 200, answer
    return "".join(texts_of(answer))


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_an_answer_reaches_every_dialect_and_is_charged_by_the_upstreams_figures(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    site.up.on("plain", Script(pieces=("Hel", "lo ", "日本")))
    assert await text_of(client, dialect, stream) == "Hello 日本"
    (row,) = await site.books.settled(client.account)
    assert (row.source, row.provider, row.error) == ("provider", "acme", None)
    assert row.price == price_of(row) > 0
    asked = (await site.request()).json
    assert asked["max_tokens"] == 64
    assert asked["messages"][-1]["content"]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_and_choices_are_single_calls_put_back_in_order(
    site: Site, client: Client, stream: bool
) -> None:
    site.up.on("plain", Script())
    fields: dict[str, Any] = {"text": ["one", "two"], "n": 2}
    if stream:
        listener = await client.stream("openai", "plain", **fields)
        assert await listener.finish() == "completed"
        choices = [choice for event in listener.events for choice in event["choices"]]
    else:
        status, answer = await client.blocking("openai", "plain", **fields)
        assert status == 200
        choices = answer["choices"]
    texts = {
        index: "".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(4)
    }
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert site.asked == 4
    (row,) = await site.books.settled(client.account)
    assert row.price == price_of(row)


async def test_a_limit_that_was_reached_is_said(site: Site, client: Client) -> None:
    site.up.on("plain", Script(pieces=("a",), finish=limit_of(site)))
    _, answer = await client.blocking("openai", "plain")
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"text": [1, 2]}, "prompt"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
    ],
    ids=str,
)
async def test_what_the_upstream_has_no_words_for_is_refused_by_name(
    site: Site, client: Client, fields: dict[str, Any], param: str
) -> None:
    status, answer = await client.blocking("openai", "plain", **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["code"] == "unsupported_parameter"
    assert site.asked == 0
    assert site.books.rows(client.account) == []


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_an_overloaded_upstream_is_503_and_costs_nothing(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    ask = client.ask(dialect, "status-529", stream=stream)
    async with await client.send(ask) as response:
        assert response.status == 503
    (row,) = await site.books.settled(client.account)
    assert (row.price, row.error) == (0, "upstream_unavailable")


async def test_a_client_that_leaves_closes_the_upstream_and_pays_for_what_came(
    site: Site, client: Client
) -> None:
    listener = await client.stream("chat", "held-after-2")
    await listener.hear(2)
    received = await site.request()
    listener.leave()
    await until(received.closed.is_set)
    (row,) = await site.books.settled(client.account)
    assert row.completion_tokens > 0 and row.price > 0
