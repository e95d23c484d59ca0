"""Models x prompts x candidates -> jobs, and back to choices.

One job is one call to a provider. Choices are numbered models first, then prompts, then n, so
`index = prompt * n + j` within a model. Where more candidates than n are asked for (`best_of`), a provider that can
chooses itself; else each prompt's candidates are generated here, and the best n of them kept.
"""

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Struct

from headgate.core.completion import Choice, CompletionRequest, Job, Prompt, Sampling, Shape
from headgate.core.models import ModelSpec
from headgate.service.mapping import sampling_for, shape_for, transcript

SEED_STRIDE = 2_654_435_761
"""A prime near 2**32 divided by the golden ratio: multiples of it lie far apart, also in 32 bits."""


class Candidate(Struct, frozen=True, gc=False):
    """A finished choice and the mean log probability of what was generated of it (None: not known)."""

    choice: Choice
    score: float | None


def jobs_for(request: CompletionRequest, spec: ModelSpec, first_index: int) -> Iterator[Job]:
    """The jobs of one model, in order of their choices. `max_tokens` is still open (0); see planning."""
    shape = shape_for(request, spec)
    prompts: tuple[Prompt | None, ...]
    messages = request.messages
    plain = request.plain
    if messages is not None:
        prompts = (None,)
        if shape == "completion":
            # Words of end users: special tokens in them stay text here too. A template's own must be read as such, so
            # there they were refused in the words.
            prompts, messages, plain = (transcript(messages, spec.template),), None, spec.template is None
    else:
        prompts = request.prompts or ()
    wanted = request.best_of or request.n
    chooses = spec.takes_n and shape == "completion"
    logprobs = request.logprobs
    if request.best_of is not None and not chooses and logprobs is None:
        logprobs = 0  # to choose by
    sampling = sampling_for(request.sampling, spec) if spec.refuses else request.sampling
    if _together(request, spec, shape):
        first, *others = prompts
        yield Job(
            request_id=request.request_id,
            model=spec,
            shape=shape,
            prompt=first,
            more_prompts=tuple(other for other in others if isinstance(other, str)),
            plain=plain,
            n=request.n * len(prompts),
            max_tokens=0,
            sampling=sampling,
            first_index=first_index,
        )
        return
    for prompt_index, prompt in enumerate(prompts):
        for call in range(1 if spec.takes_n else wanted):
            yield Job(
                request_id=request.request_id,
                model=spec,
                shape=shape,
                prompt=prompt,
                messages=messages,
                plain=plain or (shape == "chat" and prompt is not None),
                n=(request.n if chooses else wanted) if spec.takes_n else 1,
                best_of=request.best_of if chooses else None,
                max_tokens=0,
                sampling=_nth_seed(sampling, prompt_index * wanted + call),
                logprobs=logprobs,
                echo=request.echo,
                suffix=request.suffix,
                response_format=request.response_format,
                tools=request.tools,
                first_index=first_index + prompt_index * request.n + call,
                prompt_index=prompt_index,
                counts_prompt=call == 0 or spec.bills_prompt_per_call,
            )


def _together(request: CompletionRequest, spec: ModelSpec, shape: Shape) -> bool:
    """Whether one call can answer all prompts: texts, of which nothing is asked that is looked at prompt by prompt."""
    return (
        spec.takes_prompts
        and shape == "completion"
        and request.prompts is not None
        and len(request.prompts) > 1
        and all(isinstance(prompt, str) for prompt in request.prompts)
        and request.sampling.seed is None
        and request.logprobs is None
        and request.best_of is None
        and request.suffix is None
        and not request.echo
    )


def choose(
    prompts: Sequence[Sequence[Candidate]], request: CompletionRequest, first_index: int
) -> tuple[Choice, ...]:
    """The choices of each prompt, numbered in order; with `best_of` the best n of its candidates, better first.

    Those whose score is not known come last; equally good ones keep their order.
    """
    chosen: list[Choice] = []
    for candidates in prompts:
        ranked = candidates if request.best_of is None else sorted(candidates, key=_badness)
        chosen += (candidate.choice for candidate in ranked[: request.n])
    return tuple(
        choice if choice.index == index else msgspec.structs.replace(choice, index=index)
        for index, choice in enumerate(chosen, first_index)
    )


def _badness(candidate: Candidate) -> float:
    return float("inf") if candidate.score is None else -candidate.score


def _nth_seed(sampling: Sampling, call: int) -> Sampling:
    """The same seed gives the same text, and the choices of one request differ, also from those of the next seed."""
    if not call or sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + call * SEED_STRIDE) % 2**63)
