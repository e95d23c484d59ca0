"""Any upstream that speaks OpenAI's completions or chat completions.

An upstream is believed only as far as its answer goes: a stream ends well after `[DONE]` or once every choice
has its finish reason; anything shorter, stranger or larger is UpstreamFailed.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from headgate.config import ProviderSettings
from headgate.core.completion import Choice, Chunk, Completion, Job
from headgate.core.errors import InvalidRequest, ModelUnavailable, UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers import openai_wire as wire
from headgate.providers.openai_choice import CheckedChoice, is_checked
from headgate.providers.openai_stream import StreamedAnswer
from headgate.providers.sse_reader import SSEReader
from headgate.providers.upstream_errors import from_report, from_status

if TYPE_CHECKING:
    from headgate.providers.http import Http, Response

MAX_ANSWER_BYTES = 32 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
STREAM_ALLOWANCE_BYTES = 1024 * 1024
MAX_BYTES_PER_TOKEN = 4096
"""Of a stream, its wrapping included: what usual upstreams send for a token is a tenth of it."""
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
        self._key = api_key.strip() if api_key else None
        self._reason = _unusable(settings, self._key)
        self._http = None if self._reason else _connect(name, settings, self._key)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(wire.Answer).decode

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._reason or model.broken

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
        response = await self._open(job, on_sent, stream=False)
        try:
            if response.status != 200:
                raise await self._refused(response)
            if not _has_type(response, "application/json"):
                raise UpstreamFailed(f"The provider {self.name} answered with something that is not JSON.")
            answer = self._decoded(await response.read(MAX_ANSWER_BYTES))
        finally:
            response.close()
        if answer.error is not None:
            raise from_report(self.name, answer.error, self._key)
        choices = sorted(answer.choices or (), key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(job.n)):
            raise UpstreamFailed(f"The provider {self.name} gave other choices than were asked for.")
        return Completion(
            choices=tuple(self._choice(job, choice) for choice in choices),
            usage=None if answer.usage is None else wire.usage_of(answer.usage),
        )

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        response = await self._open(job, on_sent, stream=True)
        try:
            await self._check_streamed(response)
            checked = None
            reader = SSEReader()
            left = STREAM_ALLOWANCE_BYTES + job.n * job.max_tokens * MAX_BYTES_PER_TOKEN
            if is_checked(job):
                checked = [CheckedChoice(self.name, job, index) for index in range(job.n)]
                reader = SSEReader(MAX_ANSWER_BYTES)  # a whole scored prompt may come as one event
                left += _surplus(job)
            answer = StreamedAnswer(self.name, job.n, self._key, checked)
            while not answer.ended:
                try:
                    block = await response.block()
                except UpstreamError:
                    if not answer.whole:
                        yield answer.reported()
                        raise
                    block = b""  # nothing is missing, so it does not matter how the connection ended
                left -= len(block)
                if left < 0:
                    raise UpstreamFailed(f"The answer of the provider {self.name} is too large.")
                batch = answer.take(reader.feed(block) if block else reader.last())
                if not block:
                    answer.connection_ended()
                    batch += answer.reported()
                if batch:
                    yield batch
            if answer.failure is not None:
                raise answer.failure
            response.finish()
        finally:
            response.close()

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def _open(self, job: Job, on_sent: Callable[[], None], *, stream: bool) -> "Response":
        if self._http is None:
            raise ModelUnavailable(self._reason or "")
        return await self._http.open(PATHS[job.shape], self._encode(wire.call(job, stream=stream)), on_sent)

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
        try:
            return self._decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamFailed(f"The provider {self.name} sent an answer that cannot be read.") from error

    async def _check_streamed(self, response: "Response") -> None:
        if response.status != 200:
            raise await self._refused(response)
        if not _has_type(response, "text/event-stream"):
            if _has_type(response, "application/json"):
                answer = self._decoded(await response.read(MAX_ANSWER_BYTES))
                if answer.error is not None:
                    raise from_report(self.name, answer.error, self._key)
            raise UpstreamFailed(f"The provider {self.name} did not answer with a stream.")

    async def _refused(self, response: "Response") -> UpstreamError:
        try:
            body = await response.read(MAX_ERROR_BYTES)
        except UpstreamError:
            body = b""  # the status alone says enough
        return from_status(self.name, response.status, response.headers, body, self._key)


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


def _unusable(settings: ProviderSettings, key: str | None) -> str | None:
    variable = settings.api_key_env
    if variable and not key:
        return f"set {variable}"
    if key and not (key.isascii() and key.isprintable()):
        return f"set {variable} to a key; it holds characters that no key has"
    return None


def _connect(name: str, settings: ProviderSettings, key: str | None) -> "Http":
    # Imported late: an installation without upstreams does without the memory of an HTTP client.
    from headgate.providers.http import Http

    return Http(
        name,
        settings.base_url,
        {"Authorization": f"Bearer {key}"} if key else {},
        timeout_s=settings.timeout_s,
        total_timeout_s=settings.total_timeout_s,
        max_concurrency=settings.max_concurrency,
    )


def _has_type(response: "Response", media_type: str) -> bool:
    return response.headers.get("Content-Type", "").lower().startswith(media_type)
