"""What an OpenAI-compatible upstream's refusals mean, and how little of them is passed on."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.asking import KEY, nothing, provider_for, streamed, text_before_failure
from tests.support.jobs import job, model
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.completion import Job, Message
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


def _refusing(scores: object) -> tuple[Script, Script]:
    """A model that refuses, in a whole answer and streamed."""
    choice = {"index": 0, "finish_reason": "stop", "logprobs": scores}
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    said = {"choices": [{"index": 0, "delta": {"refusal": "I cannot."}, "logprobs": scores}]}
    events = "".join(f"data: {json.dumps(event)}\n\n" for event in (said, end)) + "data: [DONE]\n\n"
    return (
        Script(body={"choices": [choice | {"message": message}]}),
        Script(body=events, headers={"Content-Type": "text/event-stream"}),
    )


async def test_a_model_s_refusal_is_its_answer_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.script(*_refusing(None))
    asked = job(messages=(Message(role="user", content="Hi"),))
    [choice] = (await provider.complete(asked, nothing)).choices
    assert (choice.text, choice.finish_reason) == ("I cannot.", "content_filter")
    text, finish = await _put_together(provider, asked)
    assert (text, finish) == ("I cannot.", "content_filter")


async def test_a_refusal_has_its_scores_both_ways(upstream: Upstream, provider: OpenAICompatible) -> None:
    refused = [{"token": "I cannot.", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    upstream.script(*_refusing({"content": None, "refusal": refused}))
    asked = job(messages=(Message(role="user", content="Hi"),), logprobs=0)
    [choice] = (await provider.complete(asked, nothing)).choices
    assert choice.text == "I cannot."
    assert [entry.data for entry in choice.logprobs or ()] == [b"I cannot."]
    assert await _put_together(provider, asked) == ("I cannot.", "content_filter")


async def _put_together(provider: OpenAICompatible, asked: Job) -> tuple[str, str | None]:
    chunks = await streamed(provider, asked)
    [finish] = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    return "".join(chunk.text for chunk in chunks), finish


async def test_words_that_do_not_come_hold_up_no_refusal(
    upstream: Upstream, provider: OpenAICompatible, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headgate.providers.upstream.ERROR_BODY_S", 0.05)
    head = "HTTP/1.1 503 No\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    async with _half_an_answer(head + "x") as url:
        waiting = provider_for(url, timeout_s=60, total_timeout_s=60)
        async with asyncio.timeout(10):
            with pytest.raises(UpstreamUnavailable):
                await waiting.complete(job(), nothing)
            await text_before_failure(waiting, job(), UpstreamUnavailable)
        await waiting.aclose()


@asynccontextmanager
async def _half_an_answer(text: str) -> AsyncIterator[str]:
    """A server that begins its answers and never ends them."""

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text.encode())
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def test_no_answer_is_larger_than_what_is_held_in_memory_whatever_was_asked_for(
    upstream: Upstream, provider: OpenAICompatible, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headgate.providers.upstream.MAX_WHOLE_BYTES", 1_000_000)
    monkeypatch.setattr("headgate.providers.upstream.MAX_STREAM_BYTES", 1_000_000)
    pieces = ("x" * 65_536,) * 32
    much = model(max_output_tokens=1_000_000)
    upstream.script(Script(pieces=pieces), Script(pieces=pieces))
    with pytest.raises(UpstreamFailed, match="too large"):
        await provider.complete(job(model=much, max_tokens=1_000_000), nothing)
    text, error = await text_before_failure(provider, job(model=much, max_tokens=1_000_000), UpstreamFailed)
    assert "too large" in error.message
    assert 0 < len(text) <= 1_000_000


async def test_an_event_without_scores_is_never_waited_for_beyond_four_mebibytes(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    large = "x" * (5 * 1024 * 1024)
    upstream.on("plain", Script(pieces=(large,)))
    _, error = await text_before_failure(provider, job(max_tokens=100_000, echo=True), UpstreamFailed)
    assert "too large" in error.message
