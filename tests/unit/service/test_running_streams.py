"""A stream's chunks on their way to the reader, and how running requests are found and stopped."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.completion import Chunk
from headgate.core.errors import Overloaded, UpstreamFailed
from headgate.service.streams import BUFFER_CHUNKS, Running, RunningStream, Streams

LONG = 60.0


def stream(**fields: Any) -> RunningStream:
    given = {"dialect": "dify", "stream_id": "s1", "account": "ann", "app": None, "user": None}
    return RunningStream(**given | fields)


def texts(item: object) -> list[str]:
    assert isinstance(item, list)
    return [chunk.text for chunk in item]


def chunks(*words: str) -> list[Chunk]:
    return [Chunk(0, word) for word in words]


@asynccontextmanager
async def begun(coroutine: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """The coroutine as a task that has run as far as it can."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


class TestReading:
    async def test_what_waits_leaves_together_and_in_order(self) -> None:
        running = stream()
        await running.put(chunks("a", "b"))
        await running.put(chunks("c"))
        assert texts(await running.next(LONG)) == ["a", "b", "c"]

    async def test_a_waiting_reader_gets_the_next_chunk(self) -> None:
        running = stream()
        async with begun(running.next(LONG)) as reading:
            assert not reading.done()
            await running.put(chunks("a"))
            assert texts(await reading) == ["a"]

    async def test_nothing_for_the_whole_timeout_is_none(self) -> None:
        running = stream()
        assert await running.next(0) is None
        assert await running.next(0.001) is None

    async def test_a_timeout_loses_nothing(self) -> None:
        running = stream()
        assert await running.next(0) is None
        await running.put(chunks("a"))
        assert texts(await running.next(0)) == ["a"]

    async def test_an_error_comes_after_the_last_chunk_and_nothing_after_it(self) -> None:
        running = stream()
        await running.put(chunks("a"))
        running.finish(UpstreamFailed("broken"))
        assert texts(await running.next(LONG)) == ["a"]
        with pytest.raises(UpstreamFailed, match="broken"):
            await running.next(LONG)
        with pytest.raises(EOFError):
            await running.next(LONG)

    async def test_the_end_wakes_a_waiting_reader(self) -> None:
        running = stream()
        async with begun(running.next(LONG)) as reading:
            running.finish(Overloaded("over"))
            with pytest.raises(Overloaded):
                await reading

    async def test_a_reader_that_gave_up_leaves_the_chunks_for_the_next(self) -> None:
        running = stream()
        async with begun(running.next(LONG)):
            pass
        await running.put(chunks("a"))
        assert texts(await running.next(LONG)) == ["a"]

    @given(
        st.lists(st.lists(st.text(max_size=2), max_size=4), max_size=12),
        st.lists(st.integers(0, 3), min_size=1, max_size=8),
        st.lists(st.integers(0, 3), min_size=1, max_size=8),
    )
    async def test_no_schedule_loses_doubles_or_reorders_chunks(
        self, batches: Sequence[Sequence[str]], producer_pauses: list[int], reader_pauses: list[int]
    ) -> None:
        running = stream()
        got: list[str] = []

        async def pause(pauses: Iterator[int]) -> None:
            for _ in range(next(pauses)):
                await asyncio.sleep(0)

        async def produce() -> None:
            pauses = itertools.cycle(producer_pauses)
            for batch in batches:
                await running.put(chunks(*batch))
                await pause(pauses)
            running.finish(Overloaded("the end"))

        async def read() -> None:
            pauses = itertools.cycle(reader_pauses)
            while True:
                got.extend(texts(await running.next(LONG)))
                await pause(pauses)

        producing = asyncio.ensure_future(produce())
        with pytest.raises(Overloaded):
            await read()
        await producing
        assert got == [word for batch in batches for word in batch]


class TestBackpressure:
    async def test_a_producer_far_ahead_waits_for_the_reader(self) -> None:
        running = stream()
        await running.put(chunks(*["x"] * BUFFER_CHUNKS))
        async with begun(running.put(chunks("y"))) as putting:
            assert not putting.done()
            assert len(texts(await running.next(LONG))) == BUFFER_CHUNKS + 1
            await putting

    async def test_all_producers_of_a_stream_go_on_when_it_is_read(self) -> None:
        running = stream()
        await running.put(chunks(*["x"] * BUFFER_CHUNKS))
        async with begun(running.put(chunks("a"))) as one, begun(running.put(chunks("b"))) as two:
            assert not one.done() and not two.done()
            assert texts(await running.next(LONG))[-2:] == ["a", "b"]
            await asyncio.gather(one, two)

    async def test_memory_is_bounded_by_the_buffer_and_a_batch(self) -> None:
        running = stream()

        async def produce() -> None:
            while True:
                await running.put(chunks(*["x"] * 100))

        async with begun(produce()):
            for _ in range(5):
                for _ in range(50):
                    await asyncio.sleep(0)
                assert len(texts(await running.next(LONG))) <= BUFFER_CHUNKS + 100

    async def test_a_producer_that_waits_can_be_cancelled_and_its_chunks_are_read(self) -> None:
        running = stream()
        async with begun(running.put(chunks(*["x"] * BUFFER_CHUNKS, "last"))) as putting:
            assert not putting.done()
        assert texts(await running.next(LONG))[-1] == "last"
        await running.put(chunks("more"))
        assert texts(await running.next(LONG)) == ["more"]


class TestStopping:
    async def test_the_first_reason_counts(self) -> None:
        running = stream()
        async with begun(asyncio.Event().wait()) as work:
            running.begin(work)
            running.stop("client")
            running.stop("draining")
            assert running.stop_reason == "client"
            await asyncio.wait([work])
            assert work.cancelled()

    async def test_too_late_changes_nothing(self) -> None:
        running = stream()
        async with begun(asyncio.sleep(0)) as work:
            running.begin(work)
            running.closing()
            running.stop("client")
            assert running.stop_reason is None
            await work

    async def test_before_the_work_began_it_is_not_forgotten(self) -> None:
        running = stream()
        running.stop("client")
        running.stop("draining")
        assert running.stop_reason == "client"


class TestFinding:
    def found(self, running: Running, stream_id: str = "s1", dialect: str = "dify", **owner: Any) -> bool:
        streams = Streams()
        streams.add(running)
        return streams.find(dialect, stream_id, **owner) is running

    async def test_by_dialect_and_id(self) -> None:
        assert self.found(stream())
        assert not self.found(stream(), "s2")
        assert not self.found(stream(), dialect="genstack")

    async def test_every_owner_that_is_given_must_match(self) -> None:
        running = stream(app="story", user="u1")
        assert self.found(running, account="ann")
        assert self.found(running, account="ann", app="story", user="u1")
        for wrong in ({"account": "bob"}, {"app": "other"}, {"user": "u2"}, {"user": None}):
            assert not self.found(running, **{"account": "ann", "app": "story", "user": "u1"} | wrong)

    async def test_a_blocking_request_cannot_be_found(self) -> None:
        blocking = Running(dialect="dify", stream_id="s1", account="ann", app=None, user=None)
        assert not self.found(blocking)

    async def test_one_that_ended_cannot_be_found(self) -> None:
        streams, running = Streams(), stream()
        streams.add(running)
        streams.remove(running)
        assert streams.find("dify", "s1") is None
        assert running.settled.is_set()
        streams.remove(running)  # twice does no harm
        assert len(streams) == 0


class TestWaiting:
    async def test_stop_waits_until_it_is_settled(self) -> None:
        streams, running = Streams(), stream()
        streams.add(running)
        async with begun(asyncio.Event().wait()) as work, begun(streams.stop(running, LONG)) as stopping:
            running.begin(work)
            assert not stopping.done()
            streams.remove(running)
            assert await stopping is True

    async def test_stop_says_when_it_took_too_long(self) -> None:
        streams, running = Streams(), stream()
        streams.add(running)
        assert await streams.stop(running, 0.001) is False
        assert running.stop_reason == "client"

    async def test_idle_waits_for_the_last_one(self) -> None:
        streams, one, two = Streams(), stream(stream_id="1"), stream(stream_id="2")
        assert await streams.idle(LONG)
        streams.add(one)
        streams.add(two)
        assert len(streams) == 2 and set(streams) == {one, two}
        assert await streams.idle(0.001) is False
        async with begun(streams.idle(LONG)) as idling:
            streams.remove(one)
            await asyncio.sleep(0)
            assert not idling.done()
            streams.remove(two)
            assert await idling is True
