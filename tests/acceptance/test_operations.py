"""What an operator sees and sets: health, metrics, logs without secrets, configuration, limits, the first start."""

import asyncio
import json
import re
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from tests.support.doors import BLOCKING, BY_NAME, DOORS, JSON, STREAMING, Caller, Door, Reply
from tests.support.inside import Inside, inside
from tests.support.script import Script
from tests.support.server import Server
from tests.support.stage import JWT_SECRET, UPSTREAM_KEY, Stage

from headgate.cli.app import run
from headgate.providers.fake import Fake

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    more = '[log]\nlevel = "debug"\n'
    async with Stage(tmp_path_factory.mktemp("operations"), more=more) as running:
        yield running


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def samples(stage: Stage) -> Samples:
    reply = await stage.send("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def moved(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """By how much the samples of this name that bear these labels went up together."""

    def total(at: Samples) -> float:
        return sum(
            value
            for (found, given), value in at.items()
            if found == name and labels.items() <= dict(given).items()
        )

    return total(after) - total(before)


async def test_livez_and_readyz(stage: Stage) -> None:
    live = await stage.send("GET", "/livez")
    assert (live.status, live.json) == (200, {"status": "ok"})
    ready = await stage.send("GET", "/readyz")
    assert (ready.status, ready.json["status"]) == (200, "ok")
    assert [engine["reason"] for engine in ready.json["engines"].values()] == [None]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_metrics_count_a_served_request(stage: Stage, door: Door) -> None:
    caller = stage.caller(f"metered-{door.name}")
    before = await samples(stage)
    assert (await stage.ask(door, caller)).status == 200
    after = await samples(stage)
    (row,) = stage.books.rows(caller.account)
    mine = {"dialect": door.dialect, "model": "large"}
    assert moved(before, after, "headgate_requests_total", dialect=door.dialect, status="200") == 1
    assert moved(before, after, "headgate_request_seconds_count", **mine) == 1
    assert 0 < moved(before, after, "headgate_request_seconds_sum", **mine) < 60
    tokens = {"input": row.prompt_tokens, "output": row.completion_tokens}
    for direction, count in tokens.items():
        assert moved(before, after, "headgate_tokens_total", direction=direction, **mine) == count > 0
    assert moved(before, after, "headgate_charged_nano_usd_total", **mine) == row.price > 0
    if door.streams:
        assert moved(before, after, "headgate_time_to_first_token_seconds_count", **mine) == 1


@pytest.mark.parametrize("door", BLOCKING, ids=lambda door: door.name)
async def test_metrics_count_refusals_and_failures(stage: Stage, door: Door) -> None:
    caller = stage.caller(f"failing-{door.name}")
    before = await samples(stage)
    refused = await stage.send("POST", door.path, b"{", JSON)
    stage.upstream.script(Script(status=500, body={"error": {"message": "Down."}}))
    failed = await stage.ask(door, caller)
    after = await samples(stage)
    for reply in (refused, failed):
        wanted = [refused.status, failed.status].count(reply.status)
        status = str(reply.status)
        assert moved(before, after, "headgate_requests_total", dialect=door.dialect, status=status) == wanted
    kind = {"dialect": door.dialect, "kind": "upstream_failed"}
    assert moved(before, after, "headgate_failed_requests_total", **kind) == 1
    assert moved(before, after, "headgate_charged_nano_usd_total", dialect=door.dialect) == 0


async def test_metrics_show_what_is_open(stage: Stage) -> None:
    caller = stage.caller("opener")
    stage.upstream.hold()
    stage.upstream.script(Script(pieces=("one", " two"), hold_at=1))
    before = await samples(stage)
    headers, body = BY_NAME["openai-stream"].question(caller)
    async with stage.http.post(stage.url + "/v1/completions", json=body, headers=headers) as response:
        await response.content.readline()
        during = await samples(stage)
        stage.upstream.release()
        await response.read()
    after = await samples(stage)
    for gauge in ("headgate_open_holds", "headgate_running_requests"):
        assert [at[gauge, ()] for at in (before, during, after)] == [0, 1, 0]


async def test_metrics_have_no_labels_that_clients_can_make_up(stage: Stage) -> None:
    caller = stage.caller("inventor")
    before = await samples(stage)
    for number in range(20):
        await stage.ask(BY_NAME["openai"], caller, model=f"made-up-{number}", user=f"u{number}")
        await stage.send("GET", f"/made-up-{number}")
    after = await samples(stage)
    assert len(after.keys() - before.keys()) <= 4
    assert not any("made-up" in str(key) or "inventor" in str(key) for key in after)


# Canaries: text that must never be seen again outside the conversation it belongs to.

PROMPT, OUTPUT, TROUBLE, BAD_KEY = (
    "canary-prompt-8d1",
    "canary-output-4c7",
    "canary-trouble-93e",
    "hg-canary-key-b52",
)


async def leave_early(stage: Stage, door: Door, caller: Caller) -> None:
    """Ask, hear the first words, and go."""
    stage.upstream.hold()
    stage.upstream.script(Script(pieces=(OUTPUT, f" {OUTPUT}"), hold_at=1))
    calls = len(stage.upstream.requests)
    headers, body = door.question(caller, PROMPT)
    async with stage.http.post(stage.url + door.path, json=body, headers=headers) as response:
        await response.content.readline()
    asked = await stage.upstream.request(calls)
    async with asyncio.timeout(30):
        await asked.closed.wait()
    stage.upstream.release()


async def go_through_everything(stage: Stage, door: Door, caller: Caller, poor: Caller) -> set[int]:
    """One of each kind of request and failure, each with canaries in it; the statuses there were."""
    trouble = {"error": {"message": f"{TROUBLE} {UPSTREAM_KEY}"}}
    limit = {"genstack": "maxOutputTokens", "dify": "response_mode"}.get(door.dialect, "max_tokens")
    negative: dict[str, Any] = {limit: -1}
    no_number: dict[str, Any] = {limit: [PROMPT]}
    headers, body = door.question(caller, PROMPT)
    replies: list[Reply] = []
    stage.upstream.script(Script(pieces=(OUTPUT, f" {OUTPUT}")))
    replies.append(await stage.ask(door, caller, PROMPT))
    for script in (
        *(Script(status=status, body=trouble) for status in (400, 401, 404, 422, 429, 500, 503)),
        Script(raw=f"HTTP/1.1 {TROUBLE}\r\n\r\n"),
        Script(body=f'{{"choices": "{OUTPUT}"}}'),
        Script(body=f"<{OUTPUT}>"),
        Script(pieces=(OUTPUT, OUTPUT), reset_at=1),
        Script(pieces=(OUTPUT, OUTPUT), error_at=1, error={"message": TROUBLE, "code": 500}),
    ):
        stage.upstream.script(script)
        replies.append(await stage.ask(door, caller, PROMPT))
    stage.upstream.script(Script(silent=True))
    replies.append(await stage.ask(door, caller, PROMPT, model="hasty"))
    replies.append(await stage.ask(door, caller, PROMPT, model="keyless"))
    replies.append(await stage.ask(door, caller, PROMPT, model="demo"))
    replies.append(await stage.ask(door, caller, PROMPT, **negative))
    replies.append(await stage.ask(door, caller, PROMPT, **no_number))
    replies.append(await stage.ask(door, poor, PROMPT))
    replies.append(await stage.ask(door, caller, PROMPT * 5000, model="cold"))
    replies.append(await stage.ask(door, caller, PROMPT, headers={"Idempotency-Key": PROMPT * 99}))
    replies.append(await stage.ask(door, caller, PROMPT, padding=PROMPT * 700_000))
    other, wrong = door.with_credential(headers, body, BAD_KEY)
    replies.append(await stage.send("POST", door.path, wrong, other))
    replies.append(await stage.send("POST", door.path, json.dumps(body).encode()[:-5], headers))
    replies.append(await stage.send("POST", door.path, body, headers | {"Content-Type": f"text/{PROMPT}"}))
    replies.append(await stage.send("POST", f"{door.path}?key={caller.key}&prompt={PROMPT}", body, headers))
    replies.append(await stage.send("PUT", f"{door.path}?key={caller.key}", body, headers))
    for reply in replies[1:]:
        # What the upstream says of its own failures, and our key, is not the client's either.
        assert UPSTREAM_KEY.encode() not in reply.body
        assert caller.key.encode() not in reply.body
        if door.dialect == "genstack":
            assert caller.token.encode() not in reply.body
    return {reply.status for reply in replies}


async def test_no_prompt_output_or_secret_reaches_logs_metrics_or_the_data_folder(stage: Stage) -> None:
    caller = stage.caller("canary", apps=("cold", "hasty", "keyless", "demo"))
    poor = stage.caller("canary-poor", 0)
    statuses: set[int] = set()
    for door in DOORS:
        statuses |= await go_through_everything(stage, door, caller, poor)
    for door in STREAMING:
        await leave_early(stage, door, caller)
    bearer = {"Authorization": f"Bearer {caller.key}"}
    for method, path, body, status in (
        ("POST", "/tokenize", {"prompt": PROMPT}, 200),
        ("POST", "/tokenize", {"prompt": PROMPT, "model": PROMPT}, 404),
        ("POST", "/tokenize", {"prompt": [PROMPT]}, 400),
        ("POST", "/detokenize", {"tokens": [PROMPT]}, 400),
        ("GET", f"/tokenizer_info?model={PROMPT}", None, 404),
    ):
        assert (await stage.send(method, path, body, bearer)).status == status, path
    await stage.books.quiet("canary")
    assert statuses >= {200, 400, 401, 402, 405, 413, 415, 422, 429, 500, 502, 503, 504}

    places = {path.name: path.read_bytes() for path in (stage.folder / "data").rglob("*") if path.is_file()}
    places["the log"] = stage.server.log.encode()
    places["metrics"] = (await stage.send("GET", "/metrics")).body
    places["readyz"] = (await stage.send("GET", "/readyz")).body
    assert b'"event":"request"' in places["the log"]
    assert any(name.startswith("headgate.db") for name in places)
    secrets = (PROMPT, OUTPUT, TROUBLE, BAD_KEY, UPSTREAM_KEY, JWT_SECRET)
    for secret in (*secrets, caller.key, caller.token, *caller.app_keys.values(), poor.key, poor.token):
        for place, content in places.items():
            assert secret.encode() not in content, (secret, place)


async def test_every_request_leaves_one_structured_line(stage: Stage) -> None:
    caller = stage.caller("logged")
    ids = {}
    for door in DOORS:
        ids[stage.new_id()] = (door, 200)
        ids[stage.new_id()] = (door, 401)
    for request_id, (door, status) in ids.items():
        headers, body = door.question(caller)
        if status == 401:
            headers, body = door.with_credential(headers, body, None)
        reply = await stage.send("POST", door.path, body, headers | {"X-Request-Id": request_id})
        assert reply.status == status
    async with asyncio.timeout(10):
        while True:
            lines = [json.loads(line) for line in stage.server.log.splitlines()]
            found = [line for line in lines if line.get("request_id") in ids]
            if len(found) >= len(ids):
                break
            await asyncio.sleep(0.01)
    assert len(found) == len(ids)
    for line in found:
        door, status = ids[line["request_id"]]
        assert (line["event"], line["dialect"], line["status"]) == ("request", door.dialect, status)
        assert line["ms"] >= 0
        assert line["level"] == "info"
        assert re.match(r"\d{4}-\d\d-\d\dT", line["timestamp"])


async def test_nothing_but_json_is_on_stderr(stage: Stage) -> None:
    for line in stage.server.log.splitlines():
        assert isinstance(json.loads(line), dict), line


# Configuration.

ACME = '[providers.acme]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
ROW = """
[[models]]
name = "m"
provider = "acme"
mode = "both"
context_window = 100
max_output_tokens = 10
input_price = "1"
output_price = "1"
"""
VARIABLES = 'variables = [{ name = "q", type = "text-input" }]\n'

BROKEN: dict[str, tuple[str, str]] = {
    "not TOML": ("[server\n", "TOML"),
    "an unknown table": ("[sever]\n", "sever"),
    "an unknown key": ("[server]\nenvironment = 'x'\n", "environment"),
    "a wrong type": ("[server]\nenv = 7\n", "server.env"),
    "a number as a string": ("[limits]\nrequests_per_minute = '5'\n", "limits.requests_per_minute"),
    "a negative limit": ("[limits]\ntokens_per_minute = -1\n", "limits.tokens_per_minute"),
    "no wait": ("[server]\nfirst_chunk_wait_s = 0\n", "server.first_chunk_wait_s"),
    "an odd address": ("[server]\npublic_url = 'here'\n", "server.public_url"),
    "an unknown algorithm": ("[tokens]\nalgorithm = 'none'\n", "tokens.algorithm"),
    "an algorithm without its key": ("[tokens]\nalgorithm = 'RS256'\n", "tokens.public_key_file"),
    "an empty secret": ("[tokens]\nsecret_env = 'NO_SECRET'\n", "tokens.secret_env"),
    "a credit with endless decimals": ("[billing]\ncredit_usd = '0.0003'\n", "billing.credit_usd"),
    "a credit of nothing": ("[billing]\ncredit_usd = '0'\n", "billing.credit_usd"),
    "a credit in words": ("[billing]\ncredit_usd = 'a cent'\n", "billing.credit_usd"),
    "a margin too high": ("[billing]\ngross_margin_percent = '100'\n", "billing.gross_margin_percent"),
    "a margin too fine": ("[billing]\ngross_margin_percent = '1.00001'\n", "billing.gross_margin_percent"),
    "a share above all": ("[billing]\nplatform_share_percent = '101'\n", "billing.platform_share_percent"),
    "an unknown kind": ("[providers.acme]\nkind = 'magic'\n", "providers.acme.kind"),
    "no address": ("[providers.acme]\nkind = 'openai'\n", "providers.acme.base_url"),
    "another scheme": (ACME.replace("http:", "file:"), "providers.acme.base_url"),
    "time-outs upside down": (ACME + "timeout_s = 700\n", "providers.acme.timeout_s"),
    "no provider": (ROW, "models[0].provider"),
    "no price": (ACME + ROW.replace('input_price = "1"\n', ""), "models[0].input_price"),
    "a price as a number": (
        ACME + ROW.replace('input_price = "1"', "input_price = 1.0"),
        "models[0].input_price",
    ),
    "a negative price": (
        ACME + ROW.replace('input_price = "1"', 'input_price = "-1"'),
        "models[0].input_price",
    ),
    "a price too fine": (
        ACME + ROW.replace('output_price = "1"', 'output_price = "0.0000000001"'),
        "models[0].output_price",
    ),
    "no context": (ACME + ROW.replace("context_window = 100\n", ""), "models[0].context_window"),
    "more output than context": (
        ACME + ROW.replace("max_output_tokens = 10", "max_output_tokens = 101"),
        "models[0].max_output_tokens",
    ),
    "temperatures upside down": (ACME + ROW + "temperature = [2, 0]\n", "models[0].temperature"),
    "a model twice": (ACME + ROW + ROW, "models[1].name"),
    "an unknown mode": (ACME + ROW.replace('"both"', '"all"'), "models[0].mode"),
    "a fallback to itself": (ACME + ROW + "fallbacks = ['m']\n", "models[0].fallbacks"),
    "an unknown fallback": (ACME + ROW + "fallbacks = ['nobody']\n", "models[0].fallbacks"),
    "an app without variables": (
        "[apps.a]\nmodel = 'demo'\nprompt = 'x'\nvariables = []\n",
        "apps.a.variables",
    ),
    "an app of an unknown model": (f"[apps.a]\nmodel = 'x'\nprompt = 'x'\n{VARIABLES}", "apps.a.model"),
    "an app without a prompt": (f"[apps.a]\nmodel = 'demo'\n{VARIABLES}", "prompt"),
    "an unknown variable type": (
        "[apps.a]\nmodel = 'demo'\nprompt = 'x'\nvariables = [{ name = 'q', type = 'date' }]\n",
        "apps.a.variables[0].type",
    ),
    "a developer without an account": ("[developers.studio]\n", "account"),
    "a developer with an odd account": (
        "[developers.studio]\naccount = 'not a name'\n",
        "developers.studio.account",
    ),
}


@pytest.mark.parametrize(("toml", "key"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_configuration_stops_the_start_with_file_key_and_reason(
    toml: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "headgate.toml"
    config.write_text(toml)
    monkeypatch.setenv("HEADGATE_DATA_DIR", str(tmp_path / "data"))
    status = await asyncio.to_thread(run, ["accounts", "create", "x", "--config", str(config)])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    file, where, reason = err.removeprefix("Error: ").split(": ", 2)
    assert file == str(config)
    assert key in where + reason
    assert len(reason.split()) >= 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEADGATE_DATABASE_URL", "postgresql://headgate:canary@127.0.0.1/headgate"),
        ("HEADGATE_VALKEY_URL", "valkey://127.0.0.1"),
    ],
)
async def test_a_database_this_version_cannot_use_stops_the_start(
    variable: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADGATE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv(variable, value)
    for command in ("serve --port 0", "accounts create x"):
        assert await asyncio.to_thread(run, command.split()) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert variable in err
        assert "supported by this version" in err
        assert "canary" not in err
    monkeypatch.setenv(variable, "")  # an empty variable counts as not set
    assert await asyncio.to_thread(run, ["accounts", "create", "x"]) == 0


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("[server]\nenv = 7\n", "server.env"),
        (
            "[tokens]\nalgorithm = 'RS256'\npublic_key_file = '/nowhere.pem'\n",
            "tokens.public_key_file: /nowhere.pem",
        ),
    ],
)
async def test_a_server_with_a_broken_configuration_ends_with_1(tmp_path: Path, toml: str, key: str) -> None:
    server = Server(toml, folder=tmp_path)
    with pytest.raises(AssertionError, match="ended with 1 before it was ready"):
        await server.start()
    assert server.stdout == []
    last = server.log.splitlines()[-1]
    assert last.startswith(f"Error: {tmp_path / 'test.toml'}: {key}: ")
    assert "Traceback" not in server.log


# Limits.


@asynccontextmanager
async def limited(folder: Path, limits: str) -> AsyncIterator[Inside]:
    providers = {"acme": Fake("acme"), "embedded": Fake("embedded")}
    async with inside(folder, providers, more=f"[limits]\n{limits}\n") as house:
        yield house


LIMITED = {
    "openai": "rate_limit_error",
    "chat": "rate_limit_error",
    "thiggle": "rate_limit_error",
    "genstack": "GatewayError",
    "dify": "too_many_requests",
}


def assert_limited(reply: Reply, door: Door) -> None:
    assert reply.status == 429, reply.body
    assert reply.problem(door.dialect).kind == LIMITED[door.dialect]
    assert 1 <= int(reply.headers["Retry-After"]) <= 120


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_requests_beyond_the_limit_are_refused_and_told_when_to_come_back(
    tmp_path: Path, door: Door
) -> None:
    async with limited(tmp_path, "requests_per_minute = 3") as house:
        caller = house.caller("alice")
        for left in (2, 1, 0):
            reply = await house.ask(door, caller)
            assert reply.status == 200, reply.body
            assert reply.headers["x-ratelimit-limit-requests"] == "3"
            assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
            assert re.fullmatch(r"\d+s", reply.headers["x-ratelimit-reset-requests"])
            assert "x-ratelimit-limit-tokens" not in reply.headers
        reply = await house.ask(door, caller)
        assert_limited(reply, door)
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert 10 <= int(reply.headers["Retry-After"]) <= 20  # one of three a minute
        balance = await house.gateway.ledger.balance("alice")
        assert balance is not None
        assert balance.open_holds == 0


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_tokens_beyond_the_limit_are_refused_and_unused_ones_given_back(
    tmp_path: Path, door: Door
) -> None:
    async with limited(tmp_path, "tokens_per_minute = 60000") as house:
        caller = house.caller("alice")
        reply = await house.ask(door, caller)
        assert reply.status == 200, reply.body
        assert reply.headers["x-ratelimit-limit-tokens"] == "60000"
        first = int(reply.headers["x-ratelimit-remaining-tokens"])
        # What may be used is taken before the call; what was not is there again for the next one.
        reply = await house.ask(door, caller)
        assert reply.status == 200
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) >= first - 20
        big = "word " * 11_000
        statuses = [(await house.ask(door, caller, big)).status for _ in range(8)]
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert_limited(await house.ask(door, caller, big), door)


async def test_limits_are_kept_by_key(tmp_path: Path) -> None:
    async with limited(tmp_path, "requests_per_minute = 1") as house:
        alice, bob = house.caller("alice"), house.caller("bob")
        openai, genstack = BY_NAME["openai"], BY_NAME["genstack"]
        assert (await house.ask(openai, alice)).status == 200
        assert_limited(await house.ask(openai, alice), openai)
        # The same key is limited through every door; a token, and another account, have limits of their own.
        for other in (BY_NAME["chat"], BY_NAME["thiggle"]):
            assert_limited(await house.ask(other, alice), other)
        assert (await house.ask(genstack, alice)).status == 200
        assert_limited(await house.ask(genstack, alice), genstack)
        assert (await house.ask(openai, bob)).status == 200


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_the_limits_are_checked_after_the_model_and_before_the_funds(
    tmp_path: Path, door: Door
) -> None:
    async with limited(tmp_path, "requests_per_minute = 1") as house:
        poor = house.caller("poor", 0)
        no_funds = await house.ask(door, poor)
        assert no_funds.status == (400 if door.dialect == "dify" else 402)
        # The limit is used up now, and that is said before the lack of money; a wrong field or model before both.
        assert_limited(await house.ask(door, poor), door)
        if door.dialect == "dify":
            wrong = await house.ask(door, poor, inputs={})
            assert wrong.problem("dify").kind == "invalid_param"
        else:
            wrong = await house.ask(door, poor, model="no-such-model")
            assert wrong.status == (404 if door.dialect in ("openai", "chat") else 400)
        assert (await house.send("POST", door.path, b"{}", JSON)).status == 401


async def test_without_limits_nothing_is_said_of_them(stage: Stage) -> None:
    reply = await stage.ask(BY_NAME["openai"], stage.caller("unlimited"))
    assert reply.status == 200
    assert not [name for name in reply.headers if name.lower().startswith("x-ratelimit")]


# The first start.


async def test_a_plain_start_creates_nothing(stage: Stage) -> None:
    assert stage.server.stdout == [f"ready {stage.url}"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", stage.url)
    accounts = {record["account"] for record in (await stage.server.cli("keys", "list"))["keys"]}
    assert "demo" not in accounts
    assert not (stage.folder / "data" / "demo.key").exists()


async def test_the_demo_prints_the_same_key_each_time_and_the_ready_line_last(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        async with Server(folder=tmp_path, demo=True) as server:
            *welcome, ready = server.stdout
            assert ready == f"ready {server.url}"
            text = "\n".join(welcome)
            (key,) = set(re.findall(r"hg-[A-Za-z0-9_-]{43}", text))
            keys.append(key)
            assert f"curl {server.url}/v1/completions" in text
            (token,) = re.findall(rf"{server.url}/ui#token=(\S+)", text)
            async with aiohttp.ClientSession(server.url) as client:
                for credential in (key, token):
                    headers = {"Authorization": f"Bearer {credential}"}
                    async with client.get("/v1/balance", headers=headers) as response:
                        assert (await response.json())["balance"] == "10"
            assert key not in server.log
            assert token not in server.log
    assert keys[0] == keys[1]
    data = tmp_path / "data"
    assert (data / "demo.key").read_text().strip() == keys[0]
    for private in ("demo.key", "jwt.secret"):
        assert stat.S_IMODE((data / private).stat().st_mode) == 0o600
    holders = [
        path.name for path in data.rglob("*") if path.is_file() and keys[0].encode() in path.read_bytes()
    ]
    assert holders == ["demo.key"]
    listed = (await server.cli("keys", "list"))["keys"]
    assert [(key["account"], key["app"], key["admin"]) for key in listed] == [("demo", None, False)]
