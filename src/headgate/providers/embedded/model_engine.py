"""One model file: its process, its queue, its prompts, and the generations under way."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec

from headgate.config import EmbeddedSettings
from headgate.core.completion import Chunk, Job, Usage
from headgate.core.errors import GatewayError, InvalidRequest, Overloaded, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.providers.embedded import client
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.client import EngineGone, EngineRefusal
from headgate.providers.embedded.echo import Echo
from headgate.providers.embedded.generation import Generation, ends_here, generate_body
from headgate.providers.embedded.gguf import ModelFile
from headgate.providers.embedded.prompts import NOT_UNDERSTOOD, RESTARTING, Prompts
from headgate.providers.embedded.scored import ScoredGeneration
from headgate.providers.embedded.side_door import SideDoor
from headgate.providers.embedded.supervisor import EngineStatus, Restarts, Supervisor
from headgate.providers.embedded.tokenizer import TokenIds

_BAD_REQUEST = 400
_UNAVAILABLE = 503


class ModelEngine:
    """Answers jobs for the models `specs`, which all lie in `file`."""

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
            precision=settings.precision,
            restarts=restarts,
            folder=folder,
        )
        self._admission = Admission(settings.slots, settings.max_queue)
        self._side = SideDoor(self._post_side)
        self._echo = Echo(self._side)
        self.prompts = Prompts(model, context, self._post, self._side)

    def status(self) -> EngineStatus:
        return msgspec.structs.replace(
            self.supervisor.status(), running=self._admission.running, waiting=self._admission.waiting
        )

    async def count_prompt(self, job: Job) -> int:
        """The prompt's tokens. InvalidRequest for all that can be refused before the job is begun."""
        await self.prompts.check(job)
        await self.prompts.grammar(job)
        return len(await self.prompts.ids(job))

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        await self.prompts.check(job)
        grammar = await self.prompts.grammar(job)
        ids = await self.prompts.ids(job)
        await self._admission.enter()
        try:
            async with aclosing(self._answer(job, ids, grammar, on_sent)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._admission.leave()

    async def _answer(
        self, job: Job, ids: TokenIds, grammar: str | None, on_sent: Callable[[], None]
    ) -> AsyncGenerator[list[Chunk], None]:
        sent = False

        def mark_sent() -> None:
            nonlocal sent
            if not sent:
                sent = True
                on_sent()

        try:
            # The echo leaves with what follows it: until then the engine may still refuse.
            batch = await self._echoed(job, ids, mark_sent) if job.echo else []
            if job.max_tokens == 0:
                mark_sent()
                batch.append(_nothing(job, len(ids)))
                yield batch
                return
            generation = self._generation(job, ids)
            body = generate_body(job, ids, grammar)
            events = client.post_events(self.supervisor.address(), "/completion", body, mark_sent)
            async with aclosing(events):
                async for payloads in events:
                    batch += await generation.read(payloads)
                    if generation.ended:
                        batch.append(await generation.last())
                        yield batch
                        return
                    if batch:
                        yield batch
                        batch = []
            raise EngineGone("the stream ended early")
        except EngineGone as gone:
            if not sent:
                raise Overloaded(RESTARTING, retry_after=1) from gone
            raise UpstreamFailed("The embedded engine stopped before the answer was complete.") from gone
        except EngineRefusal as refusal:
            raise _refused(refusal, job) from refusal
        except NOT_UNDERSTOOD as error:
            raise UpstreamFailed("The embedded engine answered with something else.") from error

    async def _echoed(self, job: Job, ids: TokenIds, mark_sent: Callable[[], None]) -> list[Chunk]:
        if job.logprobs is not None:
            self.supervisor.side_address()  # Overloaded while there is none, and nothing is owed yet
            mark_sent()
        return [await self._echo.chunk(job, ids)]

    def _generation(self, job: Job, ids: TokenIds) -> Generation | ScoredGeneration:
        if ends_here(job):
            return ScoredGeneration(job, ids, self._side)
        return Generation(job, len(ids), self.prompts.decode)

    async def _post(self, path: str, body: bytes, most: int) -> bytes:
        return await client.post(self.supervisor.address(), path, body, most)

    async def _post_side(self, path: str, body: bytes, most: int) -> bytes:
        return await client.post(self.supervisor.side_address(), path, body, most)


def _nothing(job: Job, prompt_tokens: int) -> Chunk:
    """The end of an answer that is its prompt alone."""
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=0)
    return Chunk(0, "", "length", usage, 0, logprobs=None if job.logprobs is None else ())


def _refused(refusal: EngineRefusal, job: Job) -> GatewayError:
    """The engine's own message may quote the prompt: it is not passed on."""
    if refusal.status == _UNAVAILABLE:
        return Overloaded("The embedded engine is still loading its model.", retry_after=1)
    if b"exceed_context_size_error" in refusal.body:
        return InvalidRequest(
            f"The prompt does not fit into the context of the model {job.model.name}.",
            code="context_length_exceeded",
        )
    if refusal.status == _BAD_REQUEST and job.response_format is not None:
        return InvalidRequest(
            f"The model {job.model.name} cannot be held to this JSON schema.", param="response_format"
        )
    return UpstreamFailed(f"The embedded engine refused the request with status {refusal.status}.")
