"""From a request to a plan: which models, which calls, how long, and what it can cost at most.

Everything that can be refused without calling a model for text is refused here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from headgate.core.accounts import Developer, Principal
from headgate.core.completion import CompletionRequest, Prompt
from headgate.core.errors import GatewayError, InvalidRequest, ModelUnavailable
from headgate.core.models import Catalog, ModelSpec
from headgate.core.money import FemtoUSD, NanoUSD, price_of
from headgate.service.fanout import jobs_for
from headgate.service.mapping import check_mapping
from headgate.service.margins import MarginRules
from headgate.service.plan import Plan, PlannedJob, PlannedModel, bounded, ceiling_of, check_scores
from headgate.service.routing import Router, moves_on
from headgate.service.serving import Served, Serving

if TYPE_CHECKING:
    from headgate.service.images import Images

MAX_USER = 512


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
        if request.looks and self._images is not None:
            keep_urls = all(_passes_urls(one, served.catalog) for one in specs)
            request = await self._images.load(request, principal, keep_urls=keep_urls)
        deadline = self._router.deadline()
        models: list[PlannedModel] = []
        first_index = 0
        for requested, spec in zip(request.models, specs, strict=True):
            model = await _Entries(self, served, request, requested, first_index, deadline).plan(spec)
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
        )

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
        planner: Planner,
        served: Served,
        request: CompletionRequest,
        requested: str,
        first_index: int,
        deadline: float,
    ) -> None:
        self._router = planner._router
        self._margins = planner._margins
        self._served = served
        self._request = request
        self._requested = requested
        self._first_index = first_index
        self._deadline = deadline

    async def plan(self, spec: ModelSpec) -> PlannedModel:
        """The plan of the first entry that can be called, the others as its alternatives.

        Raises the requested model's own failure when there is none, unless the others go on without it.
        """
        planned, failure = await self._entry(spec)
        for name in spec.fallbacks:
            planned += (await self._fallback(name)) if failure is None or moves_on(failure) else ()
        if failure is not None and not planned:
            if isinstance(failure, InvalidRequest) or not self._request.partial_failure:
                raise failure
            return self._planned(spec, spec, failure=failure)
        if len(planned) == 1:
            return planned[0]
        ceiling = NanoUSD(max(one.ceiling for one in planned))
        return msgspec.structs.replace(planned[0], alternatives=planned[1:], ceiling=ceiling)

    async def _fallback(self, name: str) -> tuple[PlannedModel, ...]:
        """What a fallback can do for this request: nothing, where it cannot honour it."""
        spec = self._served.catalog.resolve(name)
        try:
            check_fields(self._request, spec)
            check_entry(self._request, spec)
        except InvalidRequest:
            return ()
        planned, _ = await self._entry(spec)
        return planned

    async def _entry(self, spec: ModelSpec) -> tuple[tuple[PlannedModel, ...], GatewayError | None]:
        """The entry's deployments that can be called, in the order to try them; else why there is none."""
        planned: list[PlannedModel] = []
        failure: GatewayError | None = None
        for deployment in self._router.order(spec):
            try:
                if spec.deployments:
                    check_mapping(self._request, deployment)
                planned.append(await self._deployment(spec, deployment))
            except GatewayError as error:
                failure = failure or error
        if len(planned) > 1:
            planned[:-1] = [msgspec.structs.replace(one, patient=False) for one in planned[:-1]]
        return tuple(planned), failure if not planned else None

    async def _deployment(self, entry: ModelSpec, spec: ModelSpec) -> PlannedModel:
        request = self._request
        provider = self._served.providers[spec.provider]
        reason = provider.unavailable(spec)
        if reason is not None:
            raise ModelUnavailable(
                f"The model {self._requested!r} is not available: {reason}. "
                f"Models that work now: {self._served.callable_models()}.",
                param="model",
            )
        planned: list[PlannedJob] = []
        counted: dict[Prompt | None, int | None] = {}
        for job in jobs_for(request, spec, self._first_index):
            if job.prompt not in counted:
                counted[job.prompt] = await provider.count_prompt(job)
            planned.append(bounded(request, job, counted[job.prompt], self._deadline))
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


def _passes_urls(spec: ModelSpec, catalog: Catalog) -> bool:
    """Whether all that may serve the model fetch images by themselves."""
    entries = (spec, *map(catalog.resolve, spec.fallbacks))
    return all(
        one.image_urls == "pass" for entry in entries for one in (entry.deployments or (entry,)) if one.vision
    )


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
