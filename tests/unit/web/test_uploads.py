"""web/uploads.py: a multipart form as it arrives, whole or broken, quick or slow."""

import asyncio
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.doors import Caller, Reply
from tests.support.exchange import scope_of
from tests.support.inside import Inside, inside

from headgate.config import DEFAULT_APP
from headgate.core.files import Owner
from headgate.dialects.dify import Dify
from headgate.providers.fake import Fake
from headgate.stores.files import FolderFiles
from headgate.web.json_endpoints import JsonEndpoint
from headgate.web.uploads import (
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    ROOM_AROUND_THE_FILE,
    UploadEndpoint,
    UploadLimits,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\r\n--not the boundary\r\n"
MAX = 2_000_000
BOUNDARY = "a-boundary"
Message = MutableMapping[str, Any]
_TEMPORARY = tempfile.TemporaryFile


def part(name: str, content: bytes, *, filename: str | None = None, more: str = "") -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{more}\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


FILE = part("file", PNG, filename="cat.png", more="Content-Type: text/html\r\n")
USER = part("user", b"u1")


class Web:
    """The route of a gateway whose key belongs to `ann`."""

    def __init__(self, gateway: Inside, caller: Caller) -> None:
        self.inside = gateway
        self.caller = caller
        self.limits = UploadLimits(max_bytes=MAX, keep_s=60)

    def endpoint(self, limits: UploadLimits) -> JsonEndpoint:
        dify = Dify({"default": DEFAULT_APP})
        return JsonEndpoint(dify, UploadEndpoint(self.inside.gateway, dify, limits).upload)

    async def send(
        self,
        *pieces: bytes,
        content_type: str | None = f"multipart/form-data; boundary={BOUNDARY}",
        headers: dict[str, str] | None = None,
        key: str | None = None,
        limits: UploadLimits | None = None,
        app: JsonEndpoint | None = None,
        receive: Callable[[], Awaitable[Message]] | None = None,
    ) -> Reply:
        given = {"Authorization": f"Bearer {key or self.caller.key}"} | (headers or {})
        if content_type is not None:
            given["Content-Type"] = content_type
        sent: list[Message] = []
        unsent = list(pieces or (b"",))

        async def receive_pieces() -> Message:
            body = unsent.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(unsent)}

        async def send(message: Message) -> None:
            sent.append(message)

        app = app or self.endpoint(limits or self.limits)
        await app(scope_of("POST", "/files/upload", given), receive or receive_pieces, send)
        assert sent, "no answer"
        start, *bodies = sent
        names = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(status=start["status"], headers=names, body=b"".join(body["body"] for body in bodies))

    @property
    def stored(self) -> set[str]:
        """The ids of the uploads, and whatever else is in their folder."""
        names = [path.name for path in (self.inside.settings.data_dir / "files").iterdir()]
        return {name[:36] if len(name) == 53 else name for name in names}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def web(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Web]:
    async with inside(
        tmp_path_factory.mktemp("uploads"), {"acme": Fake("acme"), "embedded": Fake("embedded")}
    ) as gateway:
        yield Web(gateway, gateway.caller("ann"))


@pytest.fixture(autouse=True)
def spools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The temporary files that forms are kept in; whatever happens, all of them are closed in the end."""
    made: list[Any] = []

    def spool(*args: Any, **kwargs: Any) -> Any:
        made.append(tempfile.SpooledTemporaryFile(*args, **kwargs))  # noqa: SIM115 - who asked for it closes it
        return made[-1]

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", spool)
    monkeypatch.setattr("headgate.web.uploads.SpooledTemporaryFile", spool)
    yield made
    assert all(file.closed for file in made)


def assert_refused(web: Web, reply: Reply, status: int, code: str) -> None:
    problem = reply.problem("dify")
    assert (reply.status, problem.code) == (status, code), problem.message


async def test_an_upload_is_answered_and_kept_for_its_user(web: Web, spools: list[Any]) -> None:
    reply = await web.send(form(FILE, USER))
    assert reply.status == 201, reply.body
    shown = reply.json
    assert (shown["name"], shown["size"], shown["extension"]) == ("cat.png", len(PNG), "png")
    assert shown["mime_type"] == "image/png"
    owner = Owner(account="ann", app="default", user="u1")
    kept = web.inside.gateway.files.load(shown["id"], owner)
    assert kept is not None
    file, content = kept
    assert content == PNG
    assert (file.created, file.expires) == (shown["created_at"], shown["created_at"] + 60)
    assert len(spools) == 2  # the parser's own, which holds nothing, and ours


@pytest.mark.parametrize("user", [b"", None])
async def test_without_a_user_it_is_nobody_s(web: Web, user: bytes | None) -> None:
    body = form(FILE) if user is None else form(part("user", user), FILE)
    reply = await web.send(body)
    owner = Owner(account="ann", app="default", user=None)
    assert web.inside.gateway.files.load(reply.json["id"], owner) is not None


async def test_the_pieces_may_be_cut_anywhere(web: Web) -> None:
    body = form(USER, FILE)
    for at in range(len(body)):
        reply = await web.send(body[:at], body[at:])
        assert (reply.status, reply.json["size"]) == (201, len(PNG)), at
    assert (await web.send(*(body[at : at + 1] for at in range(len(body))))).status == 201


async def test_a_file_that_does_not_stay_in_memory_arrives_whole(web: Web) -> None:
    content = PNG.ljust(MAX, b"\r")
    body = form(part("file", content, filename="big.png"), USER)
    reply = await web.send(*(body[at : at + 65536] for at in range(0, len(body), 65536)))
    assert (reply.status, reply.json["size"]) == (201, MAX)


async def test_what_does_not_stay_in_memory_waits_in_the_store_s_own_folder(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = web.inside.settings.data_dir / "files"
    places: list[str] = []

    def in_place(*args: Any, **kwargs: Any) -> Any:
        places.append(kwargs["dir"])
        return _TEMPORARY(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", in_place)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    body = form(part("file", PNG.ljust(MAX, b"x"), filename="big.png"))
    assert (await web.send(*(body[at : at + 65536] for at in range(0, len(body), 65536)))).status == 201
    assert places == [str(folder)]
    assert all(uuid.UUID(name) for name in web.stored)


async def test_a_disk_that_is_full_while_a_form_arrives_is_said(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    reply = await web.send(form(part("file", PNG.ljust(MAX, b"x"), filename="big.png")))
    assert_refused(web, reply, 503, "completion_request_error")


async def test_a_form_without_a_last_boundary_is_refused_wherever_it_breaks_off(web: Web) -> None:
    body, stored = form(FILE, USER), web.stored
    last = body.index(f"{BOUNDARY}--".encode()) + len(BOUNDARY)
    for at in range(last):
        assert_refused(web, await web.send(body[:at]), 400, "invalid_param")
    assert web.stored == stored


async def test_a_form_with_any_byte_changed_never_breaks_it(web: Web) -> None:
    body = form(FILE, USER)
    for at in range(len(body)):
        for byte in (0, 10, 34, 255):
            reply = await web.send(body[:at] + bytes([byte]) + body[at + 1 :])
            assert reply.status in (201, 400, 415), (at, byte, reply.body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        b"garbage",
        b"--another\r\n\r\n--another--",
        b"-" * 10_000,
        b"\x00" * 10_000,
        f"--{BOUNDARY}\r\n".encode() + b"x" * 10_000,
        f"--{BOUNDARY}\r\n".encode() + b"x: y\r\n" * 100 + b"\r\n",
        form(b"--a-boundary\r\n\r\nno disposition\r\n"),
        form(b"--a-boundary\r\nContent-Disposition: form-data\r\n\r\nno name\r\n"),
    ],
)
async def test_garbage_is_refused(web: Web, body: bytes) -> None:
    assert_refused(web, await web.send(body), 400, "invalid_param")


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 300,
        "multipart/form-data; boundary=other",
    ],
)
async def test_a_boundary_that_is_none_is_refused(web: Web, content_type: str) -> None:
    assert_refused(web, await web.send(form(FILE), content_type=content_type), 400, "invalid_param")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "text/plain",
        "image/png",
        "multipart/mixed; boundary=x",
        f"multipart/form-data; boundary={BOUNDARY}; charset=utf-7",
        f"multipart/form-data; boundary={BOUNDARY}; charset=unicode_escape",
        "; ;=;\"'",
        "\xff/\xe9; \xdf=\xdf",
    ],
)
async def test_what_is_no_form_is_415_before_anything_else(web: Web, content_type: str | None) -> None:
    for key in (None, "wrong"):
        reply = await web.send(form(FILE), content_type=content_type, key=key)
        assert_refused(web, reply, 415, "invalid_param")


async def test_a_wrong_key_is_refused_without_a_look_at_the_body(web: Web) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    reply = await web.send(key="hg-wrong", receive=receive)
    assert_refused(web, reply, 401, "unauthorized")
    assert reply.headers["www-authenticate"] == 'Bearer realm="api"'


@pytest.mark.parametrize(
    "body",
    [
        form(USER),
        form(part("file", b"text without a file name"), USER),
        form(part("image", PNG, filename="cat.png")),
        form(part("file", b"", filename="")),
    ],
)
async def test_a_form_without_a_file_is_said(web: Web, body: bytes) -> None:
    assert_refused(web, await web.send(body), 400, "no_file_uploaded")


async def test_a_form_that_cannot_hold_files_has_none(web: Web) -> None:
    reply = await web.send(b"user=u1", content_type="application/x-www-form-urlencoded")
    assert_refused(web, reply, 400, "no_file_uploaded")


@pytest.mark.parametrize("others", [("file",), ("second",), ("a", "b"), tuple("abcdefgh")])
async def test_more_than_one_file_is_said(web: Web, others: tuple[str, ...]) -> None:
    files = [part(name, PNG, filename="b.png") for name in others]
    assert_refused(web, await web.send(form(FILE, *files)), 400, "too_many_files")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PN", b"GIF88a", b"%PDF-1.7"])
async def test_what_is_no_image_is_said_whatever_it_claims_to_be(web: Web, content: bytes) -> None:
    file = part("file", content, filename="cat.png", more="Content-Type: image/png\r\n")
    assert_refused(web, await web.send(form(file)), 415, "unsupported_file_type")


async def test_a_file_beyond_the_limit_is_said_and_one_at_it_is_taken(web: Web) -> None:
    for size, status in ((MAX, 201), (MAX + 1, 413)):
        file = part("file", PNG.ljust(size, b"x"), filename="big.png")
        reply = await web.send(form(file))
        assert reply.status == status
    assert_refused(web, reply, 413, "file_too_large")


async def test_an_endless_body_is_refused_while_it_arrives(web: Web) -> None:
    piece, received = b"x" * 65536, 0
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()

    async def receive() -> Message:
        nonlocal received
        body = piece if received else head
        received += len(body)
        return {"type": "http.request", "body": body, "more_body": True}

    assert_refused(web, await web.send(receive=receive), 413, "file_too_large")
    assert received <= MAX + ROOM_AROUND_THE_FILE + len(piece) + len(head)


async def test_a_length_beyond_the_limit_is_refused_before_the_credential(web: Web) -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    for length in (str(MAX + ROOM_AROUND_THE_FILE + 1), "9" * 5000):
        reply = await web.send(headers={"Content-Length": length}, key="wrong", receive=receive)
        assert_refused(web, reply, 413, "file_too_large")
    reply = await web.send(headers={"Content-Length": "-5"}, receive=receive)
    assert_refused(web, reply, 400, "invalid_param")


@pytest.mark.parametrize(
    "fields",
    [
        [part(f"field-{number}", b"x") for number in range(MAX_FIELDS + 1)],
        [part("user", b"x" * (MAX_FIELD_BYTES + 1))],
        [part("user", b"x" * 513)],
        [part("user", "\u00e9".encode() * 513)],
    ],
)
async def test_too_many_and_too_long_fields_are_refused(web: Web, fields: list[bytes]) -> None:
    assert_refused(web, await web.send(form(*fields, FILE)), 400, "invalid_param")


async def test_silence_and_dribbling_come_to_an_end(web: Web) -> None:
    body = form(FILE)

    async def silent() -> Message:
        if body_left:
            return {"type": "http.request", "body": body_left.pop(), "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError("never")

    body_left = [body[:100]]
    limits = UploadLimits(max_bytes=MAX, keep_s=60, silence_s=0.01)
    reply = await web.send(receive=silent, limits=limits)
    assert_refused(web, reply, 400, "invalid_param")
    assert "in time" in reply.json["message"]

    async def dribbling() -> Message:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"-", "more_body": True}

    limits = UploadLimits(max_bytes=MAX, keep_s=60, total_s=0.05)
    assert_refused(web, await web.send(receive=dribbling, limits=limits), 400, "invalid_param")


async def test_a_client_that_leaves_gets_nothing_and_leaves_nothing(web: Web, spools: list[Any]) -> None:
    stored, left = web.stored, [form(FILE)[:-20]]

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": True}
        return {"type": "http.disconnect"}

    with pytest.raises(AssertionError, match="no answer"):
        await web.send(receive=receive)
    assert (web.stored, len(spools)) == (stored, 2)


async def test_names_are_cleaned_and_never_empty(web: Web) -> None:
    for given, shown in (
        ("../../etc/passwd", "../../etc/passwd"),
        ("a\x1b\x00b.png", "ab.png"),
        ("\u017c\u00f3\u0142w.png", "\u017c\u00f3\u0142w.png"),
        ("x" * 1000, "x" * 255),
        ("\x01", "image.png"),
        ("", "image.png"),
    ):
        reply = await web.send(form(part("file", PNG, filename=given)))
        assert (reply.status, reply.json["name"]) == (201, shown), reply.body
        assert json.loads(reply.body)["id"] in web.stored


async def test_while_draining_nothing_is_taken(web: Web) -> None:
    web.inside.gateway.draining = True
    try:
        reply = await web.send(form(FILE))
    finally:
        web.inside.gateway.draining = False
    assert_refused(web, reply, 503, "completion_request_error")
    assert "retry-after" in reply.headers


class Hanging:
    """A form of which the beginning has come and the rest comes when `rest` is set."""

    def __init__(self) -> None:
        body = form(FILE)
        self._pieces = [body[:50], body[50:]]
        self.rest, self.begun = asyncio.Event(), asyncio.Event()

    async def receive(self) -> Message:
        if self.begun.is_set():
            await self.rest.wait()
        self.begun.set()
        return {"type": "http.request", "body": self._pieces.pop(0), "more_body": bool(self._pieces)}


async def unread() -> Message:
    raise AssertionError("the body was read")


async def test_uploads_at_the_same_time_are_bounded_for_each_account_and_all_together(web: Web) -> None:
    limits = UploadLimits(max_bytes=MAX, keep_s=60, at_once=3, at_once_each=2)
    app, bob, cid = web.endpoint(limits), web.inside.caller("bob"), web.inside.caller("cid")
    forms = [Hanging() for _ in range(3)]
    keys = [web.caller.key, web.caller.key, bob.key]
    running = []
    for hanging, key in zip(forms, keys, strict=True):
        running.append(asyncio.ensure_future(web.send(receive=hanging.receive, key=key, app=app)))
        await hanging.begun.wait()
        if len(running) == 2:
            reply = await web.send(receive=unread, app=app)  # ann has two
            assert_refused(web, reply, 503, "completion_request_error")
            assert int(reply.headers["retry-after"]) > 0
    reply = await web.send(receive=unread, key=cid.key, app=app)  # all have three
    assert_refused(web, reply, 503, "completion_request_error")
    for hanging in forms:
        hanging.rest.set()
    assert [reply.status for reply in await asyncio.gather(*running)] == [201] * 3
    assert (await web.send(form(FILE), app=app)).status == 201


async def test_room_is_taken_before_the_body_is_read_and_given_back(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FolderFiles(tmp_path / "files", web.inside.gateway.clock, 5_000_000)
    monkeypatch.setattr(web.inside.gateway, "files", files)
    forms = [Hanging(), Hanging()]
    running = []
    for hanging in forms:
        running.append(asyncio.ensure_future(web.send(receive=hanging.receive)))
        await hanging.begun.wait()
    # Two of at most 2 MB may come, so a third has no place.
    reply = await web.send(receive=unread)
    assert_refused(web, reply, 503, "completion_request_error")
    small = await web.send(form(FILE), headers={"Content-Length": "300"})
    assert small.status == 201
    running[0].cancel()
    await asyncio.wait([running[0]])
    assert (await web.send(form(FILE))).status == 201
    forms[1].rest.set()
    assert (await running[1]).status == 201


async def test_refused_forms_give_their_room_back(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FolderFiles(tmp_path / "files", web.inside.gateway.clock, 2_100_000)
    monkeypatch.setattr(web.inside.gateway, "files", files)
    for body in (b"garbage", form(USER), form(part("file", b"<html>", filename="x.png"))):
        assert (await web.send(body)).status in (400, 415)
    assert (await web.send(form(FILE))).status == 201


async def test_an_account_without_money_uploads_nothing(web: Web) -> None:
    poor = web.inside.caller("poor", usd=0)
    reply = await web.send(receive=unread, key=poor.key)
    assert_refused(web, reply, 400, "provider_quota_exceeded")


async def test_nothing_is_left_in_the_folder_but_whole_uploads(web: Web) -> None:
    assert web.stored
    assert all(str(uuid.UUID(name)) == name for name in web.stored)
