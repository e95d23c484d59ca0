"""Anthropic's Messages API, or any upstream that speaks it.

It chats and nothing else: what it has no words for is refused by name before anything is asked of it.
"""

from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Completion, Job
from headgate.core.errors import InvalidRequest, UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers import anthropic_wire as wire
from headgate.providers.anthropic_stream import StreamedMessage
from headgate.providers.image_bodies import ImageBodies, written
from headgate.providers.upstream import Upstream, echoed_prompt

VERSION = "2023-06-01"
"""The one that has temperature and top_p, for models that still take them; later ones refuse both."""
PATH = "/messages"


class Anthropic:
    """One upstream service. Without the key that its settings name, its models are unavailable.

    `api_key` is the value of `settings.api_key_env`, `proxy` that of `settings.proxy_env`, None where that variable is
    not set. `settings.base_url` ends with the API's version, as in https://host/v1.

    Of what single models refuse (their row's `refuses`) only "prefill" is looked at here: who speaks last is seen once
    system messages, wherever they stood, are out of the way.
    """

    stream_only = False
    tokenizer: Tokenizer | None = None

    def __init__(
        self, name: str, settings: ProviderSettings, api_key: str | None, *, proxy: str | None = None
    ) -> None:
        self.name = name
        self._upstream = Upstream(name, settings, api_key, _headers, proxy=proxy)
        self._encode = msgspec.json.Encoder(enc_hook=written).encode
        self._bodies = ImageBodies(self._written)

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._upstream.unavailable(model)

    async def count_prompt(self, job: Job) -> int | None:
        """None: the upstream keeps its tokenizer to itself. InvalidRequest for all that it cannot do."""
        if job.shape != "chat":
            raise InvalidRequest(
                f"The model {job.model.name} only chats and cannot complete text as it stands; "
                'its row in the catalogue needs mode = "chat".',
                param="model",
                code="unsupported_parameter",
            )
        param = _impossible(job)
        if param is not None:
            what = "token ids as prompt" if param == "prompt" else param
            raise InvalidRequest(
                f"The model {job.model.name} is spoken to in Anthropic's Messages format, which has no {what}.",
                param=param,
                code="unsupported_parameter",
            )
        if not all(stop.strip() for stop in job.sampling.stop):
            raise InvalidRequest(
                f"stop must not hold a sequence of nothing but blanks: the model {job.model.name} refuses those.",
                param="stop",
                allowed="sequences with a character that is no blank",
            )
        if job.response_format is not None and job.response_format.schema is None:
            raise InvalidRequest(
                f"The model {job.model.name} answers in JSON only to a schema: "
                "use response_format.type json_schema, or ask for JSON in the messages.",
                param="response_format",
                code="unsupported_parameter",
                allowed="type json_schema with a schema",
            )
        refuses = job.model.refuses
        _, turns = wire.conversation(job)
        if refuses and "prefill" in refuses and turns[-1].role == "assistant":
            raise InvalidRequest(
                f"The model {job.model.name} cannot go on with words of its own: "
                "the last message must not be the assistant's.",
                param="messages",
                code="unsupported_parameter",
                allowed="a user or tool message last",
            )
        return None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        body = self._bodies.of(job)
        answer = self._decoded(
            await self._upstream.answer(
                PATH, body, on_sent, most_tokens=job.max_tokens, deadline=job.deadline
            )
        )
        usage = wire.usage_of(wire.merged(wire.Counts(), answer.usage))
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
            StreamedMessage(self.name, job, self._upstream.key),
            most_tokens=job.max_tokens,
            failed=self._failed,
            deadline=job.deadline,
        )

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _written(self, job: Job, *, stream: bool) -> bytes:
        return self._encode(wire.call(job, stream=stream))

    def _choice(self, job: Job, answer: wire.Answer) -> Choice:
        if wire.is_given(answer.error):
            raise wire.failure(self.name, answer.error, self._upstream.key)
        if answer.content is None:
            raise UpstreamFailed(f"The provider {self.name} gave no answer.")
        text, calls = wire.read_content(self.name, answer.content, tools=job.tools is not None)
        return Choice(
            index=0,
            text=echoed_prompt(job) + text,
            finish_reason=wire.finish_reason(answer.stop_reason, called=bool(calls)),
            tool_calls=calls,
        )

    def _failed(self, body: bytes) -> UpstreamError | None:
        reported = self._decoded(body).error
        return wire.failure(self.name, reported, self._upstream.key) if wire.is_given(reported) else None

    def _decoded(self, body: bytes) -> wire.Answer:
        return self._upstream.decoded(body, wire.read)


def _impossible(job: Job) -> str | None:
    """The parameter of the job that the format has no words for, if there is one."""
    sampling = job.sampling
    asked = {
        "logprobs": job.logprobs is not None,
        "best_of": job.best_of is not None,
        "n": job.n > 1,
        "suffix": bool(job.suffix),
        "prompt": isinstance(job.prompt, tuple),
        "echo": job.echo and job.prompt is None,
        "logit_bias": bool(sampling.logit_bias),
        "seed": sampling.seed is not None,
        "presence_penalty": bool(sampling.presence_penalty),
        "frequency_penalty": bool(sampling.frequency_penalty),
    }
    return next((param for param, is_asked in asked.items() if is_asked), None)


def _headers(key: str | None) -> dict[str, str]:
    return {"anthropic-version": VERSION} | ({"x-api-key": key} if key else {})
