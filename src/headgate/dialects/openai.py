"""OpenAI's legacy Completions API (seeds 3 and 4): POST /v1/completions.

https://platform.openai.com/docs/api-reference/completions
What this version cannot honour (logprobs, echo, best_of, suffix, token prompts, logit_bias) is refused by name.
"""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headgate.core.completion import (
    Answer,
    Chunk,
    CompletionRequest,
    FinishReason,
    Sampling,
    StreamEnd,
    Usage,
)
from headgate.core.errors import GatewayError, InvalidRequest
from headgate.dialects.base import (
    BearerDialect,
    Caps,
    ErrorResponse,
    RequestContext,
    decode_body,
    integer,
    number,
    stops,
    token_limit,
    unsupported,
)
from headgate.dialects.openai_errors import at_endpoint, error_event, error_response, stream_stopped
from headgate.dialects.sse import DONE, event

ENDPOINT = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
OBJECT = "text_completion"
_SEEDS = (-(2**63), 2**63 - 1)

Prompt = str | list[str | int | list[int]]
Number = int | float
_encode = msgspec.json.Encoder().encode


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class CompletionsBody(Struct, frozen=True, kw_only=True):
    """The body as sent. Numbers are wide on purpose: 500.0 is an integer to many clients."""

    model: str | None = None
    prompt: Prompt | None = None
    best_of: Number | None = None
    echo: bool | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    logprobs: Number | None = None
    max_completion_tokens: Number | None = None
    max_tokens: Number | None = None
    n: Number | None = None
    presence_penalty: Number | None = None
    seed: Number | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    user: str | None = None


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int


class UsageObject(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class TextChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class TextCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: str = OBJECT
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: UsageObject


class OpenAICompletions(BearerDialect):
    name = "openai"

    def __init__(self, caps: Caps) -> None:
        self._caps = caps

    def decode(self, body: bytes) -> CompletionsBody:
        return decode_body(body, CompletionsBody, endpoint=ENDPOINT)

    def parse(self, wire: CompletionsBody, context: RequestContext) -> CompletionRequest:
        try:
            return self._parse(wire, context)
        except InvalidRequest as error:
            raise at_endpoint(error, ENDPOINT) from None

    def _parse(self, wire: CompletionsBody, context: RequestContext) -> CompletionRequest:
        if not wire.model:
            raise InvalidRequest("model is required.", param="model")
        prompts = _prompts(wire.prompt)
        n = integer(wire.n, "n", 1, 128) or 1
        max_tokens, max_tokens_param = token_limit(
            wire.max_tokens, wire.max_completion_tokens, alias="max_completion_tokens", low=0
        )
        sampling = Sampling(
            temperature=number(wire.temperature, "temperature", 0, 2),
            top_p=number(wire.top_p, "top_p", 0, 1),
            presence_penalty=number(wire.presence_penalty, "presence_penalty", -2, 2),
            frequency_penalty=number(wire.frequency_penalty, "frequency_penalty", -2, 2),
            seed=integer(wire.seed, "seed", *_SEEDS),
            stop=stops(wire.stop, "stop", self._caps.max_stops),
        )
        candidates = _candidates(wire, n)
        if len(prompts) * candidates > self._caps.max_choices:
            allowed = f"at most {self._caps.max_choices} choices in all"
            raise InvalidRequest(
                f"prompts x max(n, best_of) is {len(prompts)} x {candidates}; {allowed}.",
                param="prompt" if len(prompts) > 1 else "n",
                allowed=allowed,
            )
        _refuse_unsupported(wire, candidates > n)
        stream = bool(wire.stream)
        options = wire.stream_options
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(wire.model,),
            prompts=_texts(prompts),
            n=n,
            max_tokens=max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            max_tokens_param=max_tokens_param,
            sampling=sampling,
            stream=stream,
            include_usage=stream and options is not None and bool(options.include_usage),
            user=wire.user,
            app=context.principal.app,
        )

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        return _encode(
            TextCompletion(
                id=completion_id(request),
                created=request.created,
                model=answer.models[0].model,
                choices=tuple(
                    TextChoice(index=choice.index, text=choice.text, finish_reason=choice.finish_reason)
                    for choice in answer.choices
                ),
                usage=usage_object(answer.usage),
            )
        )

    def renderer(self, request: CompletionRequest) -> "CompletionsStream":
        return CompletionsStream(request)

    def render_error(self, error: GatewayError) -> ErrorResponse:
        return error_response(error)


class CompletionsStream:
    """Renders one stream: one event per chunk, all of the blocking shape, then `[DONE]`."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        # What is the same in every chunk is encoded once; a chunk costs one string and three joins.
        self._open = b"data: " + chunk_head(completion_id(request), request.created, request.models[0])
        self._heads: dict[int, bytes] = {}
        close = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"
        self._tails = {reason: choice_tail(reason) + close for reason in FINISH_REASONS}

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        parts: list[bytes] = []
        for chunk in batch:
            if chunk.index < 0:  # usage only
                continue
            parts += (self._head(chunk.index), _encode(chunk.text), self._tails[chunk.finish_reason])
        return b"".join(parts)

    def _head(self, index: int) -> bytes:
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._open + b'{"index":%d,"text":' % index
        return head

    def end(self, end: StreamEnd) -> bytes:
        if end.kind == "aborted":
            return self.error(stream_stopped(end.error))
        if not self._request.include_usage:
            return DONE
        request = self._request
        last = TextCompletion(
            id=completion_id(request),
            created=request.created,
            model=end.answer.models[0].model,
            choices=(),
            usage=usage_object(end.answer.usage),
        )
        return event(_encode(last)) + DONE

    def error(self, error: GatewayError) -> bytes:
        return error_event(error)


FINISH_REASONS: tuple[FinishReason | None, ...] = (
    None,
    "stop",
    "length",
    "content_filter",
    "error",
    "timeout",
)


def completion_id(request: CompletionRequest) -> str:
    return f"cmpl-{request.answer_id.replace('-', '')}"


def chunk_head(id_: str, created: int, model: str) -> bytes:
    """A chunk's JSON up to and including the bracket that opens its choices."""
    head = {"id": id_, "object": OBJECT, "created": created, "model": model, "choices": ()}
    return _encode(head).removesuffix(b"]}")


def choice_tail(reason: FinishReason | None) -> bytes:
    """A choice's JSON after its text."""
    return b',"logprobs":null,"finish_reason":' + _encode(reason) + b"}"


def usage_object(usage: Usage) -> UsageObject:
    return UsageObject(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens)
        if usage.cached_tokens
        else UNSET,
    )


def _prompts(prompt: Prompt | None) -> Sequence[str | list[int]]:
    """The prompts one by one, each a text or token ids."""
    if prompt is None:
        raise InvalidRequest("prompt is required.", param="prompt")
    if isinstance(prompt, str):
        return (prompt,)
    texts = [part for part in prompt if isinstance(part, str)]
    tokens = [part for part in prompt if isinstance(part, int)]
    token_lists = [part for part in prompt if isinstance(part, list)]
    if not prompt or len(prompt) not in (len(texts), len(tokens), len(token_lists)):
        allowed = "a string or a non-empty list of strings"
        raise InvalidRequest(f"prompt must be {allowed}.", param="prompt", allowed=allowed)
    return (tokens,) if tokens else texts or token_lists


def _texts(prompts: Sequence[str | list[int]]) -> tuple[str, ...]:
    texts = tuple(prompt for prompt in prompts if isinstance(prompt, str))
    if len(texts) != len(prompts):
        raise unsupported("prompt", "as token ids in this version; send text")
    return texts


def _candidates(wire: CompletionsBody, n: int) -> int:
    """How many choices each prompt would generate: `n`, or `best_of` where it asks for more."""
    best_of = integer(wire.best_of, "best_of", 0, 20) or 0
    if best_of <= 1:
        return n
    if best_of < n:
        raise InvalidRequest(f"best_of must be at least n ({n}).", param="best_of", allowed=f"{n} to 20")
    if wire.stream:
        raise InvalidRequest("best_of cannot be streamed.", param="best_of", allowed="0 or 1 with stream")
    return best_of


def _refuse_unsupported(wire: CompletionsBody, best_of: bool) -> None:
    """Documented, within range, but not in this version: ignoring them would give another answer."""
    integer(wire.logprobs, "logprobs", 0, 5)
    for bias in (wire.logit_bias or {}).values():
        number(bias, "logit_bias", -100, 100)
    asked = {
        "best_of": best_of,
        "echo": wire.echo,
        "logit_bias": wire.logit_bias,
        "logprobs": wire.logprobs is not None,
        "suffix": wire.suffix,
    }
    for name, value in asked.items():
        if value:
            raise unsupported(name, "in this version")
