"""What an operator's settings make of the requests to a service."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.asking import BODY, KEY, nothing
from tests.support.script import Script
from tests.support.upstream import Upstream as Server

from headgate.config import ProviderSettings
from headgate.core.errors import ModelUnavailable, Overloaded, UpstreamFailed, UpstreamTimeout
from headgate.providers.upstream import Upstream, bearer

Make = Callable[..., Upstream]


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


async def ask(upstream: Upstream, path: str = "/completions") -> bytes:
    return await upstream.answer(path, BODY, nothing)


# --- where to, and what goes along ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "query", "path", "target"),
    [
        ("", {}, "/completions", "/v1/completions"),
        ("/", {}, "/completions", "/v1/completions"),
        ("", {"api-version": "2024-10-21"}, "/completions", "/v1/completions?api-version=2024-10-21"),
        ("?a=b", {}, "/completions", "/v1/completions?a=b"),
        ("/?a=b", {"c": "d"}, "/completions", "/v1/completions?a=b&c=d"),
        ("?a=b&a=c", {"a": "d"}, "/completions", "/v1/completions?a=d"),
        ("?a=b", {"c": "d"}, "/completions?e=f", "/v1/completions?e=f&a=b&c=d"),
        ("", {"a&b": "c=d e/ü#?+"}, "/x", "/v1/x?a%26b=c%3Dd+e/%C3%BC%23?%2B"),
        ("/deployments", {"v": "1"}, "/org%2Fmodel%3F/chat", "/v1/deployments/org%2Fmodel%3F/chat?v=1"),
    ],
)
async def test_base_path_and_query_are_joined(
    upstream: Server, make: Make, base: str, query: dict[str, str], path: str, target: str
) -> None:
    await ask(make(upstream.url + base, query=query), path)
    assert upstream.requests[0].path == target


async def test_headers_of_the_operator_go_with_every_request_and_the_keys_come_first(
    upstream: Server, make: Make
) -> None:
    acme = make(upstream.url, headers={"X-Team": "blue", "authorization": "mine", "user-agent": "ours/1"})
    for _ in range(2):
        await ask(acme)
    for request in upstream.requests:
        assert request.headers["x-team"] == "blue"
        assert request.headers["user-agent"] == "ours/1"
        assert request.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"headers": {"Content-Length": "0"}}, "providers.acme.headers: Content-Length is the gateway's own"),
        ({"headers": {"accept-encoding": "gzip"}}, "providers.acme.headers: accept-encoding is"),
        ({"headers": {"X Team": "blue"}}, "providers.acme.headers: 'X Team' is no name of a header"),
        ({"headers": {"": "blue"}}, "providers.acme.headers: '' is no name"),
        ({"headers": {"X-Team": "a\r\nX-B: c"}}, "providers.acme.headers.X-Team: must be printable ASCII"),
        ({"headers": {"X-Team": "ü"}}, "providers.acme.headers.X-Team: must be printable ASCII"),
        ({"base_url": "http://me:w0rd@acme.test/v1"}, "providers.acme.base_url: must hold no user name"),
        ({"base_url": "http://acme.test/v1#x"}, "providers.acme.base_url: must have no fragment"),
        ({"base_url": "http:///v1"}, "providers.acme.base_url: must be an http:// or https:// URL"),
        ({"base_url": "http://acme.test:port/v1"}, "providers.acme.base_url: must be"),
    ],
)
async def test_settings_that_cannot_work_make_the_provider_unavailable(
    settings: dict[str, Any], reason: str
) -> None:
    row = ProviderSettings(kind="openai", **({"base_url": "https://acme.test/v1"} | settings))
    acme = Upstream("acme", row, KEY, bearer)
    assert acme.reason is not None
    assert acme.reason.startswith(reason)
    assert "w0rd" not in acme.reason
    with pytest.raises(ModelUnavailable):
        await ask(acme)
    await acme.aclose()


# --- time and room ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"first_byte_timeout_s": 0.2}, {"timeout_s": 0.2}, {"total_timeout_s": 0.2}]
)
async def test_an_upstream_that_says_nothing_is_left_when_its_time_is_over(
    upstream: Server, make: Make, settings: dict[str, float]
) -> None:
    upstream.script(Script(silent=True))
    async with asyncio.timeout(5):
        with pytest.raises(UpstreamTimeout):
            await ask(make(upstream.url, **settings))
    async with asyncio.timeout(1):
        await upstream.requests[0].closed.wait()


async def test_a_phase_of_its_own_comes_before_the_general_limit(upstream: Server, make: Make) -> None:
    upstream.script(Script(hold_at=0))
    acme = make(upstream.url, timeout_s=0.2, first_byte_timeout_s=10, connect_timeout_s=10)
    call = asyncio.create_task(ask(acme))
    request = await upstream.request(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await request.closed.wait()
    upstream.release()
    assert b"echo: hi" in await call


async def test_the_wait_for_a_turn_is_bounded_as_set(upstream: Server, make: Make) -> None:
    upstream.on("plain", Script(hold_at=0))
    acme = make(upstream.url, max_concurrency=1, queue_wait_s=0.1)
    first = asyncio.create_task(ask(acme))
    await upstream.request(0)
    with pytest.raises(Overloaded) as raised:
        await ask(acme)
    assert raised.value.retry_after
    upstream.release()
    await first
    assert len(upstream.requests) == 1


async def test_a_deadline_ends_an_answer_earlier_than_the_total_time_out(
    upstream: Server, make: Make
) -> None:
    upstream.script(Script(silent=True))
    deadline = asyncio.get_running_loop().time() + 0.2
    async with asyncio.timeout(5):
        with pytest.raises(UpstreamTimeout):
            await make(upstream.url).answer("/completions", BODY, nothing, deadline=deadline)
    async with asyncio.timeout(1):
        await upstream.requests[0].closed.wait()


# --- how much is read -------------------------------------------------------------------------------------------


def _nested(size: int) -> str:
    return '{"choices": [], "junk": [' + ",".join(["{}"] * (size // 3)) + "]}"


async def test_a_blocking_answer_may_be_as_long_as_what_was_asked_for_can_be(
    upstream: Server, make: Make
) -> None:
    acme = make(upstream.url)
    headers = {"Content-Type": "application/json"}
    upstream.script(*(Script(body=_nested(2_000_000), headers=headers) for _ in range(4)))

    async def size(**bounds: int) -> int:
        return len(await acme.answer("/completions", BODY, nothing, **bounds))

    assert await size() > 1_990_000
    assert await size(most_tokens=10, surplus=1_000_000) > 1_990_000
    assert await size(most_tokens=4000) > 1_990_000
    with pytest.raises(UpstreamFailed, match="too large"):
        await size(most_tokens=10)
    async with asyncio.timeout(1):
        await upstream.requests[3].closed.wait()


async def test_a_blocking_answer_of_more_than_eight_mebibytes_is_never_read_unasked(
    upstream: Server, make: Make
) -> None:
    upstream.script(Script(body=_nested(9 * 1024 * 1024), headers={"Content-Type": "application/json"}))
    with pytest.raises(UpstreamFailed, match="too large"):
        await ask(make(upstream.url))


async def test_no_http_client_is_loaded_for_a_provider_that_is_of_no_use() -> None:
    code = """
import sys
from headgate.config import ProviderSettings
from headgate.providers.upstream import Upstream, bearer
row = ProviderSettings(kind="openai", base_url="https://acme.test/v1", api_key_env="ACME_KEY")
assert Upstream("acme", row, None, bearer).reason == "set ACME_KEY"
assert "aiohttp" not in sys.modules
Upstream("acme", row, "sk", bearer)
assert "aiohttp" in sys.modules
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
