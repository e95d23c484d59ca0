"""Any upstream that speaks OpenAI's completions or chat completions.

An upstream is believed only as far as its answer goes: a stream ends well after `[DONE]` or once every choice
has its finish reason; anything shorter, stranger or larger is UpstreamFailed.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from urllib.parse import quote

import msgspec

from headgate.config import ProviderSettings
from headgate.config.variants import variant_of
from headgate.core.completion import Choice, Chunk, Completion, Job, ToolCall
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers import openai_wire as wire
from headgate.providers.image_bodies import ImageBodies, written
from headgate.providers.openai_call import call
from headgate.providers.openai_choice import CheckedChoice, is_checked
from headgate.providers.openai_stream import StreamedAnswer
from headgate.providers.openai_tools import tool_calls
from headgate.providers.openai_unsupported import check_supported
from headgate.providers.sse_reader import MAX_EVENT_BYTES
from headgate.providers.upstream import MAX_BYTES_PER_TOKEN, Upstream, bearer

MAX_BYTES_PER_ALTERNATIVE = 1024
MAX_SCORED_BYTES = 32 * 1024 * 1024
"""Of echo and log probabilities, in a whole answer or in one event: a whole scored prompt may come as one."""
MAX_BYTES_PER_ESCAPE = 6
"""What JSON may make of one byte."""


class OpenAICompatible:
    """One upstream service. Without the key that its settings name, its models are unavailable.

    `api_key` is the value of `settings.api_key_env`, None where that variable is not set. `proxy` as in Upstream.
    """

    stream_only = False
    tokenizer: Tokenizer | None = None

    def __init__(
        self, name: str, settings: ProviderSettings, api_key: str | None, *, proxy: str | None = None
    ) -> None:
        self.name = name
        self._variant = variant_of(settings)
        query = {**self._variant.query, **settings.query}
        self._upstream = Upstream(
            name, msgspec.structs.replace(settings, query=query), api_key, self._headers, proxy=proxy
        )
        self._encode = msgspec.json.Encoder(enc_hook=written).encode
        self._bodies = ImageBodies(self._written)

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._upstream.unavailable(model)

    async def count_prompt(self, job: Job) -> int | None:
        """Token ids count themselves; else None: upstreams keep their tokenizers to themselves."""
        check_supported(self.name, job, self._variant)
        return len(job.prompt) if isinstance(job.prompt, tuple) else None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        body = await self._upstream.answer(
            self._path(job),
            self._bodies.of(job),
            on_sent,
            most_tokens=job.n * job.max_tokens,
            surplus=_surplus(job) if is_checked(job) else 0,
            deadline=job.deadline,
        )
        answer = self._read(body, job.n)
        usage = wire.usage_of(answer.usage)
        try:
            choices = self._choices(job, answer)
        except UpstreamError as error:
            error.usage = usage
            raise
        return Completion(choices=choices, usage=usage)

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        checked, surplus, most_event_bytes = None, 0, MAX_EVENT_BYTES
        if is_checked(job):
            checked = [CheckedChoice(self.name, job, index) for index in range(job.n)]
            surplus = _surplus(job)
            most_event_bytes = MAX_SCORED_BYTES
            if job.logprobs is None:
                most_event_bytes = min(MAX_EVENT_BYTES + _echo(job) * MAX_BYTES_PER_ESCAPE, MAX_SCORED_BYTES)
        return self._upstream.stream(
            self._path(job),
            self._bodies.of(job, stream=True),
            on_sent,
            StreamedAnswer(self.name, job.n, self._upstream.key, checked, has_tools=job.tools is not None),
            most_tokens=job.n * job.max_tokens,
            failed=self._failed,
            surplus=surplus,
            most_event_bytes=most_event_bytes,
            deadline=job.deadline,
        )

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _headers(self, key: str | None) -> dict[str, str]:
        header = self._variant.auth
        if header == "bearer":
            return bearer(key)
        return {header: key} if key else {}

    def _path(self, job: Job) -> str:
        paths = self._variant.paths
        path = paths.chat if job.shape == "chat" else paths.completion
        return path.replace("{model}", quote(job.model.upstream_name, safe="")) if "{" in path else path

    def _written(self, job: Job, *, stream: bool) -> bytes:
        return self._encode(call(job, self._variant, stream=stream))

    def _failed(self, body: bytes) -> UpstreamError | None:
        answer = self._read(body, 1)
        if not wire.is_given(answer.error):
            return None
        error = wire.error_of(self.name, answer.error, self._upstream.key)
        error.usage = wire.usage_of(answer.usage)
        return error

    def _read(self, body: bytes, n: int) -> wire.Answer:
        return self._upstream.decoded(body, partial(wire.read, n=n))

    def _choices(self, job: Job, answer: wire.Answer) -> tuple[Choice, ...]:
        if wire.is_given(answer.error):
            raise wire.error_of(self.name, answer.error, self._upstream.key)
        choices = sorted(answer.choices or (), key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(job.n)):
            raise UpstreamFailed(f"The provider {self.name} gave other choices than were asked for.")
        return tuple(self._choice(job, choice) for choice in choices)

    def _choice(self, job: Job, choice: wire.AnswerChoice) -> Choice:
        message = choice.message
        text = (choice.text if message is None else message.content) or ""
        refusal = "" if message is None else message.refusal or ""
        text += refusal
        finish = wire.finish_reason(self.name, choice.finish_reason, refused=bool(refusal))
        calls: tuple[ToolCall, ...] = ()
        if job.tools is not None and message is not None and wire.is_given(message.tool_calls):
            calls = tool_calls(self.name, message.tool_calls)
            finish = "tool_calls" if calls and finish == "stop" else finish
        if not is_checked(job):
            return Choice(index=choice.index, text=text, finish_reason=finish, tool_calls=calls)
        checked = CheckedChoice(self.name, job, choice.index)
        chunks = checked.take(text, choice.logprobs, finish)
        entries = tuple(entry for chunk in chunks for entry in chunk.logprobs or ())
        return Choice(
            index=choice.index,
            text="".join(chunk.text for chunk in chunks),
            finish_reason=chunks[-1].finish_reason,
            logprobs=None if job.logprobs is None else entries,
            tool_calls=calls,
        )


def _surplus(job: Job) -> int:
    """Bytes that echo and log probabilities may add to a stream."""
    prompt = _echo(job)
    scores = 0 if job.logprobs is None else (job.logprobs + 1) * MAX_BYTES_PER_ALTERNATIVE
    return min(job.n * (prompt * (MAX_BYTES_PER_TOKEN + scores) + job.max_tokens * scores), MAX_SCORED_BYTES)


def _echo(job: Job) -> int:
    """Bytes of the prompt where it is to come back, or how many tokens they are."""
    if not job.echo or job.prompt is None:
        return 0
    return len(job.prompt.encode()) if isinstance(job.prompt, str) else len(job.prompt)
