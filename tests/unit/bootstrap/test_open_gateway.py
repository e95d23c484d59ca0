"""How the gateway is put together from its settings, and taken apart again."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.clock import ManualClock

from headgate.bootstrap import administration, catalog
from headgate.bootstrap.gateway import make_providers, model_specs, open_gateway
from headgate.config import ConfigError, Settings, load
from headgate.core.accounts import Hold, UsageRow
from headgate.core.errors import LedgerUnavailable
from headgate.core.money import NanoUSD
from headgate.providers.anthropic import Anthropic
from headgate.providers.cohere import Cohere
from headgate.providers.fake import Fake
from headgate.providers.openai_compatible import OpenAICompatible
from headgate.stores.database import DATABASE_NAME, open_database

TOML = """
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
[developers.studio]
account = "studio-account"
"""
FAKES: Mapping[str, Fake] = {"embedded": Fake("embedded"), "acme": Fake("acme")}


def settings(folder: Path, **environ: str) -> Settings:
    path = folder / "test.toml"
    path.write_text(TOML)
    return load(path, {"HEADGATE_DATA_DIR": str(folder / "data"), **environ})


def test_every_model_has_a_provider_and_those_without_a_key_say_which_variable(tmp_path: Path) -> None:
    rows = {f"{row.provider}/{row.name}": row for row in catalog(settings(tmp_path))}
    assert rows["acme/large"].reason == "set ACME_KEY"
    assert "OPENAI_API_KEY" in str(rows["openai/gpt-4.1"].reason)
    retired = rows["openai/gpt-4"]
    assert (retired.successor, retired.reason) == ("gpt-4.1", rows["openai/gpt-4.1"].reason)
    assert "embedded/demo" in rows


def test_an_empty_key_counts_as_none_and_a_real_one_brings_a_model_to_life(tmp_path: Path) -> None:
    def reason(**environ: str) -> str | None:
        return next(row.reason for row in catalog(settings(tmp_path, **environ)) if row.name == "large")

    assert reason(ACME_KEY="") == "set ACME_KEY"
    assert reason(ACME_KEY="key") is None


def test_each_kind_of_upstream_is_there_and_waits_for_its_key(tmp_path: Path) -> None:
    given = settings(tmp_path, ANTHROPIC_API_KEY="key")
    providers = make_providers(given, model_specs(given))
    assert isinstance(providers["acme"], OpenAICompatible)
    assert isinstance(providers["anthropic"], Anthropic)
    assert isinstance(providers["cohere"], Cohere)
    reasons = {
        spec.provider: providers[spec.provider].unavailable(spec)
        for spec in model_specs(given)
        if spec.provider in ("anthropic", "cohere")
    }
    assert reasons == {"anthropic": None, "cohere": "set COHERE_API_KEY"}


async def test_an_open_gateway_serves_and_has_the_folder_to_itself(tmp_path: Path) -> None:
    given = settings(tmp_path)
    async with open_gateway(given, providers=FAKES, clock=ManualClock()) as gateway:
        assert await gateway.not_ready() is None
        assert gateway.catalog.resolve("large").provider == "acme"
        with pytest.raises(LedgerUnavailable, match="another server"):
            async with open_gateway(given, providers=FAKES):
                pass
        assert await gateway.not_ready() is None
    async with open_gateway(given, providers=FAKES) as again:
        assert await again.not_ready() is None


async def test_a_developers_missing_account_is_made_and_a_present_one_kept(tmp_path: Path) -> None:
    given = settings(tmp_path)
    async with open_gateway(given, providers=FAKES):
        with administration(given) as operator:
            assert operator.balance("studio-account").balance == 0
            operator.credit("studio-account", NanoUSD(5))
    async with open_gateway(given, providers=FAKES):
        with administration(given) as operator:
            assert operator.balance("studio-account").balance == 5


async def test_holds_of_a_former_process_are_resolved_before_anything_is_served(tmp_path: Path) -> None:
    given = settings(tmp_path)
    row = UsageRow(request_id="r", dialect="openai", model="large", provider="acme")
    charged = UsageRow(request_id="r", dialect="openai", model="large", provider="acme", price=7, cost=7)
    with administration(given) as operator:
        operator.create_account("ann", NanoUSD(1000))
    async with open_gateway(given, providers=FAKES) as gateway:
        for name in ("released", "charged"):
            await gateway.ledger.hold(
                Hold(id=name, account="ann", amount=NanoUSD(100), created_ms=1, rows=(row,))
            )
        gateway.ledger.checkpoint("charged", [charged])
    async with open_gateway(given, providers=FAKES) as gateway:
        balance = await gateway.ledger.balance("ann")
        assert balance is not None
        assert (balance.balance, balance.held, balance.open_holds) == (993, 0, 0)
    with administration(given) as operator:
        assert operator.audit().ok


async def test_closing_closes_every_provider(tmp_path: Path) -> None:
    fakes = {"embedded": Fake("embedded"), "acme": Fake("acme")}
    async with open_gateway(settings(tmp_path), providers=fakes):
        assert not any(fake.closed for fake in fakes.values())
    assert all(fake.closed for fake in fakes.values())


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(LedgerUnavailable, match="data"):
        async with open_gateway(settings(tmp_path), providers=FAKES):
            pass


@pytest.mark.parametrize(("line", "told"), [("max_tokens = 9999", "at most"), ("temperature = 3", "0 to 2")])
async def test_an_app_that_its_model_cannot_serve_stops_the_start(
    tmp_path: Path, line: str, told: str
) -> None:
    path = tmp_path / "test.toml"
    path.write_text(f'[apps.story]\nmodel = "demo"\nprompt = "Go"\nvariables = [{{ name = "a" }}]\n{line}\n')
    given = load(path, {"HEADGATE_DATA_DIR": str(tmp_path / "data")})
    with pytest.raises(ConfigError, match=f"apps.story.{line.split(maxsplit=1)[0]}: must be {told}"):
        async with open_gateway(given):
            pass


async def test_a_damaged_database_is_named_with_the_reason(tmp_path: Path) -> None:
    given = settings(tmp_path)
    database = open_database(given.data_dir)
    with database.read() as connection:
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        page = connection.exec_driver_sql(
            "SELECT rootpage FROM sqlite_master WHERE name = 'holds'"
        ).scalar_one()
    with (given.data_dir / DATABASE_NAME).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xee" * size)
    with pytest.raises(LedgerUnavailable, match=r"headgate\.db: the database cannot be used: .*malformed"):
        async with open_gateway(given, providers=FAKES):
            pass
