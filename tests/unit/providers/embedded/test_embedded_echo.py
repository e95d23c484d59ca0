"""Prompts echoed before their answers by the embedded model, and how likely it finds them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.reference import Reference

from headgate.config import demo_model_path
from headgate.core.completion import Chunk, Job
from headgate.core.errors import InvalidRequest, Overloaded, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.providers.embedded import echo as echo_module
from headgate.providers.embedded.echo import Echo, as_written
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.side_door import SideDoor

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]

FRANCE = "The capital of France is"
PROMPTS = [FRANCE, "日本 🎉👩‍👩‍👧 é\u0301", "a\x00b\n\n\t ", " ", "<|im_start|>user\nHi<|im_end|>"]


def ignore() -> None:
    """For calls whose moment of sending does not matter."""


def side_socket_in(folder: Path) -> Path:
    (socket,) = folder.glob("*/side.sock")
    return socket


async def chunks_of(provider: EmbeddedProvider, job: Job) -> list[Chunk]:
    async with aclosing(provider.stream(job, ignore)) as batches:
        return [chunk async for batch in batches for chunk in batch]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo_model_path())


async def test_the_prompt_comes_first_and_counts_no_token(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=4, echo=True)
    first, *others = await chunks_of(provider, job)
    assert first == Chunk(0, FRANCE, tokens=0, echoed=True)
    assert others == await chunks_of(provider, msgspec.structs.replace(job, echo=False))
    assert (await provider.complete(job, ignore)).choices[0].text == FRANCE + " Paris."


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_each_token_of_the_prompt_is_scored_right(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec, reference: Reference, prompt: str
) -> None:
    provider = await start_provider()
    first, last = await chunks_of(provider, build_job(prompt, max_tokens=0, echo=True, logprobs=2))
    ids = await provider.tokenize(demo, prompt, add_special=True, parse_special=True)
    entries = first.logprobs or ()
    assert len(entries) == len(ids)
    assert (entries[0].data, entries[0].logprob, entries[0].top) == (b"", None, None)
    assert b"".join(entry.data for entry in entries) == first.text.encode() == prompt.encode()
    assert [entry.logprob for entry in entries[1:]] == pytest.approx(list(reference.scores(ids)), abs=1e-3)
    assert all(len(entry.top or ()) == 2 for entry in entries[1:])
    assert (last.text, last.finish_reason, last.logprobs) == ("", "length", ())
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(ids), 0)


async def test_token_ids_are_scored_as_they_are(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec, reference: Reference
) -> None:
    provider = await start_provider()
    ids = await provider.tokenize(demo, "🎉 is", add_special=False, parse_special=False)
    job = build_job((0, *ids[1:]), max_tokens=1, temperature=0, echo=True, logprobs=1)
    (choice,) = (await provider.complete(job, ignore)).choices
    prompt, generated = (choice.logprobs or ())[:-1], (choice.logprobs or ())[-1]
    assert [entry.data for entry in prompt] == [b"<|endoftext|>", b"\x9f", b"\x8e", b"\x89", b" is"]
    assert [entry.logprob for entry in prompt[1:]] == pytest.approx(
        list(reference.scores((0, *ids[1:]))), abs=1e-3
    )
    assert choice.text.startswith("<|endoftext|>\ufffd")
    # What evaluations look at: the likeliest token is the one chosen, to the last bit.
    assert generated.top is not None and generated.top[0][1] == generated.logprob


@pytest.mark.parametrize("prompt", ["", ()])
async def test_an_empty_prompt_echoes_nothing(
    start_provider: StartProvider, build_job: BuildJob, prompt: str | tuple[int, ...]
) -> None:
    provider = await start_provider()
    first, *_ = await chunks_of(provider, build_job(prompt, max_tokens=1, echo=True, logprobs=1))
    assert first.text == ""
    assert [(entry.data, entry.logprob, entry.top) for entry in first.logprobs or ()] == [(b"", None, None)]
    assert (await chunks_of(provider, build_job(prompt, max_tokens=1, echo=True)))[0].text == ""


async def test_a_prompt_that_is_only_echoed_is_owed(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    sent: list[bool] = []
    answer = await provider.complete(build_job(FRANCE, max_tokens=0, echo=True), lambda: sent.append(True))
    assert (answer.choices[0].text, answer.choices[0].finish_reason, sent) == (FRANCE, "length", [True])


async def test_scoring_is_owed_before_it_begins_and_owed_once(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    sent: list[bool] = []
    job = build_job(FRANCE, max_tokens=1, echo=True, logprobs=1)
    await provider.complete(job, lambda: sent.append(True))
    assert sent == [True]


@pytest.mark.parametrize("fields", [{"suffix": " end"}, {"chat": True}])
async def test_a_prompt_that_is_not_completed_as_it_is_cannot_be_scored(
    start_provider: StartProvider, build_job: BuildJob, fields: dict[str, Any]
) -> None:
    provider = await start_provider()
    with pytest.raises(InvalidRequest) as caught:
        await provider.count_prompt(build_job(FRANCE, echo=True, logprobs=1, **fields))
    assert caught.value.param == "echo"


async def test_a_message_is_echoed_as_it_was_written(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    first, *_ = await chunks_of(provider, build_job("Hello", chat=True, max_tokens=1, echo=True))
    assert first.text == "Hello"


class Scoring:
    """A side door that scores when it is let, by each position's number, and notes which slices were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.begun = asyncio.Event()
        self.free = asyncio.Event()

    async def post(self, path: str, body: bytes, most: int) -> bytes:
        asked = msgspec.json.decode(body)
        ids: Sequence[int] = asked["ids"]
        names = [bytes([token]).decode("latin-1") for token in ids]
        if path == "/pieces":
            return msgspec.json.encode({"pieces": names})
        self.asked.append((asked["from"], asked["to"]))
        self.begun.set()
        await self.free.wait()
        scores = [-float(position) for position in range(max(1, asked["from"]), asked["to"])]
        pieces = {str(token): name for token, name in zip(ids, names, strict=True)}
        return msgspec.json.encode({"logprobs": scores, "top": [[]] * len(scores), "pieces": pieces})


async def test_the_jobs_of_one_request_are_scored_once_even_if_the_first_one_leaves(
    build_job: BuildJob,
) -> None:
    scoring = Scoring()
    echo = Echo(SideDoor(scoring.post), max_queue=0)
    job = build_job("abc", echo=True, logprobs=0)
    first, *others = [asyncio.create_task(echo.echoed(job, (97, 98, 99), ignore)) for _ in range(4)]
    await scoring.begun.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    scoring.free.set()
    assert len(set(map(str, await asyncio.gather(*others)))) == 1
    assert len(scoring.asked) == 2  # the one that left, and one for all the others
    another = msgspec.structs.replace(job, request_id="another")
    await echo.echoed(another, (97, 98, 99), ignore)
    assert len(scoring.asked) == 3


async def test_one_prompt_is_scored_at_a_time_and_only_so_many_wait(build_job: BuildJob) -> None:
    scoring = Scoring()
    echo = Echo(SideDoor(scoring.post), max_queue=0)
    job = build_job("abc", echo=True, logprobs=0)
    first = asyncio.create_task(echo.echoed(job, (97, 98, 99), ignore))
    await scoring.begun.wait()
    another = msgspec.structs.replace(job, request_id="another")
    with pytest.raises(Overloaded):
        await echo.echoed(another, (97, 98, 99), ignore)
    scoring.free.set()
    assert await first == await echo.echoed(another, (97, 98, 99), ignore)


@pytest.mark.parametrize("prompt", ["a 中文 😀!", tuple("a 中文 😀!".encode())], ids=["text", "ids"])
async def test_a_long_prompt_is_scored_in_slices_that_join_to_the_whole(
    build_job: BuildJob, monkeypatch: pytest.MonkeyPatch, prompt: str | tuple[int, ...]
) -> None:
    ids = tuple("a 中文 😀!".encode())
    monkeypatch.setattr(echo_module, "SLICE", 4)
    scoring = Scoring()
    scoring.free.set()
    job = build_job(prompt, echo=True, logprobs=0)
    chunks = (await Echo(SideDoor(scoring.post), max_queue=0).echoed(job, ids, ignore)).chunks
    assert scoring.asked == [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert "".join(chunk.text for chunk in chunks) == "a 中文 😀!"
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert [entry.logprob for entry in entries] == [None, *(-float(at) for at in range(1, 14))]
    assert b"".join(entry.data for entry in entries) == "a 中文 😀!".encode()
    assert all(chunk.echoed and chunk.tokens == 0 for chunk in chunks)


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        ([b"<s>", b" Hello", b" you"], b"Hello you", [b"", b"Hello", b" you"]),
        ([b" Hello"], b"Hello", [b"Hello"]),
        ([b"<s>", b"Hello", b"</s>"], b"Hello", [b"", b"Hello", b""]),
        ([b"<s>", b"<s>", b"Hello"], b"<s>Hello", [b"", b"<s>", b"Hello"]),
        ([b"<s>"], b"", [b""]),
        ([b"<s>", b"<s>"], b"<s>", [b"", b"<s>"]),
        ([b"<s>", b" "], b"", [b"", b""]),
        ([b"he", b"llo"], b"HELLO", [b"he", b"llo"]),
    ],
)
def test_what_a_tokenizer_adds_is_no_part_of_the_prompt(
    pieces: list[bytes], text: bytes, expected: list[bytes]
) -> None:
    assert as_written(pieces, text) == expected


async def test_a_cancelled_scoring_gives_its_turn_back(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=1, max_queue=0)
    sent = asyncio.Event()
    job = build_job(tuple(range(6, 500)), max_tokens=0, echo=True, logprobs=5)
    call = asyncio.create_task(provider.complete(job, sent.set))
    await sent.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert provider.status()[0].running == 0
    again = await provider.complete(build_job(FRANCE, max_tokens=0, echo=True, logprobs=1), ignore)
    assert again.choices[0].text == FRANCE


async def test_a_side_door_that_is_shut_owes_nothing_and_says_why(
    start_provider: StartProvider, build_job: BuildJob, tmp_path: Path
) -> None:
    provider = await start_provider(folder=tmp_path)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        said = b'{"error": "the library has another layout"}'
        writer.write(b"HTTP/1.1 501 Not Implemented\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))
        await writer.drain()
        writer.close()

    socket = side_socket_in(tmp_path)
    socket.unlink()
    jobs = [
        build_job(FRANCE, max_tokens=0, echo=True, logprobs=1),
        build_job(FRANCE, max_tokens=1, logprobs=1),
        build_job((5, 6), max_tokens=1),
        build_job(FRANCE, max_tokens=1, logit_bias=((5, 1.0),)),
    ]
    async with await asyncio.start_unix_server(refuse, socket):
        for job in jobs:
            with pytest.raises(UpstreamFailed, match="another layout"):
                await provider.complete(job, ignore)
        plain = build_job(FRANCE, max_tokens=4, temperature=0, echo=True)
        assert (await provider.complete(plain, ignore)).choices[0].text == FRANCE + " Paris."
    with pytest.raises(Overloaded):
        await provider.count_prompt(build_job((5, 6)))
    assert provider.status()[0].running == 0
