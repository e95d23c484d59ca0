"""What clients of the OpenAI forms send and get, field by field, and the bytes that answers and chunks share."""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headgate.core.completion import Answer, FinishReason, Usage
from headgate.dialects.openai_logprobs import LegacyLogprobs

OBJECT = "text_completion"
FINISH_REASONS: tuple[FinishReason | None, ...] = (
    None,
    "stop",
    "length",
    "tool_calls",
    "content_filter",
    "error",
    "timeout",
)

Number = int | float
Prompt = str | list[str | Number | list[Number]]
_encode = msgspec.json.Encoder().encode


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class SamplingBody(Struct, frozen=True, kw_only=True):
    """What completions and chat have in common. Numbers are wide on purpose: 500.0 is an integer to many clients."""

    model: str | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    max_completion_tokens: Number | None = None
    max_tokens: Number | None = None
    n: Number | None = None
    presence_penalty: Number | None = None
    seed: Number | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    user: str | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a last chunk with the usage is asked for; without `stream` the option means nothing."""
        options = self.stream_options
        return bool(self.stream) and options is not None and bool(options.include_usage)


class CompletionsBody(SamplingBody, frozen=True, kw_only=True):
    """The body of `POST /v1/completions` as sent."""

    prompt: Prompt | None = None
    best_of: Number | None = None
    echo: bool | None = None
    logprobs: Number | None = None
    suffix: str | None = None


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
    logprobs: LegacyLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: str = OBJECT
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: UsageObject


def usage_object(usage: Usage) -> UsageObject:
    return UsageObject(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens)
        if usage.cached_tokens
        else UNSET,
    )


def chunk_head(id_: str, created: int, model: str, object_: str = OBJECT) -> bytes:
    """A chunk's JSON up to and including the bracket that opens its choices."""
    head = {"id": id_, "object": object_, "created": created, "model": model, "choices": ()}
    return _encode(head).removesuffix(b"]}")


def choice_tail(reason: FinishReason | None) -> bytes:
    """A choice's JSON after its text, where it has no log probabilities."""
    return b',"logprobs":null' + finish_tail(reason)


def finish_tail(reason: FinishReason | None) -> bytes:
    """A choice's JSON after its log probabilities."""
    return b',"finish_reason":' + _encode(reason) + b"}"


def chunk_close(include_usage: bool) -> bytes:
    """A chunk's JSON after its choice, and the end of its event. The usage itself comes in a chunk of its own."""
    return b'],"usage":null}\n\n' if include_usage else b"]}\n\n"


def whole_answer(answer: Answer, id_: str, object_: str, choices: Iterable[bytes]) -> bytes:
    """An answer's JSON from that of its choices. They are encoded one by one: with log probabilities an answer may
    have hundreds of megabytes, and one call for them all would hold up every other thread."""
    head = chunk_head(id_, answer.request.created, answer.models[0].model, object_)
    usage = _encode(usage_object(answer.usage))
    return b"".join((head, b",".join(choices), b'],"usage":', usage, b"}"))
