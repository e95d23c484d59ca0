"""Who is asked, and how often: deployments by weight, retries of one call, fallbacks to another model.

A call is repeated only while nothing of it has reached the client, within the request's deadline, and for failures
that pass: a lost connection, 408, 409, 429, 5xx. What fails for good goes to the next deployment or fallback instead.
"""

import random
from collections.abc import Awaitable, Callable

import stamina
import structlog

from headgate.config import RoutingSettings
from headgate.core.errors import (
    ConnectionFailed,
    GatewayError,
    ModelUnavailable,
    Overloaded,
    UpstreamAuth,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.core.models import ModelSpec
from headgate.service.circuits import Circuits
from headgate.service.meter import JobMeter
from headgate.service.metrics import Metrics

log = structlog.get_logger("headgate.routing")


class Router:
    """`chance` chooses among deployments."""

    def __init__(
        self,
        circuits: Circuits,
        rules: RoutingSettings,
        metrics: Metrics,
        chance: random.Random | None = None,
    ) -> None:
        self.circuits = circuits
        self.rules = rules
        self.metrics = metrics
        self._chance = chance or random.Random()  # noqa: S311  # which deployment is asked is no secret

    def deadline(self) -> float:
        """When a request that begins now must be answered, in monotonic seconds."""
        return self.circuits.clock.monotonic() + self.rules.deadline_s

    def order(self, spec: ModelSpec) -> tuple[ModelSpec, ...]:
        """The model's deployments in the order to try them: by chance as their weights say, those at rest last."""
        if not spec.deployments:
            return (spec,)
        drawn = sorted(spec.deployments, key=lambda one: self._chance.expovariate(one.weight))
        return tuple(sorted(drawn, key=self.rests))

    def rests(self, spec: ModelSpec) -> bool:
        """Whether the deployment must not be asked now."""
        return self.circuits.of(spec).refusal() is not None

    async def call(
        self, meter: JobMeter, ask: Callable[[], Awaitable[None]], *, patient: bool, last: bool
    ) -> None:
        """Ask for one job; where `patient`, again after failures that pass.

        `last`: there is nowhere else to go, so a circuit's refusal is waited for too.
        """
        try:
            await self._attempt(meter, ask)
            return
        except UpstreamError as error:
            pause = self._pause(error, meter, 1, last=last) if patient else None
            if pause is None:
                raise
            failure: UpstreamError | None = error
            # Now, not after the pause: a client that leaves meanwhile owes nothing for it.
            meter.restart()

        def again(error: Exception) -> bool | float:
            nonlocal failure, pause
            if failure is not None and pause is not None:
                failure = None
                return pause
            pause = (
                self._pause(error, meter, attempt.num, last=last)
                if isinstance(error, UpstreamError)
                else None
            )
            if pause is None:
                return False
            meter.restart()
            return pause

        async for attempt in stamina.retry_context(on=again, attempts=self.rules.retries + 1, timeout=None):
            with attempt:
                if failure is not None:  # the first attempt was the one above
                    raise failure
                await self._attempt(meter, ask)

    def answers(self, meter: JobMeter) -> None:
        """The deployment has begun to answer."""
        spec = meter.planned.job.model
        if spec.file is None:
            self.circuits.of(spec).heard(meter.call)

    def seconds_left(self, deadline: float | None) -> float:
        if deadline is None:
            return self.rules.deadline_s
        return max(0.0, deadline - self.circuits.clock.monotonic())

    async def _attempt(self, meter: JobMeter, ask: Callable[[], Awaitable[None]]) -> None:
        spec = meter.planned.job.model
        if spec.file is not None:  # an engine of ours has its supervisor
            meter.attempts += 1
            await ask()
            return
        circuit = self.circuits.of(spec)
        refusal = circuit.refusal()
        if refusal is not None:
            raise refusal
        call = meter.call = circuit.begin()
        meter.attempts += 1
        try:
            await ask()
        except UpstreamError as error:
            meter.failed(error)
            if self._is_ours(error, meter):
                circuit.abandoned(call)
            else:
                key = (spec.provider, spec.upstream_name)
                circuit.failed(call, error, counts=key not in meter.counted)
                meter.counted.add(key)
            self.metrics.failed_attempt(spec, error)
            log.warning(
                "attempt failed",
                request_id=meter.planned.job.request_id,
                provider=spec.provider,
                model=spec.upstream_name,
                kind=error.kind,
                status=error.status,
            )
            raise
        except BaseException:
            circuit.abandoned(call)
            raise
        circuit.succeeded(call)

    def _is_ours(self, error: UpstreamError, meter: JobMeter) -> bool:
        """A time-out that we set, not the upstream: the request's deadline, or the end of an answer long under way."""
        if not isinstance(error, UpstreamTimeout) or error.status is not None:
            return False
        return meter.handed_on or not self.seconds_left(meter.planned.job.deadline)

    def _pause(self, error: UpstreamError, meter: JobMeter, attempt: int, *, last: bool) -> float | None:
        """Seconds until the call is repeated; None where it is not: nothing is begun that cannot end in time."""
        if attempt > self.rules.retries or meter.handed_on or not is_passing(error, sent=meter.sent):
            return None
        if not error.asked and not last:
            return None
        first, most, wait = self.rules.retry_wait_s, self.rules.retry_max_wait_s, error.retry_after
        if wait is None:
            pause = min(first * 2 ** (attempt - 1), most) * (0.5 + self._chance.random())
        elif wait <= most:
            pause = wait + self._chance.random() * max(first, wait / 4)  # not all at once when it is over
        else:
            return None
        return pause if pause < self.seconds_left(meter.planned.job.deadline) else None


def is_passing(error: GatewayError, *, sent: bool) -> bool:
    """Whether the same call may well succeed a moment later. `sent`: the upstream had the request."""
    if isinstance(error, UpstreamRateLimited | UpstreamUnavailable | ConnectionFailed):
        return True
    if isinstance(error, UpstreamTimeout) and error.status is None:
        return not sent  # it was connecting that took too long; what is under way is not begun a second time
    if not isinstance(error, UpstreamError) or isinstance(error, UpstreamRejected | UpstreamAuth):
        return False
    return error.status is not None and (error.status in (408, 409) or error.status >= 500)


def moves_on(error: GatewayError) -> bool:
    """Whether another deployment or model may do better: not where the request itself is at fault, or we are."""
    if isinstance(error, UpstreamRejected):
        return False
    return isinstance(error, UpstreamError | Overloaded | ModelUnavailable)
