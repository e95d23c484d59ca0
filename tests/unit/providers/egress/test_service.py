"""The outbound HTTP port: what goes out, when it asks again, and how its failures look."""

import asyncio
import socket
from collections.abc import Callable

import pytest
from tests.support.asking import BODY, KEY, STREAM, ask, nothing
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.errors import UpstreamFailed
from headgate.providers.egress.service import Http

Connect = Callable[..., Http]


async def test_a_request_goes_out_as_given_and_asks_for_no_compression(
    upstream: Upstream, connect: Connect
) -> None:
    http = connect()
    response = await http.open("/completions", BODY, nothing)
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    assert b"echo: hi" in await response.read(10_000)
    response.close()
    [request] = upstream.requests
    assert (request.path, request.body) == ("/v1/completions", BODY)
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"


async def test_the_connection_is_used_again_after_an_answer_was_read(
    upstream: Upstream, connect: Connect
) -> None:
    http = connect()
    for _ in range(3):
        await ask(http)
    assert upstream.accepted == 1


async def test_the_connection_is_used_again_after_a_stream_that_was_not_read_to_its_last_byte(
    upstream: Upstream, connect: Connect
) -> None:
    http = connect()
    upstream.script(Script(pieces=("a", "b"), hold_at=1))
    response = await http.open("/completions", STREAM, nothing)
    await response.block()
    response.finish()
    upstream.release()
    await upstream.requests[0].answered.wait()
    await asyncio.sleep(0.2)  # the last bytes arrive while nobody waits for them: there is nothing to await
    await ask(http)
    assert upstream.accepted == 1


async def test_a_body_of_several_megabytes_goes_out_and_comes_in(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(pieces=("x" * 3_000_000,)))
    http = connect()
    response = await http.open("/completions", b'{"prompt": "' + b"y" * 3_000_000 + b'"}', nothing)
    assert len(await response.read(4_000_000)) > 3_000_000
    response.close()
    assert len(upstream.requests[0].json["prompt"]) == 3_000_000


async def test_a_longer_body_than_allowed_is_refused(upstream: Upstream, connect: Connect) -> None:
    upstream.script(Script(pieces=("x" * 300_000,)))
    response = await connect().open("/completions", BODY, nothing)
    with pytest.raises(UpstreamFailed, match="too large"):
        await response.read(100_000)
    response.close()
    await upstream.requests[0].closed.wait()


async def test_redirects_and_cookies_lead_nowhere(upstream: Upstream, connect: Connect) -> None:
    http = connect()
    upstream.script(Script(status=302, headers={"Location": "/v1/elsewhere", "Set-Cookie": "a=b"}))
    response = await http.open("/completions", BODY, nothing)
    assert response.status == 302
    await response.read(100)
    response.close()
    await ask(http)
    assert [request.path for request in upstream.requests] == ["/v1/completions", "/v1/completions"]
    assert "cookie" not in upstream.requests[1].headers


async def test_proxies_in_the_environment_are_ignored(
    upstream: Upstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert await ask(connect())


# --- stale connections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Script(reset_at=0), Script(raw="")], ids=["reset", "closed"])
async def test_a_request_on_a_stale_connection_is_asked_once_more(
    upstream: Upstream, connect: Connect, way: Script
) -> None:
    http = connect()
    await ask(http)
    upstream.script(way)
    assert b"echo: hi" in await ask(http)
    assert [request.body for request in upstream.requests] == [BODY] * 3


async def test_the_second_try_is_the_last(upstream: Upstream, connect: Connect) -> None:
    http = connect()
    await ask(http)
    upstream.script(Script(reset_at=0), Script(reset_at=0), Script(reset_at=0))
    with pytest.raises(UpstreamFailed):
        await ask(http)
    assert len(upstream.requests) == 3


async def test_sent_is_said_once_even_when_asked_twice(upstream: Upstream, connect: Connect) -> None:
    http = connect()
    await ask(http)
    upstream.script(Script(reset_at=0))
    sent: list[bool] = []
    response = await http.open("/completions", BODY, lambda: sent.append(True))
    response.close()
    assert sent == [True]


async def test_a_fresh_connection_that_breaks_is_not_tried_again(
    upstream: Upstream, connect: Connect
) -> None:
    upstream.script(Script(reset_at=0))
    with pytest.raises(UpstreamFailed):
        await ask(connect())
    assert len(upstream.requests) == 1


async def test_an_answer_that_had_begun_is_not_asked_for_again(upstream: Upstream, connect: Connect) -> None:
    http = connect()
    await ask(http)
    upstream.script(Script(raw="HTTP/1.1 200 OK\r\nContent-Ty"))
    with pytest.raises(UpstreamFailed):
        await ask(http)
    assert len(upstream.requests) == 2


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        Script(raw="this is not HTTP\r\n\r\n"),
        Script(raw="HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        Script(raw="HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        Script(close_at=1),
        Script(reset_at=1),
    ],
    ids=["no-http", "bad-length", "bad-chunk", "cut", "reset"],
)
async def test_broken_answers_are_upstream_failures_without_secrets(
    upstream: Upstream, connect: Connect, script: Script
) -> None:
    upstream.script(script)
    with pytest.raises(UpstreamFailed) as raised:
        await ask(connect())
    assert "acme" in raised.value.message
    assert KEY not in str(raised.value)
    assert "127.0.0.1" not in str(raised.value)


async def test_an_upstream_that_is_not_there_cannot_be_reached_and_was_sent_nothing(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        http = connect(f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        sent: list[bool] = []
        with pytest.raises(UpstreamFailed, match="could not be reached"):
            await http.open("/completions", BODY, lambda: sent.append(True))
        assert sent == []


async def test_a_closed_port_answers_nothing_more(connect: Connect) -> None:
    http = connect()
    await ask(http)
    await http.aclose()
    with pytest.raises(UpstreamFailed, match="shut down"):
        await ask(http)
