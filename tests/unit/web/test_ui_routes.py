"""The page's files as a browser gets them."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urljoin

import pytest
from starlette.applications import Starlette
from starlette.types import Message, Scope

from headgate.web.ui_routes import CONTENT_SECURITY_POLICY, FOLDER, ui_routes

PATHS = [route.path for route in ui_routes() if route.path != "/ui/"]


class Answer:
    def __init__(self, messages: list[Message]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])


async def fetch(path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    await Starlette(routes=ui_routes())(scope, receive, send)
    return Answer(sent)


async def test_the_page_is_html() -> None:
    answer = await fetch("/ui")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.body == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("path", PATHS)
async def test_every_file_carries_the_strict_headers(path: str) -> None:
    headers = (await fetch(path)).headers
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PATHS)
async def test_a_file_the_browser_has_is_not_sent_again(path: str) -> None:
    etag = (await fetch(path)).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = await fetch(path, headers={"If-None-Match": known})
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == etag
    assert (await fetch(path, headers={"If-None-Match": '"other"'})).status == 200


async def test_head_answers_as_get_without_a_body() -> None:
    got, head = await fetch("/ui"), await fetch("/ui", "HEAD")
    assert head.status == 200
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_a_trailing_slash_leads_to_the_page() -> None:
    answer = await fetch("/ui/")
    assert answer.status == 308
    assert urljoin("http://gateway/under/ui/", answer.headers["location"]) == "http://gateway/under/ui"


@pytest.mark.parametrize("path", ["/ui/index.html", "/ui/../ui_routes.py", "/ui/nothing.js"])
async def test_nothing_else_is_served(path: str) -> None:
    assert (await fetch(path)).status == 404


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.html")), ids=lambda file: file.name)
def test_the_page_names_only_files_that_are_served(file: Path) -> None:
    named = re.findall(r'(?:src|href)="([^"]+)"', file.read_text())
    assert named
    assert {f"/{name}" for name in named} <= set(PATHS)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.js")), ids=lambda file: file.name)
def test_scripts_import_only_files_that_are_served(file: Path) -> None:
    named = re.findall(r'^import .* from "\./([^"]+)";$', file.read_text(), re.MULTILINE)
    assert {f"/ui/{name}" for name in named} <= set(PATHS)
    assert len(named) == file.read_text().count("import {")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.js")), ids=lambda file: file.name)
def test_no_script_turns_text_into_markup(file: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage\."
    assert not re.search(forbidden, file.read_text())
