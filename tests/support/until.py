"""Waiting for a condition instead of a time."""

import asyncio
from collections.abc import Callable

SECONDS = 30.0


async def until(condition: Callable[[], object], *, seconds: float = SECONDS) -> None:
    """Return once the condition holds; TimeoutError when it takes far too long."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)
