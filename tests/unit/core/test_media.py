"""core/media.py: images by their first bytes."""

import pytest

from headgate.core.media import EXTENSIONS, sniff

WEBP = b"RIFF\x24\x00\x00\x00WEBPVP8 "


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "image/png"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "image/jpeg"),
        (b"\xff\xd8\xff\xe1\x00\x10Exif\x00", "image/jpeg"),
        (b"GIF87a\x01\x00\x01\x00", "image/gif"),
        (b"GIF89a\x01\x00\x01\x00", "image/gif"),
        (WEBP, "image/webp"),
    ],
)
def test_an_image_is_known_by_its_first_bytes(content: bytes, media_type: str) -> None:
    assert sniff(content) == media_type
    assert media_type in EXTENSIONS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG",
        b"\x89PNG\n\x1a\n",
        b"\xff\xd8",
        b"GIF88a",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        WEBP[:11],
        b" " + WEBP,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"BM\x36\x00",
        b"II*\x00",
        b"<html>image/png</html>",
    ],
)
def test_everything_else_is_none(content: bytes) -> None:
    assert sniff(content) is None
