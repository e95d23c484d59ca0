"""Dispatch, CORS and request ids of the whole application."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.exchange import Exchange, scope_of
from tests.support.inside import Inside, inside

from headgate.providers.fake import Fake
from headgate.web.app import HeadgateApp

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    folder: Path = tmp_path_factory.mktemp("app")
    async with inside(folder, {"acme": Fake("acme"), "embedded": Fake("embedded")}) as gateway:
        yield gateway


async def ask(
    gateway: Inside, method: str, path: str, app: HeadgateApp | None = None, **headers: str
) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    exchange = Exchange(b"", scope=scope_of(method, path, named))
    await (app or gateway.app)(exchange.scope, exchange.receive, exchange.send)
    return exchange


def error_of(exchange: Exchange) -> dict[str, str | None]:
    error: dict[str, str | None] = exchange.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/nothing", "/v1/completions/", "//", "/ui/secret.txt", "/stream/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path_is_404_in_the_openai_form(gateway: Inside, method: str, path: str) -> None:
    if (method, path) == ("GET", "/ui/"):
        return
    exchange = await ask(gateway, method, path)
    assert exchange.status == 404
    assert error_of(exchange)["type"] in {"invalid_request_error", "not_found_error"}


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "x/y", "", "evil:port", "user@host"])
async def test_a_malformed_host_does_not_disturb_a_refusal(gateway: Inside, host: str) -> None:
    exchange = await ask(gateway, "GET", "/nothing", host=host)
    assert exchange.status == 404
    assert "at /nothing." in str(error_of(exchange)["message"])


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"GET", "HEAD", "POST"}),
        ("/stream", {"POST"}),
        ("/v1/completions", {"POST"}),
        ("/completion-messages", {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/v1/models/openai/gpt-4", {"GET", "HEAD"}),
        ("/livez", {"GET", "HEAD"}),
        ("/ui", {"GET", "HEAD"}),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "QUERY", "OPTIONS"])
async def test_an_unknown_method_is_405_and_says_what_is_allowed(
    gateway: Inside, method: str, path: str, allowed: set[str]
) -> None:
    exchange = await ask(gateway, method, path)
    assert exchange.status == 405
    assert set(exchange.headers["allow"].split(", ")) == allowed
    assert error_of(exchange)["type"] == "invalid_request_error"


async def test_a_wrong_method_on_a_path_of_two_rows_names_both(gateway: Inside) -> None:
    exchange = await ask(gateway, "GET", "/v1/completions")
    assert (exchange.status, exchange.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/", "/livez", "/v1/models", "/metrics", "/ui"])
async def test_head_is_answered_as_get(gateway: Inside, path: str) -> None:
    got, head = await ask(gateway, "GET", path), await ask(gateway, "HEAD", path)
    assert head.status == got.status
    assert head.headers["content-type"] == got.headers["content-type"]


class TestRequestIds:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/livez"), ("GET", "/"), ("GET", "/nothing"), ("PUT", "/"), ("GET", "/v1/models"),
            ("POST", "/v1/completions"), ("POST", "/"), ("POST", "/stream/shutdown"), ("GET", "/ui"),
        ],
    )  # fmt: skip
    async def test_every_answer_carries_the_clients_or_a_new_one(
        self, gateway: Inside, method: str, path: str
    ) -> None:
        assert (await ask(gateway, method, path, x_request_id="mine-1")).headers["x-request-id"] == "mine-1"
        made = (await ask(gateway, method, path, x_request_id="not mine")).headers["x-request-id"]
        assert len(made) == 32

    async def test_a_preflight_does_too(self, gateway: Inside) -> None:
        exchange = await preflight(gateway, "/v1/completions")
        assert len(exchange.headers["x-request-id"]) == 32


async def preflight(gateway: Inside, path: str, app: HeadgateApp | None = None) -> Exchange:
    return await ask(
        gateway,
        "OPTIONS",
        path,
        app,
        origin="https://app.example",
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type",
    )


class TestCors:
    @pytest.mark.parametrize("path", ["/v1/completions", "/stream", "/v1/models", "/nothing"])
    async def test_any_origin_may_ask_without_credentials_of_the_browser(
        self, gateway: Inside, path: str
    ) -> None:
        exchange = await preflight(gateway, path)
        assert exchange.status == 200
        assert exchange.headers["access-control-allow-origin"] == "*"
        assert "POST" in exchange.headers["access-control-allow-methods"]
        assert "authorization" in exchange.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in exchange.headers

    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/livez"), ("POST", "/v1/completions"), ("GET", "/x")]
    )
    async def test_answers_and_refusals_can_be_read_and_their_headers_too(
        self, gateway: Inside, method: str, path: str
    ) -> None:
        exchange = await ask(gateway, method, path, origin="https://app.example")
        assert exchange.headers["access-control-allow-origin"] == "*"
        exposed = {
            name.strip().lower() for name in exchange.headers["access-control-expose-headers"].split(",")
        }
        assert exposed >= {
            "x-request-id",
            "x-stream-id",
            "x-headgate-provider",
            "x-headgate-price",
            "retry-after",
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-tokens",
            "x-ratelimit-reset-tokens",
        }

    async def test_only_configured_origins_may_read(self, gateway: Inside) -> None:
        strict = HeadgateApp(gateway.rows, ["https://app.example"])
        allowed = await ask(gateway, "POST", "/v1/completions", strict, origin="https://app.example")
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = await ask(gateway, "POST", "/v1/completions", strict, origin="https://evil.example")
        assert "access-control-allow-origin" not in other.headers
        refused = Exchange(
            b"",
            scope=scope_of(
                "OPTIONS",
                "/v1/completions",
                {"origin": "https://evil.example", "access-control-request-method": "POST"},
            ),
        )
        await strict(refused.scope, refused.receive, refused.send)
        assert refused.status == 400
        assert len(refused.headers["x-request-id"]) == 32


async def test_a_client_that_leaves_with_half_a_body_of_a_small_endpoint_is_let_go(
    gateway: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange = Exchange(scope=scope_of("POST", "/stream/shutdown"))
    messages: list[dict[str, object]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    await gateway.app(exchange.scope, receive, exchange.send)
    assert exchange.status is None
    assert "Traceback" not in capsys.readouterr().out


async def test_anything_but_http_is_refused(gateway: Inside) -> None:
    exchange = Exchange()
    with pytest.raises(RuntimeError, match="websocket"):
        await gateway.app({"type": "websocket"}, exchange.receive, exchange.send)
    assert exchange.status is None
