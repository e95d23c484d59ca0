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
from headgate.providers.cohere_messages import messages_of
from headgate.providers.cohere_stream import StreamedAnswer
from headgate.providers.image_bodies import ImageBodies, written
from headgate.providers.upstream import Upstream, bearer, echoed_prompt

PATH = "/chat"
MAX_STOPS = 5


class Cohere:
    """The service. Without the key that its settings name, its models are unavailable.

    `api_key` is the value of `settings.api_key_env`, `proxy` that of `settings.proxy_env`, None where that variable is
    not set. `settings.base_url` ends with /v2.
    """

    stream_only = False
    tokenizer: Tokenizer | None = None

    def __init__(
        self, name: str, settings: ProviderSettings, api_key: str | None, *, proxy: str | None = None
    ) -> None:
        self.name = name
        self._upstream = Upstream(name, settings, api_key, bearer, proxy=proxy)
        self._encode = msgspec.json.Encoder(enc_hook=written).encode
        self._bodies = ImageBodies(self._written)

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._upstream.unavailable(model)

    async def count_prompt(self, job: Job) -> int | None:
        """None: Cohere's tokens are not counted here."""
        refusal = _refusal(job)
        if refusal is not None:
            raise refusal
        return None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        body = self._bodies.of(job)
        answer = self._decoded(
            await self._upstream.answer(
                PATH, body, on_sent, most_tokens=job.max_tokens, deadline=job.deadline
            )
        )
        usage = wire.usage_of(answer.usage)
        try:
            return Completion(choices=(self._choice(job, answer),), usage=usage)
        except UpstreamError as error:
            error.usage = usage
            raise

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        return self._upstream.stream(
            PATH,
            self._bodies.of(job, stream=True),
            on_sent,
            StreamedAnswer(self.name, echoed_prompt(job), tools=job.tools is not None),
            most_tokens=job.max_tokens,
            failed=self._failed,
            deadline=job.deadline,
        )

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _written(self, job: Job, *, stream: bool) -> bytes:
        return self._encode(wire.call(job, stream=stream))

    def _choice(self, job: Job, answer: wire.Answer) -> Choice:
        message = answer.message
        if isinstance(message, str):
            raise wire.failed(self.name)
        if message is None:
            raise UpstreamFailed(f"The provider {self.name} gave no message.")
        calls = wire.calls_of(self.name, message.tool_calls) if job.tools is not None else ()
        text = "".join(content.text or "" for content in message.content or ())
        return Choice(
            index=0,
            text=echoed_prompt(job) + text,
            finish_reason=wire.finish_reason(self.name, answer.finish_reason, called=bool(calls)),
            tool_calls=calls,
        )

    def _failed(self, body: bytes) -> UpstreamError | None:
        return wire.failed(self.name) if isinstance(self._decoded(body).message, str) else None

    def _decoded(self, body: bytes) -> wire.Answer:
        return self._upstream.decoded(body, wire.read)


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
    messages_of(job)
    if not _is_asked(job):
        return InvalidRequest(
            f"The model {job.model.name} needs at least one user message that is not empty.",
            param="prompt" if job.messages is None else "messages",
            allowed="at least one message whose role is user, with text",
        )
    return None


def _is_asked(job: Job) -> bool:
    """Some user says something, or shows an image."""
    if job.messages is None:
        return isinstance(job.prompt, str) and bool(job.prompt.strip())
    return any(
        message.role == "user" and bool(message.parts or message.content.strip()) for message in job.messages
    )


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
        "parallel_tool_calls": job.tools is not None and job.tools.parallel is False,
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
    if job.tools is not None:
        if job.tools.choice == "named":
            return "tool_choice", "auto, none or required"
        if len({bool(tool.strict) for tool in job.tools.tools}) > 1:
            return "tools", "strict for all of them, or for none"
        if job.response_format is not None:
            return "response_format", "null where there are tools"
    return None
