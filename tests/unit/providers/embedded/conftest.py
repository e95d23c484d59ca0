"""Real engines for the embedded provider's tests, always ended again, and jobs for them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from headgate.config import EmbeddedSettings, ModelSettings, demo_model_path
from headgate.core.completion import Job, Message, Prompt, ResponseFormat, Sampling
from headgate.core.models import ModelSpec
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.spec import spec_for
from headgate.providers.embedded.supervisor import Restarts

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]


@pytest.fixture
def demo() -> ModelSpec:
    return spec_for(ModelSettings(name="demo", provider="embedded"), demo_model_path())


@pytest.fixture
def build_job(demo: ModelSpec) -> BuildJob:
    """`build_job("prompt", max_tokens=…, temperature=…)`: a raw prompt, or a conversation with `messages`."""

    def build(
        prompt: Prompt | None = None,
        *,
        messages: tuple[Message, ...] | None = None,
        model: ModelSpec = demo,
        max_tokens: int = 16,
        plain: bool = False,
        chat: bool = False,
        request_id: str = "request",
        logprobs: int | None = None,
        echo: bool = False,
        suffix: str | None = None,
        response_format: ResponseFormat | None = None,
        **sampling: object,
    ) -> Job:
        return Job(
            request_id=request_id,
            model=model,
            shape="chat" if chat or messages is not None else "completion",
            prompt=prompt,
            messages=messages,
            plain=plain,
            max_tokens=max_tokens,
            logprobs=logprobs,
            echo=echo,
            suffix=suffix,
            response_format=response_format,
            sampling=Sampling(**sampling),  # type: ignore[arg-type]  # tests pass what Sampling takes
        )

    return build


@pytest.fixture
async def start_provider(demo: ModelSpec) -> AsyncIterator[StartProvider]:
    """`await start_provider(slots=…, max_queue=…)`: a provider whose engines are up or have failed."""
    async with AsyncExitStack() as stack:

        async def start(
            *specs: ModelSpec, restarts: Restarts | None = None, folder: Path | None = None, **settings: Any
        ) -> EmbeddedProvider:
            provider = EmbeddedProvider(
                specs or (demo,), EmbeddedSettings(**settings), restarts=restarts, folder=folder
            )
            stack.push_async_callback(provider.aclose)
            await provider.start()
            await provider.ready_or_failed(30)
            return provider

        yield start
