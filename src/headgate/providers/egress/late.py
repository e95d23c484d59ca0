"""Images by URL, without an HTTP client in memory until the first one is asked for."""

from collections.abc import Callable

from headgate.core.errors import Overloaded
from headgate.core.ports import ImageSource


class LateImages:
    """core.ports.ImageSource; `make` makes the real one."""

    def __init__(self, make: Callable[[], ImageSource]) -> None:
        self._make = make
        self._made: ImageSource | None = None
        self._closed = False

    async def check(self, url: str, param: str, *, caller: str = "") -> str:
        return await self._source().check(url, param, caller=caller)

    async def fetch(self, url: str, param: str, *, caller: str = "") -> bytes:
        return await self._source().fetch(url, param, caller=caller)

    async def aclose(self) -> None:
        self._closed = True
        if self._made is not None:
            await self._made.aclose()

    def _source(self) -> ImageSource:
        if self._closed:  # nobody would close what is made now
            raise Overloaded("The gateway is shutting down.", retry_after=5)
        if self._made is None:
            self._made = self._make()
        return self._made
