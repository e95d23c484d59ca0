"""A request that is stopped, or cancelled, at any moment of its life leaves no open hold and at most one charge.

The event loop is replayed: everything here takes the same turns each time, so a run that is disturbed at turn k
is followed by one disturbed at turn k + 1, until the request is over before it can be disturbed.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from msgspec import Struct
from tests.support.memory_ledger import MemoryLedger
from tests.support.workbench import RICH, Workbench, request, running_for, spec

from headgate.core.accounts import Principal
from headgate.core.completion import Chunk, Completion, CompletionRequest, Job, StreamEnd
from headgate.core.errors import GatewayError, InsufficientFunds, LedgerUnavailable, UpstreamFailed
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service import billing as billing_module
from headgate.service.streams import Running, RunningStream, StopReason

MAX_TURNS = 400


class Slow(Fake):
    """Takes turns of the loop for counting, connecting, every batch and its clean-up."""

    async def count_prompt(self, job: Job) -> int:
        await turns(2)
        return 3

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        await turns(2)
        completion = await super().complete(job, on_sent)
        try:
            await turns(3)
        except asyncio.CancelledError:
            await turns(2)
            raise
        return completion

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        await turns(2)
        inner = super().stream(job, on_sent)
        try:
            async for batch in inner:
                await turns(2)
                yield batch
        finally:
            await turns(2)
            await inner.aclose()


class Scenario(Struct, frozen=True, kw_only=True):
    name: str
    streamed: bool
    prompts: tuple[str, ...] = ("a b c d",)
    models: tuple[str, ...] = ("fast",)
    answer: FakeAnswer = FakeAnswer()
    stream_only: bool = False
    funds: int = RICH

    def bench(self) -> Workbench:
        fakes = [Slow("slow", default=self.answer, stream_only=self.stream_only), Slow("other")]
        bench = Workbench(spec("fast", "slow"), spec("second", "other"), fakes=fakes)
        bench.memory.balances["ann"] = bench.memory.credited["ann"] = self.funds
        return bench

    def request(self) -> CompletionRequest:
        partial = len(self.models) > 1
        return request(*self.prompts, models=self.models, partial_failure=partial, stream=self.streamed)


FAILING = FakeAnswer(error=UpstreamFailed("broken"), error_at=2)
SCENARIOS = [
    Scenario(name="blocking", streamed=False),
    Scenario(name="blocking over a stream", streamed=False, stream_only=True),
    Scenario(name="blocking, several prompts", streamed=False, prompts=("a b", "c d")),
    Scenario(name="blocking, several models", streamed=False, models=("fast", "second")),
    Scenario(name="blocking, failing", streamed=False, answer=FAILING),
    Scenario(name="blocking, one model failing", streamed=False, models=("fast", "second"), answer=FAILING),
    Scenario(name="blocking, no funds", streamed=False, funds=1),
    Scenario(name="stream", streamed=True),
    Scenario(name="stream, several prompts", streamed=True, prompts=("a b", "c d")),
    Scenario(name="stream, several models", streamed=True, models=("fast", "second")),
    Scenario(name="stream, failing", streamed=True, answer=FAILING),
    Scenario(name="stream, one model failing", streamed=True, models=("fast", "second"), answer=FAILING),
    Scenario(name="stream, no funds", streamed=True, funds=1),
]


class Outcome(Struct):
    """What the client got. `delivered`: the text of a stream's chunks."""

    error: BaseException | None = None
    end: StreamEnd | None = None
    answered: bool = False
    delivered: str = ""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing_module, "RETRY_SECONDS", (0.0,))


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def perform(bench: Workbench, asked: CompletionRequest, running: Running) -> Outcome:
    """Be the client."""
    outcome = Outcome()
    try:
        if isinstance(running, RunningStream):
            while outcome.end is None:
                item = await running.next(60)
                if isinstance(item, StreamEnd):
                    outcome.end = item
                else:
                    outcome.delivered += "".join(chunk.text for chunk in item or ())
        else:
            await bench.ask(asked, running)
            outcome.answered = True
    except (GatewayError, asyncio.CancelledError) as error:
        outcome.error = error
    return outcome


def checked(bench: Workbench, outcome: Outcome, running: Running) -> None:
    """The rules that hold wherever a request was disturbed."""
    ledger = bench.memory
    ledger.assert_balanced()
    assert len(ledger.settled) == len(set(ledger.settled)) <= 1
    assert len(bench.streams) == 0 and bench.completions.open_holds == 0
    charged = ledger.credited["ann"] - ledger.balances["ann"]
    assert charged == sum(row.price for row in ledger.rows)
    assert bool(ledger.rows) == bool(ledger.settled)
    for fake in bench.providers.values():
        assert isinstance(fake, Fake)
        assert all(call.state != "running" for call in fake.calls)
    if outcome.end is not None:
        assert outcome.end.answer.price == charged
        assert outcome.end.kind == ("completed" if running.stop_reason is None else "aborted")
    if outcome.answered:
        assert charged > 0
    told = isinstance(outcome.error, GatewayError) and running.stop_reason != "disconnected"
    if told and not outcome.delivered:
        assert charged == 0  # the answer was an error
    if outcome.delivered:
        assert charged > 0


async def disturbed(
    scenario: Scenario, turn: int, disturb: Callable[[Running, "asyncio.Task[Outcome]"], None]
) -> bool:
    """One run, disturbed after so many turns; False when it was over before."""
    bench, asked = scenario.bench(), scenario.request()
    running: Running = running_for(asked)
    if isinstance(running, RunningStream):
        bench.completions.stream(asked, running_principal(running), running)
    client = asyncio.ensure_future(perform(bench, asked, running))
    await turns(turn)
    over = client.done()
    disturb(running, client)
    await asyncio.wait([client])
    outcome = Outcome(error=asyncio.CancelledError()) if client.cancelled() else client.result()
    if isinstance(running, RunningStream) and not running.settled.is_set():
        running.stop("disconnected")  # what the web does when it leaves a stream
    await bench.settle_down()
    await turns(10)
    checked(bench, outcome, running)
    return not over


def running_principal(running: Running) -> "Principal":
    return Principal(account=running.account, key_id="key-1")


def named(scenarios: Sequence[Scenario]) -> list[Any]:
    return [pytest.param(scenario, id=scenario.name) for scenario in scenarios]


async def every_turn(scenario: Scenario, disturb: Callable[[Running, "asyncio.Task[Outcome]"], None]) -> int:
    for turn in itertools.count():
        assert turn < MAX_TURNS, "the request never ends"
        if not await disturbed(scenario, turn, disturb):
            return turn
    raise AssertionError


STREAMED = [scenario for scenario in SCENARIOS if scenario.streamed]
BLOCKING = [scenario for scenario in SCENARIOS if not scenario.streamed]


@pytest.mark.parametrize("scenario", named(SCENARIOS))
@pytest.mark.parametrize("reason", ["disconnected", "draining"])
async def test_a_stop_at_any_moment_leaves_the_books_right(scenario: Scenario, reason: StopReason) -> None:
    assert await every_turn(scenario, lambda running, _: running.stop(reason)) > 5


@pytest.mark.parametrize("scenario", named(STREAMED))
async def test_a_shutdown_of_a_stream_at_any_moment_leaves_the_books_right(scenario: Scenario) -> None:
    assert await every_turn(scenario, lambda running, _: running.stop("client")) > 5


@pytest.mark.parametrize("scenario", named(BLOCKING))
async def test_a_task_cancelled_at_any_moment_leaves_the_books_right(scenario: Scenario) -> None:
    def cancel(_: Running, client: "asyncio.Task[Outcome]") -> None:
        client.cancel()

    assert await every_turn(scenario, cancel) > 5


@pytest.mark.parametrize("scenario", named(STREAMED))
async def test_a_reader_that_leaves_at_any_moment_leaves_the_books_right(scenario: Scenario) -> None:
    def leave(running: Running, client: "asyncio.Task[Outcome]") -> None:
        client.cancel()
        running.stop("disconnected")

    assert await every_turn(scenario, leave) > 5


@pytest.mark.parametrize("scenario", named(SCENARIOS))
async def test_two_stops_and_a_cancellation_at_once_leave_the_books_right(scenario: Scenario) -> None:
    def all_at_once(running: Running, client: "asyncio.Task[Outcome]") -> None:
        running.stop("disconnected")
        running.stop("draining")
        client.cancel()

    assert await every_turn(scenario, all_at_once) > 5


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("scenario", named(SCENARIOS))
async def test_an_outage_of_the_ledger_at_any_moment_is_made_good(
    scenario: Scenario, cancelled: bool
) -> None:
    for turn in itertools.count():
        assert turn < MAX_TURNS
        bench, asked = scenario.bench(), scenario.request()
        running: Running = running_for(asked)
        if isinstance(running, RunningStream):
            bench.completions.stream(asked, running_principal(running), running)
        client = asyncio.ensure_future(perform(bench, asked, running))
        await turns(turn)
        over = client.done()
        bench.memory.fail()
        if cancelled:
            running.stop("disconnected")
            client.cancel()
        await asyncio.wait([client])
        outcome = Outcome(error=asyncio.CancelledError()) if client.cancelled() else client.result()
        await turns(20)
        bench.memory.problem = None
        await bench.settle_down()
        ledger: MemoryLedger = bench.memory
        ledger.assert_balanced()
        assert len(ledger.settled) <= 1
        charged = ledger.credited["ann"] - ledger.balances["ann"]
        if isinstance(outcome.error, LedgerUnavailable):
            assert (charged > 0) == bool(outcome.delivered)
        if outcome.answered or (outcome.end is not None and outcome.end.kind == "completed"):
            assert charged > 0
        if over:
            return


async def test_a_stop_races_a_stop_and_the_end_whatever_the_distance() -> None:
    """Two stops at every pair of moments: the first reason counts, and the hold resolves once."""
    scenario = Scenario(name="short", streamed=True, prompts=("a",), answer=FakeAnswer(text="x y"))
    bench, asked = scenario.bench(), scenario.request()
    length = await every_turn(scenario, lambda running, _: None)
    for first in range(length):
        for distance in (0, 1, 2, 3, 5, 8):
            bench, asked = scenario.bench(), scenario.request()
            running = bench.start(asked)
            client = asyncio.ensure_future(perform(bench, asked, running))
            await turns(first)
            running.stop("client")
            reason = running.stop_reason
            await turns(distance)
            running.stop("disconnected")
            assert running.stop_reason == (reason or running.stop_reason)
            outcome = await client
            await bench.settle_down()
            checked(bench, outcome, running)


async def test_undisturbed_scenarios_end_as_they_should() -> None:
    """The scenarios above are what their names say."""
    for scenario in SCENARIOS:
        bench, asked = scenario.bench(), scenario.request()
        running = running_for(asked)
        if scenario.streamed:
            bench.completions.stream(asked, running_principal(running), running)
        outcome = await perform(bench, asked, running)
        if scenario.funds == 1:
            assert isinstance(outcome.error, InsufficientFunds)
        elif scenario.answer is FAILING and len(scenario.models) == 1:
            assert isinstance(outcome.error, UpstreamFailed)
        else:
            assert outcome.answered or (outcome.end is not None and outcome.end.kind == "completed")
        checked(bench, outcome, running)
