"""POST /files/upload: one image as a multipart form, kept for its end user until it expires.

The form's bounds hold while it arrives, whatever it declares of itself. Its room is taken before its body is read; what
does not stay in memory waits in the store's folder, in a temporary file without a name, which goes with the request.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

import structlog
from msgspec import Struct
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from headgate.core.accounts import App, Principal
from headgate.core.errors import InsufficientFunds, InvalidRequest, Overloaded, UnsupportedContentType
from headgate.core.files import Owner, UploadedFile
from headgate.core.media import sniff
from headgate.dialects.dify import Dify
from headgate.dialects.dify_files import (
    extension_of,
    file_too_large,
    no_file,
    render_upload,
    shown_name,
    too_many_files,
    unsupported_file,
)
from headgate.service.gateway import Gateway
from headgate.service.planning import MAX_USER
from headgate.web.json_endpoints import caller, json_response
from headgate.web.wire import ClientGone, Receive, Scope, header

log = structlog.get_logger("headgate.files")

ROOM_AROUND_THE_FILE = 128 * 1024
"""What boundaries and the other fields may take."""
MAX_FIELDS = 16
MAX_FIELD_BYTES = 64 * 1024


class UploadLimits(Struct, frozen=True, kw_only=True):
    """A file's greatest size and for how long it is kept; the longest silence, and time, while it arrives. Seconds.

    `at_once` uploads may arrive at the same time, at most `at_once_each` of them one account's.
    """

    max_bytes: int
    keep_s: float
    silence_s: float = 20.0
    total_s: float = 300.0
    at_once: int = 64
    at_once_each: int = 8

    @property
    def max_body_bytes(self) -> int:
        return self.max_bytes + ROOM_AROUND_THE_FILE


class UploadEndpoint:
    def __init__(self, gateway: Gateway, dialect: Dify, limits: UploadLimits) -> None:
        self._gateway = gateway
        self._dialect = dialect
        self._limits = limits
        self._arriving: Counter[str] = Counter()
        """Uploads by account."""

    async def upload(self, request: Request) -> Response:
        holds_files = _check_content_type(request.scope)
        _check_declared_size(request.scope, self._limits)
        principal = await caller(request, self._gateway, "dify")
        if self._gateway.draining:
            raise Overloaded("The gateway is shutting down.", retry_after=5)
        app = self._dialect.app_of(principal)
        if not holds_files:
            raise no_file()
        balance = await self._gateway.balance(principal)
        if balance.available <= 0:
            raise InsufficientFunds(1, balance.available)
        self._gateway.limits.admit(principal, 0)
        with self._place(principal.account):
            return await self._kept(request, principal, app)

    async def _kept(self, request: Request, principal: Principal, app: App) -> Response:
        """Read the form and keep its file, in room that is taken before."""
        files, file_id = self._gateway.files, self._gateway.ids.uuid()
        try:
            folder = await asyncio.to_thread(
                files.reserve, file_id, principal.account, _room(request.scope, self._limits)
            )
            name, content, user = await _read_form(request, self._limits, folder)
            media_type = sniff(content)
            if media_type is None:
                raise unsupported_file()
            created = int(self._gateway.clock.time())
            extension = extension_of(name, media_type)
            file = UploadedFile(
                id=file_id,
                owner=Owner(account=principal.account, app=app.name, user=user),
                name=name or f"image.{extension}",
                extension=extension,
                media_type=media_type,
                size=len(content),
                created=created,
                expires=created + int(self._limits.keep_s),
            )
            await asyncio.to_thread(files.save, file, content)
        finally:
            await asyncio.to_thread(files.release, file_id, principal.account)
        return json_response(render_upload(file), 201)

    @contextmanager
    def _place(self, account: str) -> Iterator[None]:
        own, limits = self._arriving[account], self._limits
        if own >= limits.at_once_each or self._arriving.total() >= limits.at_once:
            raise Overloaded("Too many files are being uploaded now; try again later.", retry_after=5)
        self._arriving[account] += 1
        try:
            yield
        finally:
            self._arriving[account] -= 1
            self._arriving += Counter()  # forgets those who have none


def _check_content_type(scope: Scope) -> bool:
    """Whether the form can hold files. UnsupportedContentType for what is no form."""
    given = header(scope, b"content-type") or b"application/json"
    media_type, options = parse_options_header(given)
    if media_type == b"application/x-www-form-urlencoded":
        return False  # what clients send who have no file
    if media_type != b"multipart/form-data":
        shown = given.decode("latin-1")[:100]
        raise UnsupportedContentType(f"The content type must be multipart/form-data, not {shown!r}.")
    # In another charset names and fields could decode to what is no text, or take for ever.
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise UnsupportedContentType("The form's charset must be utf-8.")
    return True


def _check_declared_size(scope: Scope, limits: UploadLimits) -> None:
    declared = header(scope, b"content-length")
    if declared is None:
        return
    if not declared.isdigit():
        raise InvalidRequest("The Content-Length header is not a number.")
    if len(declared) > 15 or int(declared) > limits.max_body_bytes:
        raise file_too_large(limits.max_bytes)


def _room(scope: Scope, limits: UploadLimits) -> int:
    """What the file may take, by what was declared."""
    declared = header(scope, b"content-length")
    return limits.max_bytes if declared is None else min(int(declared), limits.max_bytes)


async def _read_form(request: Request, limits: UploadLimits, folder: Path) -> tuple[str, bytes, str | None]:
    """The file's name, as shown, and its content, and the end user."""
    form = await _Form(request.headers, request.receive, limits, folder).read()
    try:
        if len(_files_in(form.multi_items())) > 1:
            raise too_many_files()
        file, user = form.get("file"), form.get("user")
        # Browsers send an empty file without a name for a field that was left alone.
        if not isinstance(file, UploadFile) or not (file.filename or file.size):
            raise no_file()
        if isinstance(user, UploadFile) or len(user or "") > MAX_USER:
            allowed = f"a text of at most {MAX_USER} characters"
            raise InvalidRequest(f"user must be {allowed}.", param="user", allowed=allowed)
        if (file.size or 0) > limits.max_bytes:
            raise file_too_large(limits.max_bytes)
        return shown_name(file.filename or ""), await file.read(), user or None
    finally:
        await form.close()


def _files_in(items: list[tuple[str, str | UploadFile]]) -> list[UploadFile]:
    return [value for _, value in items if isinstance(value, UploadFile)]


class _Form(MultiPartParser):
    """A form as it arrives; whatever goes wrong, its temporary files, in `folder`, are closed."""

    def __init__(self, headers: Headers, receive: Receive, limits: UploadLimits, folder: Path) -> None:
        super().__init__(
            headers,
            self._pieces(receive, limits),
            max_files=2,  # a second one has then been seen when the third is refused
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        self._limits = limits
        self._folder = folder
        self._ended = False

    async def read(self) -> FormData:
        try:
            async with asyncio.timeout(self._limits.total_s):
                return await self.parse()
        except TimeoutError:
            raise InvalidRequest("The form did not arrive in time.") from None
        except OSError as error:
            log.exception("an upload was not stored")
            raise Overloaded("The file cannot be stored now; try again later.", retry_after=60) from error
        except MultiPartException as error:
            if len(_files_in(self.items)) > 1:
                raise too_many_files() from None
            raise InvalidRequest(
                f"The body is not the multipart form it should be: {error.message}"
            ) from None

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        file = self._current_part.file
        if file is not None:
            # Starlette's own goes to the system's folder for temporary files, which may be memory, or the whole disk.
            file.file.close()
            spool = SpooledTemporaryFile(  # noqa: SIM115 - closed with the form
                max_size=self.spool_max_size, dir=str(self._folder), suffix=".part"
            )
            self._files_to_close_on_error.append(spool)
            file.file = cast("BinaryIO", spool)

    def on_end(self) -> None:
        self._ended = True

    async def _pieces(self, receive: Receive, limits: UploadLimits) -> AsyncGenerator[bytes, None]:
        size, more = 0, True
        while more:
            message = await asyncio.wait_for(receive(), limits.silence_s)
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > limits.max_body_bytes:
                raise file_too_large(limits.max_bytes)
            yield piece
            more = message.get("more_body", False)
        if not self._ended:
            raise MultiPartException("It breaks off before its last boundary.")
