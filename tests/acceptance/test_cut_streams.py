"""Streams of every kind of upstream that end early: who is closed, what is charged, and by whose figures.

What came and was not counted by the upstream is guessed, tool calls like text; nothing that came is free.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.support import tool_answers
from tests.support.catalogue import CACHED as CACHED_PRICE
from tests.support.catalogue import INPUT, OUTPUT, model
from tests.support.client import DIALECTS, Client, Dialect, Listener
from tests.support.fault_upstream import (
    CLOSE,
    HEARD,
    RESET,
    STALL,
    STREAM,
    FaultUpstream,
    Play,
    Step,
    Steps,
    chunk,
)
from tests.support.site import RICH, Site, open_site
from tests.support.three_kinds import KINDS, Kind
from tests.support.tool_answers import Asked
from tests.support.wires import CACHED, PROMPT, WIRES, Wire

from headgate.core.accounts import UsageRow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

CLOSE_SECONDS = 1.0
"""How soon the upstream must see that nobody wants its answer any more."""

PIECES = tuple(f" piece{number:02}" for number in range(12))
WIRE: dict[str, Wire] = {wire.name: wire for wire in WIRES}
OF_KIND: dict[Kind, Wire] = {"openai": WIRE["chat"], "anthropic": WIRE["anthropic"], "cohere": WIRE["cohere"]}
OTHERS = (WIRE["anthropic"], WIRE["cohere"])
CALLS = (
    Asked("call_1", "get_weather", '{"city": "Rome"}'),
    Asked("call_2", "get_weather", '{"city": "Ulm"}'),
)
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
_tags = (f"cell-{number}" for number in itertools.count(1))


def toml(url: str) -> str:
    origin = url.removesuffix("/v1")
    return "".join(
        f'\n[providers.{wire.name}]\nkind = "{wire.kind}"\nbase_url = "{origin}{wire.root}"\n'
        + model(wire.name, provider=wire.name, mode=wire.mode, tools=wire.mode == "chat")
        for wire in WIRES
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with open_site(toml, tmp_path_factory.mktemp("cut"), FaultUpstream) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def client(site: Site) -> Client:
    return await site.client()


async def begin(
    site: Site, client: Client, dialect: Dialect, wire: Wire, steps: Steps, **fields: Any
) -> tuple[Listener, Play]:
    """A stream that is answered by these steps, and what becomes of them."""
    tag = next(_tags)
    assert isinstance(site.up, FaultUpstream)
    play = site.up.play(tag, (STREAM, *steps))
    return await client.stream(dialect, wire.name, text=f"This is {tag}.", **fields), play


def spoken(wire: Wire, pieces: int) -> tuple[Step, ...]:
    return (chunk(wire.opening()), *(chunk(wire.piece(piece)) for piece in PIECES[:pieces]))


def called(kind: Kind, arguments: int) -> tuple[Step, ...]:
    """One call and a half: the first whole, of the second its head and so many pieces of its arguments."""
    first, second = (tool_answers.pieces(kind, index, call) for index, call in enumerate(CALLS))
    whole = b"".join(first) + tool_answers.closing(kind, 0)
    return (
        chunk(tool_answers.opening(kind)),
        chunk(whole),
        *(chunk(piece) for piece in second[: 1 + arguments]),
    )


async def closed(play: Play) -> None:
    """The upstream's connection is gone in time."""
    async with asyncio.timeout(CLOSE_SECONDS):
        await play.requests[0].closed.wait()


async def charged(site: Site, client: Client, most: int) -> UsageRow:
    """The one row of a stream of at most `most` tokens: it costs its tokens, and nothing else is gone or held."""
    (row,) = await site.books.settled(client.account)
    fresh = row.prompt_tokens - row.cached_tokens
    assert row.price == fresh * INPUT + row.cached_tokens * CACHED_PRICE + row.completion_tokens * OUTPUT
    assert row.prompt_tokens >= 1
    assert 1 <= row.completion_tokens <= most
    assert (row.stream, row.excess) == (True, 0)
    assert site.books.balance(client.account).balance == RICH - row.price
    return row


def told(wire: Wire) -> tuple[int, int] | None:
    """Of which prompt, and how much of it cached, the stream speaks at its beginning."""
    return (PROMPT, CACHED) if wire.tells_prompt else None


def assert_prompt(row: UsageRow, figures: tuple[int, int] | None) -> None:
    if figures is None:
        assert row.prompt_tokens <= len("This is cell-1000.") + 3 * 16
    else:
        assert (row.prompt_tokens, row.cached_tokens) == figures


def arguments_of(listener: Listener, position: int) -> list[str]:
    """The pieces of one call's arguments that the client has."""
    deltas = [choice["delta"] for event in listener.events for choice in event.get("choices", ())]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ()) if call["index"] == position]
    return [call["function"]["arguments"] for call in calls]


@pytest.mark.parametrize("wire", OTHERS, ids=lambda wire: wire.name)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("pieces", [1, 11])
async def test_who_leaves_pays_for_the_text_that_came(
    site: Site, client: Client, wire: Wire, dialect: Dialect, pieces: int
) -> None:
    listener, play = await begin(site, client, dialect, wire, (*spoken(wire, pieces), STALL))
    await listener.hear(pieces)
    held = await site.books.held(client.account)
    listener.leave()
    await closed(play)
    row = await charged(site, client, len("".join(PIECES[:pieces])))
    assert row.completion_tokens >= pieces  # each piece is two tokens, or three
    assert row.price < held
    assert row.source == "estimate"
    assert_prompt(row, told(wire))
    assert len(play.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [0, 3])
async def test_who_leaves_pays_for_calls_like_for_text(
    site: Site, client: Client, kind: Kind, arguments: int
) -> None:
    wire = OF_KIND[kind]
    listener, play = await begin(
        site, client, "chat", wire, (*called(kind, arguments), STALL), tools=[WEATHER]
    )
    await listener.until(lambda heard: len(arguments_of(heard, 1)) == 1 + arguments)
    assert listener.texts == []
    held = await site.books.held(client.account)
    listener.leave()
    await closed(play)
    came = len(CALLS[0].name + CALLS[0].arguments + CALLS[1].name) + 5 * arguments
    row = await charged(site, client, came)
    assert row.completion_tokens >= came // 8
    assert row.price < held
    assert row.source == "estimate"
    assert len(play.requests) == 1
    if kind == "anthropic":
        assert (row.prompt_tokens, row.cached_tokens) == (tool_answers.PROMPT, tool_answers.FROM_CACHE[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks", [CLOSE, RESET], ids=["close", "reset"])
async def test_calls_that_break_off_are_told_as_an_error_and_paid_as_far_as_they_came(
    site: Site, client: Client, kind: Kind, breaks: Step
) -> None:
    steps = (*called(kind, 3), HEARD, breaks)
    listener, play = await begin(site, client, "chat", OF_KIND[kind], steps, tools=[WEATHER])
    await listener.until(lambda heard: len(arguments_of(heard, 1)) == 4)
    play.heard.set()
    assert await listener.finish() == "error"
    came = len(CALLS[0].name + CALLS[0].arguments + CALLS[1].name) + 15
    row = await charged(site, client, came)
    assert row.error in ("upstream_failed", "upstream_error")
    assert row.completion_tokens >= came // 8


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
async def test_who_leaves_after_the_reason_to_stop_pays_what_the_upstream_counted(
    site: Site, client: Client, wire: Wire
) -> None:
    """Many clients do not wait for the format's last word."""
    steps = (*spoken(wire, 3), chunk(wire.half_ending(5)), STALL)
    dialect: Dialect = "openai" if wire.mode == "completion" else "chat"
    listener, play = await begin(site, client, dialect, wire, steps)
    await listener.until(
        lambda heard: any(choice["finish_reason"] for event in heard.events for choice in event["choices"])
    )
    listener.leave()
    row = await charged(site, client, 5)
    assert (row.source, row.completion_tokens) == ("provider", 5)
    assert_prompt(row, (PROMPT, CACHED))
    await closed(play)


@pytest.mark.parametrize("wire", [WIRE["completions"], WIRE["chat"]], ids=lambda wire: wire.name)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_figures_that_come_with_the_text_count_for_who_leaves(
    site: Site, client: Client, wire: Wire, dialect: Dialect
) -> None:
    """Some upstreams count with every piece. What they say of the prompt is known then, and need not be guessed."""
    counted = (chunk(wire.counted(piece, number)) for number, piece in enumerate(PIECES[:4], start=1))
    listener, play = await begin(site, client, dialect, wire, (chunk(wire.opening()), *counted, STALL))
    await listener.hear(4)
    listener.leave()
    await closed(play)
    row = await charged(site, client, len("".join(PIECES[:4])))
    assert_prompt(row, (PROMPT, CACHED))
    assert row.completion_tokens >= 4


@pytest.mark.parametrize("wire", OTHERS, ids=lambda wire: wire.name)
async def test_a_stream_that_is_shut_down_pays_for_what_came(site: Site, client: Client, wire: Wire) -> None:
    listener, play = await begin(site, client, "genstack", wire, (*spoken(wire, 2), STALL))
    await listener.hear(2)
    async with asyncio.timeout(CLOSE_SECONDS):
        stopped = await client.post("/stream/shutdown", {"streamId": listener.stream_id})
        assert stopped == (200, {"success": True})
        assert await listener.finish() == "aborted"
        await play.requests[0].closed.wait()
    row = await charged(site, client, len("".join(PIECES[:2])))
    assert_prompt(row, told(wire))
    usage = listener.last["response"]["usage"]
    assert usage["completionTokens"] == row.completion_tokens


@pytest.mark.parametrize("wire", OTHERS, ids=lambda wire: wire.name)
async def test_a_task_that_is_stopped_pays_for_what_came(site: Site, client: Client, wire: Wire) -> None:
    listener, play = await begin(site, client, "dify", wire, (*spoken(wire, 2), STALL))
    await listener.hear(2)
    bearer = {"Authorization": f"Bearer {client.app_key(wire.name)}"}
    path = f"/completion-messages/{listener.task_id}/stop"
    async with asyncio.timeout(CLOSE_SECONDS):
        assert await client.post(path, {"user": "somebody"}, bearer) == (200, {"result": "success"})
        assert await listener.finish() == "completed"
        await play.requests[0].closed.wait()
    row = await charged(site, client, len("".join(PIECES[:2])))
    assert_prompt(row, told(wire))
    usage = listener.last["metadata"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (row.prompt_tokens, row.completion_tokens)


@pytest.mark.parametrize("kind", ["anthropic", "cohere"])
async def test_who_leaves_several_choices_of_calls_pays_for_each_call_to_the_upstream(
    site: Site, client: Client, kind: Kind
) -> None:
    listener, play = await begin(
        site, client, "chat", OF_KIND[kind], (*called(kind, 3), STALL), tools=[WEATHER], n=2
    )
    await listener.until(lambda heard: len(arguments_of(heard, 1)) == 8)
    listener.leave()
    async with asyncio.timeout(CLOSE_SECONDS):
        await asyncio.gather(*(request.closed.wait() for request in play.requests))
    assert len(play.requests) == 2
    came = 2 * (len(CALLS[0].name + CALLS[0].arguments + CALLS[1].name) + 15)
    row = await charged(site, client, came)
    assert row.completion_tokens >= came // 8
