"""OpenAI's legacy Completions API (seeds 3 and 4): POST /v1/completions.

https://platform.openai.com/docs/api-reference/completions
"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from headgate.core.completion import Answer, Choice, Chunk, CompletionRequest, Sampling
from headgate.core.completion import Prompt as CorePrompt
from headgate.core.errors import InvalidRequest
from headgate.dialects.base import (
    HIGHEST_TOKEN_ID,
    Caps,
    RequestContext,
    integer,
    number,
    stops,
    token_ids,
    token_limit,
)
from headgate.dialects.openai_form import OpenAIForm, OpenAIStream
from headgate.dialects.openai_logprobs import LegacyLogprobs, LegacyScores
from headgate.dialects.openai_wire import (
    FINISH_REASONS,
    OBJECT,
    CompletionsBody,
    Number,
    Prompt,
    SamplingBody,
    TextChoice,
    TextCompletion,
    choice_tail,
    finish_tail,
    usage_object,
    whole_answer,
)

ENDPOINT = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
MOST_BIASES = 1024
_SEEDS = (-(2**63), 2**63 - 1)
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

_encode = msgspec.json.Encoder().encode


class OpenAICompletions(OpenAIForm[CompletionsBody]):
    name = "openai"
    endpoint = ENDPOINT
    body = CompletionsBody

    def _parse(self, wire: CompletionsBody, context: RequestContext) -> CompletionRequest:
        if not wire.model:
            raise InvalidRequest("model is required.", param="model")
        prompts = _prompts(wire.prompt)
        n = integer(wire.n, "n", 1, 128) or 1
        best_of = _best_of(wire, n)
        candidates = best_of or n
        if len(prompts) * candidates > self._caps.max_choices:
            allowed = f"at most {self._caps.max_choices} choices in all"
            raise InvalidRequest(
                f"prompts x max(n, best_of) is {len(prompts)} x {candidates}; {allowed}.",
                param="prompt" if len(prompts) > 1 else "n" if candidates == n else "best_of",
                allowed=allowed,
            )
        max_tokens, max_tokens_param = token_limit(
            wire.max_tokens, wire.max_completion_tokens, alias="max_completion_tokens", low=0
        )
        logprobs = integer(wire.logprobs, "logprobs", 0, 5)
        echo, suffix = bool(wire.echo), wire.suffix or None
        if echo and suffix and logprobs is not None:
            raise InvalidRequest(
                "logprobs cannot be given with both echo and suffix.",
                param="logprobs",
                allowed="null where both echo and suffix are given",
            )
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(wire.model,),
            prompts=tuple(map(_core_prompt, prompts)),
            n=n,
            best_of=best_of,
            logprobs=logprobs,
            echo=echo,
            suffix=suffix,
            max_tokens=max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            max_tokens_param=max_tokens_param,
            sampling=sampling_of(wire, self._caps),
            stream=bool(wire.stream),
            include_usage=wire.includes_usage,
            user=wire.user,
            app=context.principal.app,
        )

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        most = request.logprobs
        if most is not None:
            choices = [_encode(_choice(choice, most)) for choice in answer.choices]
            return whole_answer(answer, completion_id(request), OBJECT, choices)
        return _encode(
            TextCompletion(
                id=completion_id(request),
                created=request.created,
                model=answer.models[0].model,
                choices=tuple([_choice(choice, None) for choice in answer.choices]),
                usage=usage_object(answer.usage),
            )
        )

    def renderer(
        self, request: CompletionRequest, served: Sequence[str] | None = None
    ) -> "CompletionsStream":
        return CompletionsStream(request, (served or request.models)[0])


class CompletionsStream(OpenAIStream):
    """One event per chunk, all of the blocking shape."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        super().__init__(request, model, completion_id(request), OBJECT)
        self._heads: dict[int, bytes] = {}
        tail = choice_tail if request.logprobs is None else finish_tail
        self._tails = {reason: tail(reason) + self._close for reason in FINISH_REASONS}
        self._scored: dict[int, _ScoredText] = {}

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        most = self._request.logprobs
        parts: list[bytes] = []
        for chunk in batch:
            if chunk.index < 0:  # usage only
                continue
            if most is not None:
                parts += self._with_scores(chunk, most)
            elif chunk.text or chunk.finish_reason is not None:
                parts += (self._head(chunk.index), _encode(chunk.text), self._tails[chunk.finish_reason])
        return b"".join(parts)

    def _with_scores(self, chunk: Chunk, most: int) -> tuple[bytes, ...]:
        reason = chunk.finish_reason
        if not (chunk.text or chunk.logprobs or reason is not None):
            return ()
        scored = self._scored.get(chunk.index)
        if scored is None:
            scored = self._scored[chunk.index] = _ScoredText(most)
        scores = b',"logprobs":' + _encode(scored.add(chunk))
        return (self._head(chunk.index), _encode(chunk.text), scores, self._tails[reason])

    def _head(self, index: int) -> bytes:
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._open + b'{"index":%d,"text":' % index
        return head


class _ScoredText:
    """How far one choice of a stream has come."""

    def __init__(self, most: int) -> None:
        self._scores = LegacyScores(most)
        self._length = 0

    def add(self, chunk: Chunk) -> LegacyLogprobs:
        self._length += len(chunk.text)
        whole = None if chunk.finish_reason is None else self._length
        return self._scores.add(chunk.logprobs or (), within=whole)


def completion_id(request: CompletionRequest) -> str:
    return f"cmpl-{request.answer_id.replace('-', '')}"


def sampling_of(wire: SamplingBody, caps: Caps) -> Sampling:
    """What steers generation, in completions and chat alike."""
    return Sampling(
        temperature=number(wire.temperature, "temperature", 0, 2),
        top_p=number(wire.top_p, "top_p", 0, 1),
        presence_penalty=number(wire.presence_penalty, "presence_penalty", -2, 2),
        frequency_penalty=number(wire.frequency_penalty, "frequency_penalty", -2, 2),
        seed=integer(wire.seed, "seed", *_SEEDS),
        stop=stops(wire.stop, "stop", caps.max_stops),
        logit_bias=_logit_bias(wire.logit_bias or {}),
    )


def _logit_bias(biases: Mapping[str, Number]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MOST_BIASES:
        allowed = f"at most {MOST_BIASES} token ids"
        raise InvalidRequest(f"logit_bias must hold {allowed}.", param="logit_bias", allowed=allowed)
    return tuple([(_token_id(key), _bias(bias)) for key, bias in biases.items()])


def _token_id(key: str) -> int:
    # One way to write each id: two biases for one token would contradict each other.
    if not _TOKEN_ID.fullmatch(key) or int(key) > HIGHEST_TOKEN_ID:
        allowed = f'token ids from 0 to {HIGHEST_TOKEN_ID} in decimal digits, such as "50256"'
        raise InvalidRequest(
            f"logit_bias must have {allowed} as its keys.", param="logit_bias", allowed=allowed
        )
    return int(key)


def _bias(value: Number) -> float:
    if not -100 <= value <= 100:
        allowed = "numbers from -100 to 100"
        raise InvalidRequest(
            f"logit_bias must have {allowed} as its values.", param="logit_bias", allowed=allowed
        )
    return float(value)


def _choice(choice: Choice, most: int | None) -> TextChoice:
    logprobs = None
    if most is not None:
        logprobs = LegacyScores(most).add(choice.logprobs or (), within=len(choice.text))
    return TextChoice(
        index=choice.index, text=choice.text, logprobs=logprobs, finish_reason=choice.finish_reason
    )


def _prompts(prompt: Prompt | None) -> Sequence[str | list[Number]]:
    """The prompts one by one, each a text or token ids."""
    if prompt is None:
        raise InvalidRequest("prompt is required.", param="prompt")
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds and kinds <= {int, float}:
        return (cast(list[Number], prompt),)
    if kinds in ({str}, {list}):
        return cast(list[str] | list[list[Number]], prompt)
    allowed = "a string, or a non-empty list of strings, of token ids or of lists of token ids"
    raise InvalidRequest(f"prompt must be {allowed}.", param="prompt", allowed=allowed)


def _core_prompt(prompt: str | list[Number]) -> CorePrompt:
    return prompt if isinstance(prompt, str) else token_ids(prompt, "prompt")


def _best_of(wire: CompletionsBody, n: int) -> int | None:
    """How many candidates each prompt gets, the best first; 0 and 1 ask for nothing."""
    best_of = integer(wire.best_of, "best_of", 0, 20) or 0
    if best_of <= 1:
        return None
    if best_of < n:
        raise InvalidRequest(f"best_of must be at least n ({n}).", param="best_of", allowed=f"{n} to 20")
    if wire.stream:
        raise InvalidRequest("best_of cannot be streamed.", param="best_of", allowed="0 or 1 with stream")
    return best_of
