"""Images in Dify's form, with Dify's own Python client: uploaded, named by URL, and looked at by a model."""

import asyncio
import base64
import contextlib
import io
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from dify_client import CompletionClient
from tests.support.house import ACME, House, model_row, open_house
from tests.support.script import Script

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

CONFIG = (
    ACME
    + model_row("eyes", mode="chat", vision=True, image_tokens=1000)
    + model_row("blind", mode="chat")
    + """
[files]
max_bytes = 2000000

[apps.looker]
model = "eyes"
prompt = "Describe it for {{reader}}."
max_tokens = 32
variables = [{ name = "reader", type = "text-input", required = true }]

[apps.other]
model = "eyes"
prompt = "{{reader}}"
variables = [{ name = "reader", type = "text-input", required = true }]

[apps.blind]
model = "blind"
prompt = "{{reader}}"
variables = [{ name = "reader", type = "text-input", required = true }]
"""
)
MAX = 2_000_000
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
GIF = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
INPUTS = {"reader": "Ann"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("files")) as house:
        yield house


class Dify:
    """The client in a thread of its own, as the upstream lives on this loop."""

    def __init__(
        self, house: House, app: str = "looker", *, account: str = "demo", base: str = "/v1"
    ) -> None:
        self._client = CompletionClient(house.books.key(account, app))
        self._client.base_url = house.url + base

    async def upload(self, files: Any, user: str = "u1") -> Any:
        return await asyncio.to_thread(self._client.file_upload, user, files)

    async def uploaded(self, content: bytes = PNG, name: str = "cat.png", user: str = "u1") -> str:
        response = await self.upload({"file": (name, io.BytesIO(content), "image/png")}, user)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    async def ask(self, *files: Any, user: str = "u1", mode: str = "blocking") -> Any:
        def ask() -> Any:
            response = self._client.create_completion_message(INPUTS, mode, user, list(files))
            _ = response.content
            return response

        return await asyncio.to_thread(ask)

    async def parameters(self) -> Any:
        response = await asyncio.to_thread(self._client.get_application_parameters, "u1")
        return response.json()


def local(file_id: str) -> dict[str, str]:
    return {"type": "image", "transfer_method": "local_file", "upload_file_id": file_id}


def remote(url: str) -> dict[str, str]:
    return {"type": "image", "transfer_method": "remote_url", "url": url}


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def seen(call: Any) -> tuple[list[str], list[str]]:
    """Texts and image URLs of the one message that the upstream got."""
    (message,) = call.json["messages"]
    assert message["role"] == "user"
    parts = message["content"]
    assert {part["type"] for part in parts} <= {"text", "image_url"}
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return texts, [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def assert_refused(response: Any, status: int, code: str, *words: str) -> None:
    body = response.json()
    assert (response.status_code, body["code"], body["status"]) == (status, code, status), body
    assert set(body) == {"code", "message", "status"}
    for word in words:
        assert word in body["message"], body


@contextlib.asynccontextmanager
async def canary() -> AsyncIterator[tuple[int, list[str]]]:
    """A server on loopback that nobody may connect to: its port, and who did."""
    came: list[str] = []

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(str(writer.get_extra_info("peername")))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG)
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], came


@pytest.mark.parametrize("base", ["/v1", ""])
async def test_an_upload_is_answered_in_dify_s_form(house: House, base: str) -> None:
    before = house.balance()
    response = await Dify(house, base=base).upload({"file": ("cät.PNG", io.BytesIO(PNG), "text/plain")})
    assert response.status_code == 201
    shown = response.json()
    assert set(shown) == {"id", "name", "size", "extension", "mime_type", "created_by", "created_at"}
    assert str(uuid.UUID(shown["id"])) == shown["id"]
    assert str(uuid.UUID(shown["created_by"])) == shown["created_by"]
    assert (shown["name"], shown["size"]) == ("cät.PNG", len(PNG))
    assert (shown["extension"], shown["mime_type"]) == ("png", "image/png")
    assert isinstance(shown["created_at"], int)
    assert response.headers["X-Request-Id"]
    assert house.balance() == before


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_the_model_sees_what_was_uploaded(house: House, mode: str) -> None:
    asked, before = len(house.up.requests), house.balance()
    dify = Dify(house)
    png, gif = await dify.uploaded(), await dify.uploaded(GIF, "b.jpg")
    house.up.script(Script(pieces=("A cat.",), usage={"prompt_tokens": 1200, "completion_tokens": 3}))
    response = await dify.ask(local(png), local(gif), mode=mode)
    assert response.status_code == 200, response.text
    assert "A cat." in response.text
    (call,) = house.up.requests[asked:]
    texts, images = seen(call)
    assert texts == ["Describe it for Ann."]
    assert images == [data_url(PNG), data_url(GIF, "image/gif")]
    assert call.json["max_tokens"] == 32
    assert before - house.balance() == 1200 * 500 + 3 * 1500


async def test_an_upload_may_be_used_again(house: House) -> None:
    dify = Dify(house)
    file = await dify.uploaded()
    for _ in range(2):
        assert (await dify.ask(local(file))).status_code == 200


async def test_an_upload_is_for_its_own_app_and_user_alone(house: House) -> None:
    house.books.open("rival", 10**10)
    mine = Dify(house)
    file = await mine.uploaded(user="u1")
    asked, before = len(house.up.requests), house.balance()
    unknown = await mine.ask(local(str(uuid.uuid4())))
    assert_refused(unknown, 400, "invalid_param", "files[0].upload_file_id", "does not exist or has expired")
    for response in (
        await mine.ask(local(file), user="u2"),
        await Dify(house, "other").ask(local(file)),
        await Dify(house, account="rival").ask(local(file)),
    ):
        # As unknown as one that never was.
        assert_refused(response, 400, "invalid_param")
        assert response.json() == unknown.json()
    for nonsense in ("x", "../headgate.db", "0" * 32, "a\x00b"):
        assert (await mine.ask(local(nonsense))).json() == unknown.json()
    assert (len(house.up.requests), house.balance()) == (asked, before)
    assert (await mine.ask(local(file))).status_code == 200


async def test_an_address_of_the_machine_itself_is_never_connected_to(house: House) -> None:
    asked, before = len(house.up.requests), house.balance()
    async with canary() as (port, came):
        for host in (
            "127.0.0.1",
            "localhost",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "2130706433",
            "0",
            "u@127.0.0.1",
        ):
            for mode in ("blocking", "streaming"):
                response = await Dify(house).ask(remote(f"http://{host}:{port}/a.png"), mode=mode)
                assert_refused(response, 400, "invalid_param", "files[0].url")
        assert came == []
    for url in (
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "x",
    ):
        assert_refused(await Dify(house).ask(remote(url)), 400, "invalid_param", "files[0].url")
    assert (len(house.up.requests), house.balance()) == (asked, before)


async def test_an_app_whose_model_is_blind_takes_no_images(house: House) -> None:
    blind = Dify(house, "blind")
    asked = len(house.up.requests)
    file = await blind.uploaded()
    async with canary() as (port, came):
        for given in (local(file), remote(f"http://127.0.0.1:{port}/a.png")):
            response = await blind.ask(given)
            assert_refused(response, 400, "invalid_param", "files[0]", "images")
        assert came == []
    assert len(house.up.requests) == asked
    assert (await blind.ask()).status_code == 200


async def test_parameters_say_which_app_takes_images(house: House) -> None:
    looker, blind = await Dify(house).parameters(), await Dify(house, "blind").parameters()
    assert looker["file_upload"]["image"]["enabled"] is True
    assert blind["file_upload"]["image"]["enabled"] is False
    assert looker["file_upload"]["image"]["transfer_methods"] == ["remote_url", "local_file"]
    limit = looker["file_upload"]["image"]["number_limits"]
    assert looker["system_parameters"]["image_file_size_limit"] == MAX // 2**20
    dify = Dify(house)
    file = await dify.uploaded()
    assert (await dify.ask(*[local(file)] * limit)).status_code == 200
    assert_refused(await dify.ask(*[local(file)] * (limit + 1)), 400, "invalid_param", "files", str(limit))


async def test_what_is_too_large_is_refused(house: House) -> None:
    dify = Dify(house)
    for size in (MAX + 1, 12 * MAX):
        response = await dify.upload({"file": ("big.png", io.BytesIO(PNG.ljust(size, b"x")), "image/png")})
        assert_refused(response, 413, "file_too_large", str(MAX))
    house.up.script(Script(pieces=("Large.",)))
    response = await dify.ask(local(await dify.uploaded(PNG.ljust(MAX, b"x"))))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", [b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"x"])
async def test_what_is_no_image_is_refused(house: House, content: bytes) -> None:
    response = await Dify(house).upload({"file": ("cat.png", io.BytesIO(content), "image/png")})
    assert_refused(response, 415, "unsupported_file_type")


async def test_one_file_is_taken_no_less_and_no_more(house: House) -> None:
    dify = Dify(house)
    for nothing in (None, {}, {"image": ("cat.png", PNG)}):
        assert_refused(await dify.upload(nothing), 400, "no_file_uploaded")
    for several in (
        [("file", ("a.png", PNG)), ("file", ("b.png", PNG))],
        {"file": ("a.png", PNG), "other": ("b.png", PNG)},
    ):
        assert_refused(await dify.upload(several), 400, "too_many_files")


async def test_a_form_that_is_none_is_refused_and_the_next_is_taken(house: House) -> None:
    key = house.books.key("demo", "looker")
    for content_type, body, status in (
        ("multipart/form-data; boundary=x", b"garbage", 400),
        ("multipart/form-data", b"garbage", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("application/json", b"{}", 415),
        ("image/png", PNG, 415),
    ):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
        async with aiohttp.request("POST", f"{house.url}/files/upload", data=body, headers=headers) as reply:
            assert (reply.status, (await reply.json())["code"]) == (status, "invalid_param"), content_type
    assert await Dify(house).uploaded()


async def test_a_bad_key_is_unauthorized(house: House) -> None:
    client = CompletionClient("app-wrong")
    client.base_url = f"{house.url}/v1"
    for size in (len(PNG), MAX):
        file = {"file": ("cat.png", io.BytesIO(PNG.ljust(size, b"x")))}
        response = await asyncio.to_thread(client.file_upload, "u1", file)
        assert_refused(response, 401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="api"'


async def test_uploads_outlive_the_server(house: House) -> None:
    dify = Dify(house)
    file = await dify.uploaded(GIF)
    await house.server.stop()
    await house.server.start()
    asked = len(house.up.requests)
    again = Dify(house)
    assert (await again.ask(local(file))).status_code == 200
    (call,) = house.up.requests[asked:]
    assert seen(call)[1] == [data_url(GIF, "image/gif")]
