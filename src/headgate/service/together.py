"""Several things at once, of which none is left running when the others end."""

import asyncio
from collections.abc import Coroutine, Sequence


async def together(coroutines: Sequence[Coroutine[object, object, None]]) -> None:
    """Run all at once; the first failure, or a cancellation, ends the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        await _outlast(unfinished)
    # All are looked at, so that none is reported as forgotten; of several the earliest model's or prompt's is raised.
    ended = [*(task for task in tasks if task in done), *unfinished]
    failures = [task.exception() for task in ended if not task.cancelled()]
    for failure in filter(None, failures):
        raise failure
    for task in done:
        task.result()


async def _outlast(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Wait for all of them, whoever cancels us meanwhile: nothing may run on when the bill is made."""
    cancelled = False
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
