"""One completion, from request to answer: the values every dialect, provider and the service share.

Frozen, keyword-only, tuples instead of lists; `None` means "not given".
"""

from decimal import Decimal
from typing import Literal

from msgspec import Struct

from headgate.core.errors import GatewayError
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error", "timeout"]
UsageSource = Literal["provider", "tokenizer", "estimate"]
Shape = Literal["completion", "chat"]
Prompt = str | tuple[int, ...]
"""A text, or token ids of the model it goes to."""


class Image(Struct, frozen=True, kw_only=True, gc=False):
    """An image to look at: its bytes, or where they are.

    Exactly one of `url` (http or https), `file_id` (an upload of the same app and user) and `data` is set; the service
    turns the first two into `data` unless the provider is to fetch the URL itself. `media_type` (image/png, …) goes
    with `data`. `param` is what the client calls it, for errors.
    """

    url: str | None = None
    file_id: str | None = None
    data: bytes | None = None
    media_type: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    param: str = "messages"


class ToolCall(Struct, frozen=True, kw_only=True, gc=False):
    """A function that the model wants called. `arguments` is JSON text as the model wrote it, well-formed or not."""

    id: str
    name: str
    arguments: str


class Message(Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One turn of a conversation. `content` is all its text.

    `parts`: text and images in their order, where there are images (else empty). `tool_calls`: what an assistant
    wanted called. `tool_call_id`: which call a tool's message answers.
    """

    role: Role
    content: str
    parts: tuple[str | Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing but a role and a text."""
        return not (self.parts or self.tool_calls or self.tool_call_id is not None)


class Tool(Struct, frozen=True, kw_only=True):
    """A function the model may ask for. `parameters` is a JSON schema as JSON text; None: it takes none."""

    name: str
    description: str | None = None
    parameters: bytes | None = None
    strict: bool | None = None


class Tools(Struct, frozen=True, kw_only=True):
    """What a model may call. `choice` None: its own default (auto); `name` goes with "named". `parallel`: several
    calls in one answer."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "none", "required", "named"] | None = None
    name: str | None = None
    parallel: bool | None = None


class Sampling(Struct, frozen=True, kw_only=True, gc=False):
    """What steers generation. `None`: the provider's own default (the embedded model: temperature 1)."""

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()


class ResponseFormat(Struct, frozen=True, kw_only=True):
    """What a chat answer must look like: any JSON object, or JSON of this schema (as JSON text)."""

    kind: Literal["json_object", "json_schema"]
    schema: bytes | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class IdempotencyKey(Struct, frozen=True, kw_only=True):
    """The client's key within its account, and the SHA-256 of the route and the body that it stands for."""

    account: str
    key: str
    digest: bytes


class CompletionRequest(Struct, frozen=True, kw_only=True):
    """What a client asked, whichever dialect it spoke.

    Exactly one of `prompts` and `messages` is set. `plain` prompts hold words of end users: special tokens
    written in them stay text. `chat_first`: a model that can chat gets the prompt as one user message even if
    it could complete it raw. `max_tokens` None: `default_max_tokens`, else all the model and context allow.
    `partial_failure`: one failed model of several does not fail the request. `best_of` candidates are generated
    per prompt and the best `n` of them answered (None: just the n). `logprobs`: how many alternatives to each token
    (0: only the token's own log probability; None: none at all). `echo`: the prompt comes first in each choice's
    text, with scores where `logprobs` are asked for. `suffix`: what follows the text to be filled in.
    `looks`: some message holds an image. `answer_id` is a UUID, `stream_id` 128 random bits in hex, `created` Unix
    seconds. `max_tokens_param` is what this dialect calls `max_tokens`. `idempotency`: the same request may come again.
    """

    request_id: str
    answer_id: str
    stream_id: str
    created: int
    dialect: str
    models: tuple[str, ...]
    prompts: tuple[Prompt, ...] | None = None
    messages: tuple[Message, ...] | None = None
    plain: bool = False
    chat_first: bool = False
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    looks: bool = False
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    sampling: Sampling = Sampling()
    stream: bool = False
    include_usage: bool = False
    partial_failure: bool = False
    user: str | None = None
    app: str | None = None
    developer_id: str | None = None
    application_id: str | None = None
    margin_override: Decimal | None = None
    idempotency: IdempotencyKey | None = None


class Job(Struct, frozen=True, kw_only=True):
    """One call to a provider: one prompt or one conversation, `n` choices.

    The choices it yields are numbered from 0; `first_index` places them in the answer. `prompt_index` says which of
    the request's prompts it answers. `more_prompts`: texts that the same call answers too, each with as many choices;
    `n` are those of all. `best_of`: the provider itself chooses the n choices from so many candidates.
    `counts_prompt` is False for further calls whose prompt the provider does not bill again. `logprobs`, `echo` and
    `suffix` as in CompletionRequest. `deadline`: when the answer must be whole, in monotonic seconds
    (None: the provider's own limit).
    """

    request_id: str
    model: ModelSpec
    shape: Shape
    prompt: Prompt | None = None
    more_prompts: tuple[str, ...] = ()
    messages: tuple[Message, ...] | None = None
    plain: bool = False
    n: int = 1
    best_of: int | None = None
    max_tokens: int
    sampling: Sampling
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    deadline: float | None = None
    first_index: int = 0
    prompt_index: int = 0
    counts_prompt: bool = True

    @property
    def candidates(self) -> int:
        """How many choices the provider generates, and bills."""
        return self.best_of or self.n


class Usage(Struct, frozen=True, kw_only=True, gc=False):
    """Token counts. `prompt_tokens` includes `cached_tokens`. Not `final`: the output is not counted yet."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    source: UsageSource = "provider"
    final: bool = True

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(Struct, frozen=True, gc=False):
    """One token of a choice, or of its echoed prompt.

    `data` are its bytes in the text: part of a character perhaps, none for an end token (`end`). `logprob` is
    natural, before sampling; None for a prompt's first token. `top` are the most likely tokens in its place, as
    (bytes, logprob), best first, as many as were asked for; None beside a prompt's first token.
    """

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] | None = ()
    end: bool = False


class ToolCallPiece(Struct, frozen=True, gc=False):
    """A piece of the `position`-th tool call of a choice: `id` and `name` come with its first piece."""

    position: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Chunk(Struct, frozen=True):
    """A piece of one choice.

    `tokens` is how many tokens the provider says this piece holds (None: it does not say). `usage` comes once
    per job, usually with the last chunk; a chunk that carries only usage has index -1. `error` says why this
    choice alone failed (several models). `logprobs` are those of the tokens in this piece, where they were asked for.
    `echoed`: this is the prompt, not something generated.
    """

    index: int
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tokens: int | None = None
    error: GatewayError | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    echoed: bool = False
    tool_calls: tuple[ToolCallPiece, ...] | None = None


class Choice(Struct, frozen=True, kw_only=True, gc=False):
    """One finished choice. `text` and `logprobs` begin with the prompt where it was echoed."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Completion(Struct, frozen=True, kw_only=True):
    """A provider's blocking answer to one job."""

    choices: tuple[Choice, ...]
    usage: Usage | None = None


class Charge(Struct, frozen=True, kw_only=True):
    """What one model of one request came to.

    `exact_*` are the provider's costs before rounding. `excess` is what is above the model's part of the hold: it
    is recorded and not charged.
    """

    model: str
    provider: str
    usage: Usage
    exact_input: FemtoUSD
    exact_output: FemtoUSD
    cost: NanoUSD
    price: NanoUSD
    margin: MarginPPM
    excess: NanoUSD = NanoUSD(0)


class ModelAnswer(Struct, frozen=True, kw_only=True):
    """What one requested model gave. `model` is the name to show: as requested, or that of the entry that served in
    its place. `error` holds its failure; its choices are then empty."""

    requested: str
    model: str
    provider: str
    spec: ModelSpec
    choices: tuple[Choice, ...]
    charge: Charge
    elapsed_s: float
    created: int
    error: GatewayError | None = None


class Answer(Struct, frozen=True, kw_only=True):
    """A settled request: what was produced, what it came to, and the balance around it (all nano-USD)."""

    request: CompletionRequest
    models: tuple[ModelAnswer, ...]
    price: NanoUSD
    balance_before: NanoUSD
    balance_after: NanoUSD
    elapsed_s: float

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices of all models, in order."""
        if len(self.models) == 1:
            return self.models[0].choices
        return tuple(choice for model in self.models for choice in model.choices)

    @property
    def usage(self) -> Usage:
        """Tokens of all models summed."""
        if len(self.models) == 1:
            return self.models[0].charge.usage
        usages = [model.charge.usage for model in self.models]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        )

    @property
    def providers(self) -> str:
        """Providers that served, in order of choices, comma-separated."""
        return ", ".join(dict.fromkeys(model.provider for model in self.models if model.error is None))


class StreamEnd(Struct, frozen=True, kw_only=True):
    """How a stream ended, after it was settled. A stream that failed raises its error instead.

    `completed`: every choice finished. `aborted`: somebody stopped it, and `answer` holds what came until
    then; `error` is None when the client asked for the stop, else says why we did (draining).
    """

    kind: Literal["completed", "aborted"]
    answer: Answer
    error: GatewayError | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a keyed request, in the form in which it is kept and replayed.

    `aborted`: somebody stopped it; `failed`, with `error`: it broke after something was delivered, and so charged. The
    answer's request is without its prompts.
    """

    kind: Literal["completed", "aborted", "failed"]
    answer: Answer
    error: GatewayError | None = None
    providers: str = ""
    served: tuple[str, ...] = ()
