"""Images by URL. Clients choose the URL, so it may lead nowhere but to the public internet.

One parser (yarl, which aiohttp goes by as well) reads the URL; what two parsers could read differently is refused. A
name is looked up once: the addresses that were looked at are those that are connected to. No redirects, cookies,
credentials or proxies. Every port is allowed. Each caller has a share of the places, so that none stops the others.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from headgate.core.errors import InvalidRequest, Overloaded
from headgate.providers.egress.addresses import Address, is_public, parsed
from headgate.providers.egress.lookups import Lookup, Lookups, Resolve
from headgate.providers.egress.shares import Shares

CODE = "invalid_image_url"
MAX_URL = 8192
MAX_NAME = 253
MAX_FETCHES = 64
MAX_FETCHES_EACH = 8

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*\.?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
"""A last label like this makes a host an IPv4 address to some parsers, however it is written."""

_looked_at: ContextVar[Sequence[Address]] = ContextVar("looked_at", default=())
"""The addresses that the fetch under way may connect to."""


class ImageFetcher:
    """A core.ports.ImageSource. At most `max_bytes` in `timeout_s`, in which everything must happen once it has begun.

    `permitted` says which addresses may be connected to; `resolve` looks names up (the system's way by default); `tls`
    replaces the system's authorities.
    """

    def __init__(
        self,
        max_bytes: int,
        timeout_s: float = 10.0,
        *,
        permitted: Callable[[Address], bool] = is_public,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._permitted = permitted
        self._lookups = Lookups(resolve)
        self._fetches = Shares(MAX_FETCHES, MAX_FETCHES_EACH, timeout_s)
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def check(self, url: str, param: str, *, caller: str = "") -> str:
        target = _target(url, param)
        lookup = await self._lookup(target, caller)
        async with self._refusing(param):
            await self._addresses(target, lookup)
        return str(target)

    async def fetch(self, url: str, param: str, *, caller: str = "") -> bytes:
        target = _target(url, param)
        async with self._fetches.place(caller):
            lookup = await self._lookup(target, caller)
            async with self._refusing(param):
                ours = _looked_at.set(await self._addresses(target, lookup))
                try:
                    async with self._client().get(target, allow_redirects=False) as answer:
                        return await self._content(answer)
                finally:
                    _looked_at.reset(ours)

    async def aclose(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()
        self._lookups.close()

    async def _lookup(self, target: URL, caller: str) -> Lookup | None:
        """The look-up of the URL's host, begun; None for an address. Waiting for it is not the URL's fault."""
        if self._closed:
            raise _closing()
        host = target.raw_host or ""
        if parsed(host) is not None:
            return None
        return await self._lookups.begin(host, target.port or 0, caller)

    async def _addresses(self, target: URL, lookup: Lookup | None) -> list[Address]:
        """Those of the URL's host. One that is not permitted spoils them all."""
        texts = [target.raw_host or ""] if lookup is None else await lookup.answer()
        found = [parsed(text) for text in texts]
        addresses = [address for address in found if address is not None and self._permitted(address)]
        if not addresses or len(addresses) < len(found):
            raise _Refused
        return addresses

    async def _content(self, answer: aiohttp.ClientResponse) -> bytes:
        if answer.status != 200 or (answer.content_length or 0) > self._max_bytes:
            raise _Refused
        content = bytearray()
        while block := await answer.content.readany():
            content += block
            if len(content) > self._max_bytes:
                raise _Refused
        return bytes(content)

    @asynccontextmanager
    async def _refusing(self, param: str) -> AsyncIterator[None]:
        """All that can happen out there looks the same to the client, who could otherwise explore what we can reach."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (
            aiohttp.ClientError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # a TimeoutError is an OSError
            if self._closed:
                raise _closing() from error
            if isinstance(error, RuntimeError):
                raise
            allowed = (
                f"the URL of an image of at most {self._max_bytes} bytes, on a host with public addresses alone, "
                f"that answers within {self._timeout_s:g} s, with status 200 and without a redirect"
            )
            raise InvalidRequest(
                f"{param} could not be fetched; it must be {allowed}.",
                param=param,
                code=CODE,
                allowed=allowed,
            ) from error

    def _client(self) -> aiohttp.ClientSession:
        if self._closed:
            raise _closing()
        if self._session is None:
            self._session = self._opened()
        return self._session

    def _opened(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the shares are the limit
                resolver=_LookedAt(),
                use_dns_cache=False,
                socket_factory=self._socket,
                force_close=True,
                ssl=self._tls or True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "headgate"},
            timeout=aiohttp.ClientTimeout(total=None),  # ours is around everything
            auto_decompress=False,
            trust_env=False,
        )

    def _socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """The last gate: whatever led here, there is no socket for an address that is not permitted."""
        family, kind, protocol, _, where = info
        address = parsed(str(where[0]))
        if address is None or not self._permitted(address):
            raise _Refused
        return socket.socket(family, kind, protocol)


class _Refused(OSError):
    """What was found is not what may be fetched."""


class _LookedAt(AbstractResolver):
    """Gives a connection the addresses that were looked at for it, and never any other."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = _looked_at.get()
        if not addresses:
            raise _Refused
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def _target(url: str, param: str) -> URL:
    """The URL as everybody reads it. InvalidRequest for another scheme, a user name, a host written oddly."""
    if len(url) > MAX_URL:
        _refuse(param, f"be at most {MAX_URL} characters long")
    if not url.isprintable() or " " in url or "\\" in url:
        _refuse(param, "be a URL without spaces, backslashes and control characters")
    try:
        target = URL(url)
    except ValueError:
        _refuse(param, "be a URL")
    if target.scheme not in ("http", "https"):
        _refuse(param, "be an http:// or https:// URL")
    if "@" in _authority(url):
        _refuse(param, "hold no user name or password")
    if not _plain(target.raw_host or ""):
        _refuse(param, "name a host, or an address as it is commonly written")
    return target


def _plain(host: str) -> bool:
    if parsed(host) is not None:
        return True
    last = host.removesuffix(".").rpartition(".")[2]
    return len(host) <= MAX_NAME and bool(_NAME.fullmatch(host)) and not _NUMBER.fullmatch(last)


def _authority(url: str) -> str:
    return re.split(r"[/?#]", url.partition("//")[2], maxsplit=1)[0]


def _closing() -> Overloaded:
    return Overloaded("The gateway is shutting down.", retry_after=5)


def _refuse(param: str, allowed: str) -> NoReturn:
    raise InvalidRequest(f"{param} must {allowed}.", param=param, code=CODE, allowed=allowed)
