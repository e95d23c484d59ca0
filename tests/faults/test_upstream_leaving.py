"""Clients that leave while the upstream does something: it sees that within a second, what was produced is charged,
and nothing stays held."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
from msgspec import Struct
from tests.support.doors import DOORS, Door
from tests.support.fault_site import FaultSite, Visit, open_fault_site, priced
from tests.support.fault_upstream import CHUNKED_JSON, STALL, STREAM, TURN, Endless, Steps, chunk
from tests.support.faults import BEFORE, TRICKLE_S, half, half_said, then
from tests.support.wires import CACHED, PROMPT, WIRES, Wire

from headgate.core.accounts import UsageRow

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOSE_SECONDS = 1.0
"""How soon the upstream must see that nobody wants its answer any more."""

HEARD = "".join(BEFORE)
UNTIL_READ = (TURN,) * 10
"""What the gateway has read without passing anything on; it runs on the same loop."""


class Moment(Struct, frozen=True, kw_only=True):
    """What the upstream has done when the client leaves. `opened`: a stream has told what its prompt came to, where
    the format does. `hears`: the client has the first pieces."""

    name: str
    play: Callable[[Wire], Steps]
    streams: tuple[bool, ...] = (False, True)
    opened: bool = False
    hears: bool = False


MOMENTS = (
    Moment(name="before the head", play=lambda wire: (STALL,)),
    Moment(name="within the head", play=lambda wire: (b"HTTP/1.1 200 O", STALL)),
    Moment(name="after the head", play=lambda wire: (CHUNKED_JSON, STALL), streams=(False,)),
    Moment(name="in the middle of the body", play=lambda wire: (half_said(wire), STALL), streams=(False,)),
    Moment(
        name="in a slow body",
        play=lambda wire: (CHUNKED_JSON, Endless(chunk(b" "), TRICKLE_S)),
        streams=(False,),
    ),
    Moment(name="before the first event", play=lambda wire: (STREAM, STALL), streams=(True,)),
    Moment(
        name="among comments",
        play=lambda wire: (STREAM, Endless(chunk(b": nothing\n\n"), TRICKLE_S)),
        streams=(True,),
    ),
    Moment(
        name="before the first text",
        play=lambda wire: (STREAM, chunk(wire.opening()), chunk(half(wire.piece("x"))), *UNTIL_READ, STALL),
        streams=(True,),
        opened=True,
    ),
    Moment(name="between two events", play=then(STALL), streams=(True,), opened=True, hears=True),
    Moment(
        name="in a slow stream",
        play=then(Endless(chunk(b": nothing\n\n"), TRICKLE_S)),
        streams=(True,),
        opened=True,
        hears=True,
    ),
)


@pytest.fixture(scope="module")
def unreachable() -> Iterator[str]:
    """An address where connections are neither made nor refused: a full queue that nobody serves."""
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first.connect(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, unreachable: str) -> AsyncIterator[FaultSite]:
    async with open_fault_site(tmp_path_factory.mktemp("leaving"), unreachable) as opened:
        yield opened


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
async def test_whoever_leaves_closes_the_upstream_and_pays_for_what_came(
    site: FaultSite, moment: Moment, wire: Wire
) -> None:
    doors = [door for door in DOORS if door.streams in moment.streams]
    before = {door.name: site.balance(door) for door in doors}
    results = await asyncio.gather(
        *(leaving(site, moment, wire, door) for door in doors), return_exceptions=True
    )
    problems = [
        f"{moment.name}, {wire.name}, {door.name}: {result!r}"
        for door, result in zip(doors, results, strict=True)
        if isinstance(result, BaseException)
    ]
    assert not problems, "\n".join(problems)
    for door, row in zip(doors, results, strict=True):
        assert isinstance(row, UsageRow)
        assert site.balance(door) == before[door.name] - row.price
    site.check()


async def leaving(site: FaultSite, moment: Moment, wire: Wire, door: Door) -> UsageRow:
    visit = site.visit(door, wire.name, moment.play(wire))
    await visit.play.asked.wait()
    await visit.play.stalled.wait()
    if moment.hears:
        await visit.exchange.until(text=BEFORE[-1].encode())
        visit.play.heard.set()
    visit.exchange.leave()
    async with asyncio.timeout(CLOSE_SECONDS):
        for received in visit.play.requests:
            await received.closed.wait()
    row = await gone(site, visit)
    assert row.price == priced(row) > 0, row
    if moment.opened and wire.tells_prompt:
        assert (row.prompt_tokens, row.cached_tokens) == (PROMPT, CACHED), row
    else:
        assert 1 <= row.prompt_tokens <= len(f"This is {visit.tag}.") + 3 * 16, row
    if moment.hears:
        assert 1 <= row.completion_tokens <= len(HEARD), row
    else:
        assert row.completion_tokens == 0, row
    return row


async def gone(site: FaultSite, visit: Visit) -> UsageRow:
    """The row of a request whose client left."""
    row = await site.settled(visit)
    await visit.task
    site.up.forget(visit.tag)
    assert row.stream is visit.door.streams
    # Where nothing was generated yet, the input may be the provider's own figure.
    sources = ("estimate", "tokenizer") if row.completion_tokens else ("estimate", "tokenizer", "provider")
    assert row.source in sources, row
    return row


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
async def test_whoever_leaves_before_there_is_a_connection_pays_nothing(site: FaultSite, wire: Wire) -> None:
    before = {door.name: site.balance(door) for door in DOORS}
    visits = [site.visit(door, f"unreachable-{wire.name}", ()) for door in DOORS]
    for visit in visits:
        while not site.operator.balance(visit.account).open_holds:  # noqa: ASYNC110  # the ledger's thread makes it
            await asyncio.sleep(0.001)
    for visit in visits:
        visit.exchange.leave()
    rows = [await gone(site, visit) for visit in visits]
    assert [(row.price, row.prompt_tokens, row.completion_tokens) for row in rows] == [(0, 0, 0)] * len(DOORS)
    assert all(visit.play.requests == [] for visit in visits)
    assert {door.name: site.balance(door) for door in DOORS} == before
    site.check()
