"""TLS to an upstream: whom we trust, who we are, and settings that cannot work."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import BODY, KEY, nothing
from tests.support.certificates import Authority
from tests.support.script import Script
from tests.support.tls_upstream import TLSUpstream

from headgate.config import ProviderSettings
from headgate.core.errors import ModelUnavailable, UpstreamError, UpstreamFailed, UpstreamTimeout
from headgate.providers.upstream import Upstream, bearer

Make = Callable[..., Upstream]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Upstream] = []

    def upstream(url: str, **settings: Any) -> Upstream:
        row = ProviderSettings(kind="openai", base_url=url, api_key_env="ACME_KEY", **settings)
        made.append(Upstream("acme", row, KEY, bearer))
        return made[-1]

    yield upstream
    for one in made:
        await one.aclose()


async def ask(upstream: Upstream) -> bytes:
    return await upstream.answer("/completions", BODY, nothing)


# --- whom we trust ----------------------------------------------------------------------------------------------


async def test_an_authority_of_ones_own_is_trusted_instead_of_the_systems(
    authority: Authority, make: Make
) -> None:
    async with TLSUpstream(authority.serving("localhost")) as server:
        assert b"echo: hi" in await ask(make(server.url, ca_file=str(authority.file)))
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        with pytest.raises(UpstreamFailed, match="trusted") as raised:
            await ask(make(server.url))
        assert "acme" in raised.value.message
        assert "localhost" not in raised.value.message
        assert len(server.requests) == 1


async def test_a_certificate_of_another_host_is_not_accepted(authority: Authority, make: Make) -> None:
    async with TLSUpstream(authority.serving("elsewhere.test")) as server:
        with pytest.raises(UpstreamFailed, match="trusted"):
            await ask(make(server.url, ca_file=str(authority.file)))
        assert server.requests == []


async def test_a_certificate_of_another_authority_is_not_accepted(
    authority: Authority, make: Make, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "Other Authority")
    async with TLSUpstream(authority.serving("localhost")) as server:
        with pytest.raises(UpstreamFailed, match="trusted"):
            await ask(make(server.url, ca_file=str(other.file)))


# --- who we are -------------------------------------------------------------------------------------------------


async def test_our_certificate_is_shown_where_it_is_asked_for(authority: Authority, make: Make) -> None:
    certificate, key = authority.issue("gateway.test")
    own = {"client_cert_file": str(certificate), "client_key_file": str(key)}
    async with TLSUpstream(authority.serving("localhost", clients=authority)) as server:
        assert b"echo: hi" in await ask(make(server.url, ca_file=str(authority.file), **own))
        with pytest.raises(UpstreamFailed):
            await ask(make(server.url, ca_file=str(authority.file)))
        assert len(server.requests) == 1


async def test_certificate_and_key_may_be_in_one_file(
    authority: Authority, make: Make, tmp_path: Path
) -> None:
    certificate, key = authority.issue("gateway.test")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    async with TLSUpstream(authority.serving("localhost", clients=authority)) as server:
        upstream = make(server.url, ca_file=str(authority.file), client_cert_file=str(both))
        assert b"echo: hi" in await ask(upstream)


# --- settings that cannot work ----------------------------------------------------------------------------------


async def why(make: Make, **settings: str) -> str:
    upstream = make("https://localhost:1/v1", **settings)
    with pytest.raises(ModelUnavailable):
        await ask(upstream)
    assert upstream.reason is not None
    return upstream.reason


@pytest.mark.parametrize("setting", ["ca_file", "client_cert_file"])
async def test_a_file_that_is_missing_or_no_certificate_makes_the_provider_unavailable(
    make: Make, tmp_path: Path, setting: str
) -> None:
    missing, folder, junk, empty = (
        tmp_path / name for name in ("missing.pem", "folder", "junk.pem", "empty")
    )
    folder.mkdir()
    junk.write_bytes(b"\x00\xff not a certificate")
    empty.touch()
    for file, problem in (
        (missing, "No such file or directory"),
        (folder, "Is a directory"),
        (junk, "no certificate"),
        (empty, "no certificate"),
    ):
        reason = await why(make, **{setting: str(file)})
        assert reason.startswith(f"providers.acme.{setting}: {file}")
        assert problem in reason


async def test_what_is_wrong_with_our_own_key_is_told(
    make: Make, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = (str(file) for file in authority.issue("gateway.test"))
    _, other = (str(file) for file in authority.issue("other.test"))
    hidden, locked = (str(file) for file in authority.issue("locked.test", password=b"word"))
    assert await why(make, client_key_file=key) == (
        "providers.acme.client_key_file: belongs to client_cert_file, which is not set"
    )
    assert await why(make, client_cert_file=certificate, client_key_file=key + "x") == (
        f"providers.acme.client_key_file: {key}x: No such file or directory"
    )
    assert await why(make, client_cert_file=certificate, client_key_file=other) == (
        f"providers.acme.client_key_file: {other} holds the key of another certificate"
    )
    for own in (
        {"client_cert_file": certificate},
        {"client_cert_file": hidden, "client_key_file": locked},
        {"client_cert_file": certificate, "client_key_file": str(authority.file)},
    ):
        reason = await why(make, **own)
        assert reason.startswith(f"providers.acme.client_cert_file: {own['client_cert_file']}")
        assert "unencrypted key in PEM format" in reason


# --- a server that does not finish the handshake ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def dumb() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """Takes connections and says nothing: its URL, and what is set when somebody came and when they left."""
    came, left = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        left.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", came, left
    finally:
        server.close()
        await server.wait_closed()


async def test_the_handshake_counts_as_connecting(make: Make) -> None:
    async with dumb() as (url, _, left):
        sent: list[bool] = []
        with pytest.raises(UpstreamTimeout):
            await make(url, connect_timeout_s=0.2).answer("/completions", BODY, lambda: sent.append(True))
        assert sent == []
        async with asyncio.timeout(1):
            await left.wait()


async def test_cancelling_during_the_handshake_closes_the_connection(make: Make) -> None:
    async with dumb() as (url, came, left):
        call = asyncio.create_task(ask(make(url)))
        await came.wait()
        call.cancel()
        async with asyncio.timeout(1):
            await left.wait()
        await asyncio.wait([call])
        assert call.cancelled()


@pytest.mark.parametrize("script", [Script(silent=True), Script(hold_at=0)])
async def test_cancelling_over_tls_closes_the_connection(
    authority: Authority, make: Make, script: Script
) -> None:
    async with TLSUpstream(authority.serving("localhost")) as server:
        server.script(script)
        call = asyncio.create_task(ask(make(server.url, ca_file=str(authority.file))))
        request = await server.request(0)
        call.cancel()
        async with asyncio.timeout(1):
            await request.closed.wait()
        await asyncio.wait([call])
        assert call.cancelled()


async def test_a_service_that_speaks_no_tls_is_a_failure_without_its_address(make: Make) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with pytest.raises(UpstreamError) as raised:
        await ask(make(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
    assert "127.0.0.1" not in raised.value.message
    server.close()
    await server.wait_closed()
