"""Streams that do not come to their own end: clients that leave, streams that are stopped, idle ones, late failures."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
from tests.support.catalogue import INPUT, OUTPUT, catalogue, model, provider
from tests.support.client import DIALECTS, MAX_TOKENS, Client, Dialect, Listener
from tests.support.script import Script
from tests.support.site import Site, open_site
from tests.support.upstream import Received

from headgate.core.accounts import UsageRow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

NANO = 10**9
CLOSE_SECONDS = 1.0
"""How soon the upstream must see that nobody wants its answer any more."""

PIECES = tuple(f" piece{number:02}" for number in range(12))
NAMES = ("plain", "held", "held-after-2", "scripted", "error-event", "cut")


def toml(url: str) -> str:
    narrow = provider("narrow", url, "max_concurrency = 1")
    return catalogue(url, NAMES) + narrow + model("narrow", provider="narrow", upstream_name="held")


def idle_toml(url: str) -> str:
    return f"""
[server]
ping_interval_s = 0.05
first_chunk_wait_s = 0.2
write_timeout_s = 0.3
{catalogue(url, NAMES)}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with open_site(toml, tmp_path_factory.mktemp("streams")) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A gateway that soon sends its headers, and pings often."""
    async with open_site(idle_toml, tmp_path_factory.mktemp("idle")) as site:
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def client(site: Site) -> Client:
    site.mark()
    return await site.client()


@pytest_asyncio.fixture(loop_scope="module")
async def idle(impatient: Site) -> Client:
    impatient.mark()
    return await impatient.client()


async def closed(request: Received) -> None:
    """The upstream's connection is gone in time."""
    async with asyncio.timeout(CLOSE_SECONDS):
        await request.closed.wait()


def charged_for_a_part(site: Site, client: Client, row: UsageRow, held: int) -> None:
    """More than nothing, less than the hold, and exactly what the row's tokens cost."""
    assert 0 < row.price == row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT < held
    assert row.excess == 0
    assert row.source in {"estimate", "tokenizer"}
    balance = site.books.balance(client.account)
    assert (balance.balance, balance.held, balance.open_holds) == (10 * NANO - row.price, 0, 0)


# Clients that leave


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("pieces", [1, 5, 11])
async def test_a_client_that_leaves_its_stream_is_charged_once_for_what_came(
    site: Site, client: Client, dialect: Dialect, pieces: int
) -> None:
    site.up.script(Script(pieces=PIECES, hold_at=pieces))
    listener = await client.stream(dialect, "scripted")
    await listener.hear(pieces)
    held = await site.books.held(client.account)
    listener.leave()
    await closed(await site.request())
    (row,) = await site.books.settled(client.account)
    charged_for_a_part(site, client, row, held)
    # A token is at least a byte, and no model's tokens are longer than all that came.
    assert 1 <= row.completion_tokens <= len("".join(PIECES[:pieces]))
    assert row.stream is True
    assert site.asked == 1


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_who_leaves_before_the_first_piece_is_charged_the_prompt(
    site: Site, client: Client, dialect: Dialect
) -> None:
    for number, stream in enumerate((True, False), start=1):
        question = client.ask(dialect, "held", stream=stream)
        asking = asyncio.ensure_future(client.send(question))
        request = await site.request(number - 1)
        await site.books.held(client.account)
        asking.cancel()
        await closed(request)
        row = (await site.books.settled(client.account, number))[-1]
        assert (row.completion_tokens, row.stream) == (0, stream)
        assert 0 < row.price == row.prompt_tokens * INPUT
        assert row.prompt_tokens <= len("one two three") + 2 * 16  # bytes, and a conversation's frame


async def test_a_half_open_request_body_holds_nothing(site: Site, client: Client) -> None:
    host, port = site.server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer " + client.key.encode() + b'\r\nContent-Length: 500\r\n\r\n{"model": "plain"'
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    status, _ = await client.blocking("openai", "plain")
    assert (status, site.asked) == (200, 1)
    assert len(await site.books.settled(client.account)) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_before_the_upstream_was_asked_is_charged_nothing(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    first = await site.client()
    taking = asyncio.ensure_future(first.blocking("openai", "narrow"))
    await site.request(0)
    waiting = asyncio.ensure_future(client.send(client.ask(dialect, "narrow", stream=stream)))
    await site.books.held(client.account)  # the hold is made, and the only turn is taken
    waiting.cancel()
    (row,) = await site.books.settled(client.account)
    assert (row.price, row.prompt_tokens, row.completion_tokens) == (0, 0, 0)
    assert site.books.balance(client.account).balance == 10 * NANO
    assert site.asked == 1
    site.up.release()
    assert (await taking)[0] == 200


async def test_a_client_of_several_models_that_leaves_pays_each_models_part(
    site: Site, client: Client
) -> None:
    site.up.script(
        Script(pieces=PIECES, hold_at=3), Script(pieces=PIECES, hold_at=3), Script(pieces=("done",))
    )
    listener = await client.stream("thiggle", ["scripted", "scripted", "plain"])
    await listener.until(lambda heard: len(heard.texts) == 7)
    held = await site.books.held(client.account)
    listener.leave()
    for request in [await site.request(index) for index in range(3)]:
        if not request.answered.is_set():
            await closed(request)
    rows = await site.books.settled(client.account, 3)
    assert all(row.price > 0 for row in rows)
    assert sum(row.price for row in rows) < held
    assert site.books.balance(client.account).balance == 10 * NANO - sum(row.price for row in rows)


async def test_who_leaves_the_embedded_model_pays_the_tokens_it_made(site: Site, client: Client) -> None:
    # Far more than it can make before we are gone.
    listener = await client.stream("openai", "demo", n=64, max_tokens=250, text="Once upon a time")
    await listener.hear(1)
    held = await site.books.held(client.account)
    listener.leave()
    (row,) = await site.books.settled(client.account)
    assert row.source == "tokenizer"
    assert row.prompt_tokens > 0
    assert 0 < row.completion_tokens < 64 * 250
    assert 0 < row.price == row.prompt_tokens * 100 + row.completion_tokens * 400 < held
    # Its slots are free again at once.
    async with asyncio.timeout(CLOSE_SECONDS):
        status, _ = await client.blocking("openai", "demo", max_tokens=1)
    assert status == 200


async def test_leaving_after_the_end_changes_nothing(site: Site, client: Client) -> None:
    listener = await client.stream("openai", "plain")
    assert await listener.finish() == "completed"
    listener.leave()
    (row,) = await site.books.settled(client.account)
    assert row.price == 3 * INPUT + 4 * OUTPUT


# Streams that are stopped


async def begun(site: Site, client: Client, dialect: Dialect, pieces: int = 2) -> tuple[Listener, int]:
    """A stream that gave so many pieces and gives no more, and what is held for it."""
    site.up.script(Script(pieces=PIECES, hold_at=pieces))
    listener = await client.stream(dialect, "scripted")
    await listener.hear(pieces)
    return listener, await site.books.held(client.account)


@pytest.mark.parametrize("with_token", [False, True])
async def test_shutdown_ends_a_stream_as_aborted_and_charges_what_came(
    site: Site, client: Client, with_token: bool
) -> None:
    listener, held = await begun(site, client, "genstack")
    body = {"streamId": listener.stream_id} | ({"genstackToken": client.token} if with_token else {})
    async with asyncio.timeout(CLOSE_SECONDS):
        assert await client.post("/stream/shutdown", body) == (200, {"success": True})
        assert await listener.finish() == "aborted"
        await (await site.request()).closed.wait()
    (row,) = site.books.rows(client.account)
    charged_for_a_part(site, client, row, held)
    response = listener.last["response"]
    assert response["output"] == listener.text == "".join(PIECES[:2])
    assert response["model"] == "scripted"
    assert Decimal(response["usage"]["price"]) * NANO == row.price
    assert response["usage"]["completionTokens"] == row.completion_tokens
    before, after = Decimal(response["balanceBefore"]), Decimal(response["balanceAfter"])
    assert (before - after) * 100_000 == row.price  # nano-USD in a credit


async def test_a_stream_that_was_shut_down_or_has_ended_is_unknown(site: Site, client: Client) -> None:
    listener, _ = await begun(site, client, "genstack")
    stopped = {"streamId": listener.stream_id}
    assert (await client.post("/stream/shutdown", stopped))[0] == 200
    await listener.finish()
    ended = await client.stream("genstack", "plain")
    assert await ended.finish() == "completed"
    for body in (stopped, {"streamId": ended.stream_id}, {"streamId": "0" * 32}, {"streamId": "no such"}):
        for token in ({}, {"genstackToken": client.token}):
            status, answer = await client.post("/stream/shutdown", body | token)
            assert (status, answer["error"]["type"]) == (404, "InvalidRequest"), body
    assert len(await site.books.settled(client.account, 2)) == 2


async def test_another_accounts_token_does_not_find_the_stream_which_goes_on(
    site: Site, client: Client
) -> None:
    stranger = await site.client()
    listener, _ = await begun(site, client, "genstack")
    body = {"streamId": listener.stream_id, "genstackToken": stranger.token}
    unknown = {"streamId": "f" * 32, "genstackToken": stranger.token}
    answers = [await stranger.post("/stream/shutdown", given) for given in (body, unknown)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    site.up.release()
    assert await listener.finish() == "completed"
    assert listener.text == "".join(PIECES)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({}, 400, "InvalidRequest"),
        ({"streamId": ""}, 400, "InvalidRequest"),
        ({"streamId": None}, 400, "InvalidRequest"),
        ({"streamId": 7}, 400, "InvalidRequest"),
        ({"streamId": "here", "genstackToken": "a.b.c"}, 401, "InvalidCredentials"),
        ({"streamId": "here", "genstackToken": 5}, 401, "InvalidCredentials"),
        ({"genstackToken": "a.b.c"}, 401, "InvalidCredentials"),
    ],
)
async def test_a_wrong_shutdown_says_what_is_wrong_and_stops_nothing(
    site: Site, client: Client, body: dict[str, Any], status: int, kind: str
) -> None:
    listener, _ = await begun(site, client, "genstack")
    if body.get("streamId") == "here":
        body = body | {"streamId": listener.stream_id}
    found, answer = await client.post("/stream/shutdown", body)
    assert (found, answer["error"]["type"]) == (status, kind)
    site.up.release()
    assert await listener.finish() == "completed"


async def test_an_api_key_is_no_token_at_shutdown(site: Site, client: Client) -> None:
    listener, _ = await begun(site, client, "genstack")
    status, answer = await client.post(
        "/stream/shutdown", {"streamId": listener.stream_id, "genstackToken": client.key}
    )
    assert (status, answer["error"]["type"]) == (401, "InvalidCredentials")
    site.up.release()
    assert await listener.finish() == "completed"


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_difys_stop_ends_its_task_with_message_end_and_charges_what_came(
    site: Site, client: Client, prefix: str
) -> None:
    listener, held = await begun(site, client, "dify")
    bearer = {"Authorization": f"Bearer {client.app_key('scripted')}"}
    path = f"{prefix}/completion-messages/{listener.task_id}/stop"
    async with asyncio.timeout(CLOSE_SECONDS):
        assert await client.post(path, {"user": "somebody"}, bearer) == (200, {"result": "success"})
        assert await listener.finish() == "completed"
        await (await site.request()).closed.wait()
    assert listener.last["event"] == "message_end"
    (row,) = site.books.rows(client.account)
    charged_for_a_part(site, client, row, held)
    usage = listener.last["metadata"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (row.prompt_tokens, row.completion_tokens)
    assert usage["total_tokens"] == row.prompt_tokens + row.completion_tokens
    # Said again, it is still a success, and still charged once.
    assert await client.post(path, {"user": "somebody"}, bearer) == (200, {"result": "success"})
    assert len(site.books.rows(client.account)) == 1


async def test_difys_stop_of_anybody_elses_task_succeeds_and_stops_nothing(
    site: Site, client: Client
) -> None:
    stranger = await site.client()
    listener, _ = await begun(site, client, "dify")
    path = f"/completion-messages/{listener.task_id}/stop"
    attempts = [
        (client.app_key("scripted"), "another user"),
        (client.app_key("plain"), "somebody"),
        (client.key, "somebody"),
        (stranger.app_key("scripted"), "somebody"),
    ]
    for key, user in attempts:
        answer = await client.post(path, {"user": user}, {"Authorization": f"Bearer {key}"})
        assert answer == (200, {"result": "success"})
    unknown = await client.post(
        "/completion-messages/no-such-task/stop",
        {"user": "somebody"},
        {"Authorization": f"Bearer {client.app_key('scripted')}"},
    )
    assert unknown == (200, {"result": "success"})
    site.up.release()
    assert await listener.finish() == "completed"
    assert listener.text == "".join(PIECES)


async def test_a_task_is_no_genstack_stream(site: Site, client: Client) -> None:
    listener, _ = await begun(site, client, "dify")
    for stream_id in (listener.task_id, listener.task_id.replace("-", "")):
        assert (await client.post("/stream/shutdown", {"streamId": stream_id}))[0] == 404
    site.up.release()
    assert await listener.finish() == "completed"


# Idle streams


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_idle_stream_is_kept_alive(impatient: Site, idle: Client, dialect: Dialect) -> None:
    listener = await idle.stream(dialect, "held-after-2")
    await listener.hear(2)
    await listener.until(lambda heard: len(heard.pings) >= 3)
    assert set(listener.pings) == {"event: ping" if dialect == "dify" else ": ping"}
    assert listener.text == "alpha beta"
    impatient.up.release()
    assert await listener.finish() == "completed"
    assert listener.text == "alpha beta gamma delta"


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_headers_go_out_before_the_first_piece_when_it_takes_long(
    impatient: Site, idle: Client, dialect: Dialect
) -> None:
    listener = await idle.stream(dialect, "held")  # returns with the headers; the upstream says nothing yet
    assert listener.status == 200
    assert listener.response.content_type == "text/event-stream"
    assert not (await impatient.request()).answered.is_set()
    await listener.until(lambda heard: len(heard.pings) >= 1)
    assert listener.texts == []
    impatient.up.release()
    assert await listener.finish() == "completed"
    assert listener.text == "alpha beta gamma delta"
    assert await impatient.books.settled(idle.account)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("status", [500, 503, 429, 400])
async def test_what_fails_after_the_headers_is_an_event_and_costs_nothing(
    impatient: Site, idle: Client, dialect: Dialect, status: int
) -> None:
    impatient.up.script(Script(status=status, hold_at=0, body={"error": {"message": "Late."}}))
    listener = await idle.stream(dialect, "scripted")
    assert listener.status == 200
    impatient.up.release()
    assert await listener.finish() == "error"
    if dialect == "dify":
        assert (listener.last["event"], listener.last["status"]) == (
            "error",
            400 if status == 500 else status,
        )
    (row,) = await impatient.books.settled(idle.account)
    assert row.price == 0
    assert row.error is not None
    assert impatient.books.balance(idle.account).balance == 10 * NANO


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_what_fails_before_the_headers_keeps_its_status(
    impatient: Site, idle: Client, dialect: Dialect
) -> None:
    impatient.up.script(Script(status=503, body={"error": {"message": "Soon."}}))
    async with await idle.send(idle.ask(dialect, "scripted", stream=True)) as response:
        assert response.status == 503
        assert response.content_type == "application/json"
        assert 1 <= int(response.headers["Retry-After"]) <= 120


async def test_a_stream_that_waits_for_its_first_piece_can_be_stopped(impatient: Site, idle: Client) -> None:
    listener = await idle.stream("genstack", "held")
    assert await idle.post("/stream/shutdown", {"streamId": listener.stream_id}) == (200, {"success": True})
    assert await listener.finish() == "aborted"
    assert listener.last["response"]["output"] == ""
    await closed(await impatient.request())
    (row,) = await impatient.books.settled(idle.account)
    assert row.completion_tokens == 0
    assert 0 < row.price == row.prompt_tokens * INPUT < MAX_TOKENS * OUTPUT


async def test_a_client_that_does_not_read_is_taken_for_gone(impatient: Site, idle: Client) -> None:
    # More than all buffers on the way take, and no more than so many tokens may come to.
    impatient.up.script(Script(pieces=("x" * 150_000,) * 100, hold_at=99))
    listener = await idle.stream("openai", "scripted", max_tokens=4000)
    assert listener.status == 200
    held = await impatient.books.held(idle.account)
    (row,) = await impatient.books.settled(idle.account, seconds=10)
    await closed(await impatient.request())
    assert row.source == "estimate"
    assert row.prompt_tokens * INPUT < row.price <= held  # some pieces went out
    listener.leave()


async def test_stream_ids_are_long_and_never_the_same(site: Site, client: Client) -> None:
    ids = set()
    for _ in range(5):
        listener = await client.stream("genstack", "plain")
        assert await listener.finish() == "completed"
        ids.add(listener.stream_id)
    assert len(ids) == 5
    assert all(len(stream_id) * 4 >= 128 for stream_id in ids)


async def test_streams_that_were_left_free_their_connections(site: Site, client: Client) -> None:
    listeners = []
    for _ in range(10):
        listener, _ = await begun(site, client, "openai")
        listeners.append(listener)
    assert site.books.balance(client.account).open_holds == 10
    for listener in listeners:
        listener.leave()
    for index in range(10):
        await closed(await site.request(index))
    assert len(await site.books.settled(client.account, 10)) == 10
    assert site.books.check().open_holds == 0
