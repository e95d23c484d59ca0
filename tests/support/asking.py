"""Ways to ask the scripted upstream: over the outbound HTTP port, and through a provider."""

from typing import Any

import pytest

from headgate.config import ProviderSettings
from headgate.core.completion import Chunk, Job
from headgate.core.errors import UpstreamError
from headgate.providers.egress.service import Http
from headgate.providers.openai_compatible import OpenAICompatible

KEY = "sk-canary-51c9"

BODY = b'{"model": "plain", "prompt": "hi"}'
STREAM = b'{"model": "plain", "prompt": "one two three", "stream": true}'


def nothing() -> None:
    pass


async def ask(http: Http, body: bytes = BODY) -> bytes:
    response = await http.open("/completions", body, nothing)
    try:
        return await response.read(1_000_000)
    finally:
        response.close()


def provider_for(url: str, key: str | None = KEY, **settings: Any) -> OpenAICompatible:
    return OpenAICompatible(
        "acme", ProviderSettings(kind="openai", base_url=url, api_key_env="ACME_KEY", **settings), key
    )


async def streamed(provider: OpenAICompatible, asked: Job) -> list[Chunk]:
    return [chunk async for batch in provider.stream(asked, nothing) for chunk in batch]


async def text_before_failure(
    provider: OpenAICompatible, asked: Job, failure: type[UpstreamError]
) -> tuple[str, UpstreamError]:
    text = ""
    with pytest.raises(failure) as raised:
        async for batch in provider.stream(asked, nothing):
            text += "".join(chunk.text for chunk in batch)
    return text, raised.value
