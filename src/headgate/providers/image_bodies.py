"""Request bodies that hold images: they are large, and a request for many choices may need the same one many times.

Their base64 is made when they are written, not when the conversation is put together: checking it costs nothing. Large
ones are written in another thread, and never twice for calls that say the same at the same time.
"""

import asyncio
from binascii import b2a_base64
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from headgate.core.completion import Image, Job

AT_ONCE_BYTES = 256 * 1024
"""Of images: writing no more than that takes less than changing threads is worth."""
PIECE_BYTES = 3 * 64 * 1024
"""Of an image, in one go: the interpreter serves nobody else meanwhile. A multiple of three needs no padding."""
_OF_ONE_CALL = frozenset({"request_id", "deadline", "first_index", "prompt_index", "counts_prompt"})
"""What tells the calls of one request apart and is not sent."""
_SENT = tuple(name for name in Job.__struct_fields__ if name not in _OF_ONE_CALL)
_encode = msgspec.json.Encoder().encode


class InBase64:
    """An image's content, which becomes a text when it is written; `head` comes before it in that."""

    __slots__ = ("content", "head")

    def __init__(self, content: bytes, head: str = "") -> None:
        self.content = content
        self.head = head

    def text(self) -> msgspec.Raw:
        """As JSON."""
        content = memoryview(self.content)
        pieces = [
            b2a_base64(content[start : start + PIECE_BYTES], newline=False)
            for start in range(0, len(content), PIECE_BYTES)
        ]
        return msgspec.Raw(b"".join((_encode(self.head)[:-1], *pieces, b'"')))


def data_url(image: Image) -> InBase64 | str:
    """The image itself as a URL where it is there, else where it is; "" for an upload that is not read yet."""
    if image.data is None:
        return image.url or ""
    return InBase64(image.data, f"data:{image.media_type};base64,")


def written(value: object) -> msgspec.Raw:
    """For encoders of bodies: how they write what JSON has no form for."""
    if isinstance(value, InBase64):
        return value.text()
    raise NotImplementedError(f"{type(value).__name__} cannot be written as JSON")


def image_bytes(job: Job) -> int | None:
    """The size of the job's images, those aside that the upstream fetches; None where it has none at all."""
    if job.messages is None:
        return None
    sizes = [
        len(part.data or b"")
        for message in job.messages
        if message.parts
        for part in message.parts
        if isinstance(part, Image)
    ]
    return sum(sizes) if sizes else None


class ImageBodies:
    """The bodies of one provider's calls, each kept for as long as one of its calls is under way."""

    def __init__(self, make: Callable[..., bytes]) -> None:
        """`make` writes a body: make(job, stream=...)."""
        self._make = make
        self._bodies: WeakValueDictionary[tuple[object, ...], _Shared] = WeakValueDictionary()
        self._turn = asyncio.Lock()

    def of(self, job: Job, *, stream: bool = False) -> "bytes | ImageBody":
        """The body of a job: at once where it has no images, which is nearly always."""
        size = image_bytes(job)
        return self._make(job, stream=stream) if size is None else self.body(job, size, stream=stream)

    def body(self, job: Job, size: int, *, stream: bool) -> "ImageBody":
        """That of this job, whose images have so many bytes."""
        return ImageBody(self, job, size, stream=stream)

    def shared(self, job: Job, size: int, *, stream: bool) -> "_Shared":
        # Identity will do, and is quick: the calls of one request share their messages. What is kept keeps its job, so
        # no other object can come to have these ids.
        key = (stream, *(_told_apart(getattr(job, name)) for name in _SENT))
        shared = self._bodies.get(key)
        if shared is None:
            shared = self._bodies[key] = _Shared(job)
            shared.making = asyncio.ensure_future(self._written(job, size, stream=stream))
            shared.making.add_done_callback(_seen)
        return shared

    async def _written(self, job: Job, size: int, *, stream: bool) -> bytes:
        if size <= AT_ONCE_BYTES:
            return self._make(job, stream=stream)
        async with self._turn:  # each takes several times its size for a moment
            return await asyncio.to_thread(self._make, job, stream=stream)


class ImageBody:
    """One call's body, on demand. For as long as this lives, other calls that say the same are given the same."""

    __slots__ = ("_bodies", "_job", "_shared", "_size", "_stream")

    def __init__(self, bodies: ImageBodies, job: Job, size: int, *, stream: bool) -> None:
        self._bodies = bodies
        self._job = job
        self._size = size
        self._stream = stream
        self._shared: _Shared | None = None

    async def __call__(self) -> bytes:
        self._shared = self._bodies.shared(self._job, self._size, stream=self._stream)
        # The caller may leave; others may still wait for it.
        return await asyncio.shield(self._shared.making)


class _Shared:
    __slots__ = ("__weakref__", "job", "making")

    making: "asyncio.Future[bytes]"

    def __init__(self, job: Job) -> None:
        self.job = job


def _told_apart(value: object) -> object:
    return value if isinstance(value, int | float | None) else id(value)


def _seen(making: "asyncio.Future[Any]") -> None:
    """The loop would complain of a failure that nobody waited for."""
    if not making.cancelled():
        making.exception()
