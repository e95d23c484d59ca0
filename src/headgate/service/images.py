"""The images of a request, brought together before anything is held: fetched, or read from what was uploaded."""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from headgate.core.accounts import Principal
from headgate.core.completion import CompletionRequest, Image
from headgate.core.errors import InvalidRequest
from headgate.core.files import Owner
from headgate.core.media import IMAGES, MAX_IMAGES, sniff
from headgate.core.ports import Files, ImageSource

MAX_BYTES_TOGETHER = 20 * 1024 * 1024
AT_ONCE = 4
"""How many images of one request are brought at the same time."""


class Images:
    """`max_bytes` bounds each image; its media type is what its bytes say, whatever was declared."""

    def __init__(self, source: ImageSource, files: Files, max_bytes: int) -> None:
        self._source = source
        self._files = files
        self._max_bytes = max_bytes

    async def load(
        self, request: CompletionRequest, principal: Principal, *, keep_urls: bool
    ) -> CompletionRequest:
        """The request with the data of all its images; with `keep_urls` URLs stay, as they were checked.

        InvalidRequest naming the image that is missing, too large or none at all; Overloaded.
        """
        messages = request.messages or ()
        images = [part for message in messages for part in message.parts if isinstance(part, Image)]
        if len(images) > MAX_IMAGES:
            raise InvalidRequest(
                f"A request may hold at most {MAX_IMAGES} images.",
                param=images[MAX_IMAGES].param,
                allowed=f"at most {MAX_IMAGES} images",
            )
        owner = Owner(account=principal.account, app=request.app, user=request.user)
        brought = iter(await self._all(images, owner, keep_urls))
        return replace(
            request,
            messages=tuple(
                replace(
                    message,
                    parts=tuple(part if isinstance(part, str) else next(brought) for part in message.parts),
                )
                if message.parts
                else message
                for message in messages
            ),
        )

    async def _all(self, images: Sequence[Image], owner: Owner, keep_urls: bool) -> list[Image]:
        places = asyncio.Semaphore(AT_ONCE)
        together = 0

        async def bring(image: Image) -> Image:
            nonlocal together
            async with places:
                loaded = await self._one(image, owner, keep_urls)
            together += len(loaded.data or b"")
            if together > MAX_BYTES_TOGETHER:
                raise InvalidRequest(
                    f"The images of a request may have at most {MAX_BYTES_TOGETHER} bytes together.",
                    param=image.param,
                    allowed=f"at most {MAX_BYTES_TOGETHER} bytes in all images together",
                )
            return loaded

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(bring(image)) for image in images]
        except ExceptionGroup as failed:
            # The others were stopped for the first one's sake.
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _one(self, image: Image, owner: Owner, keep_urls: bool) -> Image:
        if image.url is not None:
            if keep_urls:
                # Not the client's text: others could read something else in it than what was checked.
                checked = await self._source.check(image.url, image.param, caller=owner.account)
                return replace(image, url=checked)
            content = await self._source.fetch(image.url, image.param, caller=owner.account)
            return self._looked_at(image, content)
        if image.file_id is not None:
            found = await asyncio.to_thread(self._files.load, image.file_id, owner)
            if found is None:
                raise InvalidRequest(
                    f"{image.param}: the file does not exist or has expired.",
                    param=image.param,
                    allowed="the id of a file uploaded by the same app and user",
                )
            return self._looked_at(image, found[1])
        return self._looked_at(image, image.data or b"")

    def _looked_at(self, image: Image, content: bytes) -> Image:
        if len(content) > self._max_bytes:
            allowed = f"at most {self._max_bytes} bytes"
            raise InvalidRequest(
                f"{image.param}: an image may have {allowed}.", param=image.param, allowed=allowed
            )
        media_type = sniff(content)
        if media_type is None:
            raise InvalidRequest(f"{image.param} must be {IMAGES}.", param=image.param, allowed=IMAGES)
        return replace(image, url=None, file_id=None, data=content, media_type=media_type)
