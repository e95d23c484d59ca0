"""Images by URL, without an HTTP client in memory until the first one is asked for."""

from collections.abc import Callable

from headgate.core.ports import ImageSource


class LateImages:
    """core.ports.ImageSource; `make` makes the real one."""

    def __init__(self, make: Callable[[], ImageSource]) -> None:
        self._make = make
        self._made: ImageSource | None = None

    async def check(self, url: str, param: str) -> None:
        await self._source().check(url, param)

    async def fetch(self, url: str, param: str) -> bytes:
        return await self._source().fetch(url, param)

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.aclose()

    def _source(self) -> ImageSource:
        if self._made is None:
            self._made = self._make()
        return self._made
