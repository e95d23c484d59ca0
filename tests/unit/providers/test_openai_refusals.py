"""What an OpenAI-compatible upstream's refusals mean, and how little of them is passed on."""

import pytest
from tests.support.asking import KEY, nothing, text_before_failure
from tests.support.jobs import job
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.openai_compatible import OpenAICompatible


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, UpstreamRejected),
        (413, UpstreamRejected),
        (422, UpstreamRejected),
        (401, UpstreamAuth),
        (402, UpstreamAuth),
        (403, UpstreamAuth),
        (404, UpstreamFailed),
        (409, UpstreamFailed),
        (429, UpstreamRateLimited),
        (500, UpstreamFailed),
        (502, UpstreamFailed),
        (503, UpstreamUnavailable),
        (529, UpstreamUnavailable),
        (408, UpstreamFailed),
        (504, UpstreamTimeout),
    ],
)
async def test_a_status_means_the_same_both_ways(
    upstream: Upstream, provider: OpenAICompatible, status: int, expected: type[UpstreamError]
) -> None:
    with pytest.raises(UpstreamError) as blocking:
        await provider.complete(job(f"status-{status}"), nothing)
    _, streaming = await text_before_failure(provider, job(f"status-{status}"), UpstreamError)
    for error in (blocking.value, streaming):
        assert type(error) is expected
        assert error.status == status
        assert ("Told to say" in error.message) == (expected is UpstreamRejected)


async def test_retry_after_is_passed_on_within_bounds(upstream: Upstream, provider: OpenAICompatible) -> None:
    waits = []
    for given in ("7", "0.2", "86400", "soon", "-5", "inf", "nan", None):
        upstream.script(Script(status=429, headers={} if given is None else {"Retry-After": given}))
        with pytest.raises(UpstreamRateLimited) as raised:
            await provider.complete(job(), nothing)
        waits.append(raised.value.retry_after)
    assert waits == [7, 1, 120, None, 1, 120, None, None]


async def test_our_key_and_long_words_of_the_upstream_are_cut(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    body = {"error": {"message": f"No model for {KEY}. " + "x" * 10_000}}
    upstream.script(Script(status=400, body=body))
    with pytest.raises(UpstreamRejected) as raised:
        await provider.complete(job(), nothing)
    assert raised.value.message.startswith("No model for [key]. xxx")
    assert len(raised.value.message) <= 500


async def test_a_refusal_with_an_endless_body_is_still_understood(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.script(Script(status=422, body="x" * 1_000_000))
    with pytest.raises(UpstreamRejected) as raised:
        await provider.complete(job(), nothing)
    assert raised.value.status == 422
    assert "xx" not in raised.value.message


async def test_a_stream_far_longer_than_was_asked_for_is_broken_off(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    piece = "x" * 65_536
    upstream.script(Script(pieces=(piece,) * 64))
    text, error = await text_before_failure(provider, job("endless", max_tokens=2), UpstreamFailed)
    assert "too large" in error.message
    assert 0 < len(text) < 2 * 1024 * 1024
    await (await upstream.request(0)).closed.wait()
