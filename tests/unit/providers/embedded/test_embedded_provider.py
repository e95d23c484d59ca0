"""The embedded provider with real engines and the bundled model."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import structlog
import uvloop

from headgate.config import EmbeddedSettings, ModelSettings, demo_model_path
from headgate.core.completion import Chunk, Completion, Job, Message, Usage
from headgate.core.errors import InvalidRequest, ModelUnavailable, Overloaded, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.spec import spec_for
from headgate.providers.embedded.supervisor import Restarts

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]

FRANCE = "The capital of France is"
ASK = (Message(role="user", content="What is the capital of France?"),)


def ignore() -> None:
    """For calls whose moment of sending does not matter."""


async def until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  # processes and queues have no event to wait for
            await asyncio.sleep(0.005)


async def chunks_of(provider: EmbeddedProvider, job: Job) -> list[Chunk]:
    async with aclosing(provider.stream(job, ignore)) as batches:
        return [chunk async for batch in batches for chunk in batch]


async def text_of(provider: EmbeddedProvider, job: Job) -> str:
    return (await provider.complete(job, ignore)).choices[0].text


def usage_of(chunks: Sequence[Chunk]) -> Usage:
    usage = chunks[-1].usage
    assert usage is not None
    return usage


def pid_of(provider: EmbeddedProvider) -> int:
    pid = provider.status()[0].pid
    assert pid is not None
    return pid


def sockets_in(folder: Path) -> list[Path]:
    return list(folder.glob("*/engine.sock"))


async def engine_slot(folder: Path) -> dict[str, Any]:
    """What the engine itself says of its only slot."""
    reader, writer = await asyncio.open_unix_connection(sockets_in(folder)[0])
    writer.write(b"GET /slots HTTP/1.0\r\n\r\n")
    _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    slots: list[dict[str, Any]] = msgspec.json.decode(body)
    assert len(slots) == 1
    return slots[0]


def joined(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def test_it_completes_real_text(start_provider: StartProvider, build_job: BuildJob) -> None:
    provider = await start_provider()
    assert (await text_of(provider, build_job(FRANCE, temperature=0))).startswith(" Paris")


async def test_it_answers_a_conversation_and_ends_by_itself(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    answer = await provider.complete(build_job(messages=ASK, temperature=0, max_tokens=60), ignore)
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert "<|" not in answer.choices[0].text


async def test_a_prompt_for_a_chat_answers_like_a_message(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    expected = await text_of(provider, build_job(messages=ASK, temperature=0))
    assert await text_of(provider, build_job(ASK[0].content, chat=True, temperature=0)) == expected


async def test_chunks_add_up_to_the_answer_and_its_usage(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=12)
    chunks = await chunks_of(provider, job)
    assert joined(chunks) == await text_of(provider, job)
    assert [chunk.index for chunk in chunks] == [0] * len(chunks)
    assert chunks[-1].finish_reason == "length"
    prompt_tokens = await provider.count_prompt(job)
    assert chunks[-1].usage == Usage(prompt_tokens=prompt_tokens, completion_tokens=12, source="provider")
    assert sum(chunk.tokens or 0 for chunk in chunks) == 12
    assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks[:-1])


async def test_a_stop_sequence_ends_the_text_before_it_and_never_shows(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0, max_tokens=40, stop=(" The oppo",))
    chunks = await chunks_of(provider, job)
    assert joined(chunks) == " Paris."
    assert chunks[-1].finish_reason == "stop"
    assert sum(chunk.tokens or 0 for chunk in chunks) == usage_of(chunks).completion_tokens


async def test_the_beginning_of_a_stop_sequence_is_not_lost_at_the_length_limit(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    free = await provider.complete(build_job(FRANCE, temperature=0, max_tokens=6), ignore)
    assert free.choices[0].text.endswith(" The opposite")
    stopped = build_job(FRANCE, temperature=0, max_tokens=6, stop=(" The opposite ends here",))
    assert await provider.complete(stopped, ignore) == free
    assert sum(chunk.tokens or 0 for chunk in await chunks_of(provider, stopped)) == 6


async def test_the_beginning_of_a_stop_sequence_is_not_lost_at_the_end(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    free = await text_of(provider, build_job(messages=ASK, temperature=0, max_tokens=60))
    stop = (free[-1] + " and no more",)
    assert await text_of(provider, build_job(messages=ASK, temperature=0, max_tokens=60, stop=stop)) == free


async def test_the_same_seed_gives_the_same_text_even_beside_others(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=3)
    alone = await text_of(provider, build_job("Once upon a time", seed=7, max_tokens=40))
    crowd = await asyncio.gather(
        *(text_of(provider, build_job("Once upon a time", seed=7, max_tokens=40)) for _ in range(6))
    )
    assert set(crowd) == {alone}
    assert await text_of(provider, build_job("Once upon a time", seed=8, max_tokens=40)) != alone


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, 2**63])
async def test_any_integer_is_a_repeatable_seed(
    start_provider: StartProvider, build_job: BuildJob, seed: int
) -> None:
    provider = await start_provider()
    job = build_job("Once upon a time", seed=seed, temperature=2.0, max_tokens=40)
    assert await text_of(provider, job) == await text_of(provider, job)


async def test_unseeded_calls_differ(start_provider: StartProvider, build_job: BuildJob) -> None:
    provider = await start_provider()
    job = build_job("Once upon a time", temperature=2.0, max_tokens=40)
    assert await text_of(provider, job) != await text_of(provider, job)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1e-40}, {"top_p": 0.0}, {"top_p": 0.0, "temperature": 2.0}]
)
async def test_extreme_sampling_values_are_greedy_not_broken(
    start_provider: StartProvider, build_job: BuildJob, sampling: dict[str, float]
) -> None:
    provider = await start_provider()
    greedy = await text_of(provider, build_job(FRANCE, temperature=0))
    assert await text_of(provider, build_job(FRANCE, **sampling)) == greedy


async def test_penalties_look_at_the_whole_generation(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()

    async def words(**penalties: float) -> list[str]:
        job = build_job("One day, Tom", temperature=0, max_tokens=150, **penalties)
        return (await text_of(provider, job)).split()

    rewarded = await words(presence_penalty=-2.0, frequency_penalty=-2.0)
    # With a short window the reward of an early word would fade; here the last hundred words repeat one.
    assert len(set(rewarded[-50:])) < len(set((await words())[-50:]))


@pytest.mark.parametrize("prompt", ["日本の首都は", "🎉👩‍👩‍👧🎉", "a\x00b", "", "\u202e\ufeff", "é\u0301"])
async def test_prompts_of_any_script_work_and_text_stays_whole(
    start_provider: StartProvider, build_job: BuildJob, prompt: str
) -> None:
    provider = await start_provider()
    job = build_job(prompt, seed=3, temperature=2.0, max_tokens=60)
    chunks = await chunks_of(provider, job)
    assert usage_of(chunks).prompt_tokens == await provider.count_prompt(job) >= 1
    assert joined(chunks).encode("utf-8").decode("utf-8") == await text_of(provider, job)
    assert sum(chunk.tokens or 0 for chunk in chunks) == usage_of(chunks).completion_tokens


async def test_a_prompt_may_fill_the_context_up_to_one_token(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec
) -> None:
    provider = await start_provider()
    prompt = "a" * 200
    job = build_job(prompt, max_tokens=1)
    while (count := await provider.count_prompt(job)) < demo.context_window - 1:
        prompt += " a" * (demo.context_window - 1 - count)
        job = msgspec.structs.replace(job, prompt=prompt)
    answer = await provider.complete(job, ignore)
    assert answer.usage == Usage(prompt_tokens=demo.context_window - 1, completion_tokens=1)


async def test_a_prompt_beyond_the_context_is_refused(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    with pytest.raises(InvalidRequest) as caught:
        await provider.complete(build_job(" a" * 600, max_tokens=1), ignore)
    assert caught.value.code == "context_length_exceeded"
    # And the engine goes on.
    assert await text_of(provider, build_job(FRANCE, temperature=0))


async def test_leaving_a_stream_frees_its_slot_in_the_engine(
    start_provider: StartProvider, build_job: BuildJob, tmp_path: Path
) -> None:
    provider = await start_provider(slots=1, folder=tmp_path)
    pid = pid_of(provider)
    stream = provider.stream(build_job("Once upon", temperature=2.0, max_tokens=480), ignore)
    await anext(stream)
    assert provider.status()[0].running == 1
    # Frozen meanwhile, the engine cannot simply have finished.
    os.kill(pid, signal.SIGSTOP)
    try:
        await stream.aclose()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert provider.status()[0].running == 0
    async with asyncio.timeout(1):
        while (slot := await engine_slot(tmp_path))["is_processing"]:
            pass
    # Prompt and generation together: far from the 480 asked for.
    assert slot["n_prompt_tokens"] < 300
    assert await text_of(provider, build_job(FRANCE, temperature=0, max_tokens=1))


async def test_a_cancelled_call_frees_its_slot(start_provider: StartProvider, build_job: BuildJob) -> None:
    provider = await start_provider(slots=1, max_queue=0)
    sent = asyncio.Event()
    call = asyncio.create_task(
        provider.complete(build_job("Once", temperature=2.0, max_tokens=480), sent.set)
    )
    await sent.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert provider.status()[0].running == 0
    assert await text_of(provider, build_job(FRANCE, temperature=0))


async def test_more_than_slots_and_queue_is_refused_and_who_leaves_the_queue_owes_nothing(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=1, max_queue=1)
    sent: list[str] = []
    stream = provider.stream(build_job("One"), lambda: sent.append("one"))
    await anext(stream)
    waiter = asyncio.create_task(provider.complete(build_job("Two"), lambda: sent.append("two")))
    await until(lambda: provider.status()[0].waiting == 1)
    with pytest.raises(Overloaded) as caught:
        await provider.complete(build_job("Three"), lambda: sent.append("three"))
    assert caught.value.retry_after is not None and caught.value.retry_after >= 1
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert provider.status()[0].waiting == 0
    assert sent == ["one"]
    await stream.aclose()
    assert await text_of(provider, build_job(FRANCE, temperature=0))


async def test_many_more_calls_than_slots_all_get_their_turn(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=2, max_queue=40)
    jobs = [build_job(f"{number} + 1 =", temperature=0, max_tokens=4) for number in range(40)]
    texts = await asyncio.gather(*(text_of(provider, job) for job in jobs))
    assert all(texts)


async def broken_off(provider: EmbeddedProvider, job: Job, end: Callable[[int], None]) -> list[bool]:
    """A stream whose engine is ended after its first tokens: how often it was sent. The next engine is up then.

    An engine that finished before it could be ended proves nothing, so the next one is tried.
    """
    for _ in range(20):
        pid = pid_of(provider)
        sent: list[bool] = []
        stream = provider.stream(job, lambda sent=sent: sent.append(True))  # type: ignore[misc]  # bound on purpose
        first = await anext(stream)
        assert first[0].text or first[-1].tokens
        end(pid)
        broken = False
        try:
            async for _ in stream:
                pass
        except UpstreamFailed as error:
            assert "embedded engine stopped" in error.message
            broken = True
        await until(lambda pid=pid: provider.status()[0].pid not in (pid, None))  # type: ignore[misc]  # as above
        if broken:
            return sent
    raise AssertionError("the engine was always faster")


async def test_killing_the_engine_fails_the_stream_and_then_it_recovers(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=1)
    job = build_job("Once upon", temperature=2.0, max_tokens=480)
    assert await broken_off(provider, job, lambda pid: os.kill(pid, signal.SIGKILL)) == [True]
    assert (await text_of(provider, build_job(FRANCE, temperature=0))).startswith(" Paris")


async def test_who_waits_for_a_stopped_engine_is_told_and_then_it_is_back(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(slots=1, restarts=Restarts(first_s=0.01, ask_s=0.05, silence_s=0.5))
    job = build_job("Once upon", temperature=2.0, max_tokens=480)
    assert await broken_off(provider, job, lambda pid: os.kill(pid, signal.SIGSTOP)) == [True]
    pid = pid_of(provider)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Overloaded, match="being restarted"):
        await provider.complete(build_job("Not counted yet"), ignore)
    await until(lambda: provider.status()[0].pid not in (pid, None))
    assert (await text_of(provider, build_job(FRANCE, temperature=0))).startswith(" Paris")


@pytest.mark.parametrize(
    "said",
    [b"nothing like JSON", b'{"content": "\xff"}', b'{"x": ' + b"[" * 5000],
    ids=["text", "bytes", "deep"],
)
async def test_what_the_engine_should_not_say_is_its_failure_not_ours(
    start_provider: StartProvider, build_job: BuildJob, tmp_path: Path, said: bytes
) -> None:
    provider = await start_provider(folder=tmp_path)
    counted = build_job(FRANCE, request_id="counted")
    await provider.count_prompt(counted)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        event = b"data: %s\n\n" % said if b"/completion" in head else said
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(event), event))
        await writer.drain()
        writer.close()

    (socket,) = sockets_in(tmp_path)
    socket.unlink()
    async with await asyncio.start_unix_server(answer, socket):
        for job in (counted, build_job(" a" * 400)):
            with pytest.raises(UpstreamFailed):
                await provider.complete(job, ignore)
    assert provider.status()[0].running == 0


async def test_engines_are_told_apart_by_the_models_they_serve(demo: ModelSpec, tmp_path: Path) -> None:
    files = [tmp_path / folder / "model.gguf" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(demo_model_path().read_bytes())
    specs = [
        msgspec.structs.replace(demo, name=name, file=str(file))
        for name, file in (("one", files[0]), ("two", files[1]), ("three", files[0]))
    ]
    statuses = EmbeddedProvider(specs, EmbeddedSettings()).status()
    assert [status.model for status in statuses] == ["one, three", "two"]
    assert str(tmp_path) not in str(statuses)


async def test_while_the_engine_is_down_calls_are_overloaded_and_nothing_is_sent(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider(restarts=Restarts(first_s=60))
    pid = pid_of(provider)
    counted = build_job(FRANCE, request_id="counted")
    await provider.count_prompt(counted)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: provider.status()[0].state == "down")
    sent: list[bool] = []
    for job in (counted, build_job("Not counted yet")):
        with pytest.raises(Overloaded) as caught:
            await provider.complete(job, lambda: sent.append(True))
        assert caught.value.retry_after is not None
    assert sent == []
    assert provider.unavailable(counted.model) is None
    with pytest.raises(Overloaded):
        await provider.count_prompt(build_job("Anything"))


async def test_an_engine_that_cannot_be_reached_is_overloaded_and_nothing_is_sent(
    start_provider: StartProvider, build_job: BuildJob, tmp_path: Path
) -> None:
    provider = await start_provider(folder=tmp_path)
    counted = build_job(FRANCE, request_id="counted")
    await provider.count_prompt(counted)
    for socket in sockets_in(tmp_path):
        socket.unlink()
    sent: list[bool] = []
    for job in (counted, build_job("Not counted yet")):
        with pytest.raises(Overloaded):
            await provider.complete(job, lambda: sent.append(True))
    assert sent == []
    assert provider.status()[0].running == 0


async def test_broken_models_are_unavailable_with_a_reason_and_spare_the_others(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_model_path().read_bytes()[:-1])  # so little missing only the engine sees
    specs = {
        name: spec_for(ModelSettings(name=name, provider="embedded"), tmp_path / f"{name}.gguf")
        for name in ("gone", "cut")
    }
    assert specs["gone"].broken and specs["cut"].broken is None
    provider = await start_provider(demo, *specs.values(), restarts=Restarts(first_s=0.01))
    assert "does not exist" in (provider.unavailable(specs["gone"]) or "")
    assert "corrupted or incomplete" in (provider.unavailable(specs["cut"]) or "")
    assert provider.unavailable(demo) is None
    with pytest.raises(ModelUnavailable, match="does not exist"):
        await provider.complete(build_job("Hello", model=specs["gone"]), ignore)
    assert await text_of(provider, build_job(FRANCE, temperature=0))


async def test_logs_tell_of_the_engine_and_never_of_prompts(
    start_provider: StartProvider, build_job: BuildJob, capfd: pytest.CaptureFixture[str]
) -> None:
    with structlog.testing.capture_logs() as logs:
        provider = await start_provider(restarts=Restarts(first_s=0.01))
        pid = pid_of(provider)
        await text_of(provider, build_job("canary-in-a-prompt"))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: provider.status()[0].pid not in (pid, None))
    assert [entry["event"] for entry in logs] == ["engine up", "engine stopped", "engine up"]
    assert "SIGKILL" in logs[1]["reason"]
    assert "canary" not in str(logs)
    assert "canary" not in "".join(capfd.readouterr())


async def test_closing_ends_every_engine_and_running_streams(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    for _ in range(20):  # an engine may have finished before it could be stopped
        provider = await start_provider()
        pid = pid_of(provider)
        stream = provider.stream(build_job("Once upon", temperature=2.0, max_tokens=480), ignore)
        await anext(stream)
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(20):
            await provider.aclose()
        assert not psutil.pid_exists(pid)
        try:
            async for _batch in stream:
                pass
        except UpstreamFailed:
            return
    raise AssertionError("the engine was always faster")


def test_it_works_on_uvloop_too(demo: ModelSpec, build_job: BuildJob) -> None:
    async def complete() -> Completion:
        provider = EmbeddedProvider([demo], EmbeddedSettings())
        await provider.start()
        try:
            await provider.ready_or_failed(30)
            return await provider.complete(build_job(messages=ASK, temperature=0, max_tokens=60), ignore)
        finally:
            await provider.aclose()

    assert "Paris" in uvloop.run(complete()).choices[0].text
