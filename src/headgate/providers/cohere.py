"""Cohere's chat (API v2). It answers one choice a call and completes no raw text.

What a job asks for and Cohere has no words for is refused by name, before anything is held.
"""

from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Completion, Job
from headgate.core.errors import InvalidRequest, UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers import cohere_wire as wire
from headgate.providers.cohere_stream import StreamedAnswer
from headgate.providers.upstream import Upstream, bearer, echoed_prompt

PATH = "/chat"
MAX_STOPS = 5


class Cohere:
    """The service. Without the key that its settings name, its models are unavailable.

    `api_key` is the value of `settings.api_key_env`, None where that variable is not set. `settings.base_url` ends
    with /v2.
    """

    stream_only = False
    tokenizer: Tokenizer | None = None

    def __init__(self, name: str, settings: ProviderSettings, api_key: str | None) -> None:
        self.name = name
        self._upstream = Upstream(name, settings, api_key, bearer)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(wire.Answer).decode

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._upstream.unavailable(model)

    async def count_prompt(self, job: Job) -> int | None:
        """None: Cohere's tokens are not counted here."""
        refusal = _refusal(job)
        if refusal is not None:
            raise refusal
        return None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        answer = self._decoded(await self._upstream.answer(PATH, self._body(job), on_sent))
        if isinstance(answer.message, str):
            raise wire.failed(self.name)
        if answer.message is None:
            raise UpstreamFailed(f"The provider {self.name} gave no message.")
        text = "".join(content.text or "" for content in answer.message.content or ())
        choice = Choice(
            index=0,
            text=echoed_prompt(job) + text,
            finish_reason=wire.finish_reason(self.name, answer.finish_reason),
        )
        return Completion(choices=(choice,), usage=wire.usage_of(answer.usage))

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        return self._upstream.stream(
            PATH,
            self._body(job, stream=True),
            on_sent,
            StreamedAnswer(self.name, echoed_prompt(job)),
            most_tokens=job.max_tokens,
            failed=self._failed,
        )

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _body(self, job: Job, *, stream: bool = False) -> bytes:
        return self._encode(wire.call(job, stream=stream))

    def _failed(self, body: bytes) -> UpstreamError | None:
        return wire.failed(self.name) if isinstance(self._decoded(body).message, str) else None

    def _decoded(self, body: bytes) -> wire.Answer:
        return self._upstream.decoded(body, self._decode)


def _refusal(job: Job) -> InvalidRequest | None:
    """What Cohere cannot do of the job, if anything."""
    if job.shape != "chat":
        return InvalidRequest(
            f"The model {job.model.name} answers chats only; it cannot complete a raw prompt.",
            param="model",
            code="unsupported_parameter",
        )
    unknown = _unknown(job)
    if unknown is not None:
        what = "token ids as prompt" if unknown == "prompt" else unknown
        return InvalidRequest(
            f"The model {job.model.name} does not support {what}.",
            param=unknown,
            code="unsupported_parameter",
        )
    unusual = _out_of_range(job)
    if unusual is not None:
        param, allowed = unusual
        return InvalidRequest(
            f"The model {job.model.name} takes {param} only as: {allowed}.",
            param=param,
            code="unsupported_parameter",
            allowed=allowed,
        )
    if not any(message.role == "user" and message.content.strip() for message in wire.messages_of(job)):
        return InvalidRequest(
            f"The model {job.model.name} needs at least one user message that is not empty.",
            param="prompt" if job.messages is None else "messages",
            allowed="at least one message whose role is user, with text",
        )
    return None


def _unknown(job: Job) -> str | None:
    """The parameter of the job that Cohere's chat has no words for, if there is one."""
    asked = {
        "prompt": isinstance(job.prompt, tuple),
        "logprobs": job.logprobs is not None,
        "best_of": job.best_of is not None,
        "n": job.n != 1,
        "suffix": bool(job.suffix),
        "echo": job.echo and job.prompt is None,
        "logit_bias": bool(job.sampling.logit_bias),
    }
    return next((param for param, given in asked.items() if given), None)


def _out_of_range(job: Job) -> tuple[str, str] | None:
    """The parameter whose value Cohere does not take, and what it takes."""
    sampling = job.sampling
    if not 0 <= (sampling.frequency_penalty or 0) <= 1:
        return "frequency_penalty", "0 to 1"
    if not 0 <= (sampling.presence_penalty or 0) <= 1:
        return "presence_penalty", "0 to 1"
    if len(sampling.stop) > MAX_STOPS:
        return "stop", f"at most {MAX_STOPS} sequences"
    return None
