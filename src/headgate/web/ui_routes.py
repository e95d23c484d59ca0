"""The page at /ui: static files, read once at the start, served with the strictest headers they work under.

The page is plain ES modules: nothing is built, nothing comes from another host, and the policy below makes the
browser hold to that. Files have no version in their names, so browsers ask each time and get a 304.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "ui"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def ui_routes() -> list[Route]:
    """GET /ui (the page), /ui/NAME for each of its files, /ui/ -> /ui. OSError when a file cannot be read."""
    files = [Route(path, _endpoint(file), methods=["GET"]) for path, file in _files()]
    return [*files, Route("/ui/", _to_the_page, methods=["GET"])]


def _files() -> Iterator[tuple[str, Path]]:
    yield "/ui", FOLDER / PAGE
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in MEDIA_TYPES and file.name != PAGE:
            yield f"/ui/{file.name}", file


def _endpoint(file: Path) -> Endpoint:
    body = file.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}
    typed = {**headers, "Content-Type": MEDIA_TYPES[file.suffix]}

    async def serve(request: Request) -> Response:
        if _knows(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=typed)

    return serve


async def _to_the_page(_: Request) -> Response:
    # Relative, so that it holds behind a path prefix; a browser carries the fragment, and so the token, along.
    return RedirectResponse("../ui", status_code=308, headers=HEADERS)


def _knows(if_none_match: str, etag: str) -> bool:
    """Whether the browser's copy is this one; weak comparison, as RFC 9110 wants it here."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags
