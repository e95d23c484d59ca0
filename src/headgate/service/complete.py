"""The whole way of a request, top to bottom:

    plan (resolve, validate, ceiling) -> limits -> hold -> call the providers -> meter -> settle -> answer

Blocking and streamed requests take the same way; a stream only hands its chunks on while it goes.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial

import structlog
from msgspec import structs

from headgate.core.accounts import Hold, Principal
from headgate.core.completion import (
    Answer,
    Chunk,
    Completion,
    CompletionRequest,
    FinishReason,
    Job,
    ModelAnswer,
    StreamEnd,
)
from headgate.core.errors import GatewayError, InternalError, Overloaded, UpstreamFailed, UpstreamTimeout
from headgate.core.money import NanoUSD
from headgate.core.ports import Clock, Provider
from headgate.service import replays
from headgate.service.billing import Bill, Billing
from headgate.service.limits import Limiter
from headgate.service.meter import JobMeter, Meter, ModelMeter
from headgate.service.metrics import Metrics
from headgate.service.plan import Plan
from headgate.service.planning import Planner
from headgate.service.routing import Router, moves_on
from headgate.service.streams import Running, RunningStream, Streams
from headgate.service.together import together

log = structlog.get_logger("headgate.complete")


class Completions:
    def __init__(
        self,
        planner: Planner,
        router: Router,
        limits: Limiter,
        billing: Billing,
        streams: Streams,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._planner = planner
        self._router = router
        self._limits = limits
        self._billing = billing
        self._streams = streams
        self._clock = clock
        self._metrics = metrics
        self._metered: dict[int, tuple[Plan, Meter, Hold]] = {}
        self._producing: set[asyncio.Task[None]] = set()

    async def complete(self, request: CompletionRequest, principal: Principal, running: Running) -> Answer:
        """Answer a blocking request. Raises a GatewayError; nothing is charged then."""
        running.begin(asyncio.current_task())
        self._streams.add(running)
        try:
            end = await self._run(request, principal, running)
        except asyncio.CancelledError:
            if running.stop_reason is None:
                raise
            _absorb_cancellation()
            raise Overloaded("The request was stopped before it began.") from None
        except GatewayError as error:
            raise error.with_traceback(None) from error.__cause__  # as in _produce
        finally:
            running.closing()
            self._streams.remove(running)
        if end.kind == "aborted":
            raise end.error or Overloaded("The request was stopped.")
        return end.answer

    def stream(self, request: CompletionRequest, principal: Principal, running: RunningStream) -> None:
        """Start a stream; read it from `running`, which ends with a StreamEnd or raises."""
        self._streams.add(running)
        # It begins by itself, so that a stop before its first step still ends it in the one proper way.
        task = asyncio.ensure_future(self._produce(request, principal, running))
        self._producing.add(task)
        task.add_done_callback(self._producing.discard)

    async def _produce(
        self, request: CompletionRequest, principal: Principal, running: RunningStream
    ) -> None:
        running.begin(asyncio.current_task())
        try:
            end: StreamEnd | BaseException = await self._run(request, principal, running)
        except GatewayError as error:
            end = error.with_traceback(None)  # or it and the frames that know it keep each other alive
        except asyncio.CancelledError:
            end = Overloaded("The request was stopped before it began.")
        except Exception:
            log.exception("stream failed", request_id=request.request_id)
            end = InternalError()
        running.closing()
        self._streams.remove(running)
        running.finish(end)

    async def _run(self, request: CompletionRequest, principal: Principal, running: Running) -> StreamEnd:
        _refuse_stopped(running)
        started = running.started_at = self._clock.monotonic()
        if request.idempotency is not None:
            kept = await self._billing.ledger.remembered(request.idempotency)
            if kept is not None:
                return await replays.play(kept, running)
        plan = await self._planner.plan(request, principal)
        running.limit_headers = self._limits.admit(principal, plan.token_ceiling)
        try:
            if request.looks:
                await self._billing.check_funds(plan)
                plan = await self._planner.with_images(plan)
            hold = await self._billing.hold(plan)
        except BaseException:
            self._limits.used(principal, plan.token_ceiling, 0)
            raise
        running.admitted = True
        meter = Meter(plan.models)
        _name_servers(running, meter)
        self._metered[id(meter)] = (plan, meter, hold)
        failure: GatewayError | None = None
        try:
            await self._call(plan, meter, running)
            failure = _all_failed(meter)
        except asyncio.CancelledError:
            _absorb_cancellation()
            if running.stop_reason is None:
                running.stop_reason = "draining"
        except GatewayError as error:
            failure = error
        except Exception:
            log.exception("request failed", request_id=request.request_id)
            failure = InternalError()
        finally:
            running.closing()
            del self._metered[id(meter)]
            bill = self._bill(plan, meter, running, failure)
            self._limits.used(principal, plan.token_ceiling, _tokens(bill))
            answer = self._answer(plan, meter, bill, started)
            keyed = request.idempotency is not None
            settlement = await self._billing.close(
                hold,
                bill,
                partial(self._unanswered, plan, meter, bill),
                keyed=keyed,
                outcome=replays.outcome_of(answer, meter, running, failure) if keyed else None,
            )
        answer = replays.settled(answer, settlement)
        self._metrics.request(answer, plan, running, failure)
        if failure is not None:
            raise failure
        if running.stop_reason is None:
            return StreamEnd(kind="completed", answer=answer)
        return StreamEnd(kind="aborted", answer=answer, error=replays.reason_to_stop(running))

    async def _call(self, plan: Plan, meter: Meter, running: Running) -> None:
        if len(meter.models) == 1:
            await self._call_model(plan, meter, meter.models[0], running)
        else:
            await together([self._call_model(plan, meter, model, running) for model in meter.models])

    async def _call_model(self, plan: Plan, meter: Meter, model: ModelMeter, running: Running) -> None:
        started = self._clock.monotonic()
        try:
            if model.failure is not None:
                raise model.failure
            await self._serve_model(plan, meter, model, running)
        except GatewayError as error:
            model.failure = error
            if not plan.request.partial_failure:
                raise
            _name_servers(running, meter)
            if isinstance(running, RunningStream):
                await running.put([_failed_chunk(model, error)])
        finally:
            model.elapsed_s = self._clock.monotonic() - started

    async def _serve_model(self, plan: Plan, meter: Meter, model: ModelMeter, running: Running) -> None:
        """Ask the planned deployment, then the alternatives while they fail and nothing has left for the client.

        Raises the first failure: the others are of models that the client did not name.
        """
        first: GatewayError | None = None
        for planned in (model.first, *model.first.alternatives):
            if first is not None:
                if not self._may_move_on(first, model, plan):
                    break
                self._metrics.fallback(model.planned.spec, planned.spec)
                log.warning(
                    "falling back",
                    request_id=plan.request.request_id,
                    model=planned.spec.name,
                    provider=planned.spec.provider,
                    kind=first.kind,
                )
                model.switch(planned)
                _name_servers(running, meter)
            try:
                await self._call_jobs(plan, model, running)
            except GatewayError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise first

    def _may_move_on(self, failure: GatewayError, model: ModelMeter, plan: Plan) -> bool:
        """Not where the request is at fault, nor once output has left or time is up."""
        return moves_on(failure) and not model.handed_on and self._router.seconds_left(plan.deadline) > 0

    async def _call_jobs(self, plan: Plan, model: ModelMeter, running: Running) -> None:
        if len(model.jobs) == 1:
            await self._call_job(plan, model, model.jobs[0], running)
        else:
            await together([self._call_job(plan, model, job, running) for job in model.jobs])

    async def _call_job(self, plan: Plan, model: ModelMeter, meter: JobMeter, running: Running) -> None:
        if (nothing := _nothing(meter.planned.job)) is not None:
            await self._hand_on(nothing, meter, running)
            return
        await self._router.call(
            meter,
            partial(self._ask, plan, model.planned.provider, meter, running),
            patient=model.planned.patient,
            last=model.planned.last,
        )

    async def _ask(self, plan: Plan, provider: Provider, meter: JobMeter, running: Running) -> None:
        job = meter.planned.job
        if plan.request.stream or provider.stream_only:
            async with aclosing(provider.stream(job, meter.mark_sent)) as chunks:
                async for batch in chunks:
                    await self._hand_on(batch, meter, running)
        else:
            completion: Completion = await provider.complete(job, meter.mark_sent)
            meter.complete(completion)

    async def _hand_on(self, batch: Sequence[Chunk], meter: JobMeter, running: Running) -> None:
        if batch and not meter.heard:
            meter.heard = True
            self._router.answers(meter)
        meter.add(batch)
        if batch and (batch[0].index < 0 or batch[-1].index < 0):
            # Usage is for the meter: it must not be what opens the client's stream.
            batch = [chunk for chunk in batch if chunk.index >= 0]
        if running.first_output_at is None and batch:
            running.first_output_at = self._clock.monotonic()
        if isinstance(running, RunningStream) and batch:
            meter.handed_on = True
            first = meter.planned.job.first_index
            await running.put([_placed(chunk, first) for chunk in batch] if first else batch)

    def _bill(self, plan: Plan, meter: Meter, running: Running, failure: GatewayError | None) -> Bill:
        """Errors are never charged; a broken stream is charged for what was delivered."""
        if failure is not None:
            return self._billing.bill(
                plan, meter, keep=plan.request.stream and meter.produced, reason=failure.kind
            )
        if running.stop_reason == "draining":
            return self._billing.bill(
                plan, meter, keep=plan.request.stream and meter.produced, reason="overloaded"
            )
        return self._billing.bill(plan, meter, keep=True)

    def _unanswered(self, plan: Plan, meter: Meter, bill: Bill) -> Bill:
        """The bill of an answer that becomes an error after all; what a stream delivered stays charged."""
        return bill if plan.request.stream else self._billing.bill(plan, meter, keep=False)

    def _answer(self, plan: Plan, meter: Meter, bill: Bill, started: float) -> Answer:
        """The answer as it is settled next."""
        now = int(self._clock.time())
        return Answer(
            request=plan.request,
            models=tuple(
                ModelAnswer(
                    requested=model.planned.requested,
                    model=model.planned.requested if model.failure is not None else model.planned.shown,
                    provider=model.planned.spec.provider,
                    spec=model.planned.spec,
                    choices=model.choices(plan.request) if model.failure is None else (),
                    charge=charge,
                    elapsed_s=model.elapsed_s,
                    created=now,
                    error=model.failure,
                )
                for model, charge in zip(meter.models, bill.charges, strict=True)
            ),
            price=NanoUSD(0),
            balance_before=NanoUSD(0),
            balance_after=NanoUSD(0),
            elapsed_s=self._clock.monotonic() - started,
        )

    @property
    def open_holds(self) -> int:
        return len(self._metered) + self._billing.unclosed

    def checkpoint(self) -> None:
        """Write down what running streams have used, so that a crash does not lose it. Called twice a second.

        A blocking answer that a crash prevents is not charged.
        """
        for plan, meter, hold in self._metered.values():
            if plan.request.stream and meter.take_dirty():
                self._billing.checkpoint(hold, plan, meter)


def _refuse_stopped(running: Running) -> None:
    """Its client may have left while its credential was looked up."""
    if running.stop_reason is not None:
        raise Overloaded("The request was stopped before it began.")


def _absorb_cancellation() -> None:
    """We were cancelled on purpose and go on to settle; later time-outs must not take it for theirs."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _all_failed(meter: Meter) -> GatewayError | None:
    """The error to answer with when not one model gave anything; a failure weighs more than a time-out."""
    failures = [model.failure for model in meter.models if model.failure is not None]
    if len(failures) < len(meter.models):
        return None
    for kind in (UpstreamFailed, UpstreamTimeout):
        for failure in failures:
            if isinstance(failure, kind):
                return failure
    return failures[0]


def _failed_chunk(model: ModelMeter, error: GatewayError) -> Chunk:
    reason: FinishReason = "timeout" if isinstance(error, UpstreamTimeout) else "error"
    return Chunk(model.planned.first_index, finish_reason=reason, error=error)


def _nothing(job: Job) -> list[Chunk] | None:
    """The whole answer to a conversation of no tokens, which no provider takes; the model is not asked for it."""
    if job.max_tokens or job.shape == "completion":
        return None
    text = job.prompt if job.echo and isinstance(job.prompt, str) else ""
    logprobs = None if job.logprobs is None else ()
    return [Chunk(index, text, "length", tokens=0, logprobs=logprobs, echoed=True) for index in range(job.n)]


def _placed(chunk: Chunk, first: int) -> Chunk:
    """The chunk with its choice's place in the whole answer."""
    if chunk.index < 0:
        return chunk
    return structs.replace(chunk, index=chunk.index + first)


def _name_servers(running: Running, meter: Meter) -> None:
    """What serves each model, and under which name, for the headers and chunks of a stream that begins now."""
    running.providers = ", ".join(
        dict.fromkeys(model.planned.spec.provider for model in meter.models if model.failure is None)
    )
    running.served[:] = [
        model.planned.shown if model.failure is None else model.planned.requested for model in meter.models
    ]


def _tokens(bill: Bill) -> int:
    return sum(charge.usage.total_tokens for charge in bill.charges)
