"""Requests that show images, of every dialect that takes them, and what an upstream of each kind saw."""

import base64
import io
import json
from typing import Any

import aiohttp
from tests.support.client import Client
from tests.support.script import Script
from tests.support.three_kinds import KINDS, Kind, kind_model

IMAGE_TOKENS = 1000
MOST_BYTES = 6_000_000
FILES = f"\n[files]\nmax_bytes = {MOST_BYTES}\n"
CONFIG = FILES + "".join(
    kind_model(kind, vision=True, image_tokens=IMAGE_TOKENS) + kind_model(kind, f"{kind}-blind")
    for kind in KINDS
)
FINISH: dict[Kind, str] = {"openai": "stop", "anthropic": "end_turn", "cohere": "COMPLETE"}

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
GIF = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffd9")
WEBP = b"RIFF\x1a\x00\x00\x00WEBPVP8L\x0d\x00\x00\x00/\x00\x00\x00\x10\x07\x10\x11\x11\x88\x88\xfe\x07\x00"
PICTURES = {"image/png": PNG, "image/gif": GIF, "image/jpeg": JPEG, "image/webp": WEBP}
CHAT = "/v1/chat/completions"
PART = "messages[0].content[1].image_url.url"
PUBLIC_URL = "http://93.184.216.34/a.png?x=1&y=%20#z"
"""Nobody connects to it here."""

Part = dict[str, Any]
Seen = list[tuple[str, Any]]


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def picture(url: str, **more: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url} | more}


def looking(model: str, *urls: str, **fields: Any) -> dict[str, Any]:
    """A chat that shows these images after one text."""
    content = [text("What is it?"), *map(picture, urls)]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 16} | fields


def seen(body: Any) -> Seen:
    """The parts of the one message that an upstream got: texts, data as (media type, bytes), and URLs."""
    (message,) = body["messages"]
    assert message["role"] == "user"
    return [_seen(part) for part in message["content"]]


def _seen(part: Part) -> tuple[str, Any]:
    match part:
        case {"type": "text", "text": words, **rest}:
            found: tuple[str, Any] = ("text", words)
        case {"type": "image_url", "image_url": {"url": url, **more}, **rest}:
            assert not more
            head, comma, data = url.partition(";base64,")
            found = (head.removeprefix("data:"), base64.b64decode(data)) if comma else ("url", url)
        case {
            "type": "image",
            "source": {"type": "base64", "media_type": kind, "data": data, **more},
            **rest,
        }:
            assert not more
            found = (kind, base64.b64decode(data))
        case {"type": "image", "source": {"type": "url", "url": url, **more}, **rest}:
            assert not more
            found = ("url", url)
        case _:
            raise AssertionError(part)
    assert not rest
    return found


def saying(kind: Kind, *pieces: str, **fields: Any) -> Script:
    return Script(pieces=pieces, finish=FINISH[kind], **fields)


async def chat(account: Client, body: dict[str, Any]) -> tuple[int, Any]:
    # A file, because the client warns of large bodies that are bytes.
    content, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
    async with account.session.post(CHAT, data=content, headers=headers | bearer(account)) as response:
        if response.content_type == "application/json":
            return response.status, await response.json()
        return response.status, await response.text()


def bearer(account: Client) -> dict[str, str]:
    return {"Authorization": f"Bearer {account.key}"}


def local(file_id: str) -> dict[str, str]:
    return {"type": "image", "transfer_method": "local_file", "upload_file_id": file_id}


def remote(url: str) -> dict[str, str]:
    return {"type": "image", "transfer_method": "remote_url", "url": url}


async def dify(account: Client, app: str, *files: Any, stream: bool = False) -> tuple[int, Any]:
    """Status and JSON; of a stream that began, its whole text."""
    ask = account.ask("dify", app, text="What is it?", stream=stream, files=list(files))
    async with await account.send(ask) as response:
        if response.content_type == "application/json":
            return response.status, await response.json()
        return response.status, await response.text()


async def uploaded(account: Client, app: str, content: bytes) -> str:
    form = aiohttp.FormData()
    form.add_field("user", "somebody")
    form.add_field("file", io.BytesIO(content), filename="x.png", content_type="image/png")
    bearer = {"Authorization": f"Bearer {account.app_key(app)}"}
    async with account.session.post("/files/upload", data=form, headers=bearer) as response:
        assert response.status == 201, await response.text()
        return str((await response.json())["id"])
