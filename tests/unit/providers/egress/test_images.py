"""Images by URL: what is fetched, and that nothing leads into a private network."""

import asyncio
import contextlib
import gzip
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.until import until

from headgate.core.errors import InvalidRequest, Overloaded
from headgate.core.ports import ImageSource
from headgate.providers.egress import lookups
from headgate.providers.egress.addresses import Address, parsed
from headgate.providers.egress.images import MAX_FETCHES, MAX_FETCHES_EACH, ImageFetcher
from headgate.providers.egress.late import LateImages

PARAM = "messages[0].content[1].image_url.url"
IMAGE = b"\x89PNG\r\n\x1a\n" + b"x" * 1000
PUBLIC = "93.184.216.34"


class Site:
    """A server on loopback that answers everything with `answer`, and remembers who came."""

    def __init__(self) -> None:
        self.answer = _response(IMAGE)
        self.silent_after = False
        self.accepted = 0
        self.heads: list[str] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            self.asked.set()
            writer.write(self.answer)
            if self.silent_after:
                await reader.read()
        self.left.set()
        writer.close()


def _response(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    return head.encode() + body


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as made:
        yield made


class Names:
    """A resolver that gives each name its answers in turn, the last one for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self._answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        given = self._answers[host]
        return given.pop(0) if len(given) > 1 else given[0]


Fetchers = Callable[..., ImageFetcher]


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetchers]:
    made: list[ImageFetcher] = []

    def make(max_bytes: int = 100_000, timeout_s: float = 10, **options: object) -> ImageFetcher:
        made.append(ImageFetcher(max_bytes, timeout_s, **options))  # type: ignore[arg-type]  # passed on as given
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


def loopback(address: Address) -> bool:
    """The rule for tests that fetch: the one address where their server is."""
    return str(address) == "127.0.0.1"


async def refused(images: ImageSource, url: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        await images.fetch(url, PARAM)
    error = raised.value
    assert (error.param, error.code) == (PARAM, "invalid_image_url")
    assert error.allowed
    return error


# --- fetching ---------------------------------------------------------------------------------------------------


async def test_an_image_is_fetched_as_it_is_and_nothing_of_ours_goes_along(
    site: Site, fetcher: Fetchers
) -> None:
    images = fetcher(permitted=loopback, resolve=Names(pictures_test=[["127.0.0.1"]]))
    url = f"http://pictures.test:{site.port}/a%2Fb.png?sig=x%2By#top"
    await images.check(url, PARAM)
    assert site.accepted == 0
    assert await images.fetch(url, PARAM) == IMAGE
    first, *headers = site.heads[0].lower().splitlines()
    assert first == "get /a%2fb.png?sig=x%2by http/1.1"
    assert {line.partition(":")[0] for line in headers if line} == {
        "host",
        "accept",
        "accept-encoding",
        "connection",
        "user-agent",
    }
    assert f"host: pictures.test:{site.port}" in headers


async def test_an_address_may_be_given_instead_of_a_name(site: Site, fetcher: Fetchers) -> None:
    names = Names()
    images = fetcher(permitted=loopback, resolve=names)
    assert await images.fetch(f"http://127.0.0.1:{site.port}/", PARAM) == IMAGE
    assert names.asked == []


async def test_names_are_looked_up_as_the_system_does(site: Site, fetcher: Fetchers) -> None:
    def here(address: Address) -> bool:
        return address.is_loopback

    assert await fetcher(permitted=here).fetch(f"http://localhost:{site.port}/", PARAM) == IMAGE


async def test_proxies_in_the_environment_are_ignored(
    site: Site, fetcher: Fetchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await fetcher(permitted=loopback).fetch(f"http://127.0.0.1:{site.port}/", PARAM) == IMAGE


async def test_over_tls_the_certificate_must_be_the_hosts_although_the_address_is_pinned(
    tmp_path: Path, fetcher: Fetchers
) -> None:
    authority = Authority(tmp_path)
    names = Names(pictures_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    trusting = ssl.create_default_context(cafile=str(authority.file))
    async with serving(authority.serving("pictures.test")) as site:
        images = fetcher(permitted=loopback, resolve=names, tls=trusting)
        assert await images.fetch(f"https://pictures.test:{site.port}/", PARAM) == IMAGE
        await refused(images, f"https://other.test:{site.port}/")
        await refused(fetcher(permitted=loopback, resolve=names), f"https://pictures.test:{site.port}/")
        assert len(site.heads) == 1


# --- what answers wrongly ---------------------------------------------------------------------------------------


async def test_a_redirect_is_not_followed(site: Site, fetcher: Fetchers) -> None:
    async with serving() as canary:
        site.answer = _response(b"", "302 Found", f"Location: http://127.0.0.1:{canary.port}/secret\r\n")
        error = await refused(fetcher(permitted=loopback), f"http://127.0.0.1:{site.port}/")
        assert "redirect" in error.message
        assert canary.accepted == 0
    assert site.accepted == 1


@pytest.mark.parametrize(
    "answer",
    [
        _response(b"top secret", "404 Not Found"),
        _response(b"top secret", "500 top secret"),
        _response(b"", "204 No Content"),
        _response(IMAGE[:10], "206 Partial Content"),
        _response(b"x" * 100_001),
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 100_001,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\nshort",
        b"SSH-2.0-OpenSSH_9.6 top secret\r\n",
        b"",
    ],
    ids=["404", "500", "204", "206", "announced", "endless", "short", "other-protocol", "nothing"],
)
async def test_all_that_is_no_image_in_bounds_is_refused_in_the_same_words(
    site: Site, fetcher: Fetchers, answer: bytes
) -> None:
    images = fetcher(permitted=loopback, resolve=Names())
    unknown = await refused(images, "http://nowhere.test/")
    site.answer = answer
    error = await refused(images, f"http://127.0.0.1:{site.port}/")
    assert error.message == unknown.message
    assert "secret" not in error.message


async def test_an_image_of_just_the_greatest_size_is_taken(site: Site, fetcher: Fetchers) -> None:
    site.answer = _response(b"x" * 5000)
    assert len(await fetcher(5000, permitted=loopback).fetch(f"http://127.0.0.1:{site.port}/", PARAM)) == 5000
    await refused(fetcher(4999, permitted=loopback), f"http://127.0.0.1:{site.port}/")


async def test_nothing_is_unpacked(site: Site, fetcher: Fetchers) -> None:
    packed = gzip.compress(b"x" * 1_000_000)
    site.answer = _response(packed, headers="Content-Encoding: gzip\r\n")
    assert await fetcher(permitted=loopback).fetch(f"http://127.0.0.1:{site.port}/", PARAM) == packed


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\nx"])
async def test_what_takes_too_long_is_left(site: Site, fetcher: Fetchers, sent: bytes) -> None:
    site.answer, site.silent_after = sent, True
    await refused(fetcher(timeout_s=0.3, permitted=loopback), f"http://127.0.0.1:{site.port}/")
    async with asyncio.timeout(1):
        await site.left.wait()


async def test_a_name_that_takes_too_long_is_left(fetcher: Fetchers) -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    images = fetcher(timeout_s=0.1, resolve=never)
    await refused(images, "http://slow.test/")
    with pytest.raises(InvalidRequest):
        await images.check("http://slow.test/", PARAM)


async def test_cancelling_a_fetch_closes_its_connection(site: Site, fetcher: Fetchers) -> None:
    site.answer, site.silent_after = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\nx", True
    call = asyncio.create_task(fetcher(permitted=loopback).fetch(f"http://127.0.0.1:{site.port}/", PARAM))
    await site.asked.wait()
    call.cancel()
    async with asyncio.timeout(1):
        await site.left.wait()
    await asyncio.wait([call])
    assert call.cancelled()


# --- where URLs may not lead ------------------------------------------------------------------------------------

WAYS_TO_LOOPBACK = [
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0x7f.1:{port}/",
    "http://127.0.0.0x1:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://１２７.０.０.１:{port}/",
    "http://127。0。0。1:{port}/",
    "http://127.0.0.1%2e:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1\n:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1\u200b:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://user:word@127.0.0.1:{port}/",
    "http://@127.0.0.1:{port}/",
    "http://public.test@127.0.0.1:{port}/",
    "http://public.test:80@127.0.0.1:{port}/",
    "http://public.test\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@public.test/",
    "http://public.test#@127.0.0.1:{port}/",
    "http://public.test?@127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "file:///etc/passwd",
    "file://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "ws://127.0.0.1:{port}/",
    "unix://127.0.0.1:{port}/",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "http://",
    "http:///x",
    "http://:{port}/",
    "http://[::1:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:x/",
    "http://a..b:{port}/",
    "http://-a:{port}/",
    "",
]


@pytest.mark.parametrize("way", WAYS_TO_LOOPBACK)
async def test_no_way_to_write_a_url_leads_to_loopback(site: Site, fetcher: Fetchers, way: str) -> None:
    url = way.format(port=site.port)
    system = fetcher(timeout_s=5)
    with pytest.raises(InvalidRequest) as checked:
        await system.check(url, PARAM)
    error = await refused(system, url)
    assert error.message == checked.value.message
    assert site.accepted == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://100.100.100.200/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.0.1/",
        "http://[fc00::1]/",
        "http://[fe80::1]/",
        "http://[ff02::1]/",
    ],
)
async def test_private_and_metadata_addresses_are_refused_by_looking_at_them(
    fetcher: Fetchers, url: str
) -> None:
    with pytest.raises(InvalidRequest, match="public addresses"):
        await fetcher().check(url, PARAM)
    await refused(fetcher(), url)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        [PUBLIC, "127.0.0.1"],
        ["127.0.0.1", PUBLIC],
        ["2606:4700::1111", "::1"],
        ["::ffff:127.0.0.1"],
        ["fe80::1%eth0"],
        ["169.254.169.254"],
        ["not an address"],
        [],
    ],
)
async def test_one_address_that_is_not_public_spoils_a_name(
    site: Site, fetcher: Fetchers, addresses: list[str]
) -> None:
    images = fetcher(resolve=Names(mixed_test=[addresses]))
    url = f"http://mixed.test:{site.port}/"
    with pytest.raises(InvalidRequest):
        await images.check(url, PARAM)
    await refused(images, url)
    assert site.accepted == 0


async def test_a_name_that_changes_its_address_after_the_look_is_refused(
    site: Site, fetcher: Fetchers
) -> None:
    names = Names(rebound_test=[[PUBLIC], ["127.0.0.1"]])
    images = fetcher(resolve=names)
    url = f"http://rebound.test:{site.port}/"
    await images.check(url, PARAM)
    await refused(images, url)
    assert names.asked == ["rebound.test", "rebound.test"]
    assert site.accepted == 0


async def test_a_name_is_resolved_once_and_connected_to_as_it_was_looked_at(
    site: Site, fetcher: Fetchers
) -> None:
    async with serving() as canary:
        names = Names(rebound_test=[["127.0.0.1"], ["127.0.0.2"]])
        images = fetcher(permitted=loopback, resolve=names)
        assert await images.fetch(f"http://rebound.test:{site.port}/", PARAM) == IMAGE
        assert names.asked == ["rebound.test"]
        await refused(images, f"http://rebound.test:{canary.port}/")
        assert canary.accepted == 0


async def test_the_rule_holds_for_the_connection_itself(site: Site, fetcher: Fetchers) -> None:
    asked: list[Address] = []

    def once(address: Address) -> bool:
        """Says yes to the look, and no afterwards."""
        asked.append(address)
        return len(asked) == 1

    await refused(fetcher(permitted=once), f"http://127.0.0.1:{site.port}/")
    assert asked == [parsed("127.0.0.1")] * 2
    assert site.accepted == 0


@pytest.fixture
def six() -> Iterator[None]:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    yield


@pytest.mark.usefixtures("six")
async def test_ipv6_addresses_are_fetched_from_where_they_are_permitted(fetcher: Fetchers) -> None:
    site = Site()
    server = await asyncio.start_server(site.serve, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    images = fetcher(permitted=lambda address: str(address) == "::1", resolve=Names(six_test=[["::1"]]))
    assert await images.fetch(f"http://[::1]:{port}/", PARAM) == IMAGE
    assert await images.fetch(f"http://six.test:{port}/", PARAM) == IMAGE
    await refused(fetcher(), f"http://[::1]:{port}/")
    assert site.accepted == 2
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://user@public.test/", "no user name or password"),
        ("http://user:word@public.test/", "no user name or password"),
        ("http://@public.test/", "no user name or password"),
        (f"http://user@{PUBLIC}/", "no user name or password"),
        ("http://1572395042/", "as it is commonly written"),
        ("http://0x5db8d822/", "as it is commonly written"),
        ("http://0135.0270.0330.0042/", "as it is commonly written"),
        ("http://93.184.55330/", "as it is commonly written"),
        ("http://93.184.216.34./", "as it is commonly written"),
        ("http://public.test.0x/", "as it is commonly written"),
        ("http://public..test/", "as it is commonly written"),
        ("http://[2606:4700::1111%25eth0]/", "as it is commonly written"),
        ("http://public.test%2e/", "as it is commonly written"),
        ("http://" + "a" * 64 + ".test/", "as it is commonly written"),
        ("http://" + "a." * 127 + "test/", "as it is commonly written"),
        ("http://public.test/a b", "without spaces"),
        ("http://public.test/\t", "without spaces"),
        ("http://public.test\\/", "without spaces"),
        ("ftp://public.test/", "http:// or https://"),
        ("public.test/x.png", "http:// or https://"),
    ],
)
async def test_urls_that_parsers_read_differently_are_refused_before_any_look_up(
    fetcher: Fetchers, url: str, allowed: str
) -> None:
    asked: list[str] = []

    async def anything(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return [PUBLIC]

    images = fetcher(resolve=anything)
    error = await refused(images, url)
    assert allowed in error.message
    with pytest.raises(InvalidRequest):
        await images.check(url, PARAM)
    assert asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://public.test/",
        "https://public.test:8443/a/b.png?x=y@z#f",
        "https://pub-lic_1.test./",
        "https://bücher.test/",
        "https://xn--bcher-kva.test/",
        f"http://{PUBLIC}/",
        "http://[2606:4700::1111]:81/",
    ],
)
async def test_urls_of_public_hosts_pass_the_look(fetcher: Fetchers, url: str) -> None:
    async def anything(host: str, port: int) -> Sequence[str]:
        return [PUBLIC, "2606:4700::1111"]

    await fetcher(resolve=anything).check(url, PARAM)


async def test_urls_have_a_greatest_length(fetcher: Fetchers) -> None:
    error = await refused(fetcher(), "http://public.test/" + "x" * 9000)
    assert "8192" in error.message


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("http://public.test?@127.0.0.1/", "http://public.test/?@127.0.0.1/"),
        ("HTTP://PUBLIC.test", "http://public.test"),
        ("https://bücher.test/ä?ö", "https://xn--bcher-kva.test/%C3%A4?%C3%B6"),
        ("https://public.test:443/a", "https://public.test/a"),
        (f"http://{PUBLIC}/a.png?x=1&y=%20#z", f"http://{PUBLIC}/a.png?x=1&y=%20#z"),
    ],
)
async def test_a_url_that_was_checked_is_told_as_it_was_read(
    fetcher: Fetchers, given: str, read: str
) -> None:
    async def anything(host: str, port: int) -> Sequence[str]:
        return [PUBLIC]

    assert await fetcher(resolve=anything).check(given, PARAM) == read


# --- one caller among others ------------------------------------------------------------------------------------


class SlowNames:
    """A resolver for which names that begin with `slow` stay without an answer until it is `opened`."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host.startswith("slow"):
            await self.opened.wait()
        return ["127.0.0.1"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "LOOKUP_S", 0.2)


@pytest.mark.usefixtures("brief")
async def test_slow_names_of_one_caller_are_in_nobody_else_s_way(site: Site, fetcher: Fetchers) -> None:
    names = SlowNames()
    images = fetcher(permitted=loopback, resolve=names)
    slow = [f"http://slow{number}.test/" for number in range(lookups.MAX_LOOKUPS)]
    asking = [asyncio.ensure_future(images.check(url, PARAM, caller="mallory")) for url in slow]
    await until(lambda: len(names.asked) == lookups.MAX_LOOKUPS_EACH)
    assert await images.fetch(f"http://pictures.test:{site.port}/", PARAM, caller="ann") == IMAGE
    failed = await asyncio.gather(*asking, return_exceptions=True)
    # Those that were asked took too long; the others had no place, which is not their URLs' fault.
    kinds = [type(error) for error in failed]
    assert kinds.count(InvalidRequest) == lookups.MAX_LOOKUPS_EACH
    assert kinds.count(Overloaded) == len(slow) - lookups.MAX_LOOKUPS_EACH
    # Their threads are busy still, whoever gave up.
    with pytest.raises(Overloaded):
        await images.check("http://quick.test/", PARAM, caller="mallory")
    assert "quick.test" not in names.asked
    names.opened.set()
    await images.check("http://quick.test/", PARAM, caller="mallory")


@pytest.mark.usefixtures("brief")
async def test_the_system_s_slow_names_keep_nobody_else_waiting(
    fetcher: Fetchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = threading.Event(), []

    def look(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        if host.startswith("slow"):
            opened.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    images = fetcher(permitted=loopback)
    try:
        slow = [f"http://slow{number}.test/" for number in range(20)]
        asking = [asyncio.ensure_future(images.check(url, PARAM, caller="mallory")) for url in slow]
        await until(lambda: len(asked) == lookups.MAX_LOOKUPS_EACH)
        assert await images.check("http://quick.test/", PARAM, caller="ann") == "http://quick.test/"
        await asyncio.gather(*asking, return_exceptions=True)
    finally:
        opened.set()


async def test_slow_hosts_of_one_caller_are_in_nobody_else_s_way(site: Site, fetcher: Fetchers) -> None:
    async with serving() as tarpit:
        tarpit.answer, tarpit.silent_after = b"", True
        images = fetcher(timeout_s=1, permitted=loopback)
        slow = f"http://127.0.0.1:{tarpit.port}/"
        asking = [
            asyncio.ensure_future(images.fetch(slow, PARAM, caller="mallory")) for _ in range(MAX_FETCHES)
        ]
        await until(lambda: tarpit.accepted == MAX_FETCHES_EACH)
        assert await images.fetch(f"http://127.0.0.1:{site.port}/", PARAM, caller="ann") == IMAGE
        assert tarpit.accepted == MAX_FETCHES_EACH
        for call in asking:
            call.cancel()
        await asyncio.wait(asking)
        # Every place is free again.
        together = [
            images.fetch(f"http://127.0.0.1:{site.port}/", PARAM, caller="mallory") for _ in range(20)
        ]
        assert await asyncio.gather(*together) == [IMAGE] * 20


# --- the end ----------------------------------------------------------------------------------------------------


async def test_after_the_end_nothing_is_fetched_and_that_is_not_the_url_s_fault(
    site: Site, fetcher: Fetchers
) -> None:
    url = f"http://127.0.0.1:{site.port}/"
    used, unused = fetcher(permitted=loopback), fetcher(permitted=loopback)
    made: list[ImageFetcher] = []

    def make() -> ImageFetcher:
        made.append(unused)
        return unused

    late, never = LateImages(lambda: used), LateImages(make)
    assert await late.fetch(url, PARAM) == IMAGE
    for images in (late, never, unused):
        await images.aclose()
    for images in (used, unused, late, never):
        for asked in (images.fetch(url, PARAM), images.check("http://public.test/", PARAM)):
            with pytest.raises(Overloaded, match="shutting down"):
                await asked
    assert made == []


async def test_a_fetch_under_way_at_the_end_is_not_the_url_s_fault(site: Site, fetcher: Fetchers) -> None:
    site.answer, site.silent_after = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\nx", True
    images = fetcher(permitted=loopback)
    call = asyncio.ensure_future(images.fetch(f"http://127.0.0.1:{site.port}/", PARAM))
    await site.asked.wait()
    await images.aclose()
    with pytest.raises(Overloaded):
        await call
