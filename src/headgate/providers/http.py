"""Outbound HTTP to one upstream service: the only module that speaks aiohttp.

A narrow port on purpose (open, read, close): keys leave by this door only, and a leaner connection may replace
aiohttp behind it. What the port promises, whatever stands behind it:

- Time-outs are UpstreamTimeout, everything else that goes wrong is UpstreamFailed. Messages name the provider,
  never an address or a header, so no key can leak through them.
- Cancelling a call at any moment closes its connection at once; the upstream sees it.
- No redirects, cookies, proxies or credentials from the environment, and no decompression.
"""

import asyncio
import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from headgate.core.errors import Overloaded, UpstreamError, UpstreamFailed, UpstreamTimeout

QUEUE_WAIT_S = 3.0
"""How long a call may wait for its turn; shorter than the wait for a first chunk, so refusals keep their status."""

LINGER_S = 1.0
"""How long a connection whose content was complete may take to end the response and so be used again."""

_NO_ANSWER = aiohttp.ServerDisconnectedError().message
"""aiohttp's message when the connection ended before a byte of the response; else the message is its head."""


class Http:
    """The connections to one service. `headers` go with every request; times are in seconds.

    `timeout_s` is the longest silence (connecting, waiting for the head, between bytes). The session starts
    with the first call, in the loop that makes it.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        total_timeout_s: float,
        max_concurrency: int,
        queue_wait_s: float = QUEUE_WAIT_S,
    ) -> None:
        self.name = name
        self._base_url = base_url.rstrip("/")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "headgate", **headers}
        self._timeout_s = timeout_s
        self._total_timeout_s = total_timeout_s
        self._queue_wait_s = queue_wait_s
        self._turns = asyncio.Semaphore(max_concurrency)
        self._max_waiting = max_concurrency
        self._waiting = 0
        self._session: aiohttp.ClientSession | None = None
        self._used: WeakSet[asyncio.BaseProtocol] = WeakSet()
        self._lingering: dict[aiohttp.ClientResponse, asyncio.TimerHandle] = {}
        self._closed = False

    async def open(self, path: str, body: bytes, on_sent: Callable[[], None]) -> "Response":
        """POST a body and wait for the head of the response, which the caller must close.

        `on_sent` is called once, when a connection is there and the request goes out on it. Overloaded when
        too many calls are under way; UpstreamTimeout; UpstreamFailed.
        """
        await self._take_turn()
        outgoing = _Outgoing(body, on_sent, self._used)
        now = asyncio.get_running_loop().time()
        deadline = now + self._total_timeout_s
        try:
            # aiohttp times connecting and waiting; an upstream that does not read our body is caught here.
            async with asyncio.timeout_at(min(deadline, now + 2 * self._timeout_s)):
                answer = await self._send(path, outgoing)
        except BaseException as error:
            outgoing.abort()
            self._turns.release()
            if isinstance(error, Exception):
                raise self._translated(error) from error
            raise
        return Response(self, answer, outgoing, deadline)

    async def aclose(self) -> None:
        """Close every connection. Calls still under way fail."""
        self._closed = True
        for answer in list(self._lingering):
            self._stop_lingering(answer)
        if self._session is not None:
            await self._session.close()

    async def _take_turn(self) -> None:
        if self._closed:
            raise UpstreamFailed(f"The provider {self.name} is shut down.")
        if not self._turns.locked():
            await self._turns.acquire()  # at once
            return
        overloaded = Overloaded(
            f"Too many requests to the provider {self.name} are under way.", retry_after=2
        )
        if self._waiting >= self._max_waiting:
            raise overloaded
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_wait_s):
                await self._turns.acquire()
        except TimeoutError:
            raise overloaded from None
        finally:
            self._waiting -= 1

    def _end_turn(self) -> None:
        self._turns.release()

    async def _send(self, path: str, outgoing: "_Outgoing") -> aiohttp.ClientResponse:
        session = self._session or self._start()
        url = self._base_url + path
        try:
            return await session.request("POST", url, data=outgoing, allow_redirects=False)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # The upstream may have closed a kept-alive connection just as we took it. With no byte of an answer
            # the request was most likely never read: ask once more.
            answered = isinstance(error, aiohttp.ServerDisconnectedError) and error.message != _NO_ANSWER
            if answered or not outgoing.reused:
                raise
        return await session.request("POST", url, data=outgoing, allow_redirects=False)

    def _start(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the cap is ours: it can refuse, aiohttp's only queues
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._timeout_s, sock_read=self._timeout_s
            ),
            auto_decompress=False,
            trust_env=False,
        )
        return self._session

    def _linger(self, answer: aiohttp.ClientResponse) -> None:
        """Wait, in nobody's way, for the end of a response whose content was complete."""
        loop = asyncio.get_running_loop()
        self._lingering[answer] = loop.call_later(LINGER_S, self._stop_lingering, answer)
        answer.content.on_eof(partial(self._stop_lingering, answer))

    def _stop_lingering(self, answer: aiohttp.ClientResponse) -> None:
        timer = self._lingering.pop(answer, None)
        if timer is not None:
            timer.cancel()
            answer.close()  # does nothing when the end came: the connection was given back then

    def _translated(self, error: Exception) -> UpstreamError:
        if isinstance(error, UpstreamError):
            return error
        # aiohttp's own time-outs are TimeoutErrors as well.
        if isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.ETIMEDOUT:
            return UpstreamTimeout(f"The provider {self.name} did not answer in time.")
        if isinstance(error, aiohttp.ClientConnectorError):
            return UpstreamFailed(f"The provider {self.name} could not be reached.")
        return UpstreamFailed(f"The connection to the provider {self.name} broke.")


class Response:
    """The head of a response, and its body as it comes. Whoever opened it closes it."""

    def __init__(
        self, http: Http, answer: aiohttp.ClientResponse, outgoing: "_Outgoing", deadline: float
    ) -> None:
        self.status: int = answer.status
        self.headers: Mapping[str, str] = answer.headers
        self._http = http
        self._answer = answer
        self._outgoing = outgoing
        self._expired = False
        self._closed = False
        # One timer for the whole body: a time-out around every read would cost more than the read.
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    async def block(self) -> bytes:
        """All bytes of the body that are there, waiting for the first; b"" at the end."""
        try:
            return await self._answer.content.readany()
        except Exception as error:
            if self._expired:
                raise UpstreamTimeout(
                    f"The provider {self._http.name} took too long to finish its answer."
                ) from error
            raise self._http._translated(error) from error

    async def read(self, limit: int) -> bytes:
        """The whole body; UpstreamFailed when it is longer than `limit` bytes."""
        blocks = []
        size = 0
        while block := await self.block():
            size += len(block)
            if size > limit:
                raise UpstreamFailed(f"The answer of the provider {self._http.name} is too large.")
            blocks.append(block)
        return b"".join(blocks)

    def finish(self) -> None:
        """Close, the content being complete, so that the connection can be used again.

        The last bytes of the response may still be on their way; nobody waits for them.
        """
        if not self._closed and not self._answer.closed:
            self._closed = True
            self._release()
            self._http._linger(self._answer)
        self.close()

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it at once."""
        if self._closed:
            return
        self._closed = True
        self._release()
        if not self._answer.closed:
            self._outgoing.abort()
            self._answer.close()

    def _release(self) -> None:
        self._timer.cancel()
        self._http._end_turn()

    def _expire(self) -> None:
        self._expired = True
        self._outgoing.abort()
        self._answer.close()


class _Outgoing(aiohttp.Payload):
    """A request body that notices when, and on which connection, it is sent."""

    _value: bytes
    _autoclose = True

    def __init__(
        self, value: bytes, on_sent: Callable[[], None], used: WeakSet[asyncio.BaseProtocol]
    ) -> None:
        super().__init__(value, content_type="application/json")
        self._size = len(value)
        self._on_sent: Callable[[], None] | None = on_sent
        self._used = used
        self._transport: asyncio.Transport | None = None
        self.reused = False

    async def write(self, writer: AbstractStreamWriter) -> None:
        stream = cast("aiohttp.http.StreamWriter", writer)  # what a client request is always written to
        connection = stream.protocol
        self.reused = connection in self._used
        self._used.add(connection)
        self._transport = stream.transport
        if self._on_sent is not None and self._transport is not None and not self._transport.is_closing():
            self._on_sent()
            self._on_sent = None
        await writer.write(self._value)

    def abort(self) -> None:
        """Close the connection now; closing it politely would first send what is still unsent."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)
