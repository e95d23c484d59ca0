"""Outbound HTTP to one upstream service.

A narrow port on purpose (open, read, close): a leaner connection may replace aiohttp behind it. What the port
promises, whatever stands behind it:

- Time-outs are UpstreamTimeout, everything else that goes wrong is UpstreamFailed. Messages name the provider,
  never an address or a header, so no key can leak through them.
- Cancelling a call at any moment closes its connection at once; the upstream sees it.
- No redirects and no cookies, no proxies or credentials from the environment, no decompression, and no TLS without
  verified certificates.
"""

import asyncio
import errno
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from weakref import WeakSet

import aiohttp
from msgspec import Struct
from multidict import CIMultiDict
from yarl import URL

from headgate.core.errors import ConnectionFailed, Overloaded, UpstreamError, UpstreamFailed, UpstreamTimeout
from headgate.providers.egress.outgoing import Outgoing

QUEUE_WAIT_S = 3.0
"""How long a call may wait for its turn; shorter than the wait for a first chunk, so refusals keep their status."""

LINGER_S = 1.0
"""How long a connection whose content was complete may take to end the response and so be used again."""

MAX_KEPT_URLS = 1024

_NO_ANSWER = aiohttp.ServerDisconnectedError().message
"""aiohttp's message when the connection ended before a byte of the response; else the message is its head."""


class Timeouts(Struct, frozen=True, kw_only=True):
    """Seconds: to connect (names, proxy and TLS included), of silence until the first byte of the content, of silence
    within the content, and for everything."""

    connect_s: float
    first_byte_s: float
    chunk_s: float
    total_s: float


class Http:
    """The connections to one service. `headers` and `query` go with every request.

    `tls`: what is trusted, and who we are, where that is not the system's choice. The session starts with the first
    call, in the loop that makes it.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        *,
        timeouts: Timeouts,
        max_concurrency: int,
        queue_wait_s: float = QUEUE_WAIT_S,
        query: Mapping[str, str] | None = None,
        proxy: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self._base, _, base_query = base_url.partition("?")
        self._base = self._base.rstrip("/")
        self._query = URL("?" + base_query).query.copy()
        self._query.update(query or {})
        self._urls: dict[str, URL] = {}
        all_headers = CIMultiDict({"Accept-Encoding": "identity", "User-Agent": "headgate"})
        all_headers.update(headers)
        # aiohttp shows a session's headers to the proxy when it asks for a tunnel: keys are no business of a proxy.
        self._session_headers = CIMultiDict({"User-Agent": "headgate"}) if proxy else all_headers
        self._request_headers = all_headers if proxy else None
        self._timeouts = timeouts
        self._proxy = proxy or None
        self._tls = tls
        self._queue_wait_s = queue_wait_s
        self._turns = asyncio.Semaphore(max_concurrency)
        self._max_waiting = max_concurrency
        self._waiting = 0
        self._session: aiohttp.ClientSession | None = None
        self._used: WeakSet[asyncio.BaseProtocol] = WeakSet()
        self._lingering: dict[aiohttp.ClientResponse, asyncio.TimerHandle] = {}
        self._closed = False

    async def open(
        self, path: str, body: bytes, on_sent: Callable[[], None], *, deadline: float | None = None
    ) -> "Response":
        """POST a body and wait for the head of the response, which the caller must close.

        `path` is percent-encoded already. `on_sent` is called once, when a connection is there and the request goes
        out on it. `deadline`: in the loop's time, when all must be over, where that is earlier than our own limit.
        Overloaded when too many calls are under way; UpstreamTimeout; UpstreamFailed.
        """
        await self._take_turn(deadline)
        outgoing = Outgoing(body, on_sent, self._used)
        times = self._timeouts
        now = asyncio.get_running_loop().time()
        end = now + times.total_s
        if deadline is not None and deadline < end:
            end = deadline
        try:
            # aiohttp times connecting and waiting; an upstream that does not read our body is caught here.
            async with asyncio.timeout_at(min(end, now + times.connect_s + times.first_byte_s)):
                answer = await self._send(path, outgoing)
        except BaseException as error:
            outgoing.abort()
            self._turns.release()
            if isinstance(error, Exception):
                raise self._translated(error) from error
            raise
        return Response(self, answer, outgoing, end)

    async def aclose(self) -> None:
        """Close every connection. Calls still under way fail."""
        self._closed = True
        for answer in list(self._lingering):
            self._stop_lingering(answer)
        if self._session is not None:
            await self._session.close()

    async def _take_turn(self, deadline: float | None) -> None:
        if self._closed:
            raise UpstreamFailed(f"The provider {self.name} is shut down.")
        if deadline is not None and deadline <= asyncio.get_running_loop().time():
            raise UpstreamTimeout(f"No time is left for a call to the provider {self.name}.")
        if not self._turns.locked():
            await self._turns.acquire()  # at once
            return
        overloaded = Overloaded(
            f"Too many requests to the provider {self.name} are under way.", retry_after=2
        )
        if self._waiting >= self._max_waiting:
            raise overloaded
        until = asyncio.get_running_loop().time() + self._queue_wait_s
        self._waiting += 1
        try:
            async with asyncio.timeout_at(until if deadline is None else min(until, deadline)):
                await self._turns.acquire()
        except TimeoutError:
            raise overloaded from None
        finally:
            self._waiting -= 1

    def _end_turn(self) -> None:
        self._turns.release()

    def _url(self, path: str) -> URL:
        """Where a path leads. Kept, since there are as many paths as models at most."""
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) >= MAX_KEPT_URLS:
                self._urls.clear()
            url = URL(self._base + path)
            if self._query:
                url = url.update_query(self._query)
            self._urls[path] = url
        return url

    async def _send(self, path: str, outgoing: Outgoing) -> aiohttp.ClientResponse:
        session = self._session or self._start()
        url, headers = self._url(path), self._request_headers
        try:
            return await session.request("POST", url, data=outgoing, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # The upstream may have closed a kept-alive connection just as we took it. With no byte of an answer
            # the request was most likely never read: ask once more.
            answered = isinstance(error, aiohttp.ServerDisconnectedError) and error.message != _NO_ANSWER
            if answered or not outgoing.reused:
                raise
        return await session.request("POST", url, data=outgoing, headers=headers, allow_redirects=False)

    def _start(self) -> aiohttp.ClientSession:
        times = self._timeouts
        self._session = aiohttp.ClientSession(
            # The cap is ours: it can refuse, aiohttp's only queues. True: verified by the system's authorities.
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._session_headers,
            timeout=aiohttp.ClientTimeout(total=None, connect=times.connect_s, sock_read=times.first_byte_s),
            auto_decompress=False,
            proxy=self._proxy,
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
        if isinstance(error, aiohttp.ClientSSLError):
            return UpstreamFailed(f"No trusted connection to the provider {self.name} could be made.")
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError)):
            return ConnectionFailed(f"The provider {self.name} could not be reached.")
        return ConnectionFailed(f"The connection to the provider {self.name} broke.")


class Response:
    """The head of a response, and its body as it comes. Whoever opened it closes it."""

    def __init__(
        self, http: Http, answer: aiohttp.ClientResponse, outgoing: Outgoing, deadline: float
    ) -> None:
        self.status: int = answer.status
        self.headers: Mapping[str, str] = answer.headers
        self._http = http
        self._answer = answer
        self._outgoing = outgoing
        times = http._timeouts
        self._chunk_s = times.chunk_s if times.chunk_s != times.first_byte_s else None
        self._expired = False
        self._closed = False
        # One timer for the whole body: a time-out around every read would cost more than the read.
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)
        self._lost = self._watch_connection()

    def _watch_connection(self) -> "asyncio.Future[None] | None":
        """Content that cannot be cut into chunks makes aiohttp close the connection without a word to its reader."""
        connection = self._answer.connection
        if connection is None or connection.protocol is None:
            return None  # all has come
        lost = connection.protocol.closed
        if lost is not None:
            if not self._outgoing.reused:
                lost.add_done_callback(_seen)
            lost.add_done_callback(self._fail)
        return lost

    def _fail(self, _: object) -> None:
        content = self._answer.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection ended within the content"))

    async def block(self) -> bytes:
        """All bytes of the body that are there, waiting for the first; b"" at the end."""
        try:
            block = await self._answer.content.readany()
        except Exception as error:
            if self._expired:
                raise UpstreamTimeout(
                    f"The provider {self._http.name} took too long to finish its answer."
                ) from error
            raise self._http._translated(error) from error
        if self._chunk_s is not None:
            self._time_chunks(self._chunk_s)
        return block

    def _time_chunks(self, chunk_s: float) -> None:
        """From the first block on, silence is measured by another limit."""
        self._chunk_s = None
        connection = self._answer.connection
        if connection is not None and connection.protocol is not None:  # else all has come
            connection.protocol.read_timeout = chunk_s
            connection.protocol.start_timeout()

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
        if self._lost is not None:
            self._lost.remove_done_callback(self._fail)
        self._http._end_turn()

    def _expire(self) -> None:
        self._expired = True
        self._outgoing.abort()
        self._answer.close()


def _seen(lost: "asyncio.Future[None]") -> None:
    """The loop would complain of a failure that nobody looked at, when an idle connection breaks."""
    if not lost.cancelled():
        lost.exception()
