"""Hold, settle, release: what a request is charged, and that it is closed exactly once.

The rules (contracts, Money): an answer that is an error is never charged; a stream that breaks is charged for
what was delivered; a client that leaves is charged the prompt and what came.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from decimal import Decimal

import structlog
from msgspec import structs

from headgate.core.accounts import Hold, Settlement, UsageRow
from headgate.core.completion import Charge, Usage
from headgate.core.errors import GatewayError, InsufficientFunds, InternalError, LedgerUnavailable
from headgate.core.money import FemtoUSD, NanoUSD, cost_of, platform_share, price_of
from headgate.core.ports import Clock, Ledger
from headgate.service.ids import Ids
from headgate.service.meter import Meter, ModelMeter
from headgate.service.plan import Plan, PlannedModel

log = structlog.get_logger("headgate.billing")

MAX_UNCLOSED = 1000
"""How many doubtful holds are followed up at once; the rest is left to the recovery at the next start."""

RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Pauses between attempts to close a hold while the ledger is out; the last one repeats."""


class Bill:
    """What every model of a request comes to. Built once, when nothing more can be used."""

    def __init__(self, charges: Sequence[Charge], rows: tuple[UsageRow, ...]) -> None:
        self.charges = charges
        self.rows = rows


class Billing:
    def __init__(self, ledger: Ledger, clock: Clock, platform_share_percent: Decimal, ids: Ids) -> None:
        self.ledger = ledger
        self._clock = clock
        self._platform_share = platform_share_percent
        self._ids = ids
        self._unclosed: set[asyncio.Task[None]] = set()

    async def hold(self, plan: Plan) -> Hold:
        """Set the plan's ceiling aside. Cancelling the wait releases what was held."""
        hold = Hold(
            id=self._ids.hex(),
            account=plan.principal.account,
            amount=plan.ceiling,
            created_ms=int(self._clock.time() * 1000),
            rows=tuple(self._row(plan, model, error="interrupted") for model in plan.models),
        )
        held = asyncio.ensure_future(self.ledger.hold(hold, plan.request.idempotency))
        try:
            await asyncio.shield(held)
        except asyncio.CancelledError:
            rows = tuple(self._row(plan, model, error="disconnected") for model in plan.models)
            self._later(self._release_after(held, hold.id, rows))
            raise
        except LedgerUnavailable:
            # The commit may have landed all the same. A hold that is not there has nothing to release.
            if len(self._unclosed) < MAX_UNCLOSED:
                rows = tuple(self._row(plan, model, error=LedgerUnavailable.kind) for model in plan.models)
                self._later(self._keep_trying(hold.id, rows))
            raise
        return hold

    async def check_funds(self, plan: Plan) -> None:
        """Refuse early what the hold would refuse, before more is done for it. InsufficientFunds."""
        balance = await self.ledger.balance(plan.principal.account)
        if balance is not None and balance.available < plan.ceiling:
            raise InsufficientFunds(plan.ceiling, balance.available)

    @property
    def unclosed(self) -> int:
        """Holds that are being closed in the background."""
        return len(self._unclosed)

    def bill(self, plan: Plan, meter: Meter, *, keep: bool, reason: str | None = None) -> Bill:
        """Price what was used. `keep`: charge also models that failed or were stopped, for what they produced.

        `reason` names why the request ended early; a failed model's own failure wins.
        """
        charges: list[Charge] = []
        rows: list[UsageRow] = []
        for model in meter.models:
            # A failed model of a blocking answer gave the client nothing.
            kept = keep and (model.failure is None or (plan.request.stream and model.produced))
            charge = self._charge(model, kept=kept)
            charges.append(charge)
            error = model.failure.kind if model.failure is not None else reason
            gave_nothing = model.failure is not None and not kept
            row = self._row(plan, model.first if gave_nothing else model.planned, charge=charge, error=error)
            failed = model.failed_cost(charged=kept)
            if failed or model.attempts:
                row = structs.replace(row, attempts=model.attempts, failed_cost=cost_of(failed))
            rows.append(row)
        return Bill(charges, tuple(rows))

    async def close(
        self,
        hold: Hold,
        bill: Bill,
        fallback: Callable[[], Bill],
        *,
        keyed: bool = False,
        outcome: bytes | None = None,
    ) -> Settlement:
        """Settle, or release where the bill is 0; survives cancellation and waits for the commit.

        While the ledger is out, keeps trying in the background with `fallback` (an answer that becomes an error
        is not charged) and raises LedgerUnavailable here.
        """
        settling = asyncio.ensure_future(self.ledger.settle(hold.id, bill.rows, keyed=keyed, outcome=outcome))
        cancelled = False
        while not settling.done():
            try:
                await asyncio.shield(settling)
            except asyncio.CancelledError:
                cancelled = True
            except (GatewayError, KeyError):
                break
        try:
            settlement = settling.result()
        except LedgerUnavailable:
            log.error("ledger unavailable at settle; retrying", hold=hold.id)
            self._later(self._keep_trying(hold.id, fallback().rows))
            raise
        except KeyError:
            log.error("hold was resolved already", hold=hold.id)
            raise InternalError from None
        except GatewayError:
            # The ledger cannot make this settle, which is our bug: charge nothing, but keep no money either.
            log.error("settle failed; releasing", hold=hold.id)
            rows = tuple(structs.replace(row, error=InternalError.kind) for row in hold.rows)
            self._later(self._keep_trying(hold.id, rows))
            raise
        if cancelled:
            raise asyncio.CancelledError
        return settlement

    def checkpoint(self, hold: Hold, plan: Plan, meter: Meter) -> None:
        """Write down what was delivered so far. Before that there is nothing that a crash could lose."""
        if not meter.produced:
            return
        self.ledger.checkpoint(hold.id, self.bill(plan, meter, keep=True, reason="interrupted").rows)

    async def aclose(self) -> None:
        """Wait for what is still being closed; gives up on what a broken ledger keeps open (recovery has it)."""
        if self._unclosed:
            await asyncio.wait(tuple(self._unclosed), timeout=2)

    def _charge(self, model: ModelMeter, *, kept: bool) -> Charge:
        planned = model.planned
        usage = model.usage()
        if not kept:
            usage = Usage(prompt_tokens=0, completion_tokens=0, source=usage.source)
        exact_input, exact_output = model.exact(usage)
        exact = FemtoUSD(exact_input + exact_output)
        whole = price_of(exact, planned.margin)
        price = min(whole, model.hold)
        return Charge(
            model=planned.spec.name,
            provider=planned.spec.provider,
            usage=usage,
            exact_input=exact_input,
            exact_output=exact_output,
            cost=cost_of(exact),
            price=price,
            margin=planned.margin,
            excess=NanoUSD(whole - price),
        )

    def _row(
        self, plan: Plan, model: PlannedModel, *, charge: Charge | None = None, error: str | None = None
    ) -> UsageRow:
        request = plan.request
        developer_share = NanoUSD(0)
        if charge is not None and plan.developer is not None:
            developer_share, _ = platform_share(max(0, charge.price - charge.cost), self._platform_share)
        usage = charge.usage if charge is not None else None
        return UsageRow(
            request_id=request.request_id,
            dialect=request.dialect,
            model=model.spec.name,
            provider=model.spec.provider,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            source=usage.source if usage else "estimate",
            cost=charge.cost if charge else 0,
            price=charge.price if charge else 0,
            excess=charge.excess if charge else 0,
            developer=plan.developer.account if plan.developer else None,
            developer_share=developer_share,
            key_id=plan.principal.key_id,
            app=request.app,
            user=request.user,
            stream=request.stream,
            error=error,
        )

    def _later(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._unclosed.add(task)
        task.add_done_callback(self._unclosed.discard)

    async def _release_after(
        self, held: asyncio.Future[None], hold_id: str, rows: tuple[UsageRow, ...]
    ) -> None:
        try:
            await held
        except LedgerUnavailable:
            pass  # the commit may have landed all the same
        except GatewayError:
            return  # it was refused, so there is nothing to release
        await self._keep_trying(hold_id, rows)

    async def _keep_trying(self, hold_id: str, rows: tuple[UsageRow, ...]) -> None:
        attempt = 0
        while True:
            try:
                await self.ledger.settle(hold_id, rows)
            except LedgerUnavailable:
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1
            except KeyError:
                return
            except GatewayError:
                log.exception("hold stays open until the next start", hold=hold_id)
                return
            else:
                return
