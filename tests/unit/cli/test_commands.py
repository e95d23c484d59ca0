import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headgate import bootstrap
from headgate.cli.app import run
from headgate.core.accounts import Hold, UsageRow
from headgate.core.money import NanoUSD
from headgate.stores.database import open_database
from headgate.stores.ledger import SqliteLedger

CONFIG = """
[apps.story]
model = "demo"
prompt = "Write about {{topic}}."
variables = [{ name = "topic" }]
"""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout, and nothing else on either side."""
        assert self.err == ""
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The JSON error on stderr, and nothing on stdout."""
        assert self.out == ""
        document = json.loads(self.err)
        assert list(document) == ["error"] and list(document["error"]) == ["message"]
        message: str = document["error"]["message"]
        assert "Traceback" not in message
        return message


class Cli:
    def __init__(self, capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
        self._capsys = capsys
        self.data_dir = data_dir

    def __call__(self, *arguments: str) -> Outcome:
        self._capsys.readouterr()
        status = run(arguments)
        out, err = self._capsys.readouterr()
        return Outcome(status, out, err)

    def json(self, *arguments: str) -> Any:
        outcome = self(*arguments, "--json")
        assert outcome.status == 0, outcome.err
        return outcome.json


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in a folder with a headgate.toml, before the first start."""
    (tmp_path / "headgate.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADGATE_DATA_DIR", str(tmp_path / "data"))
    return Cli(capsys, tmp_path / "data")


def settle_one(data_dir: Path) -> None:
    """One settled and one open hold, as a server leaves them."""

    async def work() -> None:
        ledger = SqliteLedger(open_database(data_dir), time)
        ledger.start()
        row = UsageRow(
            request_id="r1",
            dialect="openai",
            model="demo",
            provider="embedded",
            prompt_tokens=3,
            completion_tokens=4,
            source="tokenizer",
            cost=70,
            price=100,
        )
        for id in ("h1", "h2"):
            await ledger.hold(Hold(id=id, account="ann", amount=NanoUSD(400), created_ms=1, rows=(row,)))
        await ledger.settle("h1", [row])
        await ledger.close()

    asyncio.run(work())


def test_accounts_are_created_credited_and_shown(cli: Cli) -> None:
    shown = {
        "account": "ann",
        "balance_nano_usd": 1_500_000_000,
        "held_nano_usd": 0,
        "available_nano_usd": 1_500_000_000,
        "open_holds": 0,
    }
    assert cli.json("accounts", "create", "ann", "--credit", "1.5") == shown
    assert cli.json("accounts", "show", "ann") == shown
    assert cli.json("accounts", "credit", "ann", "0.000000001")["balance_nano_usd"] == 1_500_000_001
    assert cli.json("accounts", "create", "bob")["balance_nano_usd"] == 0
    settle_one(cli.data_dir)
    assert cli.json("accounts", "show", "ann") == {
        "account": "ann",
        "balance_nano_usd": 1_499_999_901,
        "held_nano_usd": 400,
        "available_nano_usd": 1_499_999_501,
        "open_holds": 1,
    }
    assert "1.499999901 USD" in cli("accounts", "show", "ann").out


def test_keys_are_created_listed_and_revoked(cli: Cli) -> None:
    cli("accounts", "create", "ann")
    first = cli.json("keys", "create", "--account", "ann")
    assert first == {"key": first["key"], "id": first["id"], "account": "ann", "app": None, "admin": False}
    assert first["key"].startswith("hg-")
    second = cli.json("keys", "create", "--account", "ann", "--app", "story", "--admin")
    assert (second["app"], second["admin"]) == ("story", True)
    assert cli.json("keys", "revoke", first["id"]) == {"id": first["id"], "revoked": True}
    listed = cli.json("keys", "list")["keys"]
    assert [(key["id"], key["account"], key["app"], key["admin"], key["revoked"]) for key in listed] == [
        (first["id"], "ann", None, False, True),
        (second["id"], "ann", "story", True, False),
    ]
    assert all(isinstance(key["created"], int) and key["prefix"].startswith("hg-") for key in listed)
    assert set(listed[0]) == {"id", "prefix", "account", "app", "admin", "created", "revoked"}
    assert cli.json("keys", "revoke", second["key"]) == {"id": second["id"], "revoked": True}
    table = cli("keys", "list").out
    assert second["id"] in table and second["key"] not in table


def test_a_minted_key_is_stored_nowhere(cli: Cli) -> None:
    cli("accounts", "create", "ann")
    key = cli.json("keys", "create", "--account", "ann")["key"].encode()
    assert all(key not in file.read_bytes() for file in cli.data_dir.iterdir())


def test_tokens_are_created_and_revoked(cli: Cli) -> None:
    cli("accounts", "create", "ann")
    created = cli.json("tokens", "create", "--account", "ann", "--ttl", "30s")
    assert set(created) == {"token", "jti", "account", "expires_at"}
    assert created["account"] == "ann"
    assert 0 < created["expires_at"] - time.time() <= 30
    assert cli.json("tokens", "revoke", created["token"]) == {"jti": created["jti"], "revoked": True}
    assert cli.json("tokens", "revoke", "another") == {"jti": "another", "revoked": True}
    hour = cli.json("tokens", "create", "--account", "ann")
    assert 3500 < hour["expires_at"] - time.time() <= 3600
    assert hour["jti"] in cli("tokens", "revoke", hour["jti"]).out


def test_usage_lists_what_was_charged(cli: Cli) -> None:
    assert cli.json("usage") == {"usage": []}
    cli("accounts", "create", "ann", "--credit", "1")
    cli("accounts", "create", "bob")
    settle_one(cli.data_dir)
    (row,) = cli.json("usage", "--account", "ann")["usage"]
    assert isinstance(row.pop("created"), int)
    assert row == {
        "request_id": "r1",
        "account": "ann",
        "dialect": "openai",
        "model": "demo",
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "source": "tokenizer",
        "cost_nano_usd": 70,
        "price_nano_usd": 100,
        "provider": "embedded",
        "attempts": 0,
        "failed_cost_nano_usd": 0,
        "error": None,
    }
    assert cli.json("usage", "--account", "bob") == {"usage": []}
    assert "r1" in cli("usage", "--limit", "1").out


def test_the_ledger_check_exits_1_when_the_books_are_wrong(cli: Cli) -> None:
    assert cli.json("ledger", "check") == {
        "ok": True,
        "transfers": 0,
        "open_holds": 0,
        "held_nano_usd": 0,
        "problems": [],
    }
    cli("accounts", "create", "ann", "--credit", "1")
    settle_one(cli.data_dir)
    assert cli.json("ledger", "check") == {
        "ok": True,
        "transfers": 2,
        "open_holds": 1,
        "held_nano_usd": 400,
        "problems": [],
    }
    with open_database(cli.data_dir).write() as connection:
        connection.exec_driver_sql("UPDATE accounts SET balance = balance + 1 WHERE name = 'ann'")
    wrong = cli("ledger", "check", "--json")
    assert wrong.status == 1
    assert wrong.json["ok"] is False and "account ann" in wrong.json["problems"][0]
    assert "problem: account ann" in cli("ledger", "check").out


def test_apps_are_those_of_the_configuration_and_the_built_in_one(cli: Cli) -> None:
    apps = cli.json("apps", "list")["apps"]
    assert {"name": "story", "model": "demo"} in apps
    assert {"name": "default", "model": "demo"} in apps
    assert "story" in cli("apps", "list").out


UPSTREAM = """
[providers.acme]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "ACME_KEY"

[[models]]
name = "large"
provider = "acme"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
output_price = "1.50"

[[models]]
name = "older"
provider = "acme"
successor = "large"
"""


def test_models_say_why_they_are_unavailable_and_who_answers_for_retired_ones(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headgate.toml").write_text(CONFIG + UPSTREAM)

    def listed(name: str) -> dict[str, Any]:
        (row,) = [row for row in cli.json("models", "list")["models"] if row["name"] == name]
        return dict(row)

    monkeypatch.delenv("ACME_KEY", raising=False)
    waits = {"provider": "acme", "available": False, "reason": "set ACME_KEY"}
    assert listed("large") == {"name": "large", **waits, "successor": None}
    assert listed("older") == {"name": "older", **waits, "successor": "large"}
    assert listed("demo") == {
        "name": "demo",
        "provider": "embedded",
        "available": True,
        "reason": None,
        "successor": None,
    }
    assert "set ACME_KEY" in cli("models", "list").out
    monkeypatch.setenv("ACME_KEY", "key")
    works = {"provider": "acme", "available": True, "reason": None}
    assert listed("large") == {"name": "large", **works, "successor": None}
    assert listed("older") == {"name": "older", **works, "successor": "large"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("accounts create ann", "exists already"),
        ("accounts show nobody", "headgate accounts create nobody"),
        ("accounts credit nobody 1", "no account 'nobody'"),
        ("keys create --account nobody", "no account 'nobody'"),
        (
            "keys create --account ann --app nope",
            "no app 'nope' in the configuration; there is: default, story",
        ),
        ("keys revoke key_nope", "headgate keys list"),
        ("tokens create --account nobody", "no account 'nobody'"),
        ("tokens revoke eyJh.eyJz.c2ln", "not valid here"),
        ("usage --account nobody", "no account 'nobody'"),
        ("apps list --config missing.toml", "missing.toml: the file does not exist"),
        ("--config missing.toml apps list", "missing.toml: the file does not exist"),
    ],
)
def test_what_fails_exits_1_and_says_what_is_wrong(cli: Cli, arguments: str, message: str) -> None:
    cli("accounts", "create", "ann")
    failed = cli(*arguments.split(), "--json")
    assert failed.status == 1
    assert message in failed.message
    human = cli(*arguments.split())
    assert (human.status, human.out) == (1, "")
    assert human.err.startswith("Error: ") and message in human.err


@pytest.mark.parametrize(
    "arguments",
    [
        "nope",
        "accounts",
        "accounts create",
        "accounts create bad/name",
        "accounts create " + "a" * 65,
        "accounts create platform",
        "accounts create bob --credit 0",
        "accounts create bob --credit -1",
        "accounts create bob --credit 1e-10",
        "accounts create bob --credit NaN",
        "accounts create bob --credit 1e30",
        "accounts create bob --credit ten",
        "accounts create bob --nope",
        "accounts credit bob",
        "accounts credit bob 1,5",
        "keys create",
        "keys create --account a/b",
        "tokens create --account bob --ttl 5",
        "tokens create --account bob --ttl 0s",
        "tokens create --account bob --ttl 1w",
        "tokens create --account bob --ttl -1h",
        "tokens create --account bob --ttl 99999d",
        "usage --limit 0",
        "usage extra",
        "serve --port 70000",
    ],
)
def test_bad_usage_exits_2_and_touches_nothing(cli: Cli, arguments: str) -> None:
    wrong = cli("--json", *arguments.split())
    assert wrong.status == 2
    assert wrong.message
    human = cli(*arguments.split())
    assert (human.status, human.out) == (2, "")
    assert human.err.startswith("Error: ")
    assert not cli.data_dir.exists()


def test_no_command_at_all_shows_the_help(cli: Cli) -> None:
    bare = cli()
    assert bare.status == 2
    assert "Usage: headgate" in bare.out
    assert bare.err == ""
    assert cli("--json").message == "Missing command."


def test_configuration_and_json_may_be_given_before_or_after_the_command(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace("story", "tale"))
    before = cli("--config", str(other), "--json", "apps", "list").json
    after = cli("apps", "list", "--config", str(other), "--json").json
    assert before == after
    assert {"name": "tale", "model": "demo"} in before["apps"]


def test_a_broken_configuration_is_named_with_file_key_and_reason(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "headgate.toml").write_text("[billing]\ncredit_usd = 5\n")
    failed = cli("accounts", "create", "ann", "--json")
    assert failed.status == 1
    assert "headgate.toml: billing.credit_usd: " in failed.message


def test_a_broken_database_is_named(cli: Cli) -> None:
    cli.data_dir.mkdir()
    (cli.data_dir / "headgate.db").write_bytes(b"nonsense" * 1000)
    failed = cli("accounts", "list-nothing", "--json")
    assert failed.status == 2
    failed = cli("accounts", "show", "ann", "--json")
    assert failed.status == 1
    assert "headgate.db" in failed.message


def test_bugs_are_reported_without_a_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(bootstrap, "administration", broken)
    failed = cli("ledger", "check", "--json")
    assert failed.status == 1
    assert failed.message == "unexpected ZeroDivisionError: a bug"


@pytest.mark.parametrize("arguments", ["--help", "accounts --help", "accounts create --help", "--version"])
def test_help_and_version_work(cli: Cli, arguments: str) -> None:
    shown = cli(*arguments.split())
    assert shown.status == 0
    assert "headgate" in shown.out
    assert not cli.data_dir.exists()


def test_the_module_runs_and_leaves_with_the_status(cli: Cli) -> None:
    arguments = [sys.executable, "-m", "headgate", "accounts", "show", "nobody", "--json"]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert (process.returncode, process.stdout) == (1, "")
    assert "nobody" in json.loads(process.stderr)["error"]["message"]


def test_a_reader_that_goes_away_causes_no_complaint(cli: Cli) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "headgate", "accounts", "create", "ann"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_commands_load_no_database_for_help() -> None:
    code = "import sys, headgate.cli.app; print(sorted({'sqlalchemy', 'alembic', 'jwt'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
