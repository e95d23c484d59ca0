"""Any upstream that speaks OpenAI's completions or chat completions.

An upstream is believed only as far as its answer goes: a stream ends well after `[DONE]` or once every choice
has its finish reason; anything shorter, stranger or larger is UpstreamFailed.
"""

from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Completion, Job
from headgate.core.errors import InvalidRequest, UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers import openai_wire as wire
from headgate.providers.openai_choice import CheckedChoice, is_checked
from headgate.providers.openai_stream import StreamedAnswer
from headgate.providers.sse_reader import MAX_EVENT_BYTES
from headgate.providers.upstream import MAX_ANSWER_BYTES, MAX_BYTES_PER_TOKEN, Upstream, bearer
from headgate.providers.upstream_errors import from_report

MAX_BYTES_PER_ALTERNATIVE = 1024
PATHS = {"completion": "/completions", "chat": "/chat/completions"}


class OpenAICompatible:
    """One upstream service. Without the key that its settings name, its models are unavailable.

    `api_key` is the value of `settings.api_key_env`, None where that variable is not set.
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
        """Token ids count themselves; else None: upstreams keep their tokenizers to themselves."""
        param = _impossible(job)
        if param is not None:
            what = "token ids as prompt" if param == "prompt" else param
            raise InvalidRequest(
                f"The model {job.model.name} answers this as a {job.shape} model and does not support {what} there.",
                param=param,
                code="unsupported_parameter",
            )
        return len(job.prompt) if isinstance(job.prompt, tuple) else None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        answer = self._decoded(await self._upstream.answer(PATHS[job.shape], self._body(job), on_sent))
        if answer.error is not None:
            raise from_report(self.name, answer.error, self._upstream.key)
        choices = sorted(answer.choices or (), key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(job.n)):
            raise UpstreamFailed(f"The provider {self.name} gave other choices than were asked for.")
        return Completion(
            choices=tuple(self._choice(job, choice) for choice in choices),
            usage=None if answer.usage is None else wire.usage_of(answer.usage),
        )

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        checked, surplus, most_event_bytes = None, 0, MAX_EVENT_BYTES
        if is_checked(job):
            checked = [CheckedChoice(self.name, job, index) for index in range(job.n)]
            surplus = _surplus(job)
            most_event_bytes = MAX_ANSWER_BYTES  # a whole scored prompt may come as one event
        return self._upstream.stream(
            PATHS[job.shape],
            self._body(job, stream=True),
            on_sent,
            StreamedAnswer(self.name, job.n, self._upstream.key, checked),
            most_tokens=job.n * job.max_tokens,
            failed=self._failed,
            surplus=surplus,
            most_event_bytes=most_event_bytes,
        )

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _body(self, job: Job, *, stream: bool = False) -> bytes:
        return self._encode(wire.call(job, stream=stream))

    def _failed(self, body: bytes) -> UpstreamError | None:
        reported = self._decoded(body).error
        return None if reported is None else from_report(self.name, reported, self._upstream.key)

    def _choice(self, job: Job, choice: wire.AnswerChoice) -> Choice:
        text = (choice.text if choice.message is None else choice.message.content) or ""
        if not is_checked(job):
            return Choice(
                index=choice.index, text=text, finish_reason=wire.finish_reason(choice.finish_reason)
            )
        checked = CheckedChoice(self.name, job, choice.index)
        chunks = checked.take(text, choice.logprobs, choice.finish_reason or "stop")
        entries = tuple(entry for chunk in chunks for entry in chunk.logprobs or ())
        return Choice(
            index=choice.index,
            text="".join(chunk.text for chunk in chunks),
            finish_reason=chunks[-1].finish_reason,
            logprobs=None if job.logprobs is None else entries,
        )

    def _decoded(self, body: bytes) -> wire.Answer:
        return self._upstream.decoded(body, self._decode)


def _impossible(job: Job) -> str | None:
    """The parameter of the job that its shape has no words for, if there is one."""
    if job.shape == "completion":
        return "response_format" if job.response_format is not None else None
    if isinstance(job.prompt, tuple):
        return "prompt"
    if job.echo and (job.logprobs is not None or job.prompt is None):
        return "echo"
    if job.suffix:
        return "suffix"
    return "best_of" if job.best_of is not None else None


def _surplus(job: Job) -> int:
    """Bytes that echo and log probabilities may add to a stream."""
    prompt = 0
    if job.echo and job.prompt is not None:
        prompt = len(job.prompt.encode()) if isinstance(job.prompt, str) else len(job.prompt)
    scores = 0 if job.logprobs is None else (job.logprobs + 1) * MAX_BYTES_PER_ALTERNATIVE
    return job.n * (prompt * (MAX_BYTES_PER_TOKEN + scores) + job.max_tokens * scores)
