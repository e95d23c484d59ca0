"""From a request to a plan: which models, which calls, how long, and what it can cost at most.

Everything that can be refused without calling a model for text is refused here.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from headgate.core.accounts import Developer, Principal
from headgate.core.completion import CompletionRequest, Image, Prompt
from headgate.core.errors import GatewayError, InvalidRequest, ModelUnavailable
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, NanoUSD, price_of
from headgate.service.fanout import jobs_for
from headgate.service.mapping import check_mapping
from headgate.service.margins import MarginRules
from headgate.service.plan import Plan, PlannedJob, PlannedModel, bounded_together, ceiling_of, check_scores
from headgate.service.routing import Router, moves_on
from headgate.service.serving import Served, Serving

if TYPE_CHECKING:
    from headgate.service.images import Images

MAX_USER = 512
MAX_IMAGE_BYTES_SENT = 64 * 1024 * 1024
"""Of one request, in all its calls to a provider that answers one choice a call."""
FALLBACK_COUNT_S = 0.5
"""How long a fallback's prompt may take to be counted; else its bytes are what the hold goes by."""


class Planner:
    """`images` turns images that are named into images that are there."""

    def __init__(
        self,
        serving: Serving,
        router: Router,
        margins: MarginRules,
        developers: Mapping[str, Developer],
        images: "Images | None" = None,
    ) -> None:
        self._serving = serving
        self._router = router
        self._margins = margins
        self._developers = developers
        self._images = images

    async def plan(self, request: CompletionRequest, principal: Principal) -> Plan:
        """Resolve, validate and price. Raises what the client did wrong, or why no model can be called."""
        served = self._serving.now  # one reload's, whatever happens meanwhile
        check_user(request)
        developer = self._developer(request)
        specs = [served.catalog.resolve(name) for name in request.models]
        for spec in specs:
            check_fields(request, spec)
            check_entry(request, spec)
        deadline = self._router.deadline()
        models: list[PlannedModel] = []
        first_index = 0
        for requested, spec in zip(request.models, specs, strict=True):
            entries = _Entries(self._router, self._margins, served, request, requested, first_index, deadline)
            model = await entries.plan(spec)
            first_index += request.n * len(request.prompts or (None,))
            models.append(model)
        failures = [model.failure for model in models if model.failure is not None]
        if len(failures) == len(models):
            raise failures[0]
        return Plan(
            request=request,
            principal=principal,
            models=tuple(models),
            developer=developer,
            ceiling=NanoUSD(sum(model.ceiling for model in models)),
            token_ceiling=sum(
                max(_tokens(planned) for planned in (model, *model.alternatives)) for model in models
            ),
            deadline=deadline,
        )

    async def with_images(self, plan: Plan) -> Plan:
        """The plan with images that are there, where they were only named.

        After everything else that can be refused: fetching costs time and traffic. InvalidRequest.
        """
        if self._images is None:
            return plan
        everyone = [one for model in plan.models for one in (model, *model.alternatives)]
        keep_urls = all(one.spec.image_urls == "pass" for one in everyone)
        request = await self._images.load(plan.request, plan.principal, keep_urls=keep_urls)
        models = [await _seeing(model, request) for model in plan.models]
        return msgspec.structs.replace(plan, request=request, models=tuple(models))

    def _developer(self, request: CompletionRequest) -> Developer | None:
        if request.developer_id is None:
            if request.application_id is not None:
                raise InvalidRequest("applicationId needs a developerId.", param="applicationId")
            return None
        developer = self._developers.get(request.developer_id)
        if developer is None:
            raise InvalidRequest("The developerId is not known here.", param="developerId")
        if request.application_id is not None and request.application_id not in developer.applications:
            raise InvalidRequest("The applicationId is not one of this developer's.", param="applicationId")
        return developer


class _Entries:
    """Plans one requested model: where it may be served, and what may stand in for it."""

    def __init__(
        self,
        router: Router,
        margins: MarginRules,
        served: Served,
        request: CompletionRequest,
        requested: str,
        first_index: int,
        deadline: float,
    ) -> None:
        self._router = router
        self._margins = margins
        self._served = served
        self._request = request
        self._requested = requested
        self._first_index = first_index
        self._deadline = deadline

    async def plan(self, spec: ModelSpec) -> PlannedModel:
        """The plan of the first entry that can be called, the others as its alternatives.

        Raises the requested model's own failure when there is none, unless the others go on without it.
        """
        pinned = self._requested.startswith(f"{spec.provider}/")
        planned, failure = await self._entry(spec, pinned=pinned)
        if not pinned and (failure is None or moves_on(failure)):
            for name in spec.fallbacks:
                planned += await self._fallback(name)
        if failure is not None and not planned:
            if isinstance(failure, ModelUnavailable):
                failure = self._explained(failure)
            if isinstance(failure, InvalidRequest) or not self._request.partial_failure:
                raise failure
            return self._planned(spec, spec, failure=failure)
        if len(planned) == 1:
            return planned[0]
        *before, last = planned
        first, *others = (*(msgspec.structs.replace(one, last=False) for one in before), last)
        ceiling = NanoUSD(max(one.ceiling for one in planned))
        return msgspec.structs.replace(first, alternatives=tuple(others), ceiling=ceiling)

    def _explained(self, failure: ModelUnavailable) -> ModelUnavailable:
        return ModelUnavailable(
            f"The model {self._requested!r} is not available: {failure.message}. "
            f"Models that work now: {self._served.callable_models()}.",
            param="model",
        )

    async def _fallback(self, name: str) -> tuple[PlannedModel, ...]:
        """What a fallback can do for this request: nothing, where it cannot honour it."""
        spec = self._served.catalog.resolve(name)
        try:
            check_fields(self._request, spec)
            check_entry(self._request, spec)
        except InvalidRequest:
            return ()
        planned, _ = await self._entry(spec, hurried=True)
        return planned

    async def _entry(
        self, spec: ModelSpec, *, pinned: bool = False, hurried: bool = False
    ) -> tuple[tuple[PlannedModel, ...], GatewayError | None]:
        """The entry's deployments that can be called, in the order to try them; else why there is none.

        `pinned`: at its own provider only. All but the last one that is not at rest are asked once.
        """
        planned: list[PlannedModel] = []
        failure: GatewayError | None = None
        for deployment in self._router.order(spec):
            if pinned and deployment.provider != spec.provider:
                continue
            try:
                if spec.deployments:
                    check_mapping(self._request, deployment)
                planned.append(await self._deployment(spec, deployment, hurried=hurried))
            except GatewayError as error:
                if failure is None or (moves_on(error) and not moves_on(failure)):
                    failure = error
        if len(planned) > 1:
            awake = [one for one in planned if not self._router.rests(one.spec)] or planned
            planned = [
                one if one is awake[-1] else msgspec.structs.replace(one, patient=False) for one in planned
            ]
        return tuple(planned), failure if not planned else None

    async def _deployment(self, entry: ModelSpec, spec: ModelSpec, *, hurried: bool) -> PlannedModel:
        request = self._request
        provider = self._served.providers[spec.provider]
        reason = provider.unavailable(spec)
        if reason is not None:
            raise ModelUnavailable(reason, param="model")
        planned: list[PlannedJob] = []
        counted: dict[Prompt | None, int | None] = {}
        for job in jobs_for(request, spec, self._first_index):
            if request.looks:
                counted[job.prompt] = None  # once its images are there
            elif job.prompt not in counted:
                counting = provider.count_prompt(job)
                counted[job.prompt] = await (_soon(counting) if hurried else counting)
            planned.append(bounded_together(request, job, counted[job.prompt], self._deadline))
        check_scores(planned)
        return self._planned(entry, spec, jobs=tuple(planned))

    def _planned(
        self,
        entry: ModelSpec,
        spec: ModelSpec,
        *,
        jobs: tuple[PlannedJob, ...] = (),
        failure: GatewayError | None = None,
    ) -> PlannedModel:
        margin = self._margins.margin_for(self._request, spec)
        return PlannedModel(
            requested=self._requested,
            shown=self._served.catalog.shown_name(self._requested, entry),
            spec=spec,
            provider=self._served.providers[spec.provider],
            margin=margin,
            first_index=self._first_index,
            jobs=jobs,
            ceiling=price_of(FemtoUSD(sum(ceiling_of(item) for item in jobs)), margin),
            failure=failure,
        )


def check_entry(request: CompletionRequest, spec: ModelSpec) -> None:
    """InvalidRequest when none of the model's deployments can honour the request."""
    refusal: InvalidRequest | None = None
    for deployment in spec.deployments or (spec,):
        try:
            check_mapping(request, deployment)
        except InvalidRequest as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal


async def _soon(counting: Coroutine[Any, Any, int | None]) -> int | None:
    """The count, or None where it takes too long: what may stand in must not hold up what is asked first."""
    task = asyncio.ensure_future(counting)
    try:
        await asyncio.wait((task,), timeout=FALLBACK_COUNT_S)
        return task.result() if task.done() else None
    finally:
        task.cancel()


async def _seeing(model: PlannedModel, request: CompletionRequest) -> PlannedModel:
    """The planned model with the request's images, without alternatives that cannot take those."""
    alternatives = []
    for alternative in model.alternatives:
        with contextlib.suppress(InvalidRequest):
            alternatives.append(await _with_messages(alternative, request))
    seeing = await _with_messages(model, request) if model.failure is None else model
    return msgspec.structs.replace(
        seeing, alternatives=tuple(alternatives), last=seeing.last or not alternatives
    )


async def _with_messages(model: PlannedModel, request: CompletionRequest) -> PlannedModel:
    """With images in place. InvalidRequest for what the provider cannot show, and for too much of it at once."""
    size = sum(
        len(part.data or b"")
        for message in request.messages or ()
        for part in message.parts
        if isinstance(part, Image)
    )
    if len(model.jobs) > 1 and size * len(model.jobs) > MAX_IMAGE_BYTES_SENT:
        allowed = f"at most {max(MAX_IMAGE_BYTES_SENT // size, 1)} with images of {size} bytes"
        raise InvalidRequest(
            f"n is {request.n}, and the model {model.spec.name} is sent the images once for each choice; {allowed}.",
            param="n",
            allowed=allowed,
        )
    jobs = [
        msgspec.structs.replace(planned, job=msgspec.structs.replace(planned.job, messages=request.messages))
        for planned in model.jobs
    ]
    await model.provider.count_prompt(jobs[0].job)  # they differ in their seeds alone
    return msgspec.structs.replace(model, jobs=tuple(jobs))


def _tokens(planned: PlannedModel) -> int:
    """The most tokens it can come to."""
    return sum(
        (item.bound if item.job.counts_prompt else 0) + item.job.max_tokens * item.job.candidates
        for item in planned.jobs
    )


def check_user(request: CompletionRequest) -> None:
    """The end user's name is kept with the usage, so it cannot be of any length."""
    if request.user is not None and len(request.user) > MAX_USER:
        allowed = f"at most {MAX_USER} characters"
        raise InvalidRequest(f"user must be {allowed}.", param="user", allowed=allowed)


def check_fields(request: CompletionRequest, spec: ModelSpec) -> None:
    """The request's fields against this model's own limits."""
    low, high = spec.temperature
    temperature = request.sampling.temperature
    if temperature is not None and not low <= temperature <= high:
        allowed = f"{low:g} to {high:g}"
        raise InvalidRequest(
            f"temperature must be {allowed} for the model {spec.name}, not {temperature:g}.",
            param="temperature",
            allowed=allowed,
        )
    limit = request.max_tokens
    # A broken file gives no limits; that it is broken is the answer then.
    if limit is not None and limit > spec.max_output_tokens and spec.broken is None:
        allowed = f"at most {spec.max_output_tokens}"
        raise InvalidRequest(
            f"{request.max_tokens_param} must be {allowed} for the model {spec.name}.",
            param=request.max_tokens_param,
            allowed=allowed,
        )
