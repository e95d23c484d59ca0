"""providers/egress/shares.py: places among callers."""

import asyncio

import pytest
from tests.support.until import until

from headgate.core.errors import Overloaded
from headgate.providers.egress.shares import Shares


class Users:
    """Callers who keep their places until they are told to leave."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self.came: list[str] = []
        self._leaving: dict[str, list[asyncio.Event]] = {}

    def come(self, *callers: str) -> list["asyncio.Task[None]"]:
        return [asyncio.ensure_future(self._stay(caller)) for caller in callers]

    async def _stay(self, caller: str) -> None:
        async with self._shares.place(caller):
            self.came.append(caller)
            leaving = asyncio.Event()
            self._leaving.setdefault(caller, []).append(leaving)
            await leaving.wait()

    def leave(self, caller: str) -> None:
        self._leaving[caller].pop().set()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_caller_has_its_share_and_others_have_theirs() -> None:
    users = Users(Shares(5, 2, 10))
    tasks = users.come("a", "a", "a", "a", "b", "c", "c", "d")
    await settled()
    assert users.came == ["a", "a", "b", "c", "c"]
    for task in tasks:
        task.cancel()


async def test_a_free_place_is_for_who_has_fewest() -> None:
    users = Users(Shares(3, 3, 10))
    tasks = users.come("a", "a", "a", "a", "b")
    await settled()
    users.leave("a")
    await settled()
    assert users.came == ["a", "a", "a", "b"]
    users.leave("a")
    await settled()
    assert users.came == ["a", "a", "a", "b", "a"]
    for task in tasks:
        task.cancel()


async def test_who_waits_in_vain_is_told_to_try_again_and_waits_no_more() -> None:
    shares = Shares(1, 1, 0.01)
    users = Users(shares)
    (first,) = users.come("a")
    await settled()
    with pytest.raises(Overloaded):
        await shares.take("a")
    with pytest.raises(Overloaded):
        await shares.take("b")
    users.leave("a")
    await first
    users.come("b")
    await until(lambda: users.came == ["a", "b"])
    users.leave("b")


async def test_who_gives_up_leaves_the_place_to_others() -> None:
    users = Users(Shares(1, 1, 10))
    first, second, third = users.come("a", "b", "c")
    await settled()
    second.cancel()
    users.leave("a")
    await first
    await settled()
    assert users.came == ["a", "c"]
    users.leave("c")
    await third


async def test_a_place_that_comes_as_its_caller_gives_up_is_not_lost() -> None:
    shares = Shares(1, 1, 10)
    await shares.take("a")
    leaving = asyncio.ensure_future(shares.take("b"))
    await settled()
    shares.give_back("a")
    leaving.cancel()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    await shares.take("c")
