"""The embedded provider: llama.cpp in child processes, one per model file, behind the same port as any upstream."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec

from headgate.config import EmbeddedSettings
from headgate.core.completion import Choice, Chunk, Completion, FinishReason, Job, Message, Shape, Usage
from headgate.core.errors import (
    GatewayError,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    UpstreamFailed,
)
from headgate.core.models import ModelSpec
from headgate.providers.embedded import client
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.client import EngineGone, EngineRefusal
from headgate.providers.embedded.generation import Generation, generate_body
from headgate.providers.embedded.gguf import BrokenModel, ModelFile, read_gguf
from headgate.providers.embedded.supervisor import EngineStatus, Restarts, Supervisor
from headgate.providers.embedded.tokenizer import TokenIds, Tokenizer

TOKENIZING_AT_ONCE = 4
TOKENIZING_QUEUE = 4096
REMEMBERED_PROMPTS = 512
REMEMBERED_TOKENS = 250_000
RESTARTING = "The embedded engine stopped; it is being restarted."
_NOT_UNDERSTOOD = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_PromptKey = tuple[str, Shape, str | None, tuple[Message, ...] | None, bool]


class EmbeddedProvider:
    """Serves the embedded models among `specs`. `start` launches the engines; broken models get none."""

    name = "embedded"
    stream_only = True

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        settings: EmbeddedSettings,
        *,
        restarts: Restarts | None = None,
        folder: Path | None = None,
    ) -> None:
        """`folder`: where the sockets' folders are made; default: the system's folder for temporary files."""
        served: dict[str, list[ModelSpec]] = {}
        for spec in specs:
            if spec.provider == self.name and spec.file is not None and spec.broken is None:
                served.setdefault(spec.file, []).append(spec)
        self._engines: dict[str, _Engine] = {}
        self._broken: dict[str, str] = {}
        for file, models in served.items():
            try:
                model = read_gguf(file)
            except BrokenModel as error:
                self._broken[file] = error.reason
            else:
                self._engines[file] = _Engine(file, model, models, settings, restarts, folder)

    async def start(self) -> None:
        """Launch the engines without waiting for them."""
        for engine in self._engines.values():
            engine.supervisor.start()

    async def ready_or_failed(self, timeout: float) -> tuple[EngineStatus, ...]:
        """Wait at most `timeout` seconds until each engine has been up once or has failed."""
        waits = [engine.supervisor.ready_or_failed(timeout) for engine in self._engines.values()]
        await asyncio.gather(*waits)
        return self.status()

    def status(self) -> tuple[EngineStatus, ...]:
        """One entry per engine, named by the models it serves."""
        return tuple(engine.status() for engine in self._engines.values())

    def unavailable(self, model: ModelSpec) -> str | None:
        if model.broken is not None:
            return model.broken
        if model.file is None:
            return "the model has no file"
        engine = self._engines.get(model.file)
        if engine is None:
            return self._broken.get(model.file, "the model was not configured at the start")
        status = engine.status()
        return f"the engine failed: {status.reason}" if status.state == "failed" else None

    async def count_prompt(self, job: Job) -> int:
        return len(await self._engine(job).encode(job))

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        texts: list[str] = []
        finish_reason: FinishReason | None = None
        usage: Usage | None = None
        async with aclosing(self.stream(job, on_sent)) as batches:
            async for batch in batches:
                for chunk in batch:
                    texts.append(chunk.text)
                    finish_reason = chunk.finish_reason or finish_reason
                    usage = chunk.usage or usage
        choice = Choice(index=0, text="".join(texts), finish_reason=finish_reason)
        return Completion(choices=(choice,), usage=usage)

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        return self._engine(job).stream(job, on_sent)

    async def aclose(self) -> None:
        """End all engines; running streams fail with UpstreamFailed."""
        await asyncio.gather(*(engine.supervisor.aclose() for engine in self._engines.values()))

    def _engine(self, job: Job) -> "_Engine":
        engine = self._engines.get(job.model.file or "")
        if engine is None:
            raise ModelUnavailable(
                f"The model {job.model.name} is not available: {self.unavailable(job.model)}."
            )
        return engine


class _Engine:
    """One model file: its process, its queue, its tokenizer, and the ids of the last prompts."""

    def __init__(
        self,
        file: str,
        model: ModelFile,
        specs: Sequence[ModelSpec],
        settings: EmbeddedSettings,
        restarts: Restarts | None,
        folder: Path | None,
    ) -> None:
        context = max(spec.context_window for spec in specs)
        self.supervisor = Supervisor(
            file,
            name=", ".join(spec.name for spec in specs),
            slots=settings.slots,
            threads=settings.threads,
            context=context,
            restarts=restarts,
            folder=folder,
        )
        self._admission = Admission(settings.slots, settings.max_queue)
        self._tokenizer = Tokenizer(model, context, self._post)
        # The engine has a fixed number of HTTP threads, and a short queue of connections.
        self._tokenizing = Admission(TOKENIZING_AT_ONCE, TOKENIZING_QUEUE)
        self._prompts: OrderedDict[_PromptKey, TokenIds] = OrderedDict()
        self._remembered = 0

    def status(self) -> EngineStatus:
        return msgspec.structs.replace(
            self.supervisor.status(), running=self._admission.running, waiting=self._admission.waiting
        )

    async def encode(self, job: Job) -> TokenIds:
        """The prompt's ids, remembered for the jobs of the same request."""
        key = (job.request_id, job.shape, job.prompt, job.messages, job.plain)
        ids = self._prompts.get(key)
        if ids is not None:
            return ids
        await self._tokenizing.enter()
        try:
            ids = await self._tokenizer.encode(job)
        except EngineGone as gone:
            raise Overloaded(RESTARTING, retry_after=1) from gone
        except (EngineRefusal, *_NOT_UNDERSTOOD) as error:
            raise UpstreamFailed("The embedded engine could not tokenize the prompt.") from error
        finally:
            self._tokenizing.leave()
        self._remember(key, ids)
        return ids

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        ids = await self.encode(job)
        await self._admission.enter()
        try:
            async with aclosing(self._generate(job, ids, on_sent)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._admission.leave()

    async def _generate(
        self, job: Job, ids: TokenIds, on_sent: Callable[[], None]
    ) -> AsyncGenerator[list[Chunk], None]:
        generation = Generation(job, len(ids))
        body = generate_body(job, ids)
        sent = False

        def mark_sent() -> None:
            nonlocal sent
            sent = True
            on_sent()

        try:
            events = client.post_events(self.supervisor.address(), "/completion", body, mark_sent)
            async with aclosing(events):
                async for payloads in events:
                    batch = generation.read(payloads)
                    if generation.ended:
                        owed = generation.owed
                        batch.append(generation.last(await self._tokenizer.decode(owed) if owed else ""))
                        yield batch
                        return
                    if batch:
                        yield batch
            raise EngineGone("the stream ended early")
        except EngineGone as gone:
            if not sent:
                raise Overloaded(RESTARTING, retry_after=1) from gone
            raise UpstreamFailed("The embedded engine stopped before the answer was complete.") from gone
        except EngineRefusal as refusal:
            raise _refused(refusal, job) from refusal
        except _NOT_UNDERSTOOD as error:
            raise UpstreamFailed("The embedded engine answered with something else.") from error

    async def _post(self, path: str, body: bytes, most: int) -> bytes:
        return await client.post(self.supervisor.address(), path, body, most)

    def _remember(self, key: _PromptKey, ids: TokenIds) -> None:
        self._remembered += len(ids) - len(self._prompts.pop(key, ()))
        self._prompts[key] = ids
        while len(self._prompts) > REMEMBERED_PROMPTS or self._remembered > REMEMBERED_TOKENS:
            _, forgotten = self._prompts.popitem(last=False)
            self._remembered -= len(forgotten)


def _refused(refusal: EngineRefusal, job: Job) -> GatewayError:
    """The engine's own message may quote the prompt: it is not passed on."""
    if refusal.status == 503:
        return Overloaded("The embedded engine is still loading its model.", retry_after=1)
    if b"exceed_context_size_error" in refusal.body:
        return InvalidRequest(
            f"The prompt does not fit into the context of the model {job.model.name}.",
            code="context_length_exceeded",
        )
    return UpstreamFailed(f"The embedded engine refused the request with status {refusal.status}.")
