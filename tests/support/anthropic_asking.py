"""Ways to ask an upstream of Anthropic's kind through its provider, and through the official client."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from tests.support.anthropic_upstream import COUNTED, AnthropicUpstream
from tests.support.asking import KEY, nothing
from tests.support.called import called
from tests.support.jobs import job
from tests.support.script import Script

from headgate.config import ProviderSettings
from headgate.core.completion import Chunk, Completion, Job, Message, Usage
from headgate.core.errors import UpstreamError
from headgate.providers.anthropic import Anthropic

WORDS = ("one", " two", " three", " four")
USAGE = Usage(prompt_tokens=11, completion_tokens=4, cached_tokens=3)
"""What `COUNTED` comes to."""
CONVERSATION = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hi"),
    Message(role="assistant", content="Hello."),
    Message(role="system", content="Be é."),
    Message(role="user", content="Who?"),
    Message(role="user", content="And why?"),
)


@asynccontextmanager
async def counting_upstream() -> AsyncIterator[AnthropicUpstream]:
    """One whose model "plain" says the words above and reports their usage."""
    async with AnthropicUpstream() as up:
        up.on("plain", Script(pieces=WORDS, usage=COUNTED))
        yield up


@asynccontextmanager
async def open_provider(url: str, **settings: Any) -> AsyncIterator[Anthropic]:
    made = provider_for(url, **settings)
    yield made
    await made.aclose()


def client_of(upstream: AnthropicUpstream) -> AsyncAnthropic:
    """The official client, asked to speak our version of the format."""
    return AsyncAnthropic(
        api_key=KEY,
        base_url=upstream.url.removesuffix("/v1"),
        max_retries=0,
        default_headers={"anthropic-version": "2023-06-01"},
    )


def provider_for(url: str, key: str | None = KEY, **settings: Any) -> Anthropic:
    return Anthropic(
        "acme", ProviderSettings(kind="anthropic", base_url=url, api_key_env="ACME_KEY", **settings), key
    )


def chat(upstream_name: str = "plain", **fields: Any) -> Job:
    return job(upstream_name, shape="chat", **fields)


def told(chunks: Iterable[Chunk]) -> list[Chunk]:
    """All but the input's count at the beginning, which the end repeats."""
    return [chunk for chunk in chunks if chunk.usage is None or chunk.usage.final]


async def streamed(provider: Anthropic, asked: Job) -> list[Chunk]:
    return told([chunk async for batch in provider.stream(asked, nothing) for chunk in batch])


async def before_failure(
    provider: Anthropic, asked: Job, failure: type[UpstreamError]
) -> tuple[list[Chunk], UpstreamError]:
    chunks: list[Chunk] = []
    with pytest.raises(failure) as raised:
        async for batch in provider.stream(asked, nothing):
            chunks += batch
    return told(chunks), raised.value


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def both(provider: Anthropic, asked: Job) -> Completion:
    """The blocking answer, and the stream says the same."""
    completion = await provider.complete(asked, nothing)
    chunks = await streamed(provider, asked)
    [choice] = completion.choices
    assert choice.index == 0
    assert choice.text == text(chunks)
    assert list(choice.tool_calls) == called(chunks)
    assert [choice.finish_reason] == [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert usages == ([] if completion.usage is None else [completion.usage])
    return completion


def streaming_of(provider: Anthropic) -> Callable[[Job, Callable[[], None]], Coroutine[Any, Any, object]]:
    """`provider.stream` with the face of `provider.complete`."""

    async def ask(asked: Job, on_sent: Callable[[], None]) -> list[Chunk]:
        return [chunk async for batch in provider.stream(asked, on_sent) for chunk in batch]

    return ask
