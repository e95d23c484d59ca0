"""Circuits: which deployments are left alone for now, because they fail or asked for it.

A deployment is one upstream model at one provider. Its circuit opens after failures in a row or at a rate of them;
after a pause one call may try it, which closes the circuit or opens it again for twice as long.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal

from msgspec import Struct

from headgate.config import RoutingSettings
from headgate.core.errors import (
    GatewayError,
    UpstreamAuth,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnavailable,
)
from headgate.core.models import ModelSpec
from headgate.core.ports import Clock

State = Literal["closed", "open", "half_open"]
MOST_DOUBLINGS = 4
"""A circuit that opens again and again stays open 2 ** this times as long at most."""


class CircuitStatus(Struct, frozen=True, kw_only=True):
    """What an operator sees of one deployment. `retry_after`: seconds until it may be asked again."""

    provider: str
    model: str
    state: State
    reason: str | None = None
    retry_after: int = 0


class Circuit:
    """One deployment's. Times are the injected clock's monotonic seconds."""

    __slots__ = (
        "_clock",
        "_cool_until",
        "_doublings",
        "_failures",
        "_open_until",
        "_opened",
        "_outcomes",
        "_probes",
        "_probing",
        "_reason",
        "_rules",
        "model",
        "provider",
    )

    def __init__(self, provider: str, model: str, rules: RoutingSettings, clock: Clock) -> None:
        self.provider = provider
        self.model = model
        self._rules = rules
        self._clock = clock
        self._failures = 0
        self._outcomes: deque[bool] = deque(maxlen=rules.breaker_calls)
        self._opened = False
        self._open_until = 0.0
        self._doublings = 0
        self._probing = False
        self._probes = 0
        self._cool_until = 0.0
        self._reason = ""

    @property
    def is_quiet(self) -> bool:
        """Nothing has failed lately: what nearly always is, and so is asked first."""
        return not (self._opened or self._cool_until)

    def refusal(self) -> UpstreamError | None:
        """Why the deployment must not be asked now, or None."""
        if self.is_quiet:
            return None
        now = self._clock.monotonic()
        error: UpstreamError | None = None
        if now < self._cool_until:
            error = UpstreamRateLimited(
                f"The provider {self.provider} asks for fewer requests.",
                retry_after=_seconds(self._cool_until - now),
            )
        elif self._opened and (now < self._open_until or self._probing):
            error = UpstreamUnavailable(
                f"The provider {self.provider} fails at present ({self._reason}) and is left alone for a while.",
                retry_after=_seconds(self._open_until - now),
            )
        if error is not None:
            error.asked = False
        return error

    def begin(self) -> int:
        """A call goes out; its outcome is told with the number returned. While open, it is the one that tries."""
        if self._opened:
            self._probes += 1
            self._probing = True
        return self._probes if self._opened else 0

    def heard(self, call: int) -> None:
        """The deployment answers, whatever becomes of the rest: a long stream need not end first."""
        if self._opened:
            if self._is_probe(call):
                self._close()
            return
        self._failures = 0
        if self._cool_until and self._clock.monotonic() >= self._cool_until:
            self._cool_until = 0.0

    def succeeded(self, call: int) -> None:
        self.heard(call)
        if not self._opened:
            self._outcomes.append(True)

    def failed(self, call: int, error: GatewayError, *, counts: bool = True) -> None:
        """Count what says something about the deployment; one that refuses a request is alive.

        `counts` False: the request has been counted already; it says no more by failing again.
        """
        if not self._rules.breaker_failures:
            return
        if isinstance(error, UpstreamRateLimited):
            if error.retry_after is not None:
                self._cool_until = max(self._cool_until, self._clock.monotonic() + error.retry_after)
            self.abandoned(call)
        elif not _speaks_of_the_deployment(error):
            self.heard(call) if isinstance(error, UpstreamError) else self.abandoned(call)
        elif self._opened:
            if self._is_probe(call):
                self._open(error)
        elif counts:
            self._failures += 1
            self._outcomes.append(False)
            if self._must_open():
                self._open(error)

    def abandoned(self, call: int) -> None:
        """The call ended without a word about the deployment: the client left, or asked for something wrong."""
        if self._is_probe(call):
            self._probing = False

    def _is_probe(self, call: int) -> bool:
        """Whether it is the one that tries: calls from before the circuit opened say nothing about now."""
        return self._opened and self._probing and call == self._probes

    def _close(self) -> None:
        self._opened = self._probing = False
        self._failures = self._doublings = 0
        self._outcomes.clear()

    def status(self) -> CircuitStatus:
        now = self._clock.monotonic()
        state: State = "closed"
        reason, until = None, self._cool_until
        if self._opened:
            state = "open" if now < self._open_until else "half_open"
            reason, until = self._reason, max(until, self._open_until)
        elif now < self._cool_until:
            reason = "it asked for fewer requests"
        return CircuitStatus(
            provider=self.provider,
            model=self.model,
            state=state,
            reason=reason,
            retry_after=_seconds(until - now) if until > now else 0,
        )

    def _must_open(self) -> bool:
        rules, outcomes = self._rules, self._outcomes
        if self._failures >= rules.breaker_failures:
            return True
        is_full = len(outcomes) == rules.breaker_calls
        return is_full and outcomes.count(False) * 100 >= rules.breaker_error_percent * len(outcomes)

    def _open(self, error: GatewayError) -> None:
        if self._opened:
            self._doublings = min(self._doublings + 1, MOST_DOUBLINGS)
        self._opened = True
        self._probing = False
        self._reason = error.kind
        self._open_until = self._clock.monotonic() + self._rules.breaker_open_s * 2**self._doublings


class Circuits:
    """All circuits, by provider and upstream name; they outlive a reload of the catalogue."""

    def __init__(self, rules: RoutingSettings, clock: Clock) -> None:
        self.clock = clock
        self._rules = rules
        self._circuits: dict[tuple[str, str], Circuit] = {}

    def of(self, spec: ModelSpec) -> Circuit:
        key = (spec.provider, spec.upstream_name)
        circuit = self._circuits.get(key)
        if circuit is None:
            circuit = self._circuits[key] = Circuit(*key, self._rules, self.clock)
        return circuit

    def keep(self, deployments: Iterable[ModelSpec]) -> None:
        """Forget all others: they are gone, or somewhere else now."""
        kept = {(spec.provider, spec.upstream_name) for spec in deployments}
        self._circuits = {key: circuit for key, circuit in self._circuits.items() if key in kept}

    def __iter__(self) -> Iterator[CircuitStatus]:
        return iter([circuit.status() for circuit in self._circuits.values()])

    def reason(self, deployment: ModelSpec) -> str | None:
        """Why the deployment may not be asked now, or None."""
        refusal = self.of(deployment).refusal()
        return None if refusal is None else refusal.message


def _speaks_of_the_deployment(error: GatewayError) -> bool:
    """Failures of the upstream; not of the request, of a model's name (404) or of our key, which stay what they are."""
    if not isinstance(error, UpstreamError) or isinstance(error, UpstreamRejected):
        return False
    status = error.status
    return not isinstance(error, UpstreamAuth) and (status is None or status >= 500 or status in (408, 409))


def _seconds(remaining: float) -> int:
    return min(max(math.ceil(remaining), 1), 120)
