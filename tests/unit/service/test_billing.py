"""A hold is closed exactly once, whatever happens to those who wait for it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.memory_ledger import MemoryLedger
from tests.support.until import until
from tests.support.workbench import ANN, RICH, Workbench, request, running_for

from headgate.core.accounts import Hold
from headgate.core.errors import GatewayError, InsufficientFunds, InternalError, LedgerUnavailable
from headgate.core.money import NanoUSD
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service import billing as billing_module
from headgate.service.billing import Bill, Billing
from headgate.service.meter import Meter
from headgate.service.plan import Plan
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.audit import audit
from headgate.stores.database import open_database
from headgate.stores.ledger import SqliteLedger


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing_module, "RETRY_SECONDS", (0.001,))


class Case:
    """A planned request, its hold, and a bill of what it used."""

    def __init__(self, bench: Workbench, plan: Plan, hold: Hold, bill: Bill) -> None:
        self.ledger: MemoryLedger = bench.memory
        self.billing: Billing = bench.billing
        self.plan = plan
        self.hold = hold
        self.bill = bill
        self.nothing = bench.billing.bill(plan, Meter(plan.models), keep=False, reason="ledger_unavailable")


async def begin() -> Case:
    bench = Workbench()
    plan = await bench.planner.plan(request(), ANN)
    hold = await bench.billing.hold(plan)
    meter = Meter(plan.models)
    meter.models[0].jobs[0].mark_sent()
    return Case(bench, plan, hold, bench.billing.bill(plan, meter, keep=True))


async def until_closed(ledger: MemoryLedger) -> None:
    await until(lambda: not ledger.holds)


async def test_a_hold_sets_the_ceiling_aside_for_the_payer() -> None:
    case = await begin()
    (held,) = case.ledger.holds.values()
    assert (held.account, held.amount, held.created_ms) == ("ann", case.plan.ceiling, 1_700_000_000_000)
    assert len(held.id) == 32


async def test_ids_of_holds_are_never_the_requests_own() -> None:
    """A request id comes from the client, so two requests may bear the same one."""
    bench = Workbench()
    for _ in range(2):
        await bench.ask(request(request_id="same"))
    assert len(set(bench.memory.settled)) == 2
    assert [row.request_id for row in bench.memory.rows] == ["same", "same"]


async def test_close_returns_the_balances_around_the_charge() -> None:
    case = await begin()
    settlement = await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    assert settlement.price == case.bill.charges[0].price > 0
    assert settlement.balance_before - settlement.balance_after == settlement.price
    case.ledger.assert_balanced()


async def test_closing_a_resolved_hold_charges_nothing_more() -> None:
    case = await begin()
    await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    after = dict(case.ledger.balances)
    with pytest.raises(InternalError):
        await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    assert case.ledger.balances == after


async def test_closing_survives_cancellations_and_then_passes_one_on() -> None:
    case = await begin()
    closing = asyncio.ensure_future(case.billing.close(case.hold, case.bill, lambda: case.nothing))
    for _ in range(2):
        await asyncio.sleep(0)
        closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert case.ledger.settled == [case.hold.id]
    assert [row.price for row in case.ledger.rows] == [case.bill.charges[0].price]


async def test_an_outage_is_told_and_the_fallback_closes_the_hold_when_it_is_over() -> None:
    case = await begin()
    case.ledger.fail()
    with pytest.raises(LedgerUnavailable):
        await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    await asyncio.sleep(0.005)
    assert list(case.ledger.holds) == [case.hold.id]
    case.ledger.problem = None
    await until_closed(case.ledger)
    await case.billing.aclose()
    assert [(row.price, row.error) for row in case.ledger.rows] == [(0, "ledger_unavailable")]
    case.ledger.assert_balanced()


async def test_what_another_resolved_meanwhile_is_let_be() -> None:
    case = await begin()
    case.ledger.fail()
    with pytest.raises(LedgerUnavailable):
        await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    case.ledger.problem = None
    case.ledger.holds.clear()
    await case.billing.aclose()
    assert case.ledger.rows == []


async def test_going_away_does_not_wait_for_ever_for_a_ledger_that_stays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(billing_module, "RETRY_SECONDS", (3600.0,))
    case = await begin()
    case.ledger.fail()
    with pytest.raises(LedgerUnavailable):
        await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    async with asyncio.timeout(30):
        await case.billing.aclose()
    assert list(case.ledger.holds) == [case.hold.id]  # recovery at the next start has it
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def test_a_settle_the_ledger_cannot_make_is_told_and_the_hold_is_released() -> None:
    """A row that breaks the books is our bug: the client is not charged, and its money is not kept either."""
    case = await begin()
    case.ledger.problem = InternalError()
    with pytest.raises(GatewayError):
        await case.billing.close(case.hold, case.bill, lambda: case.nothing)
    case.ledger.problem = None
    await until_closed(case.ledger)
    await case.billing.aclose()
    case.ledger.assert_balanced()
    assert case.ledger.balances["ann"] == RICH


async def test_a_cancelled_hold_is_released_however_its_commit_went() -> None:
    for funds in (RICH, 0):
        bench = Workbench()
        bench.memory.balances["ann"] = bench.memory.credited["ann"] = funds
        plan = await bench.planner.plan(request(), ANN)
        holding = asyncio.ensure_future(bench.billing.hold(plan))
        await asyncio.sleep(0)
        holding.cancel()
        await asyncio.wait([holding])
        assert holding.cancelled()
        await bench.billing.aclose()
        assert bench.memory.balances["ann"] == funds
        assert [(row.price, row.error) for row in bench.memory.rows] == (
            [(0, "disconnected")] if funds else []
        )
        bench.memory.assert_balanced()


async def test_a_refused_hold_is_told_as_it_is() -> None:
    bench = Workbench()
    bench.memory.balances["ann"] = 7
    plan = await bench.planner.plan(request(), ANN)
    with pytest.raises(InsufficientFunds) as refusal:
        await bench.billing.hold(plan)
    assert (refusal.value.required_nano, refusal.value.available_nano) == (plan.ceiling, 7)


async def test_a_charge_is_what_margin_and_usage_make_it() -> None:
    case = await begin()
    (charge,) = case.bill.charges
    likely = -(-len("say hello") // 4)
    assert charge.exact_input == likely * 500_000_000
    assert (charge.cost, charge.price) == (likely * 500, likely * 500)


async def test_requests_stopped_at_any_time_leave_a_real_ledger_right(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    SqliteAccounts(database).create("ann", NanoUSD(RICH), 1)
    ledger = SqliteLedger(database, time)
    ledger.start()
    fake = Fake(default=FakeAnswer(text="a b c d e f g h"))
    bench = Workbench(fakes=[fake], ledger=ledger)

    async def one(number: int) -> None:
        asked = request(stream=number % 2 == 0)
        running = running_for(asked)
        if asked.stream:
            bench.completions.stream(asked, ANN, running)
        else:
            work: Any = asyncio.ensure_future(bench.ask(asked, running))
        for _ in range(number):
            await asyncio.sleep(0)
        running.stop("disconnected")
        if not asked.stream:
            await asyncio.wait([work])
            assert work.exception() is None or isinstance(work.exception(), GatewayError)

    await asyncio.gather(*(one(number) for number in range(80)))
    await bench.settle_down()
    await ledger.close()
    report = audit(database)
    assert (report.problems, report.open_holds, report.held) == ((), 0, 0)
