"""What goes wrong with an upstream of Anthropic's kind: it refuses, breaks off or lies, or its client leaves."""

import asyncio
import tracemalloc

import msgspec
import pytest
from tests.support.anthropic_asking import (
    USAGE,
    WORDS,
    before_failure,
    chat,
    provider_for,
    streamed,
    streaming_of,
    text,
)
from tests.support.anthropic_upstream import (
    COUNTED,
    EVENT_STREAM,
    AnthropicUpstream,
    closed,
    ending,
    error,
    events,
    message,
    opened,
    piece,
    refusal,
    start,
    text_block,
)
from tests.support.asking import KEY, nothing
from tests.support.script import Script

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.anthropic import Anthropic
from headgate.providers.anthropic_wire import Answer, read

# --- what is not believed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (400, "invalid_request_error", UpstreamRejected),
        (401, "authentication_error", UpstreamAuth),
        (402, "billing_error", UpstreamAuth),
        (403, "permission_error", UpstreamAuth),
        (404, "not_found_error", UpstreamFailed),
        (413, "request_too_large", UpstreamRejected),
        (429, "rate_limit_error", UpstreamRateLimited),
        (500, "api_error", UpstreamFailed),
        (504, "timeout_error", UpstreamTimeout),
        (529, "overloaded_error", UpstreamUnavailable),
    ],
)
async def test_a_status_means_the_same_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic, status: int, kind: str, expected: type[UpstreamError]
) -> None:
    upstream.on("plain", refusal(status, kind, f"Told to say {status} to {KEY}."))
    with pytest.raises(UpstreamError) as blocking:
        await provider.complete(chat(), nothing)
    chunks, streaming_error = await before_failure(provider, chat(), UpstreamError)
    assert chunks == []
    for raised in (blocking.value, streaming_error):
        assert type(raised) is expected
        assert raised.status == status
        assert ("Told to say" in raised.message) == (expected is UpstreamRejected)
        assert KEY not in raised.message
        assert "127.0.0.1" not in raised.message


@pytest.mark.parametrize(("given", "kept"), [("7", 7), ("86400", 120), ("soon", None)])
async def test_retry_after_is_passed_on_within_bounds(
    upstream: AnthropicUpstream, provider: Anthropic, given: str, kept: int | None
) -> None:
    for status, kind in ((429, "rate_limit_error"), (529, "overloaded_error")):
        upstream.script(refusal(status, kind, retry_after=given))
        with pytest.raises(UpstreamError) as raised:
            await provider.complete(chat(), nothing)
        assert raised.value.retry_after == kept


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("overloaded_error", UpstreamUnavailable),
        ("rate_limit_error", UpstreamRateLimited),
        ("api_error", UpstreamFailed),
        ("invalid_request_error", UpstreamRejected),
    ],
)
async def test_an_error_event_fails_after_what_came(
    upstream: AnthropicUpstream, provider: Anthropic, kind: str, expected: type[UpstreamError]
) -> None:
    upstream.script(Script(pieces=WORDS, usage=COUNTED, error_at=2, error=kind))
    chunks, raised = await before_failure(provider, chat(), expected)
    assert type(raised) is expected
    assert text(chunks) == "one two"
    # 7 bytes
    assert chunks[-1].usage == Usage(
        prompt_tokens=11, completion_tokens=2, cached_tokens=3, source="estimate"
    )


async def test_an_answer_that_says_200_and_error_is_an_error_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.on("plain", Script(body=error("overloaded_error")))
    with pytest.raises(UpstreamUnavailable):
        await provider.complete(chat(), nothing)
    chunks, raised = await before_failure(provider, chat(), UpstreamUnavailable)
    assert (chunks, raised.status) == ([], 529)


@pytest.mark.parametrize("cut", [{"close_at": 2}, {"reset_at": 2}])
async def test_a_stream_that_breaks_off_fails_after_what_came(
    upstream: AnthropicUpstream, provider: Anthropic, cut: dict[str, int]
) -> None:
    upstream.script(Script(pieces=WORDS, usage=COUNTED, **cut))  # type: ignore[arg-type]
    chunks, _ = await before_failure(provider, chat(), UpstreamFailed)
    assert text(chunks) == "one two"
    assert all(chunk.finish_reason is None for chunk in chunks)
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    assert (usage.prompt_tokens, usage.completion_tokens, usage.source) == (11, 2, "estimate")


async def test_a_stream_that_ends_in_order_but_too_early_fails(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(Script(pieces=("a", "b"), finish=None, done=False))
    chunks, raised = await before_failure(provider, chat(), UpstreamFailed)
    assert text(chunks) == "ab"
    assert "too early" in raised.message


async def test_a_stream_with_a_reason_needs_no_end(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    upstream.script(Script(pieces=WORDS, usage=COUNTED, done=False))
    chunks = await streamed(provider, chat())
    assert text(chunks) == "one two three four"
    assert [chunk.usage for chunk in chunks if chunk.usage] == [USAGE]


async def test_a_stream_reset_after_its_reason_is_whole(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    sent = events(start(), opened(0, text_block("")), piece(0, "a"), closed(0), ending())
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999999\r\n\r\n"
    upstream.script(Script(raw=head + sent))
    chunks = await streamed(provider, chat())
    assert chunks == [Chunk(0, "a"), Chunk(0, "", "stop"), Chunk(-1, usage=USAGE)]


@pytest.mark.parametrize(
    "script",
    [
        Script(body="<html>busy</html>", headers={"Content-Type": "text/html"}),
        Script(body="{not json"),
        Script(body="[" * 100_000),
        Script(body='{"content": ' + "[" * 100_000),
        Script(body='{"content": "none"}'),
        Script(body='{"content": [{"type": "text", "text": 7}]}'),
        Script(body='{"content": [{"type": ["text"]}]}'),
        Script(body='{"content": [7], "usage": 1e999}'),
        Script(body="{}"),
        Script(body="[]"),
        Script(body='{"type": "error", "error": ["api_error"]}'),
        Script(body=events(start()) + "data: {\n\n", headers=EVENT_STREAM),
        Script(body="data: [DONE]\n\n", headers=EVENT_STREAM),
        Script(body="event: x\ndata: " + "x" * 5_000_000, headers=EVENT_STREAM),
        Script(body="", headers=EVENT_STREAM),
        Script(status=204),
        Script(status=302, headers={"Location": "/v1/elsewhere"}),
        Script(close_at=0),
        Script(reset_at=1),
    ],
)
async def test_strange_answers_are_upstream_failures_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic, script: Script
) -> None:
    upstream.on("plain", script)
    with pytest.raises(UpstreamFailed):
        await provider.complete(chat(), nothing)
    with pytest.raises(UpstreamFailed):
        await streamed(provider, chat())


async def test_a_stream_far_longer_than_was_asked_for_is_broken_off(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(Script(pieces=("x" * 65_536,) * 64))
    chunks, raised = await before_failure(provider, chat(max_tokens=2), UpstreamFailed)
    assert "too large" in raised.message
    assert 0 < len(text(chunks)) < 2 * 1024 * 1024
    await (await upstream.request(0)).closed.wait()


async def test_a_silent_upstream_is_a_time_out_both_ways(upstream: AnthropicUpstream) -> None:
    provider = provider_for(upstream.url, timeout_s=0.2)
    with pytest.raises(UpstreamTimeout):
        await provider.complete(chat("silent"), nothing)
    with pytest.raises(UpstreamTimeout):
        await streamed(provider, chat("silent"))
    await provider.aclose()


# --- leaving ----------------------------------------------------------------------------------------------------


async def test_cancelling_a_call_before_its_answer_closes_the_connection(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.on("plain", Script(pieces=WORDS, hold_at=0))
    for number, ask in enumerate((provider.complete, streaming_of(provider))):
        call = asyncio.create_task(ask(chat(), nothing))
        request = await upstream.request(number)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(1):
            await request.closed.wait()
        assert not request.answered.is_set()


async def test_leaving_a_stream_between_chunks_closes_the_connection(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.on("plain", Script(pieces=WORDS, hold_at=1))
    left = provider.stream(chat(), nothing)
    assert text(list(await anext(left))) == "one"
    await left.aclose()
    cancelled = provider.stream(chat(), nothing)
    assert text(list(await anext(cancelled))) == "one"
    more = asyncio.ensure_future(anext(cancelled))
    await asyncio.sleep(0)
    more.cancel()
    with pytest.raises(asyncio.CancelledError):
        await more
    async with asyncio.timeout(1):
        for request in upstream.requests:
            await request.closed.wait()
            assert not request.answered.is_set()


@pytest.mark.parametrize("field", ("usage", "error", "more"))
def test_what_is_not_looked_at_takes_no_memory(field: str) -> None:
    nested = ", ".join(["[]"] * 500_000)
    raw = f'{{"{field}": [{nested}]}}'.encode()
    tracemalloc.start()
    try:
        msgspec.json.decode(raw, type=Answer)
        assert tracemalloc.get_traced_memory()[1] < len(raw)
    finally:
        tracemalloc.stop()


async def test_a_large_answer_of_many_blocks_is_read_only_as_far_as_an_honest_one_goes(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    said = {"type": "text", "text": "x" * 200}
    upstream.script(*(Script(body=message(*[said] * many)) for many in (500, 513)))
    [choice] = (await provider.complete(chat(max_tokens=4000), nothing)).choices
    assert choice.text == "x" * 100_000
    with pytest.raises(UpstreamFailed, match="cannot be read"):
        await provider.complete(chat(max_tokens=4000), nothing)


def test_many_empty_blocks_take_no_memory() -> None:
    raw = ('{"content": [' + ", ".join(['{"type": ""}'] * 200_000) + "]}").encode()
    read(b"{}" + b" " * 100_000)  # what is made once
    tracemalloc.start()
    try:
        with pytest.raises(msgspec.ValidationError):
            read(raw)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
    finally:
        tracemalloc.stop()
