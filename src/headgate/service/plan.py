"""A plan: which calls answer a request, how long each may become, and what it can cost at most."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from headgate.core.accounts import Developer, Principal
from headgate.core.completion import CompletionRequest, Job
from headgate.core.errors import GatewayError, InvalidRequest
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD
from headgate.core.ports import Provider
from headgate.service.estimates import at_least, at_most, likely

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

    `failure`: it cannot be called, but the request goes on without it. `shown`: what the answer calls it. `patient`:
    a call that fails is repeated here, there being no other deployment to go to. `alternatives` are tried in order when
    it fails: further deployments, then fallbacks; the `ceiling` covers the dearest of them all. `last`: nothing comes
    after it.
    """

    requested: str
    shown: str
    spec: ModelSpec
    provider: Provider
    margin: MarginPPM
    first_index: int
    jobs: tuple[PlannedJob, ...] = ()
    ceiling: NanoUSD = NanoUSD(0)
    patient: bool = True
    last: bool = True
    alternatives: tuple["PlannedModel", ...] = ()
    failure: GatewayError | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """What will be done. `ceiling` is the greatest possible price, `token_ceiling` the most tokens, `deadline` when all
    of it must be over, in monotonic seconds."""

    request: CompletionRequest
    principal: Principal
    models: tuple[PlannedModel, ...]
    developer: Developer | None
    ceiling: NanoUSD
    token_ceiling: int
    deadline: float | None = None


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


def bounded(
    request: CompletionRequest, job: Job, counted: int | None, deadline: float | None = None
) -> PlannedJob:
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
        job=msgspec.structs.replace(job, max_tokens=limit, deadline=deadline),
        counted=counted,
        bound=counted if counted is not None else at_most(job),
        likely=counted if counted is not None else likely(job),
    )


def bounded_together(
    request: CompletionRequest, job: Job, counted: int | None, deadline: float | None = None
) -> PlannedJob:
    """Fit each of the job's prompts into the context, and sum what they come to."""
    if not job.more_prompts:
        return bounded(request, job, counted, deadline)
    singles = [
        bounded(request, msgspec.structs.replace(job, prompt=prompt, more_prompts=()), None)
        for prompt in (job.prompt, *job.more_prompts)
    ]
    limit = min(single.job.max_tokens for single in singles)
    return PlannedJob(
        job=msgspec.structs.replace(job, max_tokens=limit, deadline=deadline),
        counted=None,
        bound=sum(single.bound for single in singles),
        likely=sum(single.likely for single in singles),
    )


def ceiling_of(planned: PlannedJob) -> FemtoUSD:
    """The most this call can cost the provider's customer: every prompt token at the dearer input rate."""
    job, spec = planned.job, planned.job.model
    prompt = planned.bound * max(spec.input_rate, spec.cached_rate) if job.counts_prompt else 0
    return FemtoUSD(prompt + job.max_tokens * job.candidates * spec.output_rate)


def _about(counted: int | None) -> str:
    return "" if counted is not None else "at least "
