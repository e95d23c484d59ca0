"""One model file: its process, its queue, its prompts, and the generations under way."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from headgate.config import EmbeddedSettings
from headgate.core.completion import Chunk, Job, Usage
from headgate.core.errors import GatewayError, InvalidRequest, Overloaded, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.providers.embedded import client
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.client import EngineGone, EngineRefusal
from headgate.providers.embedded.echo import Echo, Echoed
from headgate.providers.embedded.generation import Generation, ends_here, generate_body, repeat_body
from headgate.providers.embedded.gguf import ModelFile
from headgate.providers.embedded.prompts import NOT_UNDERSTOOD, RESTARTING, Prompts
from headgate.providers.embedded.schemas import Schemas
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
        self._echo = Echo(self._side, settings.max_queue)
        self.prompts = Prompts(model, context, self._post, self._side, Schemas())

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
        sent = _Sent(on_sent)
        with _told(job, sent):
            # The echo leaves with what follows it: until then the engine may still refuse.
            echoed = await self._echoed(job, ids, sent) if job.echo else Echoed(())
            if job.max_tokens == 0:
                sent.mark()
                async for batch in _apart(echoed.chunks):
                    yield batch
                yield [_nothing(job, len(ids))]
                return
            await self._admission.enter()
            try:
                before = echoed.chunks
                async with aclosing(self._generate(job, ids, grammar, sent, echoed.opened)) as batches:
                    async for batch in batches:
                        async for piece in _apart(before):
                            yield piece
                        before = ()
                        yield batch
            finally:
                self._admission.leave()

    async def _echoed(self, job: Job, ids: TokenIds, sent: "_Sent") -> Echoed:
        if job.logprobs is not None:
            self.supervisor.side_address()  # Overloaded while there is none, and nothing is owed yet
        return await self._echo.echoed(job, ids, sent.mark)

    async def _generate(
        self, job: Job, ids: TokenIds, grammar: str | None, sent: "_Sent", opened: bytes
    ) -> AsyncGenerator[list[Chunk], None]:
        generation: Generation | ScoredGeneration
        watched = ends_here(job) or bool(opened)
        if watched:
            job = _repeatable(job)
            again = partial(self._repeated, job, ids, grammar)
            generation = ScoredGeneration(job, ids, self._side, again, opened)
        else:
            generation = Generation(job, len(ids), self.prompts.decode)
        body = generate_body(job, ids, grammar, watched=watched)
        events = client.post_events(self.supervisor.address(), "/completion", body, sent.mark)
        async with aclosing(events):
            async for payloads in events:
                batch = await generation.read(payloads)
                if generation.ended:
                    batch.append(await generation.last())
                    yield batch
                    return
                if batch:
                    yield batch
        raise EngineGone("the stream ended early")

    async def _repeated(self, job: Job, ids: TokenIds, grammar: str | None, count: int) -> TokenIds:
        """The first `count` tokens of a job's answer, generated once more."""
        body = repeat_body(job, ids, grammar, count)
        said = await self._post("/completion", body, 64 * 1024 + 16 * count)
        return msgspec.json.decode(said, type=_Repeated).tokens

    async def _post(self, path: str, body: bytes, most: int) -> bytes:
        return await client.post(self.supervisor.address(), path, body, most)

    async def _post_side(self, path: str, body: bytes, most: int) -> bytes:
        return await client.post(self.supervisor.side_address(), path, body, most)


class _Repeated(Struct, frozen=True):
    tokens: TokenIds


def _repeatable(job: Job) -> Job:
    """The job with a seed, so that the same answer can be had once more."""
    if job.sampling.seed is not None:
        return job
    seeded = msgspec.structs.replace(job.sampling, seed=secrets.randbelow(2**31))
    return msgspec.structs.replace(job, sampling=seeded)


class _Sent:
    """Tells once, at its first mark, that the engine was asked."""

    def __init__(self, on_sent: Callable[[], None]) -> None:
        self._on_sent = on_sent
        self.marked = False

    def mark(self) -> None:
        if not self.marked:
            self.marked = True
            self._on_sent()


@contextmanager
def _told(job: Job, sent: _Sent) -> Iterator[None]:
    """The engine's failures as clients are told of them."""
    try:
        yield
    except EngineGone as gone:
        if not sent.marked:
            raise Overloaded(RESTARTING, retry_after=1) from gone
        raise UpstreamFailed("The embedded engine stopped before the answer was complete.") from gone
    except EngineRefusal as refusal:
        raise _refused(refusal, job) from refusal
    except NOT_UNDERSTOOD as error:
        raise UpstreamFailed("The embedded engine answered with something else.") from error


async def _apart(chunks: Sequence[Chunk]) -> AsyncGenerator[list[Chunk], None]:
    """The pieces of a long echo one by one: each is rendered before the next, and others have their turns between."""
    for chunk in chunks:
        yield [chunk]
        if len(chunks) > 1:
            await asyncio.sleep(0)


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
