"""One upstream service over HTTP, whatever it speaks: its key, connections, refusals and the frame of its streams."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from headgate.config import ConfigError, ProviderSettings
from headgate.core.completion import Chunk, Job
from headgate.core.errors import ModelUnavailable, UpstreamError, UpstreamFailed
from headgate.core.models import ModelSpec
from headgate.providers.sse_reader import MAX_EVENT_BYTES, SSEReader
from headgate.providers.upstream_errors import from_status

if TYPE_CHECKING:
    from headgate.providers.egress.service import Http, Response

T = TypeVar("T")
Body = bytes | Callable[[], Awaitable[bytes]]
"""A request's body, or what makes it when the call is made."""

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""Of a blocking answer where nothing better is known; what it is decoded into may take several times as much."""

MAX_ERROR_BYTES = 64 * 1024
ERROR_BODY_S = 2.0
"""How long the words of an error may take to come. What it is, its status says already."""
ALLOWANCE_BYTES = 1024 * 1024
MAX_BYTES_PER_TOKEN = 4096
"""Of a stream, its wrapping included: what usual upstreams send for a token is a tenth of it."""

MAX_BYTES_PER_PLAIN_TOKEN = 256
"""Of a blocking answer, where tokens have no wrapping: the longest, runs of spaces, have some 128 bytes."""

MAX_WHOLE_BYTES, MAX_STREAM_BYTES = 64 * 1024 * 1024, 256 * 1024 * 1024
"""Of a blocking answer and of a stream, however many choices and tokens may come: the one is held in memory, the other
is not."""


class EventReader(Protocol):
    """One streamed answer, event by event.

    `ended`: nothing more is to come, and `failure` says what went wrong, if anything did. `whole`: nothing is missing,
    however the connection ends.
    """

    ended: bool
    failure: UpstreamError | None

    @property
    def whole(self) -> bool: ...

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        """The chunks in the data of these events; those before a failure are still given."""
        ...

    def reported(self) -> list[Chunk]:
        """The usage that was reported and not given yet; of an answer that broke off it counts too."""
        ...

    def connection_ended(self) -> None:
        """The upstream closed the connection; sets `failure` where something is missing."""
        ...


class Upstream:
    """One service. Where its settings cannot work (no key, no such certificate) it is of no use, and `reason` says so.

    `headers` makes the headers that carry the key, None where there is none. `proxy` is what the settings' `proxy_env`
    names, read from the environment; it comes before their `proxy`.
    """

    def __init__(
        self,
        name: str,
        settings: ProviderSettings,
        api_key: str | None,
        headers: Callable[[str | None], Mapping[str, str]],
        *,
        proxy: str | None = None,
    ) -> None:
        self.name = name
        self.key = api_key.strip() if api_key else None
        self.reason = _unusable(settings, self.key)
        self._http: Http | None = None
        if self.reason:
            return
        # Imported late: an installation without upstreams does without the memory of an HTTP client.
        from headgate.providers.egress.connect import connect

        try:
            self._http = connect(name, settings, headers(self.key), proxy)
        except ConfigError as error:
            self.reason = str(error)

    def unavailable(self, model: ModelSpec) -> str | None:
        return self.reason or model.broken

    async def answer(
        self,
        path: str,
        body: Body,
        on_sent: Callable[[], None],
        *,
        most_tokens: int | None = None,
        surplus: int = 0,
        deadline: float | None = None,
    ) -> bytes:
        """The whole JSON of a blocking answer of at most `most_tokens` tokens and `surplus` bytes beside them.

        `path` is percent-encoded. `deadline`: when it must be whole, in the loop's time. UpstreamError for everything
        but a 200.
        """
        response = await self._open(path, body, on_sent, deadline)
        try:
            if response.status != 200:
                raise await self._refused(response)
            if not _has_type(response, "application/json"):
                raise UpstreamFailed(f"The provider {self.name} answered with something that is not JSON.")
            if most_tokens is None:
                return await response.read(MAX_ANSWER_BYTES)
            limit = ALLOWANCE_BYTES + most_tokens * MAX_BYTES_PER_PLAIN_TOKEN + surplus
            return await response.read(min(limit, MAX_WHOLE_BYTES))
        finally:
            response.close()

    async def stream(
        self,
        path: str,
        body: Body,
        on_sent: Callable[[], None],
        answer: EventReader,
        *,
        most_tokens: int,
        failed: Callable[[bytes], UpstreamError | None],
        surplus: int = 0,
        most_event_bytes: int = MAX_EVENT_BYTES,
        deadline: float | None = None,
    ) -> AsyncGenerator[Sequence[Chunk], None]:
        """The chunks of a streamed answer of at most `most_tokens` tokens and `surplus` bytes beside them.

        `failed` reads an error out of a 200 that is JSON instead of a stream. `path`, `deadline` as in `answer`.
        UpstreamError.
        """
        response = await self._open(path, body, on_sent, deadline)
        try:
            if response.status != 200:
                raise await self._refused(response)
            if not _has_type(response, "text/event-stream"):
                raise await self._not_a_stream(response, failed)
            reader = SSEReader(most_event_bytes)
            left = min(ALLOWANCE_BYTES + most_tokens * MAX_BYTES_PER_TOKEN + surplus, MAX_STREAM_BYTES)
            while not answer.ended:
                try:
                    block = await response.block()
                except UpstreamError:
                    if not answer.whole:
                        yield answer.reported()
                        raise
                    block = b""  # nothing is missing, so it does not matter how the connection ended
                left -= len(block)
                try:
                    if left < 0:
                        raise UpstreamFailed(f"The answer of the provider {self.name} is too large.")
                    events = reader.feed(block) if block else reader.last()
                except UpstreamFailed:
                    yield answer.reported()
                    raise
                batch = answer.take(events)
                if not block:
                    answer.connection_ended()
                    batch += answer.reported()
                if batch:
                    yield batch
            if answer.failure is not None:
                raise answer.failure
            response.finish()
        finally:
            response.close()

    def decoded(self, body: bytes, decode: Callable[[bytes], T]) -> T:
        """The body as its wire type. UpstreamFailed for what is not one."""
        try:
            return decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamFailed(f"The provider {self.name} sent an answer that cannot be read.") from error

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def _open(
        self, path: str, body: Body, on_sent: Callable[[], None], deadline: float | None
    ) -> "Response":
        if self._http is None:
            raise ModelUnavailable(self.reason or "")
        if not isinstance(body, bytes):
            body = await body()
        return await self._http.open(path, body, on_sent, deadline=deadline)

    async def _not_a_stream(
        self, response: "Response", failed: Callable[[bytes], UpstreamError | None]
    ) -> UpstreamError:
        error = None
        if _has_type(response, "application/json") and (body := await self._error_body(response)):
            error = failed(body)
        return error or UpstreamFailed(f"The provider {self.name} did not answer with a stream.")

    async def _refused(self, response: "Response") -> UpstreamError:
        body = await self._error_body(response)
        return from_status(self.name, response.status, response.headers, body, self.key)

    async def _error_body(self, response: "Response") -> bytes:
        try:
            async with asyncio.timeout(ERROR_BODY_S):
                return await response.read(MAX_ERROR_BYTES)
        except (UpstreamError, TimeoutError):
            return b""  # that it is an error says enough


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key as OpenAI and Cohere take it."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def echoed_prompt(job: Job) -> str:
    """The prompt that is to come first in the answer of an upstream that only chats, and so cannot echo."""
    return job.prompt if job.echo and isinstance(job.prompt, str) else ""


def _unusable(settings: ProviderSettings, key: str | None) -> str | None:
    variable = settings.api_key_env
    if variable and not key:
        return f"set {variable}"
    if key and not (key.isascii() and key.isprintable()):
        return f"set {variable} to a key; it holds characters that no key has"
    return None


def _has_type(response: "Response", media_type: str) -> bool:
    return response.headers.get("Content-Type", "").lower().startswith(media_type)
