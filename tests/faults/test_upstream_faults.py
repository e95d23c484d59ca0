"""Every way an upstream breaks, in every format, through every dialect's door, blocking and streamed: what the client
is told, what it pays, and that nothing stays held or open."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from tests.support.client import texts_of
from tests.support.doors import DOORS, OPENAI_FORM, Door, Reply
from tests.support.fault_site import (
    INPUT,
    MOST_TOKENS,
    OUTPUT,
    UPSTREAM_KEY,
    FaultSite,
    Visit,
    open_fault_site,
    priced,
)
from tests.support.faults import AT_ONCE, BEFORE, TOO_SLOW, Fault, Outcome
from tests.support.wires import CACHED, PROMPT, WIRES, Wire

from headgate.core.accounts import UsageRow

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOSE_SECONDS = 1.0
"""How soon the upstream must see that nobody wants its answer any more."""

PATIENCE_SECONDS = 10.0
"""Far longer than any answer here may take."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultSite]:
    async with open_fault_site(tmp_path_factory.mktemp("faults")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("fault", "wire"),
    [
        pytest.param(fault, wire, id=f"{fault.name}-{wire.name}")
        for fault in AT_ONCE
        for wire in WIRES
        if wire.name in fault.formats
    ],
)
async def test_a_fault_is_told_and_charged_as_the_contract_says_at_every_door(
    site: FaultSite, fault: Fault, wire: Wire
) -> None:
    await at_every_door(site, fault, [wire])


@pytest.mark.parametrize("fault", TOO_SLOW, ids=lambda fault: fault.name)
async def test_an_upstream_that_is_too_slow_is_a_time_out_at_every_door(
    site: FaultSite, fault: Fault
) -> None:
    await at_every_door(site, fault, WIRES)


async def at_every_door(site: FaultSite, fault: Fault, wires: Sequence[Wire]) -> None:
    before = {door.name: site.balance(door) for door in DOORS}
    cells = [(wire, door) for wire in wires for door in DOORS if fault.scene(streams=door.streams)]
    results = await asyncio.gather(
        *(one(site, fault, wire, door) for wire, door in cells), return_exceptions=True
    )
    problems = [
        f"{fault.name}, {wire.name}, {door.name}: {result!r}"
        for (wire, door), result in zip(cells, results, strict=True)
        if isinstance(result, BaseException)
    ]
    assert not problems, "\n".join(problems)
    for door in DOORS:
        spent = sum(
            result.price
            for (_, asked), result in zip(cells, results, strict=True)
            if asked is door and isinstance(result, UsageRow)
        )
        assert site.balance(door) == before[door.name] - spent, door.name
    site.check()


async def one(site: FaultSite, fault: Fault, wire: Wire, door: Door) -> UsageRow:
    """One cell of the matrix; its usage row."""
    scene = fault.scene(streams=door.streams)
    assert scene is not None
    visit = site.visit(door, f"hasty-{wire.name}" if fault.hasty else wire.name, scene.play(wire))
    hearing = asyncio.ensure_future(heard(visit))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.wait([visit.task])
    except TimeoutError:
        visit.exchange.leave()
        await site.settled(visit)  # so that the next test finds nothing held
        raise
    finally:
        hearing.cancel()
        visit.play.heard.set()
    reply = await visit.reply()
    told(door, reply, scene.outcome)
    (row,) = site.rows(visit)
    charged(row, wire, visit, scene.outcome)
    async with asyncio.timeout(CLOSE_SECONDS):
        await visit.play.over()
    site.up.forget(visit.tag)
    return row


async def heard(visit: Visit) -> None:
    """Lets the upstream go on once the client has what it said so far."""
    await visit.exchange.until(text=BEFORE[-1].encode())
    visit.play.heard.set()


def told(door: Door, reply: Reply, outcome: Outcome) -> None:
    """Status and body are this outcome's, whole, in the dialect's own form."""
    assert UPSTREAM_KEY.encode() not in reply.body
    cause = outcome.cause
    began = cause is None or outcome.charged != "nothing"
    if cause is None and not door.streams:
        assert reply.status == 200, reply.body
        assert "".join(texts_of(reply.json)) == outcome.text
        return
    if not began:
        assert cause is not None
        expected = cause.told(door.dialect)
        problem = reply.problem(door.dialect)
        assert (reply.status, problem.kind, problem.code)[: len(expected)] == expected, reply.body
        assert "x-headgate-price" not in reply.headers
        if outcome.retry_after is not None or reply.status == 429:
            assert reply.headers.get("retry-after") == str(outcome.retry_after)
        if door.dialect in OPENAI_FORM:
            never = problem.code == "upstream_auth"
            assert reply.headers.get("x-should-retry") == ("false" if never else None)
        return
    assert reply.status == 200, reply.body
    text = "".join(text for event in reply.events if event != "[DONE]" for text in texts_of(event))
    if outcome.text is not None:
        assert text == outcome.text, reply.body
    assert door.complete(reply) == (cause is None), reply.body
    if cause is None:
        return
    problem = door.error_event(reply)
    status, *rest = cause.told(door.dialect)
    assert [problem.kind, problem.code][: len(rest)] == rest, reply.body
    if door.dialect == "dify":
        assert problem.status == status


def charged(row: UsageRow, wire: Wire, visit: Visit, outcome: Outcome) -> None:
    """The row says what was used, who said so, what went wrong and what it cost; the price is the tokens'."""
    assert row.error == (None if outcome.cause is None else outcome.cause.kind), row
    assert row.price == priced(row), row
    if outcome.charged == "nothing":
        assert (row.price, row.cost, row.prompt_tokens, row.completion_tokens) == (0, 0, 0, 0), row
        return
    assert row.source == outcome.charged, row
    assert row.stream is visit.door.streams
    if outcome.charged == "provider":
        assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (
            PROMPT,
            CACHED,
            outcome.completion,
        ), row
        return
    # Guessed: something, and no more than was delivered or was held for it.
    question = len(f"This is {visit.tag}.") + 3 * 16
    assert 1 <= row.prompt_tokens <= question, row
    if wire.tells_prompt and outcome.cause is not None:
        assert (row.prompt_tokens, row.cached_tokens) == (PROMPT, CACHED), row
    assert row.completion_tokens >= 1, row
    if outcome.text is not None:
        assert row.completion_tokens <= len(outcome.text), row
    assert row.price <= question * INPUT + MOST_TOKENS * OUTPUT
