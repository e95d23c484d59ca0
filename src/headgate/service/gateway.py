"""The running gateway: its parts as the web sees them, and its life from recovery to the last settled hold."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from headgate.core.accounts import Balance, Principal
from headgate.core.errors import InvalidCredentials, LedgerUnavailable
from headgate.core.models import Catalog, ModelSpec
from headgate.core.ports import Clock, Files, Ledger
from headgate.service.billing import Billing
from headgate.service.circuits import CircuitStatus
from headgate.service.complete import Completions
from headgate.service.identity import Identity
from headgate.service.ids import Ids
from headgate.service.limits import Limiter
from headgate.service.metrics import Metrics
from headgate.service.serving import Serving
from headgate.service.streams import Streams
from headgate.service.tokenizing import Tokenizing

log = structlog.get_logger("headgate.gateway")

CHECKPOINT_SECONDS = 0.5
PING_SECONDS = 2.0
STOP_MARGIN_SECONDS = 5.0
"""How long before the deadline running requests are stopped, so that they are settled within it."""


class EngineStatus(Protocol):
    """What an embedded model's engine says of itself."""

    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


class Gateway:
    def __init__(
        self,
        *,
        completions: Completions,
        limits: Limiter,
        identity: Identity,
        streams: Streams,
        billing: Billing,
        ledger: Ledger,
        serving: Serving,
        files: Files,
        metrics: Metrics,
        clock: Clock,
        ids: Ids,
        drain_deadline_s: float,
        engine_statuses: Callable[[], Mapping[str, EngineStatus]],
    ) -> None:
        self.completions = completions
        self.limits = limits
        self.identity = identity
        self.streams = streams
        self.ledger = ledger
        self.serving = serving
        self.files = files
        self.tokenizing = Tokenizing(serving)
        self.metrics = metrics
        self.clock = clock
        self.ids = ids
        self.draining = False
        self._billing = billing
        self._drain_deadline_s = drain_deadline_s
        self._engine_statuses = engine_statuses
        self._checkpoints: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin the periodic work. Needs the running loop."""
        self._checkpoints = asyncio.ensure_future(self._checkpoint())

    def unavailable(self, spec: ModelSpec) -> str | None:
        """Why the model cannot be called now, or None."""
        return self.serving.unavailable(spec)

    @property
    def catalog(self) -> Catalog:
        """The one in force now."""
        return self.serving.now.catalog

    async def balance(self, principal: Principal) -> Balance:
        """The caller's own balance. LedgerUnavailable when it cannot be read."""
        balance = await self.ledger.balance(principal.account)
        if balance is None:
            raise InvalidCredentials
        return balance

    async def ledger_problem(self) -> str | None:
        """Why money cannot be recorded now, after a real and bounded round trip; or None."""
        try:
            await asyncio.wait_for(self.ledger.ping(), PING_SECONDS)
        except (LedgerUnavailable, TimeoutError):
            return "the ledger does not answer"
        return None

    async def not_ready(self) -> str | None:
        """Why new work is refused now, or None."""
        return "draining" if self.draining else await self.ledger_problem()

    def engines(self) -> dict[str, dict[str, object]]:
        """What the embedded engines say of themselves, by model."""
        return {
            name: {"state": status.state, "reason": None if status.state == "up" else status.reason}
            for name, status in self._engine_statuses().items()
        }

    def deployments(self) -> list[CircuitStatus]:
        """Upstream models that are left alone now, or were until a moment ago: what is well is not listed."""
        return [status for status in self.serving.circuits if status.reason is not None]

    def exposition(self) -> bytes:
        """Metrics in the Prometheus text format."""
        self.metrics.running.set(len(self.streams))
        self.metrics.open_holds.set(self.completions.open_holds)
        self.metrics.circuits(self.serving.circuits)
        return self.metrics.exposition()

    async def drain(self) -> None:
        """Let running requests finish, stop and settle what is left before the deadline. New work is refused."""
        self.draining = True
        log.info("draining", running=len(self.streams), deadline_s=self._drain_deadline_s)
        margin = min(STOP_MARGIN_SECONDS, self._drain_deadline_s / 2)
        if not await self.streams.idle(self._drain_deadline_s - margin):
            log.warning("stopping what still runs", running=len(self.streams))
            for running in self.streams:
                running.stop("draining")
            await self.streams.idle(margin)
        log.info("drained", running=len(self.streams))

    async def aclose(self) -> None:
        """After draining: end the periodic work and the providers."""
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._checkpoints
        await self._billing.aclose()
        for provider in self.serving.now.providers.values():
            await provider.aclose()

    async def _checkpoint(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            try:
                self.completions.checkpoint()
            except Exception:
                log.exception("checkpoint failed")
