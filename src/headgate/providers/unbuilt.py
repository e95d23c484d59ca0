"""Stands in for a provider whose kind this version cannot speak: its models are listed, and say why not."""

from collections.abc import AsyncGenerator, Callable, Sequence

from headgate.core.completion import Chunk, Completion, Job
from headgate.core.errors import ModelUnavailable
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer


class Unbuilt:
    """`reason` is what a client reads who asks for one of its models."""

    stream_only = False
    tokenizer: Tokenizer | None = None

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def unavailable(self, model: ModelSpec) -> str | None:
        return self._reason

    async def count_prompt(self, job: Job) -> int | None:
        return None

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        raise ModelUnavailable(self._reason)

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        raise ModelUnavailable(self._reason)
        yield ()  # what makes this a generator

    async def aclose(self) -> None:
        pass
