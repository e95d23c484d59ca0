"""What the page's tests stand on: a slow upstream, the running gateway, and a watch over what the page does."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct
from playwright.sync_api import Page, Request


class Drip(ThreadingHTTPServer):
    """An upstream that writes a word every 20 ms for as long as somebody reads; "break" in the prompt breaks it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), DripHandler)
        self.left = threading.Event()  # the reader went away
        self.closing = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class DripHandler(BaseHTTPRequestHandler):
    server: Drip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = 3 if b"break" in body else 4000
        try:
            for _ in range(words):
                delta = {"index": 0, "delta": {"content": "drip "}, "finish_reason": None}
                event = {"id": "1", "object": "chat.completion.chunk", "choices": [delta]}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                if self.server.closing.wait(0.02):
                    return
        except OSError:
            self.server.left.set()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the test's output is not its log."""


class Gateway(Struct, frozen=True, kw_only=True):
    base: str
    token: str
    environ: dict[str, str]
    folder: Path

    @property
    def link(self) -> str:
        return f"{self.base}/ui#token={self.token}"

    def cli(self, *args: str) -> str:
        command = [sys.executable, "-m", "headgate", *args]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class Watch:
    """What a page must not do: complain on the console, break its policy, ask another host."""

    def __init__(self, page: Page) -> None:
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.expected = re.compile(r"(?!)")
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"
        )
        page.on("console", lambda message: self._complain(message.text, message.type in ("error", "warning")))
        page.on("pageerror", lambda error: self._complain(str(error), True))
        page.on("request", self._request)

    def expect(self, pattern: str) -> None:
        """The console line that a refused request leaves in every browser."""
        self.expected = re.compile(pattern)

    def _complain(self, text: str, counts: bool) -> None:
        if counts and not self.expected.search(text):
            self.complaints.append(text)

    def _request(self, request: Request) -> None:
        self.hosts.add(urlsplit(request.url).netloc)
