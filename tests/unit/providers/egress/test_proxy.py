"""Upstreams that are reached through a proxy."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import BODY, KEY, nothing
from tests.support.certificates import Authority
from tests.support.forward_proxy import ForwardProxy
from tests.support.script import Script
from tests.support.tls_upstream import TLSUpstream
from tests.support.upstream import Upstream as Server

from headgate.config import ProviderSettings
from headgate.core.errors import UpstreamAuth, UpstreamFailed, UpstreamTimeout
from headgate.providers.upstream import Upstream, bearer

Make = Callable[..., Upstream]
NAME = "acme.test"


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Upstream] = []

    def upstream(url: str, *, variable: str | None = None, **settings: Any) -> Upstream:
        row = ProviderSettings(kind="openai", base_url=url, api_key_env="ACME_KEY", **settings)
        made.append(Upstream("acme", row, KEY, bearer, proxy=variable))
        return made[-1]

    yield upstream
    for one in made:
        await one.aclose()


async def ask(upstream: Upstream) -> bytes:
    return await upstream.answer("/completions", BODY, nothing)


async def test_http_goes_through_the_proxy_which_alone_looks_the_name_up(
    upstream: Server, make: Make
) -> None:
    url = upstream.url.replace("127.0.0.1", NAME)
    async with ForwardProxy(hosts={NAME: "127.0.0.1"}) as proxy:
        assert b"echo: hi" in await ask(make(url, proxy=proxy.url))
        [request] = proxy.requests
        assert (request.method, request.target) == ("POST", f"{url}/completions")
    assert upstream.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_https_goes_through_a_tunnel_in_which_the_proxy_reads_nothing(
    tmp_path: Path, make: Make
) -> None:
    authority = Authority(tmp_path)
    async with (
        TLSUpstream(authority.serving(NAME), NAME) as server,
        ForwardProxy(hosts={NAME: "127.0.0.1"}) as proxy,
    ):
        acme = make(server.url, proxy=proxy.url, ca_file=str(authority.file))
        assert b"echo: hi" in await ask(acme)
        assert b"echo: hi" in await ask(acme)
        [request] = proxy.requests  # the second call used the same tunnel
        assert request.method == "CONNECT"
        assert KEY not in str(request.headers)
        with pytest.raises(UpstreamFailed, match="trusted"):
            await ask(make(server.url, proxy=proxy.url))
        assert len(server.requests) == 2


@pytest.mark.parametrize("tunnel", [False, True], ids=["http", "https"])
async def test_a_password_in_the_proxys_url_is_for_the_proxy_alone(
    upstream: Server, make: Make, tmp_path: Path, tunnel: bool
) -> None:
    authority = Authority(tmp_path)
    async with (
        TLSUpstream(authority.serving("localhost")) as server,
        ForwardProxy() as proxy,
    ):
        secret = f"http://gate:w%40rd@{proxy.address}"
        url = server.url if tunnel else upstream.url
        acme = make(url, proxy_env="ACME_PROXY", variable=secret, ca_file=str(authority.file))
        assert acme.reason is None
        await ask(acme)
        [request] = proxy.requests
        expected = "Basic " + base64.b64encode(b"gate:w@rd").decode()
        assert request.headers["proxy-authorization"] == expected
        if tunnel:
            assert "proxy-authorization" not in server.requests[0].headers


async def test_the_variable_comes_before_the_setting(upstream: Server, make: Make) -> None:
    async with ForwardProxy() as chosen, ForwardProxy() as other:
        await ask(make(upstream.url, proxy=other.url, proxy_env="ACME_PROXY", variable=chosen.url))
        assert (len(chosen.requests), len(other.requests)) == (1, 0)


async def test_the_proxy_itself_may_be_reached_over_tls(upstream: Server, make: Make, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with ForwardProxy(tls=authority.serving("localhost")) as proxy:
        url = proxy.url.replace("http://127.0.0.1", "https://localhost")
        assert b"echo: hi" in await ask(make(upstream.url, proxy=url, ca_file=str(authority.file)))
        with pytest.raises(UpstreamFailed, match="trusted"):
            await ask(make(upstream.url, proxy=url))
        assert len(proxy.requests) == 1


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"proxy": "socks5://127.0.0.1:1080"}, "providers.acme.proxy: must be the http:// or https:// URL"),
        ({"proxy": "127.0.0.1:3128"}, "providers.acme.proxy: must be"),
        ({"proxy": "http://"}, "providers.acme.proxy: must be"),
        ({"proxy": "http://[::1"}, "providers.acme.proxy: must be"),
        ({"proxy_env": "ACME_PROXY"}, "set ACME_PROXY"),
        ({"proxy_env": "ACME_PROXY", "proxy": "http://127.0.0.1:1"}, "set ACME_PROXY"),
        ({"proxy_env": "ACME_PROXY", "variable": "w0rd@nowhere"}, "the variable ACME_PROXY: must be"),
    ],
)
async def test_a_proxy_that_cannot_be_makes_the_provider_unavailable(
    make: Make, setting: dict[str, str], reason: str
) -> None:
    acme = make("https://acme.test/v1", **setting)
    assert acme.reason is not None
    assert acme.reason.startswith(reason)
    assert "w0rd" not in acme.reason


async def test_a_proxy_that_is_not_there_or_refuses_is_named_by_no_message(
    upstream: Server, make: Make, unused_url: str
) -> None:
    https = upstream.url.replace("http://", "https://")
    for url in (upstream.url, https):
        with pytest.raises(UpstreamFailed, match="could not be reached") as raised:
            await ask(make(url, proxy=unused_url))
        assert "127.0.0.1" not in raised.value.message
    async with ForwardProxy(status=403) as proxy:
        with pytest.raises(UpstreamFailed, match="could not be reached"):
            await ask(make(https, proxy=proxy.url))
        with pytest.raises(UpstreamAuth):
            await ask(make(upstream.url, proxy=proxy.url))
    assert upstream.requests == []


async def test_waiting_for_the_tunnel_counts_as_connecting(make: Make) -> None:
    async with ForwardProxy(silent=True) as proxy:
        sent: list[bool] = []
        acme = make("https://acme.test/v1", proxy=proxy.url, connect_timeout_s=0.2)
        with pytest.raises(UpstreamTimeout):
            await acme.answer("/completions", BODY, lambda: sent.append(True))
        assert sent == []
        async with asyncio.timeout(1):
            await proxy.closed.wait()


async def test_cancelling_while_the_tunnel_is_asked_for_closes_the_connection(make: Make) -> None:
    async with ForwardProxy(silent=True) as proxy:
        call = asyncio.create_task(ask(make("https://acme.test/v1", proxy=proxy.url)))
        await proxy.asked.wait()
        call.cancel()
        async with asyncio.timeout(1):
            await proxy.closed.wait()
        await asyncio.wait([call])
        assert call.cancelled()


async def test_cancelling_within_the_tunnel_closes_the_upstreams_connection(
    make: Make, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    async with TLSUpstream(authority.serving("localhost")) as server, ForwardProxy() as proxy:
        server.script(Script(silent=True))
        call = asyncio.create_task(ask(make(server.url, proxy=proxy.url, ca_file=str(authority.file))))
        request = await server.request(0)
        call.cancel()
        async with asyncio.timeout(1):
            await request.closed.wait()
        await asyncio.wait([call])
        assert call.cancelled()
