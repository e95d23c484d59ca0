"""Cohere when it refuses, breaks, lies or is given up on."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import cohere
import msgspec
import pytest
from msgspec.structs import replace
from tests.support.asking import KEY, nothing
from tests.support.cohere_upstream import CohereUpstream, counts, delta, message_end, refusal
from tests.support.jobs import job as any_job
from tests.support.script import Script

from headgate.config import ProviderSettings
from headgate.core.completion import Chunk, Job, Usage
from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.cohere import Cohere
from headgate.providers.cohere_wire import Answer, read

WORDS = ("one", " two", " three", " four")
JOB: Job = any_job("command", shape="chat")
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.fixture
async def upstream() -> AsyncIterator[CohereUpstream]:
    async with CohereUpstream() as up:
        yield up


@pytest.fixture
async def provider(upstream: CohereUpstream) -> AsyncIterator[Cohere]:
    settings = ProviderSettings(kind="cohere", base_url=upstream.url, api_key_env="ACME_KEY")
    made = Cohere("acme", settings, KEY)
    yield made
    await made.aclose()


async def until_failure(provider: Cohere) -> tuple[list[Chunk], UpstreamError]:
    """The chunks of a stream that fails, and its failure."""
    chunks: list[Chunk] = []
    with pytest.raises(UpstreamError) as raised:
        async for batch in provider.stream(JOB, nothing):
            chunks += batch
    return chunks, raised.value


async def failures(upstream: CohereUpstream, provider: Cohere, script: Script) -> list[UpstreamError]:
    """How both ways fail before anything came."""
    upstream.script(script, script)
    with pytest.raises(UpstreamError) as raised:
        await provider.complete(JOB, nothing)
    chunks, streaming = await until_failure(provider)
    assert chunks == []
    return [raised.value, streaming]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, UpstreamRejected),
        (413, UpstreamRejected),
        (422, UpstreamRejected),
        (401, UpstreamAuth),
        (402, UpstreamAuth),
        (403, UpstreamAuth),
        (498, UpstreamAuth),
        (404, UpstreamFailed),
        (499, UpstreamFailed),
        (429, UpstreamRateLimited),
        (500, UpstreamFailed),
        (501, UpstreamFailed),
        (503, UpstreamUnavailable),
        (504, UpstreamTimeout),
    ],
)
async def test_a_status_means_the_same_both_ways(
    upstream: CohereUpstream, provider: Cohere, status: int, expected: type[UpstreamError]
) -> None:
    words = f"Told to say {status} to {KEY}."
    for error in await failures(upstream, provider, refusal(status, words)):
        assert type(error) is expected
        assert error.status == status
        assert KEY not in error.message
        assert ("Told to say" in error.message) == (expected is UpstreamRejected)


async def test_cohere_s_own_client_reads_the_refusals(upstream: CohereUpstream) -> None:
    upstream.script(refusal(498, "invalid token"))
    async with cohere.AsyncClientV2(api_key=KEY, base_url=upstream.origin) as client:
        with pytest.raises(cohere.errors.InvalidTokenError) as raised:
            await client.chat(model="command", messages=[cohere.UserChatMessageV2(content="Hi")])
    assert raised.value.body["message"] == "invalid token"
    assert raised.value.body["id"]


async def test_retry_after_is_kept(upstream: CohereUpstream, provider: Cohere) -> None:
    script = refusal(429, "trial key", **{"Retry-After": "7"})
    assert [error.retry_after for error in await failures(upstream, provider, script)] == [7, 7]


async def test_an_error_with_status_200_is_one(upstream: CohereUpstream, provider: Cohere) -> None:
    for error in await failures(upstream, provider, refusal(200, f"{KEY} fell over")):
        assert isinstance(error, UpstreamFailed)
        assert KEY not in error.message


@pytest.mark.parametrize(
    ("finish", "expected"),
    [("ERROR", UpstreamFailed), ("ERROR_LIMIT", UpstreamFailed), ("TIMEOUT", UpstreamTimeout)],
)
async def test_an_answer_that_ends_in_error_is_one_both_ways(
    upstream: CohereUpstream, provider: Cohere, finish: str, expected: type[UpstreamError]
) -> None:
    upstream.on("command", Script(pieces=WORDS, finish=finish))
    with pytest.raises(UpstreamError) as raised:
        await provider.complete(JOB, nothing)
    chunks, streaming = await until_failure(provider)
    assert [type(raised.value), type(streaming)] == [expected, expected]
    assert "".join(chunk.text for chunk in chunks) == "one two three four"
    assert chunks[-1].usage == Usage(prompt_tokens=2, completion_tokens=4)


async def test_an_error_amid_a_stream_comes_after_what_was_said(
    upstream: CohereUpstream, provider: Cohere
) -> None:
    upstream.script(Script(pieces=WORDS, error_at=2, error=f"{KEY} fell over", usage=counts(3, 2)))
    chunks, error = await until_failure(provider)
    assert chunks == [
        Chunk(0, "one"),
        Chunk(0, " two"),
        Chunk(-1, usage=Usage(prompt_tokens=3, completion_tokens=2)),
    ]
    assert isinstance(error, UpstreamFailed)
    assert KEY not in error.message


@pytest.mark.parametrize("how", ["close_at", "reset_at"])
@pytest.mark.parametrize("at", [1, 2, 4])
async def test_a_stream_that_breaks_gives_what_came_and_fails(
    upstream: CohereUpstream, provider: Cohere, how: str, at: int
) -> None:
    upstream.script(Script(pieces=WORDS, **{how: at}))  # type: ignore[arg-type]
    chunks, error = await until_failure(provider)
    assert chunks == [Chunk(0, word) for word in WORDS[:at]]
    assert isinstance(error, UpstreamFailed)
    assert "127.0.0.1" not in error.message


@pytest.mark.parametrize("done", [True, False])
async def test_a_stream_without_its_last_event_is_broken(
    upstream: CohereUpstream, provider: Cohere, done: bool
) -> None:
    upstream.script(Script(pieces=WORDS, finish=None, done=done))
    chunks, error = await until_failure(provider)
    assert chunks == [Chunk(0, word) for word in WORDS]
    assert "too early" in error.message


async def test_done_need_not_come(upstream: CohereUpstream, provider: Cohere) -> None:
    upstream.script(Script(pieces=WORDS, done=False))
    chunks = [chunk async for batch in provider.stream(JOB, nothing) for chunk in batch]
    assert chunks[-2].finish_reason == "stop"


async def test_a_connection_that_goes_right_after_the_last_event_does_no_harm(
    upstream: CohereUpstream, provider: Cohere
) -> None:
    events = (delta("a") + message_end("COMPLETE", counts(1, 1))).decode()
    upstream.script(Script(raw=HEAD + events.rstrip()))
    chunks = [chunk async for batch in provider.stream(JOB, nothing) for chunk in batch]
    assert chunks == [
        Chunk(0, "a"),
        Chunk(0, "", "stop"),
        Chunk(-1, usage=Usage(prompt_tokens=1, completion_tokens=1)),
    ]


@pytest.mark.parametrize("at", [0, 2])
async def test_a_blocking_answer_that_breaks_fails(
    upstream: CohereUpstream, provider: Cohere, at: int
) -> None:
    upstream.script(Script(pieces=WORDS, reset_at=at))
    with pytest.raises(UpstreamFailed):
        await provider.complete(JOB, nothing)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"message": null}',
        '{"message": {}}',
        '{"message": {"content": [{"type": "text", "text": "a"}]}}',
        '{"message": {"role": "user", "content": []}}',
        '{"message": {"role": "assistant", "content": [{"text": "a"}]}}',
        '{"message": {"content": "text"}}',
        '{"message": {"content": [7]}}',
        '{"message": {"content": [{"type": "text", "text": 7}]}}',
        '{"message": {"content": []}, "finish_reason": 7}',
        '{"message": ' + "[" * 100_000,
        '{"usage": ' + "[" * 100_000,
    ],
)
async def test_an_answer_that_cannot_be_believed_fails(
    upstream: CohereUpstream, provider: Cohere, body: str
) -> None:
    for error in await failures(upstream, provider, Script(body=body)):
        assert isinstance(error, UpstreamFailed)


@pytest.mark.parametrize("body", ["<html>", "data: {}\n\n"])
async def test_another_content_type_fails(upstream: CohereUpstream, provider: Cohere, body: str) -> None:
    script = Script(headers={"Content-Type": "text/html"}, body=body)
    for error in await failures(upstream, provider, script):
        assert isinstance(error, UpstreamFailed)


async def test_an_endless_stream_is_cut_off(upstream: CohereUpstream, provider: Cohere) -> None:
    upstream.script(Script(raw=HEAD + delta("x" * 1000).decode() * 2000))
    chunks, error = await until_failure(provider)
    assert "too large" in error.message
    assert chunks


async def test_a_gigantic_event_is_not_waited_for(upstream: CohereUpstream, provider: Cohere) -> None:
    upstream.script(Script(raw=HEAD + "data: " + "x" * 5_000_000))
    _, error = await until_failure(provider)
    assert "too large" in error.message


async def test_silence_is_a_time_out(upstream: CohereUpstream) -> None:
    settings = ProviderSettings(kind="cohere", base_url=upstream.url, timeout_s=0.2, total_timeout_s=5)
    provider = Cohere("acme", settings, None)
    for error in await failures(upstream, provider, Script(silent=True)):
        assert type(error) is UpstreamTimeout
    await provider.aclose()


async def test_cancelling_a_blocking_call_ends_it_upstream(
    upstream: CohereUpstream, provider: Cohere
) -> None:
    upstream.script(Script(hold_at=0))
    call = asyncio.create_task(provider.complete(JOB, nothing))
    request = await upstream.request(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(1):
        await request.closed.wait()
    assert not request.answered.is_set()


async def test_cancelling_a_stream_between_chunks_ends_it_upstream(
    upstream: CohereUpstream, provider: Cohere
) -> None:
    upstream.script(Script(pieces=WORDS, hold_at=2))
    given: asyncio.Queue[str] = asyncio.Queue()

    async def consume() -> None:
        async for batch in provider.stream(JOB, nothing):
            for chunk in batch:
                given.put_nowait(chunk.text)

    call = asyncio.create_task(consume())
    assert [await given.get(), await given.get()] == ["one", " two"]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(1):
        await upstream.requests[0].closed.wait()
    assert not upstream.requests[0].answered.is_set()


async def test_closing_a_stream_ends_it_upstream(upstream: CohereUpstream, provider: Cohere) -> None:
    upstream.script(Script(pieces=WORDS, hold_at=1))
    chunks = provider.stream(JOB, nothing)
    assert [chunk.text for chunk in await anext(chunks)] == ["one"]
    await chunks.aclose()
    async with asyncio.timeout(1):
        await upstream.requests[0].closed.wait()
    assert not upstream.requests[0].answered.is_set()


@pytest.mark.parametrize("field", ("usage", "more"))
def test_what_is_not_looked_at_takes_no_memory(field: str) -> None:
    nested = ", ".join(["[]"] * 500_000)
    raw = f'{{"{field}": [{nested}]}}'.encode()
    tracemalloc.start()
    try:
        msgspec.json.decode(raw, type=Answer)
        assert tracemalloc.get_traced_memory()[1] < len(raw)
    finally:
        tracemalloc.stop()


async def test_a_large_answer_of_many_parts_is_read_only_as_far_as_an_honest_one_goes(
    upstream: CohereUpstream, provider: Cohere
) -> None:
    for many in (500, 513):
        content = [{"type": "text", "text": "x" * 200}] * many
        answer = {"message": {"role": "assistant", "content": content}, "finish_reason": "COMPLETE"}
        upstream.script(Script(body=answer))
    [choice] = (await provider.complete(replace(JOB, max_tokens=4000), nothing)).choices
    assert choice.text == "x" * 100_000
    with pytest.raises(UpstreamFailed, match="cannot be read"):
        await provider.complete(replace(JOB, max_tokens=4000), nothing)


async def test_a_large_error_in_a_200_is_still_an_error(upstream: CohereUpstream, provider: Cohere) -> None:
    upstream.script(Script(body={"message": "x" * 100_000}))
    with pytest.raises(UpstreamFailed, match="with an error"):
        await provider.complete(replace(JOB, max_tokens=4000), nothing)


def test_many_empty_parts_take_no_memory() -> None:
    parts = ", ".join(['{"type": ""}'] * 200_000)
    raw = f'{{"message": {{"role": "assistant", "content": [{parts}]}}}}'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(msgspec.ValidationError):
            read(raw)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
    finally:
        tracemalloc.stop()
