"""Images that the gateway fetches: once, without anybody's credentials, and only what is an image there and then.

No public host can be reached from everywhere, so these gateways may reach this machine.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import pytest
import pytest_asyncio
from tests.support.doors import Reply
from tests.support.inside import Inside
from tests.support.looking import CONFIG, JPEG, MOST_BYTES, PART, PNG, looking, remote, saying, seen
from tests.support.three_kinds import KEY_VARIABLE, KINDS, SPEAKS, Kind, model_of, provider_of

from headgate.bootstrap import administration, gateway
from headgate.config import load
from headgate.core.money import NanoUSD
from headgate.core.ports import ImageSource
from headgate.providers.egress.addresses import Address
from headgate.providers.egress.images import ImageFetcher
from headgate.providers.fake import Fake
from headgate.web.app import HeadgateApp
from headgate.web.routes import route_table

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
        "connection",
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
