"""Images by URL: none leads into a private network, whoever would fetch it, and nobody learns what is there."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.client import Client
from tests.support.looking import (
    CONFIG,
    GIF,
    PART,
    PNG,
    PUBLIC_URL,
    chat,
    data_url,
    dify,
    looking,
    remote,
    saying,
    seen,
)
from tests.support.three_kinds import KINDS, Kind, ThreeKinds, model_of, open_three_kinds

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


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
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(made.serve, "0.0.0.0", 0))
        made.port = server.sockets[0].getsockname()[1]
        with contextlib.suppress(OSError):  # a machine without IPv6
            await stack.enter_async_context(await asyncio.start_server(made.serve, "::1", made.port))
        # It would be noticed.
        _, writer = await asyncio.open_connection("127.0.0.1", made.port)
        async with asyncio.timeout(10):
            while not made.came:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        writer.close()
        made.came.clear()
        yield made


def names_of_this_machine() -> list[str]:
    """Names that lead to the machine itself without asking anybody else, who might take long."""
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
            "-",
            "",
        )
    ),
    *(f"http://{name}:{{port}}/a.png" for name in names_of_this_machine()),
    "http://127.0.0.1:{port}#@93.184.216.34/a.png",
    "http://127.0.0.1:{port}?@93.184.216.34/a.png",
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
    """An open port, a closed one, a name, an address that is not ours: all the same."""
    urls = (
        f"http://127.0.0.1:{canary.port}/",
        "http://127.0.0.1:9/",
        "http://localhost/",
        "http://10.1.2.3/",
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
    assert (await chat(account, ask))[0] == 200
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
