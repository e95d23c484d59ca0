"""Processes that are killed: the gateway between hold and settle, and the engine under its requests."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio
from tests.support.catalogue import INPUT, OUTPUT, catalogue, model, provider
from tests.support.client import BOTH_WAYS, DIALECTS, MAX_TOKENS, Client, Dialect, error_of
from tests.support.script import Script
from tests.support.site import Site, open_site

from headgate.core.accounts import UsageRow
from headgate.core.money import NanoUSD

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

NANO = 10**9
CHECKPOINT_SECONDS = 1.0
"""How far apart the checkpoints of a running stream may be."""

CREDIT_SECONDS = 1.0
"""How soon a running server must know what the command line did."""

RESTART_SECONDS = 30.0
NAMES = ("plain", "held", "held-after-2", "slow", "silent", "status-500", "error-event")
PER_MILLION = {"demo": (100, 400)}
"""Nano-USD per token of models that have other prices than the upstream's."""

SEED = int(os.environ.get("CRASH_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


def toml(url: str) -> str:
    narrow = provider("narrow", url, "max_concurrency = 1")
    return catalogue(url, NAMES) + narrow + model("narrow", provider="narrow", upstream_name="held")


@pytest_asyncio.fixture(loop_scope="module")
async def doomed(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway of the test's own, which it may kill."""
    async with open_site(toml, tmp_path) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with open_site(toml, tmp_path_factory.mktemp("faults")) as site:
        yield site


def owed(row: UsageRow) -> int:
    """What the row's tokens cost."""
    prompt, completion = PER_MILLION.get(row.model, (INPUT, OUTPUT))
    return row.prompt_tokens * prompt + row.completion_tokens * completion


def whole_again(site: Site, account: str, credit: int) -> list[UsageRow]:
    """The rows of an account whose holds were all resolved, and whose balance is what they leave."""
    report = site.books.check()
    assert (report.open_holds, report.held) == (0, 0)
    rows = site.books.rows(account)
    balance = site.books.balance(account)
    assert (balance.held, balance.open_holds) == (0, 0)
    assert balance.balance == credit - sum(row.price for row in rows)
    assert all(row.price + row.excess == owed(row) for row in rows), rows
    return rows


# The gateway


async def test_a_killed_gateway_charges_what_its_streams_had_written_down(doomed: Site) -> None:
    talking, mute, queued, blocking = [await doomed.client() for _ in range(4)]
    clients = {"talking": talking, "mute": mute, "queued": queued, "blocking": blocking}
    listeners = [
        await talking.stream(DIALECTS[number % len(DIALECTS)], "held-after-2") for number in range(10)
    ]
    for listener in listeners:
        await listener.hear(2)
    asking = [
        asyncio.ensure_future(ended(mute.stream(DIALECTS[number % len(DIALECTS)], "held")))
        for number in range(10)
    ]
    await doomed.request(19)
    asking.append(asyncio.ensure_future(ended(blocking.blocking("openai", "narrow"))))
    await doomed.request(20)
    # Nothing says when a checkpoint was made; that it has been after this time is what is promised.
    await asyncio.sleep(CHECKPOINT_SECONDS + 0.2)
    # The only turn is taken, so this one waits for it, and has nothing to write down.
    asking.append(asyncio.ensure_future(ended(queued.stream("openai", "narrow"))))
    for kind, number in (("talking", 10), ("mute", 10), ("queued", 1), ("blocking", 1)):
        await doomed.books.held(clients[kind].account, number)
    assert doomed.asked == 21
    await doomed.server.kill()
    assert doomed.books.check().open_holds == 22
    await asyncio.gather(*asking)

    await doomed.server.start()
    rows = {kind: whole_again(doomed, client.account, 10 * NANO) for kind, client in clients.items()}
    assert [len(rows[kind]) for kind in clients] == [10, 10, 1, 1]
    assert all(row.error is not None for kind in rows for row in rows[kind])
    for row in rows["talking"]:
        assert row.price > 0
        assert row.prompt_tokens > 0
        assert 0 < row.completion_tokens <= len("alpha beta")
    for row in (*rows["mute"], *rows["queued"], *rows["blocking"]):
        assert row.price == 0  # nothing was delivered: an answer that never came

    # What was known before is still known, and the money can be spent again.
    async with (
        aiohttp.ClientSession(doomed.server.url) as session,
        session.get("/v1/balance", headers={"Authorization": f"Bearer {talking.key}"}) as response,
    ):
        assert response.status == 200
        assert (await response.json())["held"] == "0"
    again = await doomed.client()
    assert (await again.blocking("openai", "plain"))[0] == 200


async def test_wherever_the_gateway_is_killed_the_books_are_right_after_the_restart(doomed: Site) -> None:
    print(f"CRASH_SEED={SEED}")
    chance = random.Random(SEED)
    credit = 0
    account = ""
    for _ in range(3):
        doomed.mark()
        if not account:
            client = await doomed.client()
            account, credit = client.account, 10 * NANO
        else:
            client = Client(doomed.server.url, doomed.books, account)
        before = len(doomed.books.rows(account))
        answered = 0

        async def one(client: Client = client) -> None:
            nonlocal answered
            dialect, stream = chance.choice(BOTH_WAYS)
            wanted = chance.choice(
                ("plain", "slow", "held-after-2", "held", "status-500", "error-event", "demo")
            )
            if dialect == "dify" and wanted == "demo":
                wanted = "plain"
            async with await client.send(
                client.ask(dialect, wanted, stream=stream, max_tokens=100)
            ) as response:
                await response.read()
                answered += response.status == 200 and not stream

        requests = [asyncio.ensure_future(ended(one())) for _ in range(40)]
        await asyncio.sleep(chance.uniform(0.0, 1.5))
        await doomed.server.kill()
        await asyncio.gather(*requests)
        await client.session.close()

        await doomed.server.start()
        rows = whole_again(doomed, account, credit)
        assert answered <= len(rows) - before <= 40, SEED


async def ended(asking: Awaitable[object]) -> None:
    """Wait until it was answered or its connection broke."""
    with contextlib.suppress(aiohttp.ClientError, OSError, AssertionError):
        await asking


# The engine


def engine(site: Site) -> psutil.Process:
    """The engine's process. The gateway has no other children."""
    (child,) = psutil.Process(site.server.pid).children()
    return child


async def engine_up(client: Client) -> None:
    """Wait until the engine answers again."""
    async with asyncio.timeout(RESTART_SECONDS):
        while True:
            status, answer = await client.get("/readyz")
            assert status == 200, answer
            (state,) = [engine["state"] for engine in answer["engines"].values()]
            if state == "up":
                return
            await asyncio.sleep(0.02)


LONG = {"text": "Once upon a time", "max_tokens": 250}
MANY = 64
"""Choices; with so many the engine is still busy when it is killed."""


async def test_when_the_engine_is_killed_streams_fail_and_are_settled_and_the_next_request_works(
    site: Site,
) -> None:
    site.mark()
    one, several = await site.client(), await site.client()
    choices = await one.stream("openai", "demo", n=MANY, **LONG)
    models = await several.stream("thiggle", ["plain", *["demo"] * 15], **LONG)
    await choices.hear(1)
    await models.hear(1)
    engine(site).send_signal(signal.SIGSTOP)  # so that nothing more comes to an end meanwhile
    held = await site.books.held(one.account)
    engine(site).kill()

    assert await choices.finish() == "error"
    assert choices.last["error"]["type"] == "server_error"
    (row,) = await site.books.settled(one.account)
    assert (row.error, row.source) == ("upstream_failed", "tokenizer")
    assert 0 < row.price == owed(row) < held
    assert len(choices.texts) <= row.completion_tokens < MANY * 250

    assert await models.finish() == "completed"  # not every model failed
    ends = [choice for event in models.events for choice in event["choices"] if "error" in choice]
    assert {(choice["model"], choice["text"], choice["finish_reason"]) for choice in ends} == {
        ("demo", "", "error")
    }
    rows = await site.books.settled(several.account, 16)
    assert all(row.price == owed(row) for row in rows)
    assert len([row for row in rows if row.error is not None]) == len(ends)
    assert rows[0].error is None
    assert rows[0].price > 0

    await engine_up(one)
    status, answer = await one.blocking("openai", "demo", max_tokens=4)
    assert status == 200, answer
    site.books.check()


async def test_blocking_answers_that_the_engine_breaks_are_not_charged(site: Site) -> None:
    site.mark()
    several, one = await site.client(), await site.client()
    site.up.script(Script(hold_at=0))
    before = engine(site).cpu_times().user
    models = asyncio.ensure_future(several.blocking("thiggle", ["plain", *["demo"] * 15], **LONG))
    choices = asyncio.ensure_future(one.blocking("openai", "demo", n=MANY, **LONG))
    await site.request()
    await site.books.held(one.account)
    async with asyncio.timeout(10):
        # So that it gave something, but far from all.
        while engine(site).cpu_times().user < before + 0.1:  # noqa: ASYNC110  # it comes true in another process
            await asyncio.sleep(0.005)
    engine(site).kill()
    site.up.release()

    status, answer = await choices
    assert status in {500, 503}, answer
    (row,) = await site.books.settled(one.account)
    assert row.error is not None
    assert site.books.balance(one.account).balance == 10 * NANO

    status, answer = await models
    assert status == 200, answer
    rows = await site.books.settled(several.account, 16)
    failed = [choice["finish_reason"] == "error" for choice in answer["choices"]]
    assert [row.error is not None for row in rows] == failed
    assert any(failed)
    assert not failed[0]
    for row in rows:
        assert row.price == (0 if row.error is not None else owed(row))
    assert site.books.balance(several.account).balance == 10 * NANO - sum(row.price for row in rows)
    await engine_up(one)


async def test_while_the_engine_is_down_its_model_is_refused_for_the_moment_and_costs_nothing(
    site: Site,
) -> None:
    client = await site.client()
    questions = [
        (dialect, client.ask(dialect, "default" if dialect == "dify" else "demo", stream=stream))
        for dialect, stream in BOTH_WAYS
    ]
    engine(site).kill()  # at first the gateway does not even know
    for dialect, question in questions:
        async with await client.send(question) as response:
            answer = await response.json()
            assert response.status == 503, answer
            assert 1 <= int(response.headers["Retry-After"]) <= 120
        kinds = {"genstack": "GatewayError", "dify": "completion_request_error"}
        assert error_of(dialect, answer) == kinds.get(dialect, "server_error")
    balance = site.books.balance(client.account)
    assert (balance.balance, balance.held, balance.open_holds) == (10 * NANO, 0, 0)
    assert all(row.price == 0 and row.error is not None for row in site.books.rows(client.account))
    # The other models do not mind.
    assert (await client.blocking("openai", "plain"))[0] == 200
    assert (await client.get("/livez"))[0] == 200
    await engine_up(client)


# The command line beside the server


async def soon(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(CREDIT_SECONDS):
        while not await condition():  # noqa: ASYNC110  # it comes true in another process
            await asyncio.sleep(0.02)


async def test_credit_from_the_command_line_can_be_spent_at_once(site: Site) -> None:
    client = await site.client(0)
    status, _ = await client.blocking("openai", "plain")
    assert status == 402
    await site.server.cli("accounts", "credit", client.account, "1")

    async def works() -> bool:
        return (await client.blocking("openai", "plain"))[0] == 200

    await soon(works)
    (row,) = await site.books.settled(client.account)
    assert site.books.balance(client.account).balance == NANO - row.price


async def test_a_key_and_a_token_revoked_on_the_command_line_stop_working_within_a_second(site: Site) -> None:
    client = await site.client()
    assert (await client.blocking("openai", "plain"))[0] == 200  # so that both are known to the server
    assert (await client.blocking("genstack", "plain"))[0] == 200
    await site.server.cli("keys", "revoke", client.key)
    dialects: dict[Dialect, str] = {"openai": "keys", "genstack": "tokens"}
    for dialect in dialects:
        if dialect == "genstack":
            await site.server.cli("tokens", "revoke", client.token)

        async def refused(dialect: Dialect = dialect) -> bool:
            return (await client.blocking(dialect, "plain"))[0] == 401

        await soon(refused)


async def test_accounts_and_keys_made_beside_the_server_work_at_once(site: Site) -> None:
    key = await site.server.account("newcomer", "0.5")
    async with (
        aiohttp.ClientSession(site.server.url) as session,
        session.get("/v1/balance", headers={"Authorization": f"Bearer {key}"}) as response,
    ):
        assert response.status == 200
        assert (await response.json())["balance"] == "0.5"


async def test_the_command_line_leaves_the_running_servers_holds_alone(site: Site) -> None:
    site.mark()
    client = await site.client()
    asking = asyncio.ensure_future(client.blocking("openai", "held"))
    await site.request()
    held = await site.books.held(client.account)
    assert held == len("one two three") * INPUT + MAX_TOKENS * OUTPUT
    await site.server.cli("accounts", "credit", client.account, "0.000000001")
    shown = await site.server.cli("accounts", "show", client.account)
    assert (shown["held_nano_usd"], shown["open_holds"]) == (held, 1)
    check = await site.server.cli("ledger", "check")
    assert (check["ok"], check["open_holds"], check["held_nano_usd"]) == (True, 1, held)
    site.up.release()
    assert (await asking)[0] == 200
    (row,) = await site.books.settled(client.account)
    assert site.books.balance(client.account).balance == NanoUSD(10 * NANO + 1 - row.price)
