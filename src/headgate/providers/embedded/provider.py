"""The embedded provider: llama.cpp in child processes, one per model file, behind the same port as any upstream."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path

from headgate.config import EmbeddedSettings
from headgate.core.completion import Choice, Chunk, Completion, FinishReason, Job, TokenLogprob, Usage
from headgate.core.errors import ModelUnavailable
from headgate.core.models import ModelSpec, TokenizerInfo
from headgate.core.ports import Tokenizer
from headgate.providers.embedded.gguf import BrokenModel, read_gguf
from headgate.providers.embedded.model_engine import ModelEngine
from headgate.providers.embedded.supervisor import EngineStatus, Restarts


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
        self._engines: dict[str, ModelEngine] = {}
        self._broken: dict[str, str] = {}
        for file, models in served.items():
            try:
                model = read_gguf(file)
            except BrokenModel as error:
                self._broken[file] = error.reason
            else:
                self._engines[file] = ModelEngine(file, model, models, settings, restarts, folder)

    @property
    def tokenizer(self) -> Tokenizer:
        return self

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
        return await self._engine(job.model).count_prompt(job)

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        finish_reason: FinishReason | None = None
        usage: Usage | None = None
        async with aclosing(self.stream(job, on_sent)) as batches:
            async for batch in batches:
                for chunk in batch:
                    texts.append(chunk.text)
                    logprobs += chunk.logprobs or ()
                    finish_reason = chunk.finish_reason or finish_reason
                    usage = chunk.usage or usage
        choice = Choice(
            index=0,
            text="".join(texts),
            finish_reason=finish_reason,
            logprobs=None if job.logprobs is None else tuple(logprobs),
        )
        return Completion(choices=(choice,), usage=usage)

    def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        return self._engine(job.model).stream(job, on_sent)

    async def aclose(self) -> None:
        """End all engines; running streams fail with UpstreamFailed."""
        await asyncio.gather(*(engine.supervisor.aclose() for engine in self._engines.values()))

    async def tokenize(
        self, model: ModelSpec, text: str, *, add_special: bool, parse_special: bool
    ) -> tuple[int, ...]:
        return await self._engine(model).prompts.tokenize(
            text, add_special=add_special, parse_special=parse_special
        )

    async def detokenize(self, model: ModelSpec, ids: Sequence[int]) -> str:
        return await self._engine(model).prompts.detokenize(model, ids)

    async def describe_tokenizer(self, model: ModelSpec) -> TokenizerInfo:
        return await self._engine(model).prompts.describe(model)

    def _engine(self, model: ModelSpec) -> ModelEngine:
        engine = self._engines.get(model.file or "")
        if engine is None:
            raise ModelUnavailable(f"The model {model.name} is not available: {self.unavailable(model)}.")
        return engine
