"""dialects/dify_files.py: the images of a request, and what an upload is answered with."""

import json
import uuid
from typing import Any

import pytest
from dify_client import CompletionClient

from headgate.core.accounts import App, Principal, Variable
from headgate.core.completion import CompletionRequest, Image, Message, Sampling
from headgate.core.errors import GatewayError, InvalidRequest
from headgate.core.files import Owner, UploadedFile
from headgate.dialects.base import RequestContext
from headgate.dialects.dify import Dify
from headgate.dialects.dify_files import (
    MAX_FILES,
    extension_of,
    file_too_large,
    no_file,
    render_upload,
    shown_name,
    too_many_files,
    unsupported_file,
)

STORY = App(
    name="story",
    model="acme-eyes",
    prompt="{{topic}}",
    variables=(Variable(name="topic"),),
    temperature=0.7,
    max_tokens=64,
    stop=("END",),
)
DIFY = Dify({"story": STORY})
REMOTE = {"type": "image", "transfer_method": "remote_url", "url": "https://example.com/a.png"}
LOCAL = {"type": "image", "transfer_method": "local_file", "upload_file_id": "an-id"}


def parsed(files: object, **inputs: str) -> CompletionRequest:
    body = {"inputs": inputs or {"topic": "cats"}, "user": "u1", "files": files}
    context = RequestContext(
        principal=Principal(account="ann", key_id="k1", app="story"),
        request_id="req-1",
        answer_id="9da23599-e713-473b-982c-4328d4f5c78a",
        stream_id="0" * 32,
        created=1,
    )
    return DIFY.parse(DIFY.decode(json.dumps(body).encode()), context)


def refused(files: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parsed(files)
    return caught.value


def test_files_make_the_prompt_a_message_with_images() -> None:
    request = parsed([REMOTE, LOCAL])
    assert request.prompts is None
    assert request.looks
    assert request.messages == (
        Message(
            role="user",
            content="cats",
            parts=(
                "cats",
                Image(url="https://example.com/a.png", param="files[0].url"),
                Image(file_id="an-id", param="files[1].upload_file_id"),
            ),
        ),
    )
    assert (request.app, request.user, request.models) == ("story", "u1", ("acme-eyes",))
    assert (request.max_tokens, request.sampling) == (64, Sampling(temperature=0.7, stop=("END",)))


def test_an_empty_prompt_is_no_part() -> None:
    (message,) = parsed([LOCAL], other="x").messages or ()
    assert message.content == ""
    assert message.parts == (Image(file_id="an-id", param="files[0].upload_file_id"),)


@pytest.mark.parametrize("files", [None, []])
def test_without_files_nothing_changes(files: object) -> None:
    request = parsed(files)
    assert (request.prompts, request.messages, request.looks) == (("cats",), None, False)


def test_what_belongs_to_the_other_transfer_method_is_not_looked_at() -> None:
    (message,) = parsed([REMOTE | {"upload_file_id": ""}, LOCAL | {"url": ""}]).messages or ()
    assert [part.param for part in message.parts if isinstance(part, Image)] == [
        "files[0].url",
        "files[1].upload_file_id",
    ]


@pytest.mark.parametrize(
    ("file", "param", "problem"),
    [
        (REMOTE | {"type": "video"}, "files[1].type", "must be image"),
        (REMOTE | {"type": ""}, "files[1].type", "must be image"),
        (
            REMOTE | {"transfer_method": "ftp"},
            "files[1].transfer_method",
            "must be remote_url or local_file",
        ),
        (REMOTE | {"url": ""}, "files[1].url", "is required"),
        (REMOTE | {"url": None}, "files[1].url", "is required"),
        (LOCAL | {"upload_file_id": ""}, "files[1].upload_file_id", "is required"),
        ({"type": "image", "transfer_method": "remote_url"}, "files[1].url", "is required"),
        ({"type": "image"}, "files[1]", "required field `transfer_method`"),
        ("a.png", "files", "object"),
        (REMOTE | {"url": 7}, "files", "string"),
    ],
)
def test_a_wrong_file_is_named(file: object, param: str, problem: str) -> None:
    error = refused([LOCAL, file])
    assert param in (error.param or "")
    assert problem in error.message


def test_there_are_at_most_ten() -> None:
    assert len((parsed([LOCAL] * MAX_FILES).messages or ())[0].parts) == 1 + MAX_FILES
    error = refused([LOCAL] * (MAX_FILES + 1))
    assert error.param == "files"
    assert "10" in error.message


class RecordingClient(CompletionClient):  # type: ignore[misc]  # it ships no types
    """The real client up to the point where it would send."""

    sent: Any

    def _send_request(self, method: str, endpoint: str, json: Any = None, **kwargs: object) -> None:
        self.sent = json


def test_what_dify_client_sends_is_understood() -> None:
    client = RecordingClient("app-key")
    client.create_completion_message({"topic": "cats"}, "blocking", "u1", [REMOTE])
    (message,) = parsed(client.sent["files"]).messages or ()
    assert message.parts[1] == Image(url="https://example.com/a.png", param="files[0].url")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("cat.png", "cat.png"),
        ("żółw 🐢 (1).PNG", "żółw 🐢 (1).PNG"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("a\r\nSet-Cookie: x\x00.png", "aSet-Cookie: x.png"),
        ("a\x1b[31m\x7f\x85.png", "a[31m.png"),
        ("a\u2028b\u2029.png", "ab.png"),
        ("\x00\n", ""),
        ("x" * 300, "x" * 255),
    ],
)
def test_a_name_is_shown_as_given_without_control_characters(given: str, shown: str) -> None:
    assert shown_name(given) == shown


@pytest.mark.parametrize(
    ("name", "media_type", "extension"),
    [
        ("a.png", "image/png", "png"),
        ("a.PNG", "image/png", "png"),
        ("a.jpeg", "image/jpeg", "jpeg"),
        ("a.JPG", "image/jpeg", "jpg"),
        ("a.png", "image/jpeg", "jpg"),
        ("a.exe", "image/gif", "gif"),
        ("webp", "image/webp", "webp"),
        ("", "image/webp", "webp"),
    ],
)
def test_the_extension_is_one_of_the_contents_type(name: str, media_type: str, extension: str) -> None:
    assert extension_of(name, media_type) == extension


def upload(**owner: Any) -> UploadedFile:
    return UploadedFile(
        id="72fa9618-8f89-4a37-9b33-7e1178a24a67",
        owner=Owner(**{"account": "ann", "app": "story", "user": "u1"} | owner),
        name="example.png",
        extension="png",
        media_type="image/png",
        size=1024,
        created=1_577_836_800,
        expires=1_577_923_200,
    )


def test_an_upload_is_answered_as_dify_answers() -> None:
    shown = json.loads(render_upload(upload()))
    creator = shown.pop("created_by")
    assert str(uuid.UUID(creator)) == creator
    assert shown == {
        "id": "72fa9618-8f89-4a37-9b33-7e1178a24a67",
        "name": "example.png",
        "size": 1024,
        "extension": "png",
        "mime_type": "image/png",
        "created_at": 1_577_836_800,
    }


def test_each_end_user_is_one_creator() -> None:
    def creator(**owner: Any) -> str:
        return str(json.loads(render_upload(upload(**owner)))["created_by"])

    assert creator() == creator()
    others = [
        creator(user="u2"),
        creator(user=None),
        creator(user="null"),
        creator(app="x"),
        creator(account="bob"),
    ]
    assert len({creator(), *others}) == 6


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (no_file(), 400, "no_file_uploaded"),
        (too_many_files(), 400, "too_many_files"),
        (file_too_large(1000), 413, "file_too_large"),
        (unsupported_file(), 415, "unsupported_file_type"),
    ],
)
def test_an_uploads_errors_are_difys(error: GatewayError, status: int, code: str) -> None:
    response = DIFY.render_error(error)
    assert response.status == status
    assert json.loads(response.body) == {"code": code, "message": error.message, "status": status}
