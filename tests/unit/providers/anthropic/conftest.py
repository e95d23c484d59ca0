"""A scripted upstream that speaks Anthropic's format, and a provider that asks it."""

from collections.abc import AsyncIterator

import pytest
from tests.support.anthropic_asking import counting_upstream, open_provider
from tests.support.anthropic_upstream import AnthropicUpstream

from headgate.providers.anthropic import Anthropic


@pytest.fixture
async def upstream() -> AsyncIterator[AnthropicUpstream]:
    async with counting_upstream() as up:
        yield up


@pytest.fixture
async def provider(upstream: AnthropicUpstream) -> AsyncIterator[Anthropic]:
    async with open_provider(upstream.url) as made:
        yield made
