"""Images in Dify's form: the `files` of a request, and what an upload is answered with."""

import json
import unicodedata
import uuid
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from headgate.core.completion import Image
from headgate.core.errors import BodyTooLarge, InvalidRequest, UnsupportedContentType
from headgate.core.files import Owner, UploadedFile
from headgate.core.media import EXTENSIONS, IMAGES
from headgate.dialects.dify_wire import UploadResponse, WireFile

MAX_FILES = 10
MAX_NAME = 255
FILE_SOURCES: Mapping[str, str] = MappingProxyType({"remote_url": "url", "local_file": "upload_file_id"})
"""Where a file can come from, and the field that says which it is."""

_END_USERS = uuid.UUID("6f0b1d9e-3f2c-4f53-9a43-0c8a51c7e3a4")
_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, surrogates and line ends."""


def images_of(files: tuple[WireFile, ...]) -> tuple[Image, ...]:
    """The images that a request names. InvalidRequest for the first file that is not one."""
    if len(files) > MAX_FILES:
        allowed = f"at most {MAX_FILES} files"
        raise InvalidRequest(f"files must hold {allowed}.", param="files", allowed=allowed)
    return tuple(_image(file, f"files[{index}]") for index, file in enumerate(files))


def _image(file: WireFile, where: str) -> Image:
    if file.type != "image":
        raise InvalidRequest(f"{where}.type must be image.", param=f"{where}.type", allowed="image")
    needs = FILE_SOURCES.get(file.transfer_method)
    if needs is None:
        allowed = " or ".join(FILE_SOURCES)
        raise InvalidRequest(
            f"{where}.transfer_method must be {allowed}.",
            param=f"{where}.transfer_method",
            allowed=allowed,
        )
    param = f"{where}.{needs}"
    if not getattr(file, needs):
        raise InvalidRequest(f"{param} is required with transfer_method {file.transfer_method}.", param=param)
    if needs == "url":
        return Image(url=file.url, param=param)
    return Image(file_id=file.upload_file_id, param=param)


def shown_name(given: str) -> str:
    """A file's name as its client gave it, without what cannot be seen and at most MAX_NAME characters long."""
    return "".join(letter for letter in given if unicodedata.category(letter) not in _UNSEEN)[:MAX_NAME]


def extension_of(name: str, media_type: str) -> str:
    """The name's own extension where it is one of the type's, else the usual one."""
    known = EXTENSIONS[media_type]
    own = name.rpartition(".")[2].lower()
    return own if own in known else known[0]


def render_upload(file: UploadedFile) -> bytes:
    """The body of the answer to `POST /files/upload`."""
    return msgspec.json.encode(
        UploadResponse(
            id=file.id,
            name=file.name,
            size=file.size,
            extension=file.extension,
            mime_type=file.media_type,
            created_by=_end_user_id(file.owner),
            created_at=file.created,
        )
    )


def _end_user_id(owner: Owner) -> str:
    """One UUID for each end user, as clients expect; nothing is ever looked up by it."""
    return str(uuid.uuid5(_END_USERS, json.dumps([owner.account, owner.app, owner.user])))


def no_file() -> InvalidRequest:
    return InvalidRequest(
        "Please upload your file: the form needs one named file.", param="file", code="no_file_uploaded"
    )


def too_many_files() -> InvalidRequest:
    return InvalidRequest("Only one file is allowed.", param="file", code="too_many_files")


def file_too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The file is too large: at most {max_bytes} bytes are allowed.", param="file", code="file_too_large"
    )


def unsupported_file() -> UnsupportedContentType:
    return UnsupportedContentType(
        f"The file's content is not supported; it must be {IMAGES}.",
        param="file",
        code="unsupported_file_type",
    )
