"""Images in a chat's messages: data URLs, which hold them, and addresses, which say where they are.

https://platform.openai.com/docs/guides/images-vision
Whether an address may be asked at all is for those to say who fetch it.
"""

import re
from binascii import a2b_base64
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from headgate.core.completion import Image
from headgate.core.errors import InvalidRequest
from headgate.dialects.base import unsupported
from headgate.dialects.chat_wire import ImageBody

_DATA = re.compile(r"data:([^;,]*);base64,", re.IGNORECASE)
_MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "image/png": "image/png",
        "image/jpeg": "image/jpeg",
        "image/jpg": "image/jpeg",  # what many write
        "image/gif": "image/gif",
        "image/webp": "image/webp",
    }
)
_MEDIA_TYPES_IN_WORDS = "image/png, image/jpeg, image/gif or image/webp"
_DETAILS: Mapping[str, Literal["auto", "low", "high"]] = MappingProxyType(
    {"auto": "auto", "low": "low", "high": "high"}
)
_DETAILS_IN_WORDS = "auto, low or high"


def image_of(wire: ImageBody | None, where: str) -> Image:
    """`where`: the path of the part's `image_url`."""
    param = f"{where}.url"
    if wire is None or not wire.url:
        raise InvalidRequest(f"{param} is required.", param=param)
    detail = _detail(wire.detail, f"{where}.detail")
    scheme = wire.url[:8].lower()
    if scheme.startswith("data:"):
        media_type, data = _held(wire.url, param)
        return Image(data=data, media_type=media_type, detail=detail, param=param)
    if scheme.startswith(("http://", "https://")):
        return Image(url=wire.url, detail=detail, param=param)
    allowed = "an http or https URL, or a data URL with base64"
    raise InvalidRequest(f"{param} must be {allowed}.", param=param, allowed=allowed)


def _detail(given: str | None, where: str) -> Literal["auto", "low", "high"] | None:
    if given is None:
        return None
    detail = _DETAILS.get(given)
    if detail is not None:
        return detail
    if given == "original":
        raise unsupported(where, f"as original by this version; give {_DETAILS_IN_WORDS}")
    raise InvalidRequest(f"{where} must be {_DETAILS_IN_WORDS}.", param=where, allowed=_DETAILS_IN_WORDS)


def _held(url: str, where: str) -> tuple[str, bytes]:
    """Media type and bytes of the image in a data URL."""
    head = _DATA.match(url)
    if head is None:
        allowed = "data:<media type>;base64,<the image in base64>"
        raise InvalidRequest(f"{where} must be {allowed}.", param=where, allowed=allowed)
    media_type = _MEDIA_TYPES.get(head[1].lower())
    if media_type is None:
        raise InvalidRequest(
            f"{where} is of the media type {head[1][:100]!r}; it must be {_MEDIA_TYPES_IN_WORDS}.",
            param=where,
            allowed=_MEDIA_TYPES_IN_WORDS,
        )
    try:
        data = a2b_base64(url[head.end() :], strict_mode=True)
    except ValueError as error:
        raise InvalidRequest(
            f"{where} is not base64: {str(error).lower()}.", param=where, allowed="base64 with its padding"
        ) from None
    if not data:
        raise InvalidRequest(f"{where} holds no image.", param=where, allowed="an image in base64")
    return media_type, data
