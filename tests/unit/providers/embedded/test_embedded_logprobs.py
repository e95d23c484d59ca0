"""Log probabilities of what the embedded model generates: one entry for each token, whatever the engine leaves out."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from tests.support.reference import Reference

from headgate.config import demo_model_path
from headgate.core.completion import Chunk, Job, Message, ResponseFormat, TokenLogprob, Usage
from headgate.providers.embedded.client import EngineRefusal
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.scored import ScoredGeneration
from headgate.providers.embedded.side_door import SideDoor

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]

FRANCE = "The capital of France is"
ASK = (Message(role="user", content="What is the capital of France?"),)
MIXED = "a🎉é b日本!"
"""Its characters beyond ASCII are four, two, three and three tokens for the demo model."""


def ignore() -> None:
    """For calls whose moment of sending does not matter."""


def only(text: str) -> ResponseFormat:
    """Makes the model answer this text, as a JSON string."""
    return ResponseFormat(kind="json_schema", schema=msgspec.json.encode({"const": text}))


async def chunks_of(provider: EmbeddedProvider, job: Job) -> list[Chunk]:
    async with aclosing(provider.stream(job, ignore)) as batches:
        return [chunk async for batch in batches for chunk in batch]


def entries_of(chunks: Sequence[Chunk]) -> list[TokenLogprob]:
    return [entry for chunk in chunks for entry in chunk.logprobs or ()]


def bytes_of(entries: Sequence[TokenLogprob]) -> bytes:
    return b"".join(entry.data for entry in entries)


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def usage_of(chunks: Sequence[Chunk]) -> Usage:
    usage = chunks[-1].usage
    assert usage is not None
    return usage


def without(job: Job) -> Job:
    return msgspec.structs.replace(job, logprobs=None)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo_model_path())


async def assert_scored_right(
    provider: EmbeddedProvider, reference: Reference, job: Job, entries: Sequence[TokenLogprob], text: str
) -> None:
    """Each entry's log probability and alternatives against an independent computation."""
    assert isinstance(job.prompt, str)
    prompt = await provider.tokenize(job.model, job.prompt, add_special=True, parse_special=True)
    ids = await provider.tokenize(job.model, text, add_special=False, parse_special=False)
    words = [entry for entry in entries if not entry.end]
    assert len(ids) == len(words)
    rows = reference.logprobs(prompt + ids)
    for position, (token, entry) in enumerate(zip(ids, words, strict=True), start=len(prompt) - 1):
        row = rows[position]
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert entry.top is not None
        best = sorted(row, reverse=True)[: len(entry.top)]
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=1e-3)


async def test_each_token_has_its_own_log_probability_and_the_best_alternatives(
    start_provider: StartProvider, build_job: BuildJob, reference: Reference
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=12, logprobs=3)
    chunks = await chunks_of(provider, job)
    entries = entries_of(chunks)
    assert [len(entry.top or ()) for entry in entries] == [3] * 12
    assert all(entry.top and entry.top[0] == (entry.data, entry.logprob) for entry in entries)
    assert all(chunk.text.encode() == bytes_of(chunk.logprobs or ()) for chunk in chunks)
    await assert_scored_right(provider, reference, job, entries, text_of(chunks))


async def test_no_alternatives_are_given_where_none_are_asked_for(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=4, logprobs=0)
    entries = entries_of(await chunks_of(provider, job))
    assert [entry.top for entry in entries] == [()] * 4
    assert all(entry.logprob is not None and entry.logprob < 0 for entry in entries)


async def test_blocking_and_streamed_answers_have_the_same_log_probabilities(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, seed=5, max_tokens=20, logprobs=2)
    (choice,) = (await provider.complete(job, ignore)).choices
    chunks = await chunks_of(provider, job)
    assert choice.text == text_of(chunks)
    assert choice.logprobs == tuple(entries_of(chunks))
    assert (await provider.complete(without(job), ignore)).choices[0].logprobs is None


async def test_tokens_that_split_a_character_each_have_an_entry(
    start_provider: StartProvider, build_job: BuildJob, reference: Reference
) -> None:
    provider = await start_provider()
    job = build_job("Say", temperature=0, max_tokens=40, logprobs=2, response_format=only(MIXED))
    chunks = await chunks_of(provider, job)
    entries = entries_of(chunks)
    assert text_of(chunks) == f'"{MIXED}"'
    assert len(entries) == usage_of(chunks).completion_tokens
    assert {b"\xf0", b"\x9f", b"\x8e", b"\x89"} < {entry.data for entry in entries}
    for chunk in chunks:
        assert chunk.tokens == len(chunk.logprobs or ())
        assert bytes_of(chunk.logprobs or ()) == chunk.text.encode()
    await assert_scored_right(provider, reference, job, entries, text_of(chunks))


async def test_the_end_token_has_an_entry_of_its_own(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    chunks = await chunks_of(provider, build_job(messages=ASK, temperature=0, max_tokens=60, logprobs=2))
    entries = entries_of(chunks)
    assert chunks[-1].finish_reason == "stop"
    assert len(entries) == usage_of(chunks).completion_tokens
    assert [entry.end for entry in entries] == [False] * (len(entries) - 1) + [True]
    assert (entries[-1].data, len(entries[-1].top or ())) == (b"", 2)
    # Special tokens have no text in an answer, but they have names among the alternatives.
    assert entries[-1].top is not None and entries[-1].top[0][0] == b"<|im_end|>"


async def test_an_end_token_at_the_length_limit_is_still_an_end(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    long = build_job(messages=ASK, temperature=0, max_tokens=60, logprobs=1)
    count = usage_of(await chunks_of(provider, long)).completion_tokens
    for limit, expected in ((count, "stop"), (count - 1, "length")):
        job = msgspec.structs.replace(long, max_tokens=limit)
        chunks = await chunks_of(provider, job)
        plain = await chunks_of(provider, without(job))
        assert chunks[-1].finish_reason == plain[-1].finish_reason == expected
        assert usage_of(chunks) == usage_of(plain)
        assert len(entries_of(chunks)) == limit


@pytest.mark.parametrize("limit", range(1, 16))
async def test_a_limit_within_a_character_keeps_the_entries_and_drops_the_text(
    start_provider: StartProvider, build_job: BuildJob, limit: int
) -> None:
    provider = await start_provider()
    job = build_job("Say", temperature=0, max_tokens=40, logprobs=1, response_format=only(MIXED))
    whole = entries_of(await chunks_of(provider, job))
    cut = msgspec.structs.replace(job, max_tokens=limit)
    chunks = await chunks_of(provider, cut)
    plain = await chunks_of(provider, without(cut))
    entries = entries_of(chunks)
    assert [entry.data for entry in entries] == [entry.data for entry in whole[:limit]]
    assert text_of(chunks) == text_of(plain) == bytes_of(entries).decode(errors="ignore")
    assert chunks[-1].finish_reason == plain[-1].finish_reason == "length"
    assert usage_of(chunks) == usage_of(plain)
    assert sum(chunk.tokens or 0 for chunk in chunks) == limit


@pytest.mark.parametrize("seed", range(8))
async def test_asking_for_log_probabilities_does_not_change_the_answer(
    start_provider: StartProvider, build_job: BuildJob, seed: int
) -> None:
    provider = await start_provider()
    job = build_job(
        "One day, Tom", seed=seed, temperature=1.5, max_tokens=60, logprobs=2, stop=(".", "\n\n", " the ca")
    )
    chunks = await chunks_of(provider, job)
    plain = await chunks_of(provider, without(job))
    assert text_of(chunks) == text_of(plain)
    assert chunks[-1].finish_reason == plain[-1].finish_reason
    assert usage_of(chunks) == usage_of(plain)
    assert sum(chunk.tokens or 0 for chunk in chunks) == usage_of(chunks).completion_tokens


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        # From the model: " P", "ar", "is", ".", " The", " opposite", …
        ((" The oppo",), " Paris.", [b" P", b"ar", b"is", b"."]),
        (("is. T",), " Par", [b" P", b"ar"]),
        (("s.",), " Pari", [b" P", b"ar", b"is"]),
        (("zzz", "aris", "is"), " P", [b" P"]),
        (("he opp", " oppos"), " Paris. T", [b" P", b"ar", b"is", b".", b" The"]),
    ],
)
async def test_a_stop_word_drops_the_tokens_from_its_beginning_on(
    start_provider: StartProvider,
    build_job: BuildJob,
    stop: tuple[str, ...],
    text: str,
    kept: list[bytes],
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=40, logprobs=1, stop=stop)
    chunks = await chunks_of(provider, job)
    plain = await chunks_of(provider, without(job))
    assert text_of(chunks) == text_of(plain) == text
    assert [entry.data for entry in entries_of(chunks)] == kept
    assert chunks[-1].finish_reason == "stop"
    assert usage_of(chunks) == usage_of(plain)


async def test_a_stop_word_that_never_comes_costs_no_entry(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    stop = (" The opposite ends here", "Paris")
    free = await chunks_of(provider, build_job(FRANCE, temperature=0, max_tokens=6, logprobs=1))
    held = await chunks_of(
        provider, build_job(FRANCE, temperature=0, max_tokens=6, logprobs=1, stop=stop[:1])
    )
    assert text_of(held) == text_of(free)
    assert entries_of(held) == entries_of(free)
    assert all(chunk.text.encode() == bytes_of(chunk.logprobs or ()) for chunk in held)


async def test_a_stop_word_beyond_ascii_is_found_between_split_tokens(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(
        "Say", temperature=0, max_tokens=40, logprobs=0, stop=("é b日",), response_format=only(MIXED)
    )
    chunks = await chunks_of(provider, job)
    assert text_of(chunks) == '"a🎉' == text_of(await chunks_of(provider, without(job)))
    assert [entry.data for entry in entries_of(chunks)] == [b'"', b"a", b"\xf0", b"\x9f", b"\x8e", b"\x89"]


@pytest.mark.parametrize("limit", range(1, 17))
async def test_the_beginning_of_a_stop_word_beyond_ascii_is_not_lost_at_the_length_limit(
    start_provider: StartProvider, build_job: BuildJob, limit: int
) -> None:
    provider = await start_provider()
    free = build_job("Say", temperature=0, max_tokens=limit, response_format=only(MIXED))
    stop = ("🎉 é b日本語", "日本!!")
    held = build_job("Say", temperature=0, max_tokens=limit, stop=stop, response_format=only(MIXED))
    chunks = await chunks_of(provider, held)
    assert text_of(chunks) == text_of(await chunks_of(provider, free))
    assert sum(chunk.tokens or 0 for chunk in chunks) == usage_of(chunks).completion_tokens == limit
    assert entries_of(chunks) == []
    scored = await chunks_of(provider, msgspec.structs.replace(held, logprobs=0))
    assert text_of(scored) == text_of(chunks)
    assert len(entries_of(scored)) == limit


async def test_leaving_a_scored_stream_frees_its_slot(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=1, max_queue=0)
    sent = asyncio.Event()
    job = build_job("Once", temperature=2.0, max_tokens=480, logprobs=5)
    call = asyncio.create_task(provider.complete(job, sent.set))
    await sent.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert provider.status()[0].running == 0
    assert entries_of(await chunks_of(provider, build_job(FRANCE, max_tokens=2, logprobs=1)))


def event(token: int, text: bytes, generated: int) -> bytes:
    entry = {"id": token, "logprob": -1.5, "bytes": list(text), "top_logprobs": []}
    return msgspec.json.encode({"tokens_predicted": generated, "completion_probabilities": [entry]})


class ForgetfulSide:
    """A side door that knows every token's byte and finds no lost tokens."""

    async def post(self, path: str, body: bytes, most: int) -> bytes:
        asked = msgspec.json.decode(body)
        if path == "/pieces":
            return msgspec.json.encode({"pieces": [chr(token) for token in asked["ids"]]})
        raise EngineRefusal(400, b'{"error": "no such tokens"}')


async def test_what_cannot_be_found_again_still_has_its_bytes_in_the_next_entry(build_job: BuildJob) -> None:
    async def otherwise(count: int) -> tuple[int, ...]:
        """Generating once more gave something else."""
        return (0x62,) * count

    job = build_job("Say", max_tokens=8, logprobs=0)
    generation = ScoredGeneration(job, (1, 2), SideDoor(ForgetfulSide().post), otherwise)
    chunks = await generation.read([event(0x61, b"a", 1), event(0xA9, "é".encode(), 3)])
    end = b'{"stop": true, "stop_type": "eos", "tokens_predicted": 3}'
    chunks += await generation.read([end])
    chunks.append(await generation.last())
    assert [entry.data for entry in entries_of(chunks)] == [b"a", "é".encode()]
    assert usage_of(chunks).completion_tokens == 3 == sum(chunk.tokens or 0 for chunk in chunks)


HALF, QUARTERS = 178, (259, 252, 228)
"""In the demo model: the token that begins "😀", and those that go on with it."""


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("most", [1, 2, 7])
async def test_an_answer_that_only_ever_begins_a_character_has_an_entry_for_each_token(
    start_provider: StartProvider, build_job: BuildJob, reference: Reference, temperature: float, most: int
) -> None:
    provider = await start_provider()
    job = build_job("Hi", temperature=temperature, max_tokens=most, logprobs=1, logit_bias=((HALF, 100.0),))
    chunks = await chunks_of(provider, job)
    entries = entries_of(chunks)
    assert [entry.data for entry in entries] == [b"\xf0"] * most
    assert "".join(chunk.text for chunk in chunks) == ""
    assert usage_of(chunks).completion_tokens == most
    ids = [0, *await provider.tokenize(job.model, "Hi", add_special=False, parse_special=True)]
    rows = reference.logprobs([*ids, *[HALF] * most])
    for position, entry in enumerate(entries, len(ids) - 1):
        assert entry.logprob == pytest.approx(rows[position, HALF], abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
async def test_tokens_that_nobody_tells_are_found_by_generating_them_once_more(
    start_provider: StartProvider, build_job: BuildJob, seed: int
) -> None:
    provider = await start_provider()
    bias = tuple((token, 100.0) for token in (HALF, *QUARTERS[:2], 45, 0))
    job = build_job("Hi", temperature=2.0, seed=seed, max_tokens=9, logprobs=0, logit_bias=bias)
    chunks = await chunks_of(provider, job)
    entries = entries_of(chunks)
    assert len(entries) == usage_of(chunks).completion_tokens
    finish = next(chunk.finish_reason for chunk in reversed(chunks) if chunk.finish_reason)
    assert [entry.end for entry in entries] == [False] * (len(entries) - 1) + [finish == "stop"]
    told = b"".join(entry.data for entry in entries).decode("utf-8", "ignore")
    assert "".join(chunk.text for chunk in chunks).replace("\ufffd", "") == told


@pytest.mark.parametrize("stop", [(), ("x",), ("ж",)])
@pytest.mark.parametrize("logprobs", [None, 0])
async def test_several_tokens_may_complete_a_character_that_the_prompt_began(
    start_provider: StartProvider, build_job: BuildJob, logprobs: int | None, stop: tuple[str, ...]
) -> None:
    provider = await start_provider()
    again = QUARTERS[1]
    job = build_job(
        (HALF, QUARTERS[0]), echo=True, logprobs=logprobs, max_tokens=2, temperature=0.0,
        logit_bias=((again, 100.0),), stop=stop,
    )  # fmt: skip
    chunks = await chunks_of(provider, job)
    assert "".join(chunk.text for chunk in chunks) == b"\xf0\x9f\x98\x98".decode()
    assert usage_of(chunks).completion_tokens == 2
    if logprobs is not None:
        assert [entry.data for entry in entries_of(chunks)] == [b"\xf0", b"\x9f", b"\x98", b"\x98"]


async def test_a_character_begun_by_the_prompt_is_completed_by_the_answer(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    *begun, last = (HALF, *QUARTERS)
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "logit_bias": ((last, 100.0),)}
    for logprobs in (None, 1):
        job = build_job(tuple(begun), echo=True, logprobs=logprobs, **fields)
        chunks = await chunks_of(provider, job)
        assert "".join(chunk.text for chunk in chunks) == "😀"
        entries = entries_of(chunks)
        assert b"".join(entry.data for entry in entries) == ("😀".encode() if logprobs else b"")
    cut = await chunks_of(provider, build_job(tuple(begun), echo=True, **fields | {"max_tokens": 0}))
    assert "".join(chunk.text for chunk in cut) == "\ufffd"
