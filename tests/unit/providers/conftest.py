"""A scripted upstream, and HTTP connections to it."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.asking import KEY, provider_for
from tests.support.upstream import Upstream

from headgate.providers.egress.service import Http, Timeouts
from headgate.providers.openai_compatible import OpenAICompatible


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as up:
        yield up


Connect = Callable[..., Http]


@pytest.fixture
async def connect(upstream: Upstream) -> AsyncIterator[Connect]:
    """Makes Https to the upstream (or to `url`), closed at the end."""
    made: list[Http] = []

    def make(url: str = "", timeout_s: float = 10, total_timeout_s: float = 10, **options: Any) -> Http:
        timeouts = Timeouts(
            connect_s=options.pop("connect_timeout_s", timeout_s),
            first_byte_s=options.pop("first_byte_timeout_s", timeout_s),
            chunk_s=options.pop("chunk_timeout_s", timeout_s),
            total_s=total_timeout_s,
        )
        http = Http(
            "acme",
            url or upstream.url,
            {"Authorization": f"Bearer {KEY}"},
            timeouts=timeouts,
            max_concurrency=options.pop("max_concurrency", 8),
            **options,
        )
        made.append(http)
        return http

    yield make
    for http in made:
        await http.aclose()


@pytest.fixture
async def provider(upstream: Upstream) -> AsyncIterator[OpenAICompatible]:
    made = provider_for(upstream.url)
    yield made
    await made.aclose()
