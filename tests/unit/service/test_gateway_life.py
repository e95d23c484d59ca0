"""The gateway from its start to the last settled hold."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.until import until
from tests.support.workbench import ANN, Workbench, read_all, request, spec

from headgate.core.accounts import Balance, Principal
from headgate.core.errors import InvalidCredentials, Overloaded
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service import gateway as gateway_module
from headgate.service.gateway import EngineStatus, Gateway
from headgate.service.ids import Ids


class Status:
    state = "failed"
    reason = "broken file"


def gateway_of(
    bench: Workbench, *, deadline: float = 30, engines: Mapping[str, EngineStatus] | None = None
) -> Gateway:
    identity: Any = None
    files: Any = None
    return Gateway(
        completions=bench.completions,
        limits=bench.limiter,
        identity=identity,
        streams=bench.streams,
        billing=bench.billing,
        ledger=bench.ledger,
        serving=bench.serving,
        files=files,
        metrics=bench.metrics,
        clock=bench.clock,
        ids=Ids(),
        drain_deadline_s=deadline,
        engine_statuses=lambda: engines or {},
    )


async def test_a_caller_sees_its_own_balance_and_a_vanished_account_is_no_account() -> None:
    gateway = gateway_of(bench := Workbench())
    expected = Balance(account="ann", balance=bench.memory.balances["ann"], held=0)
    assert await gateway.balance(ANN) == expected
    with pytest.raises(InvalidCredentials):
        await gateway.balance(Principal(account="gone", key_id="k"))


async def test_it_is_ready_while_the_ledger_answers_and_it_is_not_draining() -> None:
    gateway = gateway_of(bench := Workbench())
    assert (await gateway.not_ready(), await gateway.ledger_problem()) == (None, None)
    bench.memory.fail()
    assert await gateway.not_ready() == await gateway.ledger_problem() == "the ledger does not answer"
    bench.memory.problem = None
    await gateway.drain()
    assert await gateway.not_ready() == "draining"


async def test_a_ledger_that_hangs_is_a_problem_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "PING_SECONDS", 0.01)
    gateway = gateway_of(bench := Workbench())
    monkeypatch.setattr(bench.memory, "ping", lambda: asyncio.get_running_loop().create_future())
    assert await gateway.ledger_problem() == "the ledger does not answer"


async def test_engines_say_how_they_are() -> None:
    gateway = gateway_of(Workbench(), engines={"demo": Status()})
    assert gateway.engines() == {"demo": {"state": "failed", "reason": "broken file"}}


async def test_models_say_why_they_cannot_be_called() -> None:
    gateway = gateway_of(Workbench(fakes=[Fake(reason="set FAKE_KEY")]))
    assert gateway.unavailable(spec()) == "set FAKE_KEY"


async def test_metrics_show_what_runs_now() -> None:
    gate = asyncio.Event()
    bench = Workbench(fakes=[Fake(default=FakeAnswer(gate=gate, gate_at=1))])
    gateway = gateway_of(bench)
    running = bench.start(request(stream=True))
    await running.next(30)
    exposed = gateway.exposition().decode()
    assert "headgate_open_holds 1.0" in exposed and "headgate_running_requests 1.0" in exposed
    gate.set()
    await read_all(running)
    exposed = gateway.exposition().decode()
    assert "headgate_open_holds 0.0" in exposed and "headgate_running_requests 0.0" in exposed


class TestDraining:
    async def test_with_nothing_running_it_is_over_at_once(self) -> None:
        gateway = gateway_of(Workbench())
        async with asyncio.timeout(30):
            await gateway.drain()
        assert gateway.draining

    async def test_it_lets_what_runs_come_to_its_end(self) -> None:
        gate = asyncio.Event()
        bench = Workbench(fakes=[Fake(default=FakeAnswer(gate=gate, gate_at=1))])
        gateway = gateway_of(bench)
        running = bench.start(request(stream=True))
        await running.next(30)
        draining = asyncio.ensure_future(gateway.drain())
        await asyncio.sleep(0)
        assert gateway.draining and not draining.done()
        gate.set()
        _, end = await read_all(running)
        await draining
        assert end.kind == "completed"
        bench.memory.assert_balanced()

    async def test_before_the_deadline_it_stops_and_settles_what_still_runs(self) -> None:
        bench = Workbench(fakes=[Fake(default=FakeAnswer(text="abcd efgh", gate=asyncio.Event(), gate_at=1))])
        gateway = gateway_of(bench, deadline=0.2)
        running = bench.start(request(stream=True))
        await running.next(30)
        await gateway.drain()
        assert bench.memory.holds == {} and len(bench.memory.settled) == 1
        _, end = await read_all(running)
        assert end.kind == "aborted" and isinstance(end.error, Overloaded)
        assert end.answer.price > 0
        bench.memory.assert_balanced()


class TestCheckpoints:
    async def test_running_streams_are_written_down_from_time_to_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gateway_module, "CHECKPOINT_SECONDS", 0.001)
        gate = asyncio.Event()
        bench = Workbench(fakes=[Fake(default=FakeAnswer(gate=gate, gate_at=1))])
        gateway = gateway_of(bench)
        gateway.start()
        running = bench.start(request(stream=True))
        await running.next(30)
        await until(lambda: bench.memory.checkpoints)
        gate.set()
        await read_all(running)
        await gateway.aclose()

    async def test_a_failure_does_not_end_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gateway_module, "CHECKPOINT_SECONDS", 0.0)
        gateway = gateway_of(bench := Workbench())
        tried = 0

        def broken() -> None:
            nonlocal tried
            tried += 1
            raise RuntimeError("broken")

        monkeypatch.setattr(bench.completions, "checkpoint", broken)
        gateway.start()
        await until(lambda: tried >= 3)
        await gateway.aclose()


async def test_closing_closes_the_providers() -> None:
    bench = Workbench()
    gateway = gateway_of(bench)
    gateway.start()
    await gateway.aclose()
    assert bench.fake.closed
