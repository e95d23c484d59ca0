"""Who may come in: one generic refusal for everything else, and what a key, an app's key and a token open."""

import base64
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
import pytest_asyncio
from tests.support.doors import BLOCKING, BY_NAME, DOORS, OPENAI_FORM, Caller, Door, Reply
from tests.support.stage import JWT_SECRET, Stage

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

each_dialect = pytest.mark.parametrize("door", BLOCKING, ids=lambda door: door.name)

BEARER_GETS = (
    "/models",
    "/v1/models",
    "/models/large",
    "/v1/models/acme/large",
    "/balance",
    "/v1/balance",
    "/parameters",
    "/v1/parameters",
    "/info",
    "/v1/info",
    "/tokenizer_info",
    "/v1/tokenizer_info",
)
TOKENIZER_POSTS = ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize")
WITHIN_A_SECOND = 1.5
"""With room for a busy machine."""

STOP = "/completion-messages/6d0c5a0e-0000-4000-8000-000000000000/stop"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("identity")) as running:
        yield running


@pytest.fixture(scope="module")
def alice(stage: Stage) -> Caller:
    return stage.caller("alice", apps=("cold",))


def signed(secret: str = JWT_SECRET, algorithm: str = "HS256", header: Any = None, **claims: Any) -> str:
    """A token for alice with these claims; a claim of None is left out."""
    given = {"sub": "alice", "exp": int(time.time()) + 600, "jti": "own-1"} | claims
    kept = {name: value for name, value in given.items() if value is not None}
    return jwt.encode(kept, secret, algorithm=algorithm, headers=header)


def unsigned(header: dict[str, Any], signature: str = "") -> str:
    """A token with a header of the test's own making."""
    claims = {"sub": "alice", "exp": int(time.time()) + 600}

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part(claims)}.{signature}"


def bad_credentials() -> dict[str, str]:
    good = signed()
    head, claims, signature = good.split(".")
    return {
        "an unknown key": "hg-" + "A" * 43,
        "a key's prefix": "hg-",
        "an expired token": signed(exp=int(time.time()) - 1),
        "a token from tomorrow": signed(nbf=int(time.time()) + 86400),
        "a token without an end": signed(exp=None),
        "a token with an endless end": signed(exp=10**30),
        "a token without a subject": signed(sub=None),
        "a token of an unknown account": signed(sub="nobody"),
        "a token of the ledger itself": signed(sub="platform"),
        "a token of another signer": signed(secret="another secret, as long as the right one"),
        "a token signed with another algorithm": signed(algorithm="HS512"),
        "alg none": unsigned({"alg": "none", "typ": "JWT"}),
        "alg None": unsigned({"alg": "None"}),
        "alg none with the signature": unsigned({"alg": "none"}, signature),
        "alg RS256 signed with HMAC": unsigned({"alg": "RS256"}, signature),
        "no alg": unsigned({"typ": "JWT"}, signature),
        "an unknown critical extension": signed(header={"crit": ["exp"], "exp": 1}),
        "a key of its own": unsigned({"alg": "HS256", "jwk": {"kty": "oct", "k": "AAAA"}}, signature),
        "a changed payload": f"{head}.{claims[:-4]}AAAA.{signature}",
        "no signature": f"{head}.{claims}.",
        "two parts": f"{head}.{claims}",
        "four parts": f"{good}.x",
        "an empty jti": signed(jti=""),
        "a huge jti": signed(jti="x" * 5000),
        "dots": "...",
        "garbage": "x",
        "null": "null",
        "SQL": "' OR 1=1 --",
        "SQL in a key": "hg-' OR '1'='1",
        "SQL in a subject": signed(sub="alice' OR '1'='1"),
        "SQL in a jti": signed(jti="x'; DROP TABLE accounts; --", sub="nobody"),
        "non-ASCII": "schlüssel-鍵",
        "non-ASCII key": "hg-schlüssel",
        "format strings": "%s%n{0}${jndi:ldap://127.0.0.1/x}",
        "huge": "hg-" + "A" * 30_000,
        "a huge token": f"{head}.{claims * 300}.{signature}",
    }


BAD = bad_credentials()
WORDS = "Missing or invalid credentials."


def assert_generic(reply: Reply, dialect: Any) -> None:
    """The one refusal: nothing in it tells why."""
    problem = reply.problem(dialect)
    kinds = {"genstack": "InvalidCredentials", "dify": "unauthorized"}
    assert (reply.status, problem.kind) == (401, kinds.get(dialect, "invalid_request_error"))
    assert problem.message == WORDS
    assert problem.field is None
    if dialect in OPENAI_FORM:
        assert problem.code == "invalid_api_key"
    if dialect == "dify":
        assert reply.headers["WWW-Authenticate"] == 'Bearer realm="api"'


@each_dialect
@pytest.mark.parametrize("credential", BAD.values(), ids=BAD)
async def test_every_bad_credential_gets_the_same_refusal(
    stage: Stage, alice: Caller, door: Door, credential: str
) -> None:
    headers, body = door.with_credential(*door.question(alice), credential)
    calls = len(stage.upstream.requests)
    assert_generic(await stage.send("POST", door.path, body, headers), door.dialect)
    assert len(stage.upstream.requests) == calls


def dialect_of(path: str) -> str:
    return "dify" if path.endswith(("/parameters", "/info", "/stop")) else "openai"


@pytest.mark.parametrize("path", [*BEARER_GETS, STOP, f"/v1{STOP}", *TOKENIZER_POSTS])
async def test_the_small_routes_give_the_same_refusal(stage: Stage, path: str) -> None:
    method = "GET" if path in BEARER_GETS else "POST"
    body = {"user": "u1", "prompt": "one", "tokens": [1]}
    for credential in (None, *BAD.values()):
        headers = {} if credential is None else {"Authorization": f"Bearer {credential}"}
        reply = await stage.send(method, path, body if method == "POST" else None, headers)
        assert_generic(reply, dialect_of(path))


async def test_stopping_a_stream_with_a_bad_token_is_refused_the_same(stage: Stage, alice: Caller) -> None:
    for credential in (*BAD.values(), alice.key, 7, {"sub": "alice"}, ["x"], True):
        body = {"streamId": "0" * 32, "genstackToken": credential}
        assert_generic(await stage.send("POST", "/stream/shutdown", body), "genstack")


@pytest.mark.parametrize(
    "token", [7, 0, True, False, 1.5, {}, {"sub": "alice"}, [], ["x"], None, ""], ids=str
)
async def test_a_token_that_is_no_string_is_a_bad_one(stage: Stage, alice: Caller, token: Any) -> None:
    door = BY_NAME["genstack"]
    _, body = door.question(alice, genstackToken=token)
    assert_generic(await stage.send("POST", "/", body), "genstack")


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer  \t", "Basic {key}", "{key}", "Token {key}"]
)
async def test_only_bearer_credentials_count(stage: Stage, alice: Caller, value: str) -> None:
    headers = {"Authorization": value.format(key=alice.key)}
    assert_generic(await stage.send("GET", "/v1/balance", headers=headers), "openai")


async def test_bytes_that_are_no_text_are_a_bad_credential(stage: Stage) -> None:
    for junk in (b"\xff\xfe", b"hg-\xc3\x28", b"hg-\xff", b"ey\x80.ey\x80.\x80"):
        reply = await stage.raw(
            b"GET /v1/balance HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + junk + b"\r\n\r\n"
        )
        assert_generic(reply, "openai")


async def test_bearer_is_read_in_any_case(stage: Stage, alice: Caller) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        reply = await stage.send("GET", "/v1/balance", headers={"Authorization": f"{scheme} {alice.key}"})
        assert reply.json["account"] == "alice"


@pytest.mark.parametrize("path", [*BEARER_GETS, *TOKENIZER_POSTS])
async def test_bearer_routes_accept_a_key_and_a_token(stage: Stage, alice: Caller, path: str) -> None:
    method, body = ("GET", None) if path in BEARER_GETS else ("POST", {"prompt": "one", "tokens": [1]})
    for credential in (alice.key, alice.token):
        reply = await stage.send(method, path, body, headers={"Authorization": f"Bearer {credential}"})
        assert reply.status == 200, reply.body


@pytest.mark.parametrize(
    "door", [door for door in DOORS if door.dialect != "genstack"], ids=lambda door: door.name
)
async def test_completions_accept_a_token_as_bearer(stage: Stage, alice: Caller, door: Door) -> None:
    headers, body = door.with_credential(*door.question(alice), alice.token)
    assert (await stage.send("POST", door.path, body, headers)).status == 200


@pytest.mark.parametrize(
    "door", [BY_NAME["genstack"], BY_NAME["genstack-stream"]], ids=lambda door: door.name
)
async def test_genstack_takes_tokens_only_and_only_in_the_body(
    stage: Stage, alice: Caller, door: Door
) -> None:
    for key in (alice.key, alice.app_keys["cold"]):
        headers, body = door.with_credential(*door.question(alice), key)
        assert_generic(await stage.send("POST", door.path, body, headers), "genstack")
    headers, body = door.with_credential(*door.question(alice), None)
    with_header = headers | {"Authorization": f"Bearer {alice.token}"}
    assert_generic(await stage.send("POST", door.path, body, with_header), "genstack")


async def test_a_key_used_as_a_token_is_refused_even_right_after_it_was_accepted(
    stage: Stage, alice: Caller
) -> None:
    assert (await stage.ask(BY_NAME["openai"], alice)).status == 200
    headers, body = BY_NAME["genstack"].with_credential(*BY_NAME["genstack"].question(alice), alice.key)
    assert_generic(await stage.send("POST", "/", body, headers), "genstack")


async def test_an_app_key_opens_its_apps_routes_only(stage: Stage, alice: Caller) -> None:
    headers = {"Authorization": f"Bearer {alice.app_keys['cold']}"}
    for prefix in ("", "/v1"):
        info = await stage.send("GET", f"{prefix}/info", headers=headers)
        assert (info.status, info.json["name"]) == (200, "cold")
        assert (await stage.send("GET", f"{prefix}/parameters", headers=headers)).status == 200
        for path in (
            "/models",
            "/models?all=true",
            "/models/large",
            "/models/unknown",
            "/balance",
            "/tokenizer_info",
        ):
            reply = await stage.send("GET", prefix + path, headers=headers)
            assert (reply.status, reply.problem("openai").kind) == (403, "permission_denied_error")
        body = {"inputs": {"query": "say hello"}}
        served = await stage.send("POST", f"{prefix}/completion-messages", body, headers)
        assert served.status == 200
    asked = {"model": "cold", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [1]}
    for path in (
        "/completions",
        "/v1/completions",
        "/chat/completions",
        "/v1/chat/completions",
        "/v1/completion",
        *TOKENIZER_POSTS,
    ):
        reply = await stage.send("POST", path, asked, headers)
        assert (reply.status, reply.problem("openai").kind) == (403, "permission_denied_error")


async def test_a_key_without_an_app_speaks_to_the_default_app(stage: Stage, alice: Caller) -> None:
    for credential in (alice.key, alice.token):
        info = await stage.send("GET", "/info", headers={"Authorization": f"Bearer {credential}"})
        assert info.json["name"] == "default"


async def seconds_until_refused(stage: Stage, credential: str) -> float:
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {credential}"}
    while True:
        reply = await stage.send("GET", "/v1/balance", headers=headers)
        if reply.status != 200:
            assert_generic(reply, "openai")
            return time.monotonic() - began
        assert time.monotonic() - began < 10, "the credential is still accepted"


async def test_a_revoked_key_is_refused_within_a_second_while_its_sibling_goes_on(stage: Stage) -> None:
    carol = stage.caller("carol")
    sibling = stage.books.key("carol")
    headers = {"Authorization": f"Bearer {carol.key}"}
    assert (await stage.send("GET", "/v1/balance", headers=headers)).status == 200
    await stage.server.cli("keys", "revoke", carol.key)
    assert await seconds_until_refused(stage, carol.key) <= WITHIN_A_SECOND
    headers = {"Authorization": f"Bearer {sibling}"}
    assert (await stage.send("GET", "/v1/balance", headers=headers)).status == 200
    assert_generic(await stage.ask(BY_NAME["openai"], carol), "openai")


async def test_a_revoked_token_is_refused_within_a_second_everywhere(stage: Stage) -> None:
    dave = stage.caller("dave")
    assert (await stage.ask(BY_NAME["genstack"], dave)).status == 200
    headers = {"Authorization": f"Bearer {dave.token}"}
    assert (await stage.send("GET", "/v1/balance", headers=headers)).status == 200
    await stage.server.cli("tokens", "revoke", dave.token)
    assert await seconds_until_refused(stage, dave.token) <= WITHIN_A_SECOND
    for door in (BY_NAME["genstack"], BY_NAME["genstack-stream"]):
        assert_generic(await stage.ask(door, dave), "genstack")
    another = stage.books.token("dave")
    headers = {"Authorization": f"Bearer {another}"}
    assert (await stage.send("GET", "/v1/balance", headers=headers)).status == 200


async def test_a_token_ends_when_it_says_so(stage: Stage) -> None:
    stage.caller("erin")
    end = int(time.time()) + 2
    token = signed(sub="erin", exp=end)
    headers = {"Authorization": f"Bearer {token}"}
    assert (await stage.send("GET", "/v1/balance", headers=headers)).status == 200
    await seconds_until_refused(stage, token)
    assert end - 0.1 <= time.time() <= end + 1.5


async def test_credit_counts_within_a_second(stage: Stage) -> None:
    frank = stage.caller("frank", 0)
    assert (await stage.ask(BY_NAME["openai"], frank)).status == 402
    await stage.server.cli("accounts", "credit", "frank", "1")
    assert (await stage.ask(BY_NAME["openai"], frank)).status == 200


async def test_keys_and_tokens_are_nowhere_in_the_data_folder(stage: Stage, alice: Caller) -> None:
    for door in DOORS:
        assert (await stage.ask(door, alice)).status == 200
    secrets = [alice.key, alice.token, alice.app_keys["cold"], JWT_SECRET]
    files = [path for path in (stage.folder / "data").rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content, path.name
            # Past what `keys list` shows of a key, not even a part of it.
            assert secret.encode()[7:27] not in content, path.name


async def test_keys_list_shows_what_tells_keys_apart_and_no_more(stage: Stage, alice: Caller) -> None:
    listed = (await stage.server.cli("keys", "list"))["keys"]
    mine = [key for key in listed if key["account"] == "alice"]
    assert [(key["app"], key["revoked"]) for key in mine] == [(None, False), ("cold", False)]
    assert alice.key.startswith(mine[0]["prefix"])
    assert len(mine[0]["prefix"]) <= 8
    assert alice.key not in json.dumps(listed)


async def test_keys_hold_256_random_bits(stage: Stage) -> None:
    keys = {stage.books.key("alice") for _ in range(3)}
    assert len(keys) == 3
    for key in keys:
        assert re.fullmatch(r"hg-[A-Za-z0-9_-]{43}", key)


async def test_the_data_folder_is_its_owners_only(stage: Stage) -> None:
    folder = stage.folder / "data"
    assert folder.stat().st_mode & 0o077 == 0
