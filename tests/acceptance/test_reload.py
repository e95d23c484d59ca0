"""A running server takes up a changed catalogue, all or nothing, by SIGHUP and by `headgate reload`."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests.support.books import Books
from tests.support.client import Client
from tests.support.script import Script
from tests.support.server import Server
from tests.support.steady import steady
from tests.support.until import until
from tests.support.upstream import Upstream

pytestmark = pytest.mark.process

PROVIDER = """
[providers.{name}]
kind = "openai"
base_url = "{url}"
"""
MODEL = """
[[models]]
name = "{name}"
provider = "{provider}"
upstream_name = "plain"
mode = "both"
context_window = 8192
max_output_tokens = 4096
input_price = "{price}"
output_price = "1.50"
"""
APP = """
[apps.story]
model = "{model}"
prompt = "{{{{query}}}}"
variables = [{{ name = "query", type = "paragraph", required = true }}]
"""


class Place:
    """A server whose configuration is rewritten, its books, and a client with money."""

    def __init__(self, server: Server, up: Upstream, client: Client, config: Path) -> None:
        self.server = server
        self.up = up
        self.client = client
        self.config = config

    def write(self, *parts: str) -> None:
        self.config.write_text(steady(PROVIDER.format(name="acme", url=self.up.url) + "".join(parts)))

    async def names(self) -> set[str]:
        _, body = await self.client.get("/v1/models", {"Authorization": f"Bearer {self.client.key}"})
        return {row["id"] for row in body["data"]}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        up = await stack.enter_async_context(Upstream())
        first = PROVIDER.format(name="acme", url=up.url) + MODEL.format(
            name="old", provider="acme", price="0.50"
        )
        server = await stack.enter_async_context(Server(first, folder=tmp_path))
        books = stack.enter_context(Books(server))
        books.open("ann", 10**10)
        client = await stack.enter_async_context(Client(server.url, books, "ann"))
        yield Place(server, up, client, tmp_path / "test.toml")


async def test_new_models_and_prices_are_served_and_the_command_says_what_changed(place: Place) -> None:
    place.write(
        MODEL.format(name="old", provider="acme", price="5.00"),
        MODEL.format(name="new", provider="acme", price="1.00"),
    )
    report = await place.server.cli("reload")
    assert report["added"] == ["acme/new"]
    assert (report["changed"], report["removed"], report["needs_restart"]) == (["acme/old"], [], [])
    assert {"old", "new"} <= await place.names()
    status, answer = await place.client.blocking("openai", "new")
    assert (status, answer["model"]) == (200, "new")
    place.write(MODEL.format(name="new", provider="acme", price="1.00"))
    assert (await place.server.cli("reload"))["removed"] == ["acme/old"]
    assert (await place.client.blocking("openai", "old"))[0] == 404


async def test_a_signal_is_enough(place: Place) -> None:
    place.write(MODEL.format(name="signalled", provider="acme", price="1.00"))
    os.kill(place.server.pid, signal.SIGHUP)
    async with asyncio.timeout(10):
        while "signalled" not in await place.names():  # noqa: ASYNC110  # another process: nothing to wait on
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[[models]\n", "not valid TOML"),
        (MODEL.format(name="bad", provider="acme", price="cheap"), "models[0].input_price"),
        (MODEL.format(name="bad", provider="nobody", price="1"), "models[0].provider"),
        ('[providers.odd]\nkind = "magic"\nbase_url = "http://127.0.0.1:1"\n', "providers"),
        (MODEL.format(name="bad", provider="acme", price="1") + 'fallbacks = ["nobody"]\n', "fallbacks"),
        ("[server]\nmax_body_bytes = 0\n", "server.max_body_bytes"),
    ],
)
async def test_a_broken_file_changes_nothing_and_the_reason_is_told(
    place: Place, broken: str, said: str
) -> None:
    before = await place.names()
    place.write(broken)
    refused = await place.server.cli("reload", expect=1)
    assert said in refused["error"]["message"]
    assert "test.toml" in refused["error"]["message"]
    os.kill(place.server.pid, signal.SIGHUP)
    await until(lambda: "reload refused" in place.server.log)
    assert said in place.server.log
    assert await place.names() == before
    assert (await place.client.blocking("openai", "old"))[0] == 200


async def test_an_app_never_loses_its_model(tmp_path: Path) -> None:
    async with Upstream() as up:
        provider = PROVIDER.format(name="acme", url=up.url)
        model = MODEL.format(name="old", provider="acme", price="1")
        async with Server(provider + model + APP.format(model="old"), folder=tmp_path) as server:
            (tmp_path / "test.toml").write_text(provider)
            refused = await server.cli("reload", expect=1)
            assert "apps.story.model" in refused["error"]["message"]


async def test_what_a_reload_does_not_touch_is_named(place: Place) -> None:
    place.write(
        MODEL.format(name="old", provider="acme", price="0.50"), "[limits]\nrequests_per_minute = 9\n"
    )
    assert (await place.server.cli("reload"))["needs_restart"] == ["limits"]


async def test_a_stream_under_way_ends_as_it_began_though_its_provider_is_gone(place: Place) -> None:
    place.up.on("plain", Script(pieces=("one", " two", " three"), hold_at=1))
    listener = await place.client.stream("openai", "old")
    await listener.hear(1)
    async with Upstream() as other:
        place.config.write_text(
            PROVIDER.format(name="other", url=other.url)
            + MODEL.format(name="old", provider="other", price="0.50")
        )
        assert (await place.server.cli("reload"))["providers"] == ["acme", "other"]
        assert (await place.client.blocking("openai", "old"))[0] == 200
        assert len(other.requests) == 1
        place.up.release()
        await listener.finish()
    assert listener.text == "one two three"


async def test_without_a_server_the_command_says_so(tmp_path: Path) -> None:
    server = Server(folder=tmp_path)
    refused = await server.cli("reload", expect=1)
    assert "no server runs on this data folder" in refused["error"]["message"]


async def test_several_who_ask_at_once_all_get_a_report(place: Place) -> None:
    place.write(MODEL.format(name="new", provider="acme", price="1.00"))
    reports = await asyncio.gather(*[place.server.cli("reload") for _ in range(3)])
    assert {report["models"] for report in reports} == {reports[0]["models"]}
    assert sum("acme/new" in report["added"] for report in reports) >= 1
    assert list((place.config.parent / "data").glob("reload-*")) == []


async def test_a_burst_of_signals_harms_nothing(place: Place) -> None:
    for number in range(20):
        place.write(MODEL.format(name=f"m{number}", provider="acme", price="1.00"))
        os.kill(place.server.pid, signal.SIGHUP)
    place.write(MODEL.format(name="last", provider="acme", price="1.00"))
    await place.server.cli("reload")
    assert (await place.client.blocking("openai", "last"))[0] == 200


async def test_a_signal_during_the_start_is_kept_for_later(tmp_path: Path) -> None:
    server = Server(folder=tmp_path)
    starting = asyncio.ensure_future(server.start())
    lock = tmp_path / "data" / "headgate.lock"
    await until(lambda: lock.exists() and lock.read_text().strip())
    os.kill(server.pid, signal.SIGHUP)
    await starting
    await until(lambda: "reloaded" in server.log)
    assert await server.stop() == 0


async def test_the_file_of_the_start_is_the_one_that_counts(place: Place) -> None:
    place.config.unlink()
    os.kill(place.server.pid, signal.SIGHUP)
    await until(lambda: "reload refused" in place.server.log)
    assert (await place.client.blocking("openai", "old"))[0] == 200
