"""SIGTERM: what runs is finished or settled in time, what comes is refused; and two servers never share a folder."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.catalogue import INPUT, OUTPUT, catalogue
from tests.support.client import BOTH_WAYS, DIALECTS, Client, error_of
from tests.support.site import Site, open_site

from headgate.config import Settings

pytestmark = pytest.mark.process

NANO = 10**9
NAMES = ("plain", "held", "held-after-2")
DEADLINE_S = 1.0
EVERY_WAY = len(BOTH_WAYS)
OVERLOADED = {
    "genstack": "GatewayError",
    "dify": "completion_request_error",
    "openai": "server_error",
    "chat": "server_error",
    "thiggle": "server_error",
}


def toml(url: str) -> str:
    return catalogue(url, NAMES)


def short_toml(url: str) -> str:
    return f"[server]\ndrain_deadline_s = {DEADLINE_S}\n{catalogue(url, NAMES)}"


def terminate(site: Site) -> None:
    os.kill(site.server.pid, signal.SIGTERM)


async def draining(client: Client) -> None:
    """Wait until the gateway says that it is not ready; it must go on listening."""
    async with asyncio.timeout(10):
        while True:
            status, answer = await client.get("/readyz")
            if status == 503:
                assert answer["reason"] == "draining"
                return
            assert status == 200


async def exit_status(site: Site, seconds: float = 10) -> int:
    assert site.server.process is not None
    async with asyncio.timeout(seconds):
        return await site.server.process.wait()


async def test_a_draining_server_finishes_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    async with open_site(toml, tmp_path) as site:
        client = await site.client()
        assert (await client.get("/readyz"))[0] == 200
        listeners = [await client.stream(dialect, "held-after-2") for dialect in DIALECTS]
        for listener in listeners:
            await listener.hear(2)
        blocking = [asyncio.ensure_future(client.blocking(dialect, "held")) for dialect in DIALECTS]
        await site.request(EVERY_WAY - 1)
        terminate(site)
        await draining(client)

        for dialect, stream in BOTH_WAYS:
            async with await client.send(client.ask(dialect, "plain", stream=stream)) as response:
                assert response.status == 503
                assert error_of(dialect, await response.json()) == OVERLOADED[dialect]
                assert 1 <= int(response.headers["Retry-After"]) <= 120
        assert (await client.get("/livez"))[0] == 200
        assert site.asked == EVERY_WAY
        assert site.server.process is not None
        assert site.server.process.returncode is None

        site.up.release()
        for listener in listeners:
            assert await listener.finish() == "completed"
            assert listener.text == "alpha beta gamma delta"
        for status, answer in await asyncio.gather(*blocking):
            assert status == 200, answer
        assert await exit_status(site) == 0
        rows = await site.books.settled(client.account, EVERY_WAY)
        for row in rows:
            assert (row.error, row.completion_tokens) == (None, 4)
            assert row.price == row.prompt_tokens * INPUT + 4 * OUTPUT
        assert site.books.check().open_holds == 0


async def test_a_stream_can_still_be_stopped_while_the_server_drains(tmp_path: Path) -> None:
    async with open_site(toml, tmp_path) as site:
        client = await site.client()
        listener = await client.stream("genstack", "held-after-2")
        await listener.hear(2)
        terminate(site)
        await draining(client)
        body = {"streamId": listener.stream_id}
        assert await client.post("/stream/shutdown", body) == (200, {"success": True})
        assert await listener.finish() == "aborted"
        assert await exit_status(site) == 0
        (row,) = await site.books.settled(client.account)
        assert row.price > 0


async def test_what_never_ends_is_stopped_and_settled_before_the_deadline(tmp_path: Path) -> None:
    async with open_site(short_toml, tmp_path) as site:
        client = await site.client()
        listeners = [await client.stream(dialect, "held-after-2") for dialect in DIALECTS]
        for listener in listeners:
            await listener.hear(2)
        blocking = {dialect: asyncio.ensure_future(client.blocking(dialect, "held")) for dialect in DIALECTS}
        await site.request(EVERY_WAY - 1)
        terminate(site)
        # The process also closes its engine and connections, within moments.
        assert await exit_status(site, DEADLINE_S + 2) == 0

        for listener in listeners:
            assert await listener.finish() == ("aborted" if listener.dialect == "genstack" else "error")
            assert listener.text == "alpha beta"
        for dialect, answered in blocking.items():
            status, answer = await answered
            assert (status, error_of(dialect, answer)) == (503, OVERLOADED[dialect])
        for index in range(EVERY_WAY):
            async with asyncio.timeout(1):
                await (await site.request(index)).closed.wait()
        rows = await site.books.settled(client.account, EVERY_WAY)
        for row in rows:
            if row.stream:
                assert 0 < row.price == row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT
                assert row.completion_tokens > 0
            else:
                assert row.price == 0  # the answer was an error
            assert row.error is not None
        assert site.books.balance(client.account).balance == 10 * NANO - sum(row.price for row in rows)
        assert site.books.check().open_holds == 0


async def test_a_second_signal_does_not_wait_and_still_settles(tmp_path: Path) -> None:
    async with open_site(toml, tmp_path) as site:
        client = await site.client()
        listener = await client.stream("openai", "held-after-2")
        await listener.hear(2)
        terminate(site)
        await draining(client)
        os.kill(site.server.pid, signal.SIGINT)
        assert await exit_status(site) == 0
        assert await listener.finish() == "error"
        (row,) = await site.books.settled(client.account)
        assert row.price > 0
        assert site.books.check().open_holds == 0


async def test_an_idle_server_ends_at_once(tmp_path: Path) -> None:
    async with open_site(toml, tmp_path) as site:
        client = await site.client()
        assert (await client.blocking("openai", "plain"))[0] == 200  # leaves a kept-alive connection
        terminate(site)
        assert await exit_status(site, 5) == 0


async def test_a_second_server_on_the_same_folder_says_so_and_harms_nothing(tmp_path: Path) -> None:
    async with open_site(toml, tmp_path) as site:
        client = await site.client()
        listener = await client.stream("openai", "held-after-2")
        await listener.hear(2)
        held = await site.books.held(client.account)
        code, out, err = await second(site.server.settings)
        assert code == 1
        assert "ready" not in out
        assert "another server" in err
        assert str(site.server.settings.data_dir) in err
        assert re.search(rf"\b{site.server.pid}\b", err)
        assert "Traceback" not in err

        # It did not take the first one's holds for leftovers.
        balance = site.books.balance(client.account)
        assert (balance.held, balance.open_holds) == (held, 1)
        site.up.release()
        assert await listener.finish() == "completed"
        (row,) = await site.books.settled(client.account)
        assert (row.error, row.price) == (None, 3 * INPUT + 4 * OUTPUT)
        assert (await client.blocking("openai", "plain"))[0] == 200


async def second(settings: Settings) -> tuple[int | None, str, str]:
    """A further `headgate serve` with the same configuration and folder: exit status, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "headgate", "serve", "--port", "0", "--config", settings.source,
        env=dict(settings.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()
