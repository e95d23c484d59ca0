"""Which bytes are an image that models take. What a client declares is not believed."""

from collections.abc import Mapping
from types import MappingProxyType

IMAGES = "a PNG, JPEG, GIF or WebP image"
"""What is taken, in words."""

MAX_IMAGES = 20
"""Of one request."""

EXTENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image/png": ("png",),
        "image/jpeg": ("jpg", "jpeg"),
        "image/gif": ("gif",),
        "image/webp": ("webp",),
    }
)
"""Extensions of file names by media type, the usual one first."""


def sniff(content: bytes) -> str | None:
    """The media type of an image by its first bytes; None for everything else."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    return None
