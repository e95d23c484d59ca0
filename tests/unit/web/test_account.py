"""GET /v1/models and /v1/models/{id} over the built-in catalogue, with one provider's key and without the others'."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.support.exchange import Exchange, scope_of
from tests.support.inside import Inside, inside

from headgate.providers.fake import Fake

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    folder = tmp_path_factory.mktemp("models")
    fakes = {name: Fake(name) for name in ("acme", "embedded", "openai")}
    async with inside(folder, fakes) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def headers(gateway: Inside) -> dict[str, str]:
    return {"authorization": f"Bearer {gateway.caller('models').key}"}


async def get(gateway: Inside, url: str, headers: dict[str, str]) -> Any:
    path, _, query = url.partition("?")
    exchange = Exchange(b"", scope=scope_of("GET", path, headers) | {"query_string": query.encode()})
    await gateway.app(exchange.scope, exchange.receive, exchange.send)
    assert exchange.status == 200
    return exchange.json


async def test_the_list_is_of_models_and_the_full_one_of_retired_names_too(
    gateway: Inside, headers: dict[str, str]
) -> None:
    listed = {row["id"]: row for row in (await get(gateway, "/v1/models", headers))["data"]}
    assert "gpt-4.1" in listed
    assert not {"gpt-4", "claude-opus-5-5"} & set(listed)
    full = {row["id"]: row for row in (await get(gateway, "/v1/models?all=true", headers))["data"]}
    assert (full["gpt-4"]["successor"], full["gpt-4"]["available"]) == ("gpt-4.1", True)
    assert full["gpt-4"]["pricing"] == full["gpt-4.1"]["pricing"]
    assert "successor" not in full["gpt-4.1"]
    retired = full["claude-3-opus-20240229"]
    assert (retired["successor"], retired["available"]) == ("claude-opus-4-6", False)
    assert "ANTHROPIC_API_KEY" in retired["reason"]


async def test_a_retired_name_is_shown_as_its_successor(gateway: Inside, headers: dict[str, str]) -> None:
    for name in ("gpt-4", "gpt-4-0613", "openai/gpt-4"):
        shown = await get(gateway, f"/v1/models/{name}", headers)
        assert shown == await get(gateway, "/v1/models/gpt-4.1", headers)
        assert shown["id"] == "gpt-4.1"


async def test_capabilities_say_who_sees_and_who_calls_functions(
    gateway: Inside, headers: dict[str, str]
) -> None:
    seeing = (await get(gateway, "/v1/models/gpt-4o", headers))["capabilities"]
    assert (seeing["vision"], seeing["tools"], seeing["logprobs"]) == (True, True, True)
    reasoning = (await get(gateway, "/v1/models/gpt-6-luna", headers))["capabilities"]
    assert (reasoning["vision"], reasoning["tools"], reasoning["logprobs"]) == (True, False, False)
