"""When a deployment is left alone, and when it is asked again."""

from collections.abc import Callable

import pytest
from tests.support.clock import ManualClock
from tests.support.workbench import spec

from headgate.config import RoutingSettings
from headgate.core.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.service.circuits import Circuit, Circuits

RULES = RoutingSettings(breaker_failures=3, breaker_calls=10, breaker_error_percent=50, breaker_open_s=15)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def circuit(clock: ManualClock) -> Circuit:
    return Circuits(RULES, clock).of(spec())


def broken(status: int | None = 500, kind: type[UpstreamError] = UpstreamFailed) -> UpstreamError:
    error = kind("broken")
    error.status = status
    return error


def fail(circuit: Circuit, times: int, error: GatewayError | None = None) -> None:
    for _ in range(times):
        circuit.failed(circuit.begin(), error or broken())


def succeed(circuit: Circuit) -> None:
    circuit.succeeded(circuit.begin())


def test_failures_in_a_row_open_it_and_the_refusal_says_when_to_come_back(
    circuit: Circuit, clock: ManualClock
) -> None:
    fail(circuit, 2)
    assert circuit.refusal() is None
    fail(circuit, 1)
    clock.advance(5)
    refusal = circuit.refusal()
    assert isinstance(refusal, UpstreamUnavailable)
    assert refusal.retry_after == 10
    status = circuit.status()
    assert (status.state, status.reason, status.retry_after) == ("open", "upstream_failed", 10)


def test_a_success_between_failures_starts_the_count_anew(circuit: Circuit) -> None:
    for _ in range(4):
        fail(circuit, 2)
        succeed(circuit)
        succeed(circuit)
        succeed(circuit)
    assert circuit.refusal() is None


def test_a_rate_of_failures_opens_it_without_a_row_of_them(circuit: Circuit) -> None:
    for _ in range(4):
        fail(circuit, 1)
        succeed(circuit)
    assert circuit.refusal() is None
    fail(circuit, 1)
    succeed(circuit)
    assert circuit.refusal() is None, "it opens on failures, not on successes"
    fail(circuit, 1)
    assert circuit.refusal() is not None


def test_after_the_pause_one_call_tries_and_its_success_closes_it(
    circuit: Circuit, clock: ManualClock
) -> None:
    fail(circuit, 3)
    clock.advance(15)
    assert (circuit.refusal(), circuit.status().state) == (None, "half_open")
    call = circuit.begin()
    assert isinstance(circuit.refusal(), UpstreamUnavailable), "the others wait for what it finds"
    circuit.succeeded(call)
    assert (circuit.refusal(), circuit.status().state, circuit.status().reason) == (None, "closed", None)
    fail(circuit, 2)
    assert circuit.refusal() is None, "what was before is forgotten"


def test_a_try_that_fails_opens_it_for_twice_as_long(circuit: Circuit, clock: ManualClock) -> None:
    fail(circuit, 3)
    for pause in (15, 30, 60, 120, 240, 240):
        clock.advance(pause - 1)
        assert circuit.refusal() is not None
        clock.advance(1)
        assert circuit.refusal() is None
        fail(circuit, 1)


def test_a_try_that_is_given_up_lets_the_next_one_try(circuit: Circuit, clock: ManualClock) -> None:
    fail(circuit, 3)
    clock.advance(15)
    circuit.abandoned(circuit.begin())
    assert circuit.refusal() is None


def test_a_429_makes_it_rest_as_long_as_it_asks(circuit: Circuit, clock: ManualClock) -> None:
    circuit.failed(circuit.begin(), UpstreamRateLimited("slow down", retry_after=30))
    refusal = circuit.refusal()
    assert isinstance(refusal, UpstreamRateLimited)
    assert (refusal.retry_after, circuit.status().state) == (30, "closed")
    assert circuit.status().reason == "it asked for fewer requests"
    clock.advance(30)
    assert circuit.refusal() is None


@pytest.mark.parametrize(
    "error",
    [
        UpstreamRejected("no such parameter"),
        UpstreamAuth("bad key"),
        broken(404),
        InvalidRequest("impossible"),
        Overloaded("our own queue is full"),
    ],
)
def test_what_says_nothing_about_the_upstream_does_not_count(circuit: Circuit, error: GatewayError) -> None:
    fail(circuit, 20, error)
    assert circuit.refusal() is None


@pytest.mark.parametrize(
    "make",
    [lambda: broken(None), lambda: broken(503, UpstreamUnavailable), lambda: broken(None, UpstreamTimeout)],
)
def test_lost_connections_time_outs_and_5xx_count(
    circuit: Circuit, make: Callable[[], UpstreamError]
) -> None:
    fail(circuit, 3, make())
    assert circuit.refusal() is not None


def test_with_no_failures_allowed_for_there_are_no_circuits(clock: ManualClock) -> None:
    circuit = Circuits(RoutingSettings(breaker_failures=0), clock).of(spec())
    fail(circuit, 100)
    circuit.failed(circuit.begin(), UpstreamRateLimited("slow down", retry_after=30))
    assert circuit.refusal() is None


def test_each_deployment_has_its_own_circuit_and_reason(clock: ManualClock) -> None:
    circuits = Circuits(RULES, clock)
    one, other = spec(provider="one"), spec(provider="other")
    fail(circuits.of(one), 3)
    assert "The provider one fails at present (upstream_failed)" in (circuits.reason(one) or "")
    assert circuits.reason(other) is None
    assert [(status.provider, status.state) for status in circuits] == [("one", "open"), ("other", "closed")]


def test_the_first_sign_of_an_answer_closes_it_however_long_the_answer_takes(
    circuit: Circuit, clock: ManualClock
) -> None:
    fail(circuit, 3)
    clock.advance(15)
    call = circuit.begin()
    circuit.heard(call)
    assert circuit.refusal() is None
    circuit.succeeded(call)
    assert circuit.refusal() is None


@pytest.mark.parametrize("error", [UpstreamRejected("wrong"), UpstreamAuth("key"), broken(404)])
def test_a_try_that_is_refused_for_itself_shows_that_the_upstream_is_there(
    circuit: Circuit, clock: ManualClock, error: UpstreamError
) -> None:
    fail(circuit, 3)
    clock.advance(15)
    fail(circuit, 1, error)
    assert circuit.status().state == "closed"


def test_calls_from_before_it_opened_say_nothing_about_now(circuit: Circuit, clock: ManualClock) -> None:
    old = [circuit.begin() for _ in range(3)]
    fail(circuit, 3)
    clock.advance(15)
    probe = circuit.begin()
    circuit.succeeded(old[0])
    circuit.failed(old[1], broken())
    circuit.abandoned(old[2])
    assert isinstance(circuit.refusal(), UpstreamUnavailable), "the one that tries is still under way"
    circuit.succeeded(probe)
    assert circuit.refusal() is None


def test_one_request_that_fails_again_and_again_is_one_failure(circuit: Circuit) -> None:
    circuit.failed(circuit.begin(), broken())
    for _ in range(9):
        circuit.failed(circuit.begin(), broken(), counts=False)
    assert circuit.refusal() is None


def test_a_429_that_does_not_say_how_long_is_no_reason_to_rest(circuit: Circuit) -> None:
    fail(circuit, 9, UpstreamRateLimited("slow down"))
    assert circuit.refusal() is None


def test_those_that_are_gone_or_moved_are_forgotten(clock: ManualClock) -> None:
    circuits = Circuits(RULES, clock)
    one, other = spec(provider="one"), spec(provider="other")
    fail(circuits.of(one), 3)
    fail(circuits.of(other), 3)
    circuits.keep([one])
    assert circuits.reason(one) is not None
    assert [status.provider for status in circuits] == ["one"]
    assert circuits.reason(other) is None
