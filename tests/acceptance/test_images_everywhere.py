"""Images in front of each kind of upstream: what it sees, what is held, and what no model ever gets to see."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

import aiohttp
import openai
import pytest
import pytest_asyncio
from multidict import CIMultiDict
from openai import AsyncOpenAI
from tests.support.anthropic_upstream import AnthropicUpstream
from tests.support.catalogue import INPUT, OUTPUT
from tests.support.client import Client
from tests.support.doors import Reply
from tests.support.inside import Inside
from tests.support.script import Script
from tests.support.three_kinds import (
    KEY_VARIABLE,
    KINDS,
    SPEAKS,
    Kind,
    ThreeKinds,
    kind_model,
    model_of,
    open_three_kinds,
    provider_of,
)

from headgate.bootstrap import administration, gateway
from headgate.config import load
from headgate.core.money import NanoUSD
from headgate.core.ports import ImageSource
from headgate.providers.egress.addresses import Address
from headgate.providers.egress.images import ImageFetcher
from headgate.providers.fake import Fake
from headgate.web.app import HeadgateApp
from headgate.web.routes import route_table

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kinds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeKinds]:
    async with open_three_kinds(CONFIG, tmp_path_factory.mktemp("images")) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def passing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeKinds]:
    """Providers that fetch images by themselves."""
    folder = tmp_path_factory.mktemp("passing")
    async with open_three_kinds(CONFIG, folder, provider_lines='image_urls = "pass"') as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def account(kinds: ThreeKinds) -> Client:
    return await kinds.client()


def sdk_of(kinds: ThreeKinds, account: Client) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{kinds.url}/v1", api_key=account.key, max_retries=0)


def saying(kind: Kind, *pieces: str, **fields: Any) -> Script:
    return Script(pieces=pieces, finish=FINISH[kind], **fields)


async def chat(account: Client, body: dict[str, Any]) -> tuple[int, Any]:
    return await account.post("/v1/chat/completions", body, {"Authorization": f"Bearer {account.key}"})


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_images_of_a_chat_arrive_byte_for_byte_and_in_their_places(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    content = [text("First "), picture(data_url(PNG)), text("then "), picture(data_url(GIF, "image/gif"))]
    content += [picture(data_url(JPEG, "image/jpg")), picture(data_url(WEBP, "IMAGE/WEBP")), text("?")]
    kinds.ups[kind].script(saying(kind, "Dots", "."))
    async with sdk_of(kinds, account) as sdk:
        messages: Any = [{"role": "user", "content": content}]
        if stream:
            chunks = await sdk.chat.completions.create(
                model=model_of(kind), messages=messages, max_tokens=16, stream=True
            )
            said = "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])
        else:
            answer = await sdk.chat.completions.create(model=model_of(kind), messages=messages, max_tokens=16)
            said = answer.choices[0].message.content or ""
    assert said == "Dots."
    assert seen(kinds.latest(kind).json) == [
        ("text", "First "),
        ("image/png", PNG),
        ("text", "then "),
        ("image/gif", GIF),
        ("image/jpeg", JPEG),
        ("image/webp", WEBP),
        ("text", "?"),
    ]
    (row,) = await kinds.books.settled(account.account)
    assert row.source == "provider"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_hold_reckons_with_the_images_and_the_charge_with_the_upstreams_figures(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    held: list[int] = []
    up = kinds.ups[kind]
    up.hold()
    for number, urls in enumerate([(), (data_url(PNG),), (data_url(PNG), data_url(GIF))], start=1):
        up.script(saying(kind, "Yes.", hold_at=0))
        before = len(up.requests)
        asking = asyncio.ensure_future(chat(account, looking(model_of(kind), *urls)))
        await up.request(before)
        held.append(await kinds.books.held(account.account))
        up.release()
        assert (await asking)[0] == 200
        row = (await kinds.books.settled(account.account, number))[-1]
        up.hold()
    up.release()
    assert [later - held[0] for later in held] == [0, IMAGE_TOKENS * INPUT, 2 * IMAGE_TOKENS * INPUT]
    fresh = row.prompt_tokens - row.cached_tokens
    assert row.price == fresh * INPUT + row.cached_tokens * (INPUT // 2) + row.completion_tokens * OUTPUT
    assert row.source == "provider"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_uploaded_to_dify_arrives_byte_for_byte(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    app = model_of(kind)
    files = [local(await uploaded(account, app, content)) for content in PICTURES.values()]
    kinds.ups[kind].script(saying(kind, "Dots", "."))
    status, answer = await dify(account, app, *files, stream=stream)
    assert status == 200, answer
    assert sorted(seen(kinds.latest(kind).json)) == sorted([("text", "What is it?"), *PICTURES.items()])
    assert len(await kinds.books.settled(account.account)) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_bytes_are_counts_and_not_what_was_said(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    kinds.ups[kind].script(saying(kind, "A dot."))
    urls = (data_url(PNG, "image/jpeg"), data_url(JPEG, "image/webp"), data_url(GIF, "image/png"))
    status, _ = await chat(account, looking(model_of(kind), *urls))
    assert status == 200
    assert seen(kinds.latest(kind).json)[1:] == [
        ("image/png", PNG),
        ("image/jpeg", JPEG),
        ("image/gif", GIF),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_without_eyes_refuses_images_naming_the_part(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    before, blind = kinds.asked, f"{kind}-blind"
    for url in (data_url(PNG), PUBLIC_URL):
        status, answer = await chat(account, looking(blind, url, stream=stream))
        assert (status, answer["error"]["param"]) == (400, PART)
        assert answer["error"]["code"] == "unsupported_parameter"
    for file in (local(await uploaded(account, blind, PNG)), remote(PUBLIC_URL)):
        status, answer = await dify(account, blind, file, stream=stream)
        assert (status, answer["code"]) == (400, "invalid_param")
        assert "files[0]" in answer["message"]
    assert kinds.asked == before
    assert kinds.untouched(account)


async def test_anthropic_knows_no_low_detail(kinds: ThreeKinds, account: Client) -> None:
    body = looking(model_of("anthropic"))
    body["messages"][0]["content"].append(picture(data_url(PNG), detail="low"))
    before = kinds.asked
    status, answer = await chat(account, body)
    assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert answer["error"]["param"] == "messages[0].content[1].image_url.detail"
    assert "detail" in answer["error"]["message"]
    assert kinds.asked == before


NO_IMAGES = {
    "garbage": data_url(b"\x00\x01garbage"),
    "svg": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "pdf": data_url(b"%PDF-1.7"),
    "not-base64": "data:image/png;base64,@@@@",
    "unpadded": data_url(PNG).rstrip("="),
    "blank": "data:image/png;base64,",
    "percent": "data:image/png,%89PNG",
    "html": data_url(PNG, "text/html"),
    "svg-type": data_url(PNG, "image/svg+xml"),
    "no-url": "",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", NO_IMAGES.values(), ids=NO_IMAGES.keys())
async def test_what_is_no_image_is_refused_before_anything_is_held(
    kinds: ThreeKinds, account: Client, kind: Kind, url: str
) -> None:
    before = kinds.asked
    for stream in (False, True):
        status, answer = await chat(account, looking(model_of(kind), url, stream=stream))
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer
        assert answer["error"]["param"] == PART
    assert kinds.asked == before
    assert kinds.untouched(account)


@pytest.mark.parametrize("kind", KINDS)
async def test_too_many_and_too_large_images_are_refused(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    before, model = kinds.asked, model_of(kind)
    status, answer = await chat(account, looking(model, *[data_url(PNG)] * 21))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "20" in answer["error"]["message"]
    too_large = PNG.ljust(MOST_BYTES + 1, b"x")
    status, answer = await chat(account, looking(model, data_url(too_large)))
    assert (status, answer["error"]["param"]) == (400, PART)
    assert str(MOST_BYTES) in answer["error"]["message"]
    status, answer = await chat(account, looking(model, data_url(PNG.ljust(8_000_000, b"x"))))
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    largest = local(await uploaded(account, model, PNG.ljust(MOST_BYTES, b"x")))
    status, answer = await dify(account, model, *[largest] * 4)
    assert (status, answer["code"]) == (400, "invalid_param")
    assert "together" in answer["message"]
    status, answer = await dify(account, model, *[largest] * 11)
    assert (status, answer["code"]) == (400, "invalid_param")
    assert kinds.asked == before
    assert kinds.untouched(account)
    kinds.ups[kind].script(saying(kind, "Large."))
    assert (await chat(account, looking(model, data_url(PNG.ljust(MOST_BYTES, b"x")))))[0] == 200
    assert seen(kinds.latest(kind).json)[1] == ("image/png", PNG.ljust(MOST_BYTES, b"x"))


# Images by URL


class Canary:
    """A server on every address of this machine; nobody may come. `{port}` in a URL stands for its port."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came.append(str(writer.get_extra_info("peername")))
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(PNG) + PNG
            )
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def canary() -> AsyncIterator[Canary]:
    made = Canary()
    async with await asyncio.start_server(made.serve, "0.0.0.0", 0) as server:  # noqa: S104  # whichever is tried
        made.port = server.sockets[0].getsockname()[1]
        with contextlib.suppress(OSError):  # a machine without IPv6
            await asyncio.start_server(made.serve, "::1", made.port)
        # It would be noticed.
        _, writer = await asyncio.open_connection("127.0.0.1", made.port)
        async with asyncio.timeout(10):
            while not made.came:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        writer.close()
        made.came.clear()
        yield made


def names_of_this_machine() -> list[str]:
    """The host names that the machine itself says are its own."""
    names = ["localhost"]
    with contextlib.suppress(OSError):
        for line in Path("/etc/hosts").read_text(encoding="utf-8").splitlines():
            address, *given = line.partition("#")[0].split() or [""]
            with contextlib.suppress(ValueError):
                if ipaddress.ip_address(address).is_loopback:
                    names += given
    return sorted(set(names))


PRIVATE = [
    *(
        f"http://{host}:{{port}}/a.png"
        for host in (
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "10.0.0.1",
            "10.255.255.255",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "100.64.0.1",
            "100.100.100.200",
            "169.254.169.254",
            "168.63.129.16",
            "192.0.0.192",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::ffff:0:127.0.0.1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fd00::1]",
            "[fd00:ec2::254]",
            "[fe80::1]",
            "[fe80::1%25eth0]",
            "[ff02::1]",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "017700000001",
            "0177.0.0.1",
            "127.1",
            "127.0.1",
            "0",
            "127.0.0.1.",
            "\uff11\uff12\uff17.0.0.1",
            "\u2460\u2461\u2466.0.0.1",
            "127\u30020\u30020\u30021",
            "%31%32%37.0.0.1",
            "user@127.0.0.1",
            "user:password@93.184.216.34",
            "93.184.216.34@127.0.0.1",
            "localhost.",
            "LOCALHOST",
            "localhost.localdomain",
            "metadata.google.internal",
            "no-such-host.invalid",
            "-",
            "",
        )
    ),
    *(f"http://{name}:{{port}}/a.png" for name in names_of_this_machine()),
    "http://127.0.0.1:{port}#@93.184.216.34/a.png",
    "http://127.0.0.1:{port}?@93.184.216.34/a.png",
    "http://93.184.216.34#@127.0.0.1:{port}/a.png@",
    "http://127.0.0.1:{port}\\@93.184.216.34/a.png",
    "http://93.184.216.34:80\\@127.0.0.1:{port}/a.png",
    "http:\\\\127.0.0.1:{port}\\a.png",
    "http:/127.0.0.1:{port}/a.png",
    "http:127.0.0.1:{port}/a.png",
    "http:///127.0.0.1:{port}/a.png",
    "//127.0.0.1:{port}/a.png",
    "https://127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{port}/\r\nHost: 93.184.216.34",
    "http://127.0.0.1:{port}/\ta.png",
    " http://127.0.0.1:{port}/a.png",
    "http://127.0.0.1:99999/a.png",
    "http://127.0.0.1:x/a.png",
    "http://[127.0.0.1/a.png",
    "ftp://127.0.0.1:{port}/a.png",
    "file:///etc/passwd",
    "file://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_GET",
    "dict://127.0.0.1:{port}/d",
    "unix:///var/run/docker.sock",
    "ws://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}!/a.png",
    "javascript:alert(1)",
    "data:text/html;base64,PGI+",
    "about:blank",
    "a.png",
    "http://" + "a" * 9000 + "/a.png",
]
# One that only leads astray after the @ of its fragment is public, and nobody could answer there.
PRIVATE.remove("http://93.184.216.34#@127.0.0.1:{port}/a.png@")


def shown(url: str) -> str:
    return url[:60].encode("unicode_escape").decode()


async def refused_everywhere(kinds: ThreeKinds, account: Client, url: str) -> list[str]:
    """What is said about the URL, each way, without its place; fails when it is not refused as the dialect does."""
    words = []
    for kind in KINDS:
        for stream in (False, True):
            status, answer = await chat(account, looking(model_of(kind), url, stream=stream))
            assert status == 400, answer
            error = answer["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", PART), answer
            words.append(error["message"].replace(PART, ""))
            status, answer = await dify(account, model_of(kind), remote(url), stream=stream)
            assert (status, answer["code"], answer["status"]) == (400, "invalid_param", 400), answer
            assert answer.keys() == {"code", "message", "status"}
            assert "files[0].url" in answer["message"]
            words.append(answer["message"].replace("files[0].url", ""))
    return words


@pytest.mark.parametrize("url", PRIVATE, ids=shown)
async def test_a_url_that_leads_to_no_public_host_is_refused_and_nobody_connects(
    kinds: ThreeKinds, account: Client, canary: Canary, url: str
) -> None:
    before = kinds.asked
    await refused_everywhere(kinds, account, url.replace("{port}", str(canary.port)))
    assert canary.came == []
    assert kinds.asked == before
    assert kinds.untouched(account)


@pytest.mark.parametrize("url", PRIVATE, ids=shown)
async def test_such_a_url_is_not_passed_on_to_a_provider_that_fetches_by_itself(
    passing: ThreeKinds, canary: Canary, url: str
) -> None:
    before, account = passing.asked, await passing.client()
    await refused_everywhere(passing, account, url.replace("{port}", str(canary.port)))
    assert canary.came == []
    assert passing.asked == before
    assert passing.untouched(account)


async def test_a_refusal_does_not_say_what_is_there(
    kinds: ThreeKinds, account: Client, canary: Canary
) -> None:
    """An open port, a closed one, a name and an address that are not ours: all the same."""
    urls = (
        f"http://127.0.0.1:{canary.port}/",
        "http://127.0.0.1:9/",
        "http://localhost/",
        "http://10.1.2.3/",
        "http://no-such-host.invalid/",
    )
    said = [await refused_everywhere(kinds, account, url) for url in urls]
    assert all(words == said[0] for words in said)
    assert not any(word in words for words in said[0] for word in ("127", "refused", "resolve"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_public_url_is_passed_on_where_the_provider_fetches_by_itself(
    passing: ThreeKinds, kind: Kind, stream: bool
) -> None:
    account, model = await passing.client(), model_of(kind)
    passing.ups[kind].script(saying(kind, "A dot."), saying(kind, "A dot."))
    ask = looking(model, PUBLIC_URL, data_url(GIF, "image/gif"), stream=stream)
    async with account.session.post(
        "/v1/chat/completions", json=ask, headers={"Authorization": f"Bearer {account.key}"}
    ) as response:
        assert response.status == 200
        await response.read()
    parts = seen(passing.latest(kind).json)
    assert parts == [("text", "What is it?"), ("url", PUBLIC_URL), ("image/gif", GIF)]
    status, _ = await dify(account, model, remote(PUBLIC_URL), stream=stream)
    assert status == 200
    assert sorted(seen(passing.latest(kind).json)) == [("text", "What is it?"), ("url", PUBLIC_URL)]
    assert len(await passing.books.settled(account.account, 2)) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_data_is_looked_at_there_too(passing: ThreeKinds, kind: Kind) -> None:
    before, account = passing.asked, await passing.client()
    status, answer = await chat(account, looking(model_of(kind), PUBLIC_URL, data_url(b"garbage")))
    assert (status, answer["error"]["param"]) == (400, "messages[0].content[2].image_url.url")
    assert passing.asked == before
    assert passing.untouched(account)


# What is fetched. No public host can be reached from everywhere, so these let the fetcher reach this machine.


class Host:
    """Answers each path with its bytes, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.heads: list[str] = []
        self.url = ""

    def gives(self, path: str, body: bytes, status: str = "200 OK", **headers: str) -> str:
        """The URL of what is found there."""
        named = {"Content-Length": str(len(body)), "Connection": "close"} | headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self.answers[path] = f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body
        return self.url + path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            writer.write(self.answers[head.split(" ")[1]])
            await writer.drain()
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    made = Host()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


class Fetching:
    """A gateway in this process that may fetch from this machine, an upstream of each kind, and an account."""

    def __init__(self, inside: Inside, ups: Mapping[Kind, Any], keys: Mapping[str, str]) -> None:
        self.inside = inside
        self.ups = ups
        self._keys = keys

    async def ask(self, dialect: Literal["chat", "dify"], model: str, *urls: str) -> Reply:
        if dialect == "chat":
            path, body, key = "/v1/chat/completions", looking(model, *urls), self._keys[""]
        else:
            path, key = "/completion-messages", self._keys[model]
            body = {"inputs": {"query": "What is it?"}, "user": "u1", "files": [remote(url) for url in urls]}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return await self.inside.send("POST", path, body, headers)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fetching(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fetching]:
    folder = tmp_path_factory.mktemp("fetching")

    def fetcher(max_bytes: int) -> ImageSource:
        def permitted(address: Address) -> bool:
            return str(address) == "127.0.0.1"

        return ImageFetcher(max_bytes, 5, permitted=permitted)

    async with contextlib.AsyncExitStack() as stack:
        ups = {kind: await stack.enter_async_context(SPEAKS[kind]()) for kind in KINDS}
        toml = "".join(
            f'\n[providers.{provider_of(kind)}]\nkind = "{kind}"\nbase_url = "{up.url}"\n'
            for kind, up in ups.items()
        )
        config = folder / "fetching.toml"
        config.write_text(toml + CONFIG)
        settings = load(config, {"HEADGATE_DATA_DIR": str(folder / "data"), KEY_VARIABLE: "key"})
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(gateway, "_image_fetcher", fetcher)
        opened = await stack.enter_async_context(
            gateway.open_gateway(settings, providers={"embedded": Fake("embedded")})
        )
        rows = route_table(settings, opened, lambda: "http://inside")
        app = HeadgateApp(rows, settings.server.cors_origins)
        with administration(settings) as operator:
            operator.create_account("ann", NanoUSD(10**10))
            keys = {"": operator.create_key("ann").key}
            keys |= {model_of(kind): operator.create_key("ann", app=model_of(kind)).key for kind in KINDS}
        yield Fetching(Inside(settings, opened, rows, app), ups, keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", ["chat", "dify"])
async def test_an_image_by_url_is_fetched_once_and_sent_as_data(
    fetching: Fetching, host: Host, kind: Kind, dialect: Literal["chat", "dify"]
) -> None:
    path = f"/{kind}/{dialect}/a.bin"
    url = host.gives(path, JPEG, **{"Content-Type": "text/html"})
    fetching.ups[kind].script(saying(kind, "A dot."))
    reply = await fetching.ask(dialect, model_of(kind), url)
    assert reply.status == 200, reply.body
    assert ("image/jpeg", JPEG) in seen(fetching.ups[kind].requests[-1].json)
    (head,) = [head for head in host.heads if path in head]
    first, *lines = head.strip().split("\r\n")
    assert first == f"GET {path} HTTP/1.1"
    # Nothing of the client's or the provider's credentials goes there.
    assert {line.partition(":")[0].lower() for line in lines} == {
        "host",
        "accept",
        "accept-encoding",
        "user-agent",
    }


@pytest.mark.parametrize("dialect", ["chat", "dify"])
async def test_what_a_url_gives_must_be_an_image_at_once(
    fetching: Fetching, host: Host, dialect: Literal["chat", "dify"]
) -> None:
    there = host.gives("/there.png", PNG)
    urls = {
        "redirect": host.gives("/moved", b"", "302 Found", Location=there),
        "missing": host.gives("/missing", PNG, "404 Not Found"),
        "page": host.gives("/page.png", b"<html>", **{"Content-Type": "image/png"}),
        "nothing": host.gives("/nothing.png", b""),
        "too large": host.gives("/large.png", PNG.ljust(MOST_BYTES + 1, b"x")),
        "lying": host.gives(
            "/lying.png", PNG.ljust(MOST_BYTES + 1, b"x"), **{"Transfer-Encoding": "chunked"}
        ),
    }
    asked = sum(len(up.requests) for up in fetching.ups.values())
    fetched = len(host.heads)
    for kind in KINDS:
        for what, url in urls.items():
            reply = await fetching.ask(dialect, model_of(kind), url)
            assert reply.status == 400, (what, reply.body)
            found = json.loads(reply.body)
            if dialect == "chat":
                assert found["error"]["param"] == PART
            else:
                assert (found["code"], found["status"]) == ("invalid_param", 400)
    assert sum(len(up.requests) for up in fetching.ups.values()) == asked
    assert len(host.heads) - fetched == len(urls) * len(KINDS)  # the redirect was not followed
    with administration(fetching.inside.settings) as operator:
        assert (operator.balance("ann").held, operator.balance("ann").open_holds) == (0, 0)
