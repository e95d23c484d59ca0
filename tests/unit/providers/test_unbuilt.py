"""A provider this version cannot speak lists its models and says why they cannot be asked."""

import pytest
from tests.support.jobs import job, model

from headgate.core.errors import ModelUnavailable
from headgate.core.ports import Provider
from headgate.providers.unbuilt import Unbuilt


async def test_every_way_of_asking_gives_the_reason() -> None:
    provider: Provider = Unbuilt("anthropic", "not supported by this version")
    assert provider.name == "anthropic"
    assert provider.unavailable(model()) == "not supported by this version"
    assert provider.tokenizer is None
    assert await provider.count_prompt(job()) is None
    with pytest.raises(ModelUnavailable, match="not supported"):
        await provider.complete(job(), lambda: None)
    with pytest.raises(ModelUnavailable, match="not supported"):
        await anext(provider.stream(job(), lambda: None))
    await provider.aclose()
