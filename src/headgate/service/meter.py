"""Usage and text produced so far, and where the figures come from.

The provider's own figures win, a reported zero included; then exact tokens; then an estimate.
"""

from collections.abc import Mapping, Sequence

from headgate.core.completion import (
    Choice,
    Chunk,
    Completion,
    CompletionRequest,
    FinishReason,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
    UsageSource,
)
from headgate.core.errors import GatewayError, UpstreamError
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD
from headgate.service.estimates import likely_in_text
from headgate.service.fanout import Candidate, choose
from headgate.service.plan import PlannedJob, PlannedModel


class JobMeter:
    """Counts one call. Lives on the event loop; `add` is the hot path of every stream.

    `handed_on`: something of it has left for the client. `heard`: the provider has begun to answer. `call` is the
    attempt's number at its circuit, `counted` are the deployments whose failure this request was counted for.
    """

    __slots__ = (
        "_bytes",
        "_calls",
        "_echoed",
        "_finish",
        "_logprobs",
        "_pieces",
        "_tokens",
        "_tokens_known",
        "_usage",
        "attempts",
        "call",
        "counted",
        "dirty",
        "failed_cost",
        "handed_on",
        "heard",
        "planned",
        "sent",
    )

    def __init__(self, planned: PlannedJob, counted: set[tuple[str, str]] | None = None) -> None:
        self.planned = planned
        self.counted = set() if counted is None else counted
        self.call = 0
        self.handed_on = False
        self.attempts = 0
        self.failed_cost = 0
        self.dirty = False
        self._begin()

    def _begin(self) -> None:
        planned = self.planned
        self.sent = False
        self.heard = False
        self._pieces: list[list[str]] = [[] for _ in range(planned.job.n)]
        self._bytes = [0] * planned.job.n
        self._finish: list[FinishReason | None] = [None] * planned.job.n
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(planned.job.n)]
        self._echoed = [0] * planned.job.n
        self._tokens = 0
        self._tokens_known = True
        self._calls: list[dict[int, _Call]] | None = None
        self._usage: Usage | None = None

    def failed(self, error: UpstreamError) -> None:
        """An attempt failed; it may have reported usage before anything else came."""
        if error.usage is not None and self._usage is None:
            self._usage = error.usage

    def restart(self) -> None:
        """Forget a failed attempt, but not what the provider reported that it cost."""
        self.failed_cost += self.reported_cost
        self._begin()

    @property
    def reported_cost(self) -> FemtoUSD:
        """What the provider's own figures come to; nothing where it gave none."""
        usage = self._usage
        return FemtoUSD(0) if usage is None else FemtoUSD(sum(exact_cost(self.planned.job.model, usage)))

    def mark_sent(self) -> None:
        """From now on the prompt is owed."""
        self.sent = True
        self.dirty = True

    def add(self, batch: Sequence[Chunk]) -> None:
        self.dirty = True
        for chunk in batch:
            if chunk.usage is not None:
                self._usage = chunk.usage
            index = chunk.index
            if index < 0:
                continue
            if chunk.logprobs is not None:
                self._logprobs[index] += chunk.logprobs
                if chunk.echoed:
                    self._echoed[index] += len(chunk.logprobs)
            if chunk.echoed:
                self._pieces[index].append(chunk.text)
            elif chunk.text:
                self._pieces[index].append(chunk.text)
                self._bytes[index] += len(chunk.text.encode())
                if chunk.tokens is None:
                    self._tokens_known = False
            if chunk.tokens is not None:
                self._tokens += chunk.tokens
            if chunk.tool_calls is not None:
                self._add_calls(index, chunk.tool_calls)
            if chunk.finish_reason is not None:
                self._finish[index] = chunk.finish_reason

    def complete(self, completion: Completion) -> None:
        self._usage = completion.usage
        self._tokens_known = False
        job = self.planned.job
        echoed = len(job.prompt.encode()) if job.echo and isinstance(job.prompt, str) else 0
        for choice in completion.choices:
            self._pieces[choice.index] = [choice.text]
            self._bytes[choice.index] = max(0, len(choice.text.encode()) - echoed)
            self._finish[choice.index] = choice.finish_reason
            self._logprobs[choice.index] = list(choice.logprobs or ())
            if choice.tool_calls:
                whole = [
                    ToolCallPiece(position, call.arguments, call.id, call.name)
                    for position, call in enumerate(choice.tool_calls)
                ]
                self._add_calls(choice.index, whole)

    @property
    def produced(self) -> bool:
        """True once anything came that a client may have read."""
        return any(self._pieces) or self._calls is not None

    def choices(self) -> list[Choice]:
        first = self.planned.job.first_index
        asked = self.planned.job.logprobs is not None
        return [
            Choice(
                index=first + index,
                text="".join(pieces),
                finish_reason=self._finish[index],
                logprobs=tuple(self._logprobs[index]) if asked else None,
                tool_calls=() if self._calls is None else _tool_calls(self._calls[index]),
            )
            for index, pieces in enumerate(self._pieces)
        ]

    def _add_calls(self, index: int, pieces: Sequence[ToolCallPiece]) -> None:
        """What calls are made of counts as output, like text."""
        if self._calls is None:
            self._calls = [{} for _ in range(self.planned.job.n)]
        calls = self._calls[index]
        self._tokens_known = False
        for piece in pieces:
            call = calls.setdefault(piece.position, _Call())
            call.id = call.id or piece.id
            call.name = call.name or piece.name
            if piece.arguments:
                call.arguments.append(piece.arguments)
            self._bytes[index] += len(piece.arguments.encode()) + len((piece.name or "").encode())

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(choice, _mean(self._logprobs[index][self._echoed[index] :]))
            for index, choice in enumerate(self.choices())
        ]

    def usage(self) -> Usage:
        counts_prompt = self.planned.job.counts_prompt
        reported = self._usage
        if reported is not None and reported.final:
            if counts_prompt:
                return reported
            return Usage(
                prompt_tokens=0, completion_tokens=reported.completion_tokens, source=reported.source
            )
        source: UsageSource = "tokenizer" if reported is None or self._tokens else "provider"
        prompt = cached = 0
        if counts_prompt and reported is not None:
            prompt, cached = reported.prompt_tokens, reported.cached_tokens
        elif counts_prompt and self.sent:
            prompt = self.planned.likely
            if self.planned.counted is None:
                source = "estimate"
        completion = self._tokens
        if not self._tokens_known:
            source = "estimate"
            job = self.planned.job
            limit = job.max_tokens  # no guess is above what was asked for
            # Where an echo of token ids ends is not seen in the text, but how many they are is known.
            echoed = len(job.prompt) if job.echo and isinstance(job.prompt, tuple) else 0
            completion = sum(min(limit, max(0, likely_in_text(size) - echoed)) for size in self._bytes)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, source=source)


class _Call:
    """One tool call as it comes together."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self) -> None:
        self.id: str | None = None
        self.name: str | None = None
        self.arguments: list[str] = []


class ModelMeter:
    """Sums the calls of one requested model. `failure` is why it gave nothing, or not all.

    `planned` is what serves it: `first`, until that fails, then its alternatives. `hold` is its part of the hold.
    """

    def __init__(self, planned: PlannedModel) -> None:
        self.planned = self.first = planned
        self.hold = planned.ceiling
        self._counted: set[tuple[str, str]] = set()
        self._past_attempts = 0
        self._past_cost = 0
        self.jobs = [JobMeter(job, self._counted) for job in planned.jobs]
        self.failure: GatewayError | None = planned.failure
        self.elapsed_s = 0.0

    def switch(self, planned: PlannedModel) -> None:
        """Another deployment or model serves from now on; what came until then is forgotten, but not its cost."""
        self._past_attempts = self.attempts
        self._past_cost += sum(job.failed_cost + job.reported_cost for job in self.jobs)
        self.planned = planned
        self.jobs = [JobMeter(job, self._counted) for job in planned.jobs]

    @property
    def handed_on(self) -> bool:
        """True once something of it has left for the client."""
        return any(job.handed_on for job in self.jobs)

    @property
    def attempts(self) -> int:
        """How often providers were asked."""
        return self._past_attempts + sum(job.attempts for job in self.jobs)

    def failed_cost(self, *, charged: bool) -> FemtoUSD:
        """What providers reported for attempts that gave nothing. Not `charged`: nor did the last one."""
        last = 0 if charged else sum(job.reported_cost for job in self.jobs)
        return FemtoUSD(self._past_cost + sum(job.failed_cost for job in self.jobs) + last)

    @property
    def produced(self) -> bool:
        return any(job.produced for job in self.jobs)

    @property
    def sent(self) -> bool:
        """True once the provider was asked at least once."""
        return any(job.sent for job in self.jobs)

    def choices(self, request: CompletionRequest) -> tuple[Choice, ...]:
        """The answer's choices: n for each prompt, with `best_of` the best of its candidates."""
        if len(self.jobs) == 1 and (request.best_of is None or self.jobs[0].planned.job.best_of is not None):
            return tuple(self.jobs[0].choices())
        prompts: dict[int, list[Candidate]] = {}
        for job in self.jobs:
            prompts.setdefault(job.planned.job.prompt_index, []).extend(job.candidates())
        return choose(list(prompts.values()), request, self.planned.first_index)

    def usage(self) -> Usage:
        if len(self.jobs) == 1:
            return self.jobs[0].usage()
        usages = [job.usage() for job in self.jobs]
        sources = {usage.source for usage in usages}
        source: UsageSource = "estimate"
        if sources == {"provider"}:
            source = "provider"
        elif sources and "estimate" not in sources:
            source = "tokenizer"
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            source=source,
        )

    def exact(self, usage: Usage) -> tuple[FemtoUSD, FemtoUSD]:
        """The provider's cost before rounding: (input, output) in femto-USD. Nothing if it was never asked."""
        if not self.sent:
            return FemtoUSD(0), FemtoUSD(0)
        return exact_cost(self.planned.spec, usage)


def exact_cost(spec: ModelSpec, usage: Usage) -> tuple[FemtoUSD, FemtoUSD]:
    """(input, output) in femto-USD."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    return (
        FemtoUSD(fresh * spec.input_rate + usage.cached_tokens * spec.cached_rate),
        FemtoUSD(usage.completion_tokens * spec.output_rate),
    )


def _tool_calls(calls: Mapping[int, _Call]) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(id=call.id or "", name=call.name or "", arguments="".join(call.arguments))
        for _, call in sorted(calls.items())
    )


def _mean(entries: Sequence[TokenLogprob]) -> float | None:
    known = [entry.logprob for entry in entries if entry.logprob is not None]
    return sum(known) / len(known) if known else None


class Meter:
    """Everything one request has used so far."""

    def __init__(self, models: Sequence[PlannedModel]) -> None:
        self.models = [ModelMeter(model) for model in models]

    def take_dirty(self) -> bool:
        """True when something changed since the last time; resets the mark."""
        dirty = False
        for model in self.models:
            for job in model.jobs:
                if job.dirty:
                    job.dirty = False
                    dirty = True
        return dirty

    @property
    def produced(self) -> bool:
        return any(model.produced for model in self.models)
