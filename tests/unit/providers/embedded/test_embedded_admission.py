"""The engine's queue: bounded, in order, and left without a trace by who gives up."""

import asyncio

import pytest

from headgate.core.errors import Overloaded
from headgate.providers.embedded.admission import Admission


async def queued(admission: Admission, count: int) -> None:
    async with asyncio.timeout(5):
        while admission.waiting != count:  # noqa: ASYNC110  # a queue has no event to wait for
            await asyncio.sleep(0)


async def test_slots_are_given_first_and_then_turns_in_order() -> None:
    admission = Admission(slots=1, max_queue=3)
    await admission.enter()
    order: list[int] = []

    async def take(number: int) -> None:
        await admission.enter()
        order.append(number)

    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(take(number)))
        await queued(admission, number + 1)
    for _ in tasks:
        admission.leave()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
    assert (admission.running, admission.waiting) == (1, 0)
    admission.leave()
    assert admission.running == 0


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    admission = Admission(slots=1, max_queue=0)
    await admission.enter()
    with pytest.raises(Overloaded) as caught:
        await admission.enter()
    assert caught.value.retry_after is not None and caught.value.retry_after >= 1


async def test_who_gives_up_leaves_the_queue() -> None:
    admission = Admission(slots=1, max_queue=2)
    await admission.enter()
    first = asyncio.create_task(admission.enter())
    await queued(admission, 1)
    second = asyncio.create_task(admission.enter())
    await queued(admission, 2)
    first.cancel()
    await queued(admission, 1)
    admission.leave()
    await second
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_slot_handed_to_someone_who_just_gave_up_is_passed_on() -> None:
    admission = Admission(slots=1, max_queue=2)
    await admission.enter()
    first = asyncio.create_task(admission.enter())
    second = asyncio.create_task(admission.enter())
    await queued(admission, 2)
    admission.leave()
    first.cancel()
    await second
    assert first.cancelled() or first.cancelling()
    assert admission.running == 1
    admission.leave()
    assert admission.running == 0
