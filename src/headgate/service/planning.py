"""From a request to a plan: which models, which calls, how long, and what it can cost at most.

Everything that can be refused without calling a model for text is refused here.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from headgate.core.accounts import Developer, Principal
from headgate.core.completion import CompletionRequest, Job, Prompt
from headgate.core.errors import GatewayError, InvalidRequest, ModelUnavailable
from headgate.core.models import Catalog, ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD, price_of
from headgate.core.ports import Provider
from headgate.service.estimates import at_least, at_most, likely
from headgate.service.fanout import jobs_for
from headgate.service.mapping import check_mapping
from headgate.service.margins import MarginRules

MAX_USER = 512
MAX_SCORES = 1_000_000
"""Log probabilities in one answer: building and sending more would hold up everybody else."""


class PlannedJob(Struct, frozen=True, kw_only=True):
    """A call and its prompt's size in tokens: `counted` exactly (None: no tokenizer), `bound` at most."""

    job: Job
    counted: int | None
    bound: int
    likely: int


class PlannedModel(Struct, frozen=True, kw_only=True):
    """One requested model, its choices from `first_index` on.

    `failure`: it cannot be called, but the request goes on without it.
    """

    requested: str
    spec: ModelSpec
    provider: Provider
    margin: MarginPPM
    first_index: int
    jobs: tuple[PlannedJob, ...] = ()
    ceiling: NanoUSD = NanoUSD(0)
    failure: GatewayError | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """What will be done. `ceiling` is the greatest possible price, `token_ceiling` the most tokens."""

    request: CompletionRequest
    principal: Principal
    models: tuple[PlannedModel, ...]
    developer: Developer | None
    ceiling: NanoUSD
    token_ceiling: int


class Planner:
    def __init__(
        self,
        catalog: Catalog,
        providers: Mapping[str, Provider],
        margins: MarginRules,
        developers: Mapping[str, Developer],
    ) -> None:
        self._catalog = catalog
        self._providers = providers
        self._margins = margins
        self._developers = developers

    async def plan(self, request: CompletionRequest, principal: Principal) -> Plan:
        """Resolve, validate and price. Raises what the client did wrong, or why no model can be called."""
        check_user(request)
        developer = self._developer(request)
        specs = [self._catalog.resolve(name) for name in request.models]
        for spec in specs:
            check_fields(request, spec)
            check_mapping(request, spec)
        models: list[PlannedModel] = []
        first_index = 0
        for requested, spec in zip(request.models, specs, strict=True):
            model = await self._model(request, requested, spec, first_index)
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
                (planned.bound if planned.job.counts_prompt else 0)
                + planned.job.max_tokens * planned.job.candidates
                for model in models
                for planned in model.jobs
            ),
        )

    def callable_models(self) -> str:
        """Names of models that can be called now, for an error's advice; at most ten."""
        names = [
            spec.name
            for spec in self._catalog.models
            if self._providers[spec.provider].unavailable(spec) is None
        ]
        return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "none"

    async def _model(
        self, request: CompletionRequest, requested: str, spec: ModelSpec, first_index: int
    ) -> PlannedModel:
        provider = self._providers[spec.provider]
        margin = self._margins.margin_for(request, spec)

        def without(failure: GatewayError) -> PlannedModel:
            return PlannedModel(
                requested=requested,
                spec=spec,
                provider=provider,
                margin=margin,
                first_index=first_index,
                failure=failure,
            )

        reason = provider.unavailable(spec)
        if reason is not None:
            failure = ModelUnavailable(
                f"The model {requested!r} is not available: {reason}. Models that work now: {self.callable_models()}.",
                param="model",
            )
            if not request.partial_failure:
                raise failure
            return without(failure)
        planned: list[PlannedJob] = []
        counted: dict[Prompt | None, int | None] = {}
        try:
            for job in jobs_for(request, spec, first_index):
                if job.prompt not in counted:
                    counted[job.prompt] = await provider.count_prompt(job)
                planned.append(bounded(request, job, counted[job.prompt]))
        except InvalidRequest:
            raise
        except GatewayError as error:
            if not request.partial_failure:
                raise
            return without(error)
        check_scores(planned)
        exact = FemtoUSD(sum(ceiling_of(item) for item in planned))
        return PlannedModel(
            requested=requested,
            spec=spec,
            provider=provider,
            margin=margin,
            first_index=first_index,
            jobs=tuple(planned),
            ceiling=price_of(exact, margin),
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


def check_scores(planned: Sequence[PlannedJob]) -> None:
    """Refuse an answer of too many log probabilities: tokens x choices x (1 + alternatives)."""
    scores = sum(
        (item.job.max_tokens + (item.likely if item.job.echo else 0)) * item.job.n * (1 + item.job.logprobs)
        for item in planned
        if item.job.logprobs is not None
    )
    if scores > MAX_SCORES:
        allowed = f"at most {MAX_SCORES} in one answer"
        raise InvalidRequest(
            f"logprobs asks for up to {scores} log probabilities (tokens x choices x alternatives); {allowed}.",
            param="logprobs",
            allowed=allowed,
        )


def bounded(request: CompletionRequest, job: Job, counted: int | None) -> PlannedJob:
    """Fit the job into the model's context. InvalidRequest naming both numbers where it does not fit."""
    spec = job.model
    floor = counted if counted is not None else at_least(job)
    where = "messages" if request.messages is not None else "prompt"
    if floor > spec.max_input_tokens:
        raise InvalidRequest(
            f"The prompt has {_about(counted)}{floor} tokens; the model {spec.name} takes at most "
            f"{spec.max_input_tokens}.",
            param=where,
            code="context_length_exceeded",
            allowed=f"at most {spec.max_input_tokens} tokens",
        )
    given = request.max_tokens
    left = spec.context_window - (counted if counted is not None else likely(job))
    if given is not None:
        if floor + given > spec.context_window:
            raise InvalidRequest(
                f"The prompt's {_about(counted)}{floor} tokens and {request.max_tokens_param} {given} together exceed "
                f"the model's context of {spec.context_window} tokens.",
                param=request.max_tokens_param,
                code="context_length_exceeded",
                allowed=f"prompt and output together at most {spec.context_window} tokens",
            )
        limit = given
    else:
        if counted is not None and left < 1:
            raise InvalidRequest(
                f"The prompt's {counted} tokens leave no room in the model's context of {spec.context_window} tokens.",
                param=where,
                code="context_length_exceeded",
                allowed=f"less than {spec.context_window} tokens",
            )
        wanted = request.default_max_tokens or spec.max_output_tokens
        limit = max(1, min(wanted, spec.max_output_tokens, left))
    return PlannedJob(
        job=msgspec.structs.replace(job, max_tokens=limit),
        counted=counted,
        bound=counted if counted is not None else at_most(job),
        likely=counted if counted is not None else likely(job),
    )


def ceiling_of(planned: PlannedJob) -> FemtoUSD:
    """The most this call can cost the provider's customer: every prompt token at the dearer input rate."""
    job, spec = planned.job, planned.job.model
    prompt = planned.bound * max(spec.input_rate, spec.cached_rate) if job.counts_prompt else 0
    return FemtoUSD(prompt + job.max_tokens * job.candidates * spec.output_rate)


def _about(counted: int | None) -> str:
    return "" if counted is not None else "at least "
