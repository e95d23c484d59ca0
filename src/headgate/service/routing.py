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
        return tuple(sorted(drawn, key=lambda one: self.circuits.of(one).refusal() is not None))

    async def call(
        self, meter: JobMeter, ask: Callable[[], Awaitable[None]], *, patient: bool, streams: bool
    ) -> None:
        """Ask for one job; where `patient`, again after failures that pass.

        `streams`: what the meter has produced has left for the client, so there is no asking again.
        """
        try:
            await self._attempt(meter, ask)
            return
        except (UpstreamError, Overloaded) as error:
            if not (patient and self.rules.retries) or not self._again(error, meter, streams=streams):
                raise
            failure: GatewayError | None = error

        def pause(error: Exception) -> bool | float:
            return isinstance(error, UpstreamError) and self._again(error, meter, streams=streams)

        async for attempt in stamina.retry_context(
            on=pause,
            attempts=self.rules.retries + 1,
            timeout=self._left(meter),
            wait_initial=self.rules.retry_wait_s,
            wait_max=self.rules.retry_max_wait_s,
            wait_jitter=self.rules.retry_wait_s,
        ):
            with attempt:
                if failure is not None:  # the first attempt was the one above
                    first, failure = failure, None
                    raise first
                meter.restart()
                await self._attempt(meter, ask)

    async def _attempt(self, meter: JobMeter, ask: Callable[[], Awaitable[None]]) -> None:
        spec = meter.planned.job.model
        if spec.file is not None:  # an engine of ours has its supervisor
            await ask()
            return
        circuit = self.circuits.of(spec)
        refusal = circuit.refusal()
        if refusal is not None:
            raise refusal
        circuit.begin()
        meter.attempts += 1
        try:
            await ask()
        except UpstreamError as error:
            circuit.failed(error)
            meter.failed(error)
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
            circuit.abandoned()
            raise
        circuit.succeeded()

    def _again(self, error: GatewayError, meter: JobMeter, *, streams: bool) -> bool | float:
        """Whether to ask once more, and after how many seconds where the upstream has said so."""
        if (streams and meter.produced) or not is_passing(error, sent=meter.sent):
            return False
        if not isinstance(error, UpstreamRateLimited | UpstreamUnavailable) or error.retry_after is None:
            return True
        wait = error.retry_after + self._chance.random() * self.rules.retry_wait_s
        return wait if wait <= min(self.rules.retry_max_wait_s, self._left(meter)) else False

    def _left(self, meter: JobMeter) -> float:
        deadline = meter.planned.job.deadline
        if deadline is None:
            return self.rules.deadline_s
        return max(0.0, deadline - self.circuits.clock.monotonic())


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
