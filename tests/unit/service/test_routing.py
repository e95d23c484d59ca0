"""Retries, deployments and fallbacks: who is asked, who answers, what it costs."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from msgspec import structs
from tests.support.clock import ManualClock
from tests.support.until import until
from tests.support.workbench import Workbench, read_all, request, spec

from headgate.config import RoutingSettings
from headgate.core.accounts import UsageRow
from headgate.core.completion import Chunk, Completion, Job, Usage
from headgate.core.errors import (
    ConnectionFailed,
    GatewayError,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD
from headgate.providers.fake import Fake, FakeAnswer, FakeCall
from headgate.service.circuits import Circuits
from headgate.service.metrics import Metrics
from headgate.service.routing import Router

QUICK = RoutingSettings(retries=2, retry_wait_s=0.001, retry_max_wait_s=0.01, breaker_failures=0)


class Failing(Fake):
    """Fails with these errors, one a call, then answers."""

    def __init__(self, *errors: GatewayError, name: str = "fake", at: int = 0, sent: bool = True) -> None:
        super().__init__(name)
        self._errors = list(errors)
        self._at = at
        self._sent = sent

    def _next(self) -> None:
        error = self._errors.pop(0) if self._errors else None
        self.default = FakeAnswer(error=error, error_at=self._at, sent=self._sent or error is None)

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        self._next()
        return await super().complete(job, on_sent)

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        self._next()
        return super().stream(job, on_sent)


def failed(status: int | None = 500, usage: Usage | None = None) -> UpstreamFailed:
    error = UpstreamFailed("broken")
    error.status = status
    error.usage = usage
    return error


def rows(bench: Workbench) -> Sequence[UsageRow]:
    return bench.memory.rows


PASSING = [
    failed(500),
    failed(502),
    failed(408),
    failed(409),
    ConnectionFailed("lost"),
    UpstreamUnavailable("529"),
    UpstreamRateLimited("429"),
]
LASTING = [
    failed(404),
    failed(None),
    UpstreamAuth("key"),
    UpstreamRejected("wrong"),
    UpstreamTimeout("silent"),
    Overloaded("queue"),
]


class TestRetries:
    @pytest.mark.parametrize("error", PASSING, ids=repr)
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_failure_that_passes_is_asked_again_and_the_client_sees_nothing_of_it(
        self, error: GatewayError, stream: bool
    ) -> None:
        provider = Failing(error, error)
        bench = Workbench(fakes=[provider], routing=QUICK)
        asked = request("one two three", stream=stream)
        answer = (await bench.stream(asked))[1].answer if stream else await bench.ask(asked)
        assert answer.choices[0].text == "echo: one two three"
        assert len(provider.calls) == 3
        (row,) = rows(bench)
        assert (row.attempts, row.error, row.prompt_tokens, row.completion_tokens) == (3, None, 3, 4)
        assert row.price == answer.price == 3 * 500 + 4 * 1500

    @pytest.mark.parametrize("error", LASTING, ids=repr)
    async def test_a_failure_that_lasts_is_not(self, error: GatewayError) -> None:
        provider = Failing(error)
        bench = Workbench(fakes=[provider], routing=QUICK)
        with pytest.raises(type(error)):
            await bench.ask(request())
        assert len(provider.calls) == 1
        assert (rows(bench)[0].price, bench.memory.holds) == (0, {})

    async def test_connecting_that_took_too_long_is_tried_again(self) -> None:
        provider = Failing(UpstreamTimeout("connecting"), sent=False)
        bench = Workbench(fakes=[provider], routing=QUICK)
        await bench.ask(request())
        assert len(provider.calls) == 2

    async def test_it_gives_up_after_the_retries_with_the_failure_as_it_was(self) -> None:
        provider = Failing(*[failed(503)] * 9)
        bench = Workbench(fakes=[provider], routing=QUICK)
        with pytest.raises(UpstreamFailed) as caught:
            await bench.ask(request())
        assert (caught.value.status, len(provider.calls)) == (503, 3)
        (row,) = rows(bench)
        assert (row.attempts, row.error, row.price) == (3, "upstream_failed", 0)

    async def test_never_after_the_first_output_of_a_stream(self) -> None:
        provider = Failing(failed(500), at=1)
        bench = Workbench(fakes=[provider], routing=QUICK)
        with pytest.raises(UpstreamFailed):
            await bench.stream(request("one two three", stream=True))
        assert len(provider.calls) == 1
        assert rows(bench)[0].price > 0, "what was delivered is charged"

    async def test_output_that_nobody_has_seen_is_thrown_away_and_not_charged(self) -> None:
        provider = Failing(failed(500), at=2)
        provider.stream_only = True
        bench = Workbench(fakes=[provider], routing=QUICK)
        answer = await bench.ask(request("one two three"))
        assert answer.choices[0].text == "echo: one two three"
        assert answer.price == 3 * 500 + 4 * 1500

    async def test_a_longer_wait_than_allowed_is_for_the_client(self) -> None:
        provider = Failing(UpstreamRateLimited("slow down", retry_after=30))
        bench = Workbench(fakes=[provider], routing=QUICK)
        with pytest.raises(UpstreamRateLimited) as caught:
            await bench.ask(request())
        assert (caught.value.retry_after, len(provider.calls)) == (30, 1)

    async def test_one_of_several_calls_is_repeated_alone(self) -> None:
        provider = Failing(failed(500))
        bench = Workbench(fakes=[provider], routing=QUICK)
        answer = await bench.ask(request("a", "b", "c"))
        assert [choice.text for choice in answer.choices] == ["echo: a", "echo: b", "echo: c"]
        assert Counter(call.job.prompt for call in provider.calls) == {"a": 2, "b": 1, "c": 1}

    async def test_what_failed_attempts_cost_is_on_the_row_and_on_nobodys_bill(self) -> None:
        usage = Usage(prompt_tokens=10, completion_tokens=4)
        bench = Workbench(fakes=[Failing(failed(500, usage), failed(502, usage))], routing=QUICK)
        answer = await bench.ask(request("one"))
        (row,) = rows(bench)
        assert row.failed_cost == 2 * (10 * 500 + 4 * 1500)
        assert answer.price == row.price == row.cost == 500 + 2 * 1500

    async def test_a_request_that_failed_for_good_records_what_its_attempts_cost(self) -> None:
        usage = Usage(prompt_tokens=10, completion_tokens=4)
        bench = Workbench(fakes=[Failing(*[failed(500, usage)] * 3)], routing=QUICK)
        with pytest.raises(UpstreamFailed):
            await bench.ask(request("one"))
        (row,) = rows(bench)
        assert (row.failed_cost, row.cost, row.price) == (3 * (10 * 500 + 4 * 1500), 0, 0)

    async def test_a_client_that_leaves_during_a_pause_owes_nothing_for_what_failed(self) -> None:
        usage = Usage(prompt_tokens=10, completion_tokens=4)
        provider = Failing(failed(500, usage))
        rules = RoutingSettings(
            retries=2, retry_wait_s=600, retry_max_wait_s=600, breaker_failures=0, deadline_s=9999
        )
        bench = Workbench(fakes=[provider], routing=rules)
        running = bench.start(request("one", stream=True))
        await until(lambda: provider.calls and provider.calls[0].ended.is_set())
        await asyncio.sleep(0)
        running.stop("disconnected")
        with contextlib.suppress(Exception):
            await read_all(running)
        await bench.settle_down()
        (row,) = rows(bench)
        assert (row.price, row.failed_cost) == (0, 10 * 500 + 4 * 1500)

    async def test_pauses_grow_and_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)

        monkeypatch.setattr("stamina._core._smart_sleep", sleep)
        rules = RoutingSettings(retries=4, retry_wait_s=1, retry_max_wait_s=4, breaker_failures=0)
        bench = Workbench(fakes=[Failing(*[failed()] * 4)], routing=rules)
        await bench.ask(request())
        assert len(set(pauses)) == 4
        for pause, middle in zip(pauses, (1, 2, 4, 4), strict=True):
            assert middle / 2 <= pause <= middle * 1.5

    async def test_a_finished_choice_has_left_even_if_it_is_empty(self) -> None:
        class Empty(Failing):
            async def stream(
                self, job: Job, on_sent: Callable[[], None]
            ) -> AsyncGenerator[Sequence[Chunk], None]:
                self.calls.append(FakeCall(job, streamed=True))
                on_sent()
                yield [Chunk(0, "", "stop")]
                raise ConnectionFailed("lost")

        provider = Empty()
        bench = Workbench(fakes=[provider], routing=QUICK)
        with pytest.raises(ConnectionFailed):
            await bench.stream(request("one", n=2, stream=True))
        assert len(provider.calls) == 1

    async def test_calls_carry_the_requests_deadline(self) -> None:
        provider = Failing()
        bench = Workbench(fakes=[provider], routing=RoutingSettings(deadline_s=7))
        await bench.ask(request())
        assert provider.calls[0].job.deadline == bench.clock.monotonic() + 7

    async def test_past_the_deadline_nothing_is_repeated(self) -> None:
        clock = ManualClock()

        class Slow(Failing):
            async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
                clock.advance(11)
                return await super().complete(job, on_sent)

        provider = Slow(*[UpstreamUnavailable("busy", retry_after=1)] * 5)
        rules = RoutingSettings(retries=4, deadline_s=10, breaker_failures=0)
        bench = Workbench(fakes=[provider], routing=rules, clock=clock)
        with pytest.raises(UpstreamUnavailable):
            await bench.ask(request())
        assert len(provider.calls) == 1


class TestFallbacks:
    def bench(self, *providers: Fake, **fields: Any) -> Workbench:
        return Workbench(
            spec(fallbacks=("slow",), **fields),
            spec("slow", "spare", input_rate=FemtoUSD(10**9), output_rate=FemtoUSD(4 * 10**9)),
            fakes=providers,
            routing=RoutingSettings(retries=0, breaker_failures=0),
        )

    @pytest.mark.parametrize("error", [*PASSING, *(LASTING[i] for i in (0, 1, 2, 4, 5))], ids=repr)
    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_fallback_serves_is_named_and_is_what_is_charged(
        self, error: GatewayError, stream: bool
    ) -> None:
        spare = Fake("spare")
        bench = self.bench(Failing(error), spare)
        asked = request("one two", stream=stream)
        answer = (await bench.stream(asked))[1].answer if stream else await bench.ask(asked)
        (served,) = answer.models
        assert (served.model, served.provider, served.requested) == ("slow", "spare", "fast")
        assert answer.price == 2 * 1000 + 3 * 4000
        (row,) = rows(bench)
        assert (row.model, row.provider, row.attempts, row.error) == ("slow", "spare", 2, None)
        assert (
            b'headgate_fallbacks_total{model="fake/fast",served="spare/slow"} 1.0'
            in bench.metrics.exposition()
        )

    async def test_a_stream_names_what_serves_it_before_its_first_chunk(self) -> None:
        bench = self.bench(Failing(failed()), Fake("spare"))
        running = bench.start(request("one two", stream=True))
        await running.next(5)
        assert (running.providers, running.served) == ("spare", ["slow"])

    async def test_the_hold_covers_the_dearest_of_them(self) -> None:
        bench = self.bench(Failing(failed()), Fake("spare"))
        await bench.ask(request("x" * 100, max_tokens=10))
        (hold,) = bench.memory.amounts
        assert hold == 100 * 1000 + 10 * 4000

    async def test_what_the_client_did_wrong_is_not_asked_of_another(self) -> None:
        spare = Fake("spare")
        bench = self.bench(Failing(UpstreamRejected("wrong")), spare)
        with pytest.raises(UpstreamRejected):
            await bench.ask(request())
        assert spare.calls == []

    async def test_nothing_falls_back_once_output_has_left(self) -> None:
        spare = Fake("spare")
        bench = self.bench(Failing(failed(), at=1), spare)
        with pytest.raises(UpstreamFailed):
            await bench.stream(request("one two", stream=True))
        assert spare.calls == []

    async def test_when_all_fail_the_requested_models_failure_is_told(self) -> None:
        bench = self.bench(
            Failing(UpstreamRateLimited("slow down", retry_after=9)), Failing(failed(), name="spare")
        )
        with pytest.raises(UpstreamRateLimited):
            await bench.ask(request())
        (row,) = rows(bench)
        assert (row.price, row.attempts, bench.memory.holds) == (0, 2, {})

    async def test_a_model_without_a_key_is_stood_in_for_from_the_start(self) -> None:
        missing = Fake("fake", reason="set FAKE_KEY")
        bench = self.bench(missing, Fake("spare"))
        answer = await bench.ask(request("one"))
        assert (answer.models[0].model, missing.calls) == ("slow", [])

    async def test_without_any_that_can_be_called_it_says_which_key_to_set(self) -> None:
        bench = self.bench(Fake("fake", reason="set FAKE_KEY"), Fake("spare", reason="set SPARE_KEY"))
        with pytest.raises(ModelUnavailable, match="set FAKE_KEY"):
            await bench.ask(request())
        assert bench.memory.amounts == []

    async def test_a_fallback_that_cannot_honour_the_request_is_passed_over(self) -> None:
        spare = Fake("spare")
        bench = Workbench(
            spec(fallbacks=("small", "slow")),
            spec("small", "spare", max_output_tokens=8),
            spec("slow", "spare", upstream_name="large"),
            fakes=[Failing(failed()), spare],
        )
        await bench.ask(request(max_tokens=64))
        assert [call.job.model.upstream_name for call in spare.calls] == ["large"]

    async def test_a_wrong_request_is_refused_though_a_fallback_could_take_it(self) -> None:
        bench = self.bench(Fake(), Fake("spare"), max_output_tokens=8)
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await bench.ask(request(max_tokens=64))

    async def test_every_model_of_several_has_its_own_fallback(self) -> None:
        bench = self.bench(Failing(failed(), failed()), Fake("spare"))
        answer = await bench.ask(request("one", models=("fast", "slow", "fast"), partial_failure=True))
        assert [model.model for model in answer.models] == ["slow", "slow", "slow"]

    async def test_a_fallbacks_own_refusal_is_not_the_clients_business(self) -> None:
        bench = Workbench(
            spec(fallbacks=("slow", "third")),
            spec("slow", "spare"),
            spec("third", "last"),
            fakes=[Failing(failed(503)), Failing(UpstreamRejected("odd"), name="spare"), Fake("last")],
        )
        assert (await bench.ask(request("one"))).models[0].model == "third"

    async def test_the_row_of_a_failure_names_the_model_that_was_asked_for(self) -> None:
        bench = self.bench(Failing(failed()), Failing(failed(), name="spare"))
        with pytest.raises(UpstreamFailed):
            await bench.ask(request())
        (row,) = rows(bench)
        assert (row.model, row.provider, row.error, row.attempts) == ("fast", "fake", "upstream_failed", 2)

    async def test_a_refusal_by_a_circuit_is_not_waited_for_where_there_is_a_fallback(self) -> None:
        main, spare = Fake(), Fake("spare")
        bench = Workbench(
            spec(fallbacks=("slow",)), spec("slow", "spare"), fakes=[main, spare],
            routing=RoutingSettings(retries=2, retry_wait_s=60, retry_max_wait_s=600),
        )  # fmt: skip
        circuit = bench.circuits.of(spec())
        circuit.failed(0, UpstreamRateLimited("slow down", retry_after=5))
        answer = await asyncio.wait_for(bench.ask(request("one")), 5)
        assert (answer.models[0].model, main.calls) == ("slow", [])

    async def test_counting_for_a_fallback_does_not_hold_up_what_is_asked_first(self) -> None:
        class Slow(Fake):
            async def count_prompt(self, job: Job) -> int | None:
                await asyncio.Event().wait()
                return 1

        bench = self.bench(Fake(), Slow("spare"))
        answer = await asyncio.wait_for(bench.ask(request("one")), 10)
        assert answer.models[0].model == "fast"


class TestCircuits:
    async def test_a_stream_that_has_begun_lets_others_through_again(self) -> None:
        gate = asyncio.Event()
        provider = Failing(failed(), failed())
        bench = Workbench(
            fakes=[provider], routing=RoutingSettings(retries=0, breaker_failures=2, breaker_open_s=60)
        )
        for _ in range(2):
            with pytest.raises(UpstreamFailed):
                await bench.ask(request())
        bench.clock.advance(60)
        provider.answers["long"] = FakeAnswer(text="one two", gate=gate, gate_at=1)
        running = bench.start(request("long", stream=True))
        await running.next(5)
        assert (await bench.ask(request("one"))).choices
        gate.set()
        await read_all(running)

    async def test_time_that_ran_out_on_our_side_says_nothing_about_the_upstream(self) -> None:
        clock = ManualClock()

        class Late(Fake):
            async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
                on_sent()
                clock.advance(11)
                raise UpstreamTimeout("no time is left")

        spare = Fake("spare")
        rules = RoutingSettings(retries=0, breaker_failures=1, deadline_s=10)
        bench = Workbench(
            spec(fallbacks=("slow",)),
            spec("slow", "spare"),
            fakes=[Late(), spare],
            routing=rules,
            clock=clock,
        )
        with pytest.raises(UpstreamTimeout):
            await bench.ask(request())
        assert spare.calls == [], "there is no time for it"
        assert bench.circuits.reason(spec()) is None

    async def test_one_request_of_many_calls_does_not_open_it(self) -> None:
        provider = Failing(*[failed()] * 99)
        bench = Workbench(fakes=[provider], routing=structs.replace(QUICK, breaker_failures=3))
        with pytest.raises(UpstreamFailed):
            await bench.ask(request("a", "b", "c"))
        assert bench.circuits.reason(spec()) is None


class TestDeployments:
    def spec_of(self, **weights: int) -> ModelSpec:
        deployments = tuple(spec(provider=name, weight=weight) for name, weight in weights.items())
        return spec(provider=deployments[0].provider, deployments=deployments)

    async def test_they_are_asked_as_often_as_their_weights_say(self) -> None:
        light, heavy = Fake("light"), Fake("heavy")
        bench = Workbench(self.spec_of(light=1, heavy=3), fakes=[light, heavy])
        for _ in range(200):
            await bench.ask(request("one"))
        assert 25 <= len(light.calls) <= 75
        assert len(light.calls) + len(heavy.calls) == 200

    async def test_when_one_fails_the_other_answers_under_the_same_name(self) -> None:
        bad, good = Failing(*[failed()] * 50, name="bad"), Fake("good")
        bench = Workbench(self.spec_of(bad=1, good=1), fakes=[bad, good], routing=QUICK)
        for _ in range(20):
            answer = await bench.ask(request("one"))
            assert (answer.models[0].model, answer.models[0].provider) == ("fast", "good")
        assert bad.calls, "it was tried"
        assert len(good.calls) == 20

    async def test_a_name_with_its_provider_is_served_there_or_not_at_all(self) -> None:
        bad, good, spare = Failing(*[failed()] * 50, name="bad"), Fake("good"), Fake("spare")
        model = self.spec_of(bad=1, good=1)
        bench = Workbench(
            structs.replace(model, fallbacks=("slow",)), spec("slow", "spare"), fakes=[bad, good, spare]
        )
        with pytest.raises(UpstreamFailed):
            await bench.ask(request("one", models=("bad/fast",)))
        assert (len(bad.calls), good.calls, spare.calls) == (1, [], [])

    async def test_one_that_is_awake_keeps_its_retries_beside_one_at_rest(self) -> None:
        awake, tired = Failing(ConnectionFailed("lost"), name="awake"), Fake("tired")
        rules = structs.replace(QUICK, breaker_failures=2)
        bench = Workbench(self.spec_of(awake=1, tired=1), fakes=[awake, tired], routing=rules)
        resting = bench.circuits.of(spec(provider="tired"))
        for _ in range(2):
            resting.failed(resting.begin(), failed())
        await bench.ask(request("one"))
        assert (len(awake.calls), tired.calls) == (2, [])

    async def test_a_deployment_without_a_key_does_not_hide_a_fallback(self) -> None:
        keyless, plain, spare = Fake("keyless", reason="set KEY"), Fake("plain"), Fake("spare")
        deployments = (spec(provider="keyless"), spec(provider="plain", logprobs=False))
        model = spec(provider="keyless", deployments=deployments, fallbacks=("slow",))
        bench = Workbench(model, spec("slow", "spare"), fakes=[keyless, plain, spare])
        for _ in range(10):
            answer = await bench.ask(request("one", logprobs=0))
            assert answer.models[0].model == "slow"

    async def test_the_last_one_is_asked_patiently(self) -> None:
        one, other = Failing(*[failed()] * 9, name="one"), Failing(*[failed()] * 9, name="other")
        bench = Workbench(self.spec_of(one=1, other=1), fakes=[one, other], routing=QUICK)
        with pytest.raises(UpstreamError):
            await bench.ask(request("one"))
        assert sorted((len(one.calls), len(other.calls))) == [1, 3]

    async def test_one_that_cannot_honour_the_request_is_not_asked(self) -> None:
        plain, able = Fake("plain"), Fake("able")
        deployments = (spec(provider="plain", logprobs=False), spec(provider="able"))
        bench = Workbench(
            spec(provider="plain", logprobs=False, deployments=deployments), fakes=[plain, able]
        )
        for _ in range(9):
            await bench.ask(request("one", logprobs=0))
        assert (len(plain.calls), len(able.calls)) == (0, 9)
        with pytest.raises(InvalidRequest, match="image"):
            await bench.ask(request("one", looks=True))

    async def test_one_that_is_at_rest_is_asked_only_when_all_are(self) -> None:
        tired, fresh = Failing(*[failed()] * 99, name="tired"), Fake("fresh")
        rules = RoutingSettings(retries=0, breaker_failures=2, breaker_open_s=60)
        bench = Workbench(self.spec_of(tired=1, fresh=1), fakes=[tired, fresh], routing=rules)
        for _ in range(50):
            await bench.ask(request("one"))
        assert len(tired.calls) == 2
        assert b'headgate_circuit_state{model="plain",provider="tired"} 2.0' in _exposed(bench)

    async def test_an_open_circuit_refuses_without_asking_until_its_pause_is_over(self) -> None:
        provider = Failing(failed(), failed())
        rules = RoutingSettings(retries=0, breaker_failures=2, breaker_open_s=60)
        bench = Workbench(fakes=[provider], routing=rules)
        for _ in range(2):
            with pytest.raises(UpstreamFailed):
                await bench.ask(request())
        with pytest.raises(UpstreamUnavailable) as caught:
            await bench.ask(request())
        assert (caught.value.retry_after, len(provider.calls)) == (60, 2)
        assert "fails at present" in (bench.serving.unavailable(spec()) or "")
        bench.clock.advance(60)
        await bench.ask(request())
        assert bench.serving.unavailable(spec()) is None


def test_the_order_is_by_chance_and_those_at_rest_are_last() -> None:
    rules = RoutingSettings(breaker_failures=1)
    circuits = Circuits(rules, ManualClock())
    router = Router(circuits, rules, Metrics())
    deployments = tuple(spec(provider=name) for name in "abc")
    circuits.of(deployments[0]).failed(0, failed())
    orders = {tuple(one.provider for one in router.order(spec(deployments=deployments))) for _ in range(200)}
    assert orders == {("b", "c", "a"), ("c", "b", "a")}


def _exposed(bench: Workbench) -> bytes:
    bench.metrics.circuits(bench.serving.circuits)
    return bench.metrics.exposition()
