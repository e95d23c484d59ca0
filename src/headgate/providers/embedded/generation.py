"""A generation on the wire: the body of the engine's /completion, and what its events mean.

Everything that steers sampling is sent, since the engine's own defaults are not OpenAI's.
"""

from collections.abc import Awaitable, Callable, Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headgate.core.completion import Chunk, FinishReason, Job, Usage
from headgate.core.errors import UpstreamFailed

FAILED = "The embedded engine failed while answering."

GREEDY_BELOW = 1e-3
"""Temperatures this small are greedy in effect, and dividing by them may overflow."""

LONGEST_REST = 3
"""Tokens that may still be wanted after the last one, to complete its character: one for each byte."""

_SEEDS = 2**32 - 1
_RANDOM_SEED = 2**32 - 1
FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "word": "stop", "limit": "length"}


class _Generate(Struct, frozen=True, kw_only=True):
    prompt: Sequence[int]
    n_predict: int
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    seed: int
    stop: tuple[str, ...]
    cache_prompt: bool
    logit_bias: tuple[tuple[int, float], ...] | UnsetType = UNSET
    grammar: str | UnsetType = UNSET
    n_probs: int | UnsetType = UNSET
    stream: bool = True
    return_tokens: bool = True
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    # In this order, and nothing else: temperature before top_p, as OpenAI defines it.
    samplers: tuple[str, ...] = ("penalties", "temperature", "top_p")
    # Of the last event; it would otherwise repeat the prompt and all settings.
    response_fields: tuple[str, ...] = ("stop", "stop_type", "tokens_predicted")


class _Event(Struct, frozen=True):
    """One event: a token's text (empty while a stop word or a character may still be completed), or, with
    `stop`, the end. `error` comes instead of both."""

    content: str = ""
    tokens: tuple[int, ...] = ()
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    error: msgspec.Raw | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Event).decode


def ends_here(job: Job) -> bool:
    """Whether stop words and the length limit are watched by us, and tokens one by one, instead of by the engine.

    Of a character that several tokens share it tells only the last token, and what of its text is held as a possible
    stop word would be lost.
    """
    return job.logprobs is not None or not all(stop.isascii() for stop in job.sampling.stop)


def generate_body(
    job: Job, ids: Sequence[int], grammar: str | None = None, *, watched: bool = False
) -> bytes:
    """The request for one choice. `job.max_tokens` is at least 1; `watched`: see `ends_here`."""
    return _encode(_generate(job, ids, grammar, watched=watched))


def repeat_body(job: Job, ids: Sequence[int], grammar: str | None, count: int) -> bytes:
    """The request for a watched choice's first `count` tokens once more, as ids and in one piece."""
    again = _generate(job, ids, grammar, watched=True)
    return _encode(
        msgspec.structs.replace(
            again, n_predict=count, n_probs=UNSET, stream=False, response_fields=("tokens",)
        )
    )


def _generate(job: Job, ids: Sequence[int], grammar: str | None, *, watched: bool) -> _Generate:
    sampling = job.sampling
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    greedy = temperature < GREEDY_BELOW
    return _Generate(
        prompt=ids,
        n_predict=job.max_tokens + LONGEST_REST if watched else job.max_tokens,
        temperature=0.0 if greedy else temperature,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        # The whole generation. The engine takes no -1 here, and looks at 64 tokens by itself.
        repeat_last_n=job.max_tokens,
        # The engine's seeds are 32 bits wide, and the last one means "random".
        seed=_RANDOM_SEED if sampling.seed is None else sampling.seed % _SEEDS,
        stop=() if watched else sampling.stop,
        # A reused prefix changes batch shapes and with them near ties: repeatable calls start afresh.
        cache_prompt=not greedy and sampling.seed is None,
        logit_bias=sampling.logit_bias or UNSET,
        grammar=UNSET if grammar is None else grammar,
        # None at all would mean no log probabilities: ask for one, and leave it out.
        n_probs=max(1, job.logprobs or 0) if watched else UNSET,
    )


class Generation:
    """Turns events into chunks, and keeps what has no text of its own yet. `decode`: the text of token ids."""

    def __init__(
        self, job: Job, prompt_tokens: int, decode: Callable[[Sequence[int]], Awaitable[str]]
    ) -> None:
        self._stops = bool(job.sampling.stop)
        self._prompt_tokens = prompt_tokens
        self._text_of = decode
        self._counted = 0
        self._held: list[int] = []
        self._end: _Event | None = None

    async def read(self, payloads: Sequence[bytes]) -> list[Chunk]:
        """Chunks of the text in these events. UpstreamFailed where the engine reports an error."""
        chunks: list[Chunk] = []
        for payload in payloads:
            event = _decode(payload)
            if event.content:
                tokens = len(self._held) + len(event.tokens)
                self._held.clear()
                self._counted += tokens
                chunks.append(Chunk(0, event.content, None, None, tokens))
            elif event.stop:
                self._end = event
            elif event.error is not None:
                raise UpstreamFailed(FAILED)
            else:
                self._held += event.tokens
        return chunks

    @property
    def ended(self) -> bool:
        return self._end is not None

    async def last(self) -> Chunk:
        """The chunk that ends an `ended` generation."""
        assert self._end is not None  # noqa: S101  # see above
        generated = self._end.tokens_predicted
        text = ""
        if self._stops and self._held and self._end.stop_type == "limit":
            # What may begin a stop word: the engine will never send it.
            text = await self._text_of(self._held)
        return Chunk(
            0,
            text,
            FINISH_REASONS.get(self._end.stop_type, "stop"),
            Usage(prompt_tokens=self._prompt_tokens, completion_tokens=generated),
            max(0, generated - self._counted),
        )
