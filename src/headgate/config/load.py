"""Reading the configuration: defaults < headgate.toml < environment."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from headgate.config.checks import Checks
from headgate.config.settings import DEFAULT_APP, ConfigError, Document, ModelSettings, ProviderKind, Settings
from headgate.core import money
from headgate.core.models import ModelSpec


def load(config_file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration. `config_file` None: ./headgate.toml if there is one, else built-in defaults."""
    env = dict(os.environ if environ is None else environ)
    path = config_file
    if path is None and Path("headgate.toml").is_file():
        path = Path("headgate.toml")
    document = Document() if path is None else read_document(path)
    source = "built-in defaults" if path is None else str(path)
    _refuse_unbuilt(env)
    built_in = read_document(catalogue_path())
    own_names = {name for row in document.models for name in (row.name, *row.aliases)}
    models = document.models + tuple(row for row in built_in.models if row.name not in own_names)
    providers = {**built_in.providers, **document.providers}
    check = Checks(source)
    for name, provider in document.providers.items():
        check.provider(name, provider)
    for index, row in enumerate(document.models):
        check.model(f"models[{index}]", row, providers)
    check.duplicates(document.models)
    margins = check.margins(document.billing)
    credit = check.credit(document.billing)
    check.margin_bounds(document, margins)
    check.server(document.server)
    check.embedded(document.embedded)
    check.limits(document.limits)
    check.tokens(document.tokens, env)
    apps = {DEFAULT_APP.name: DEFAULT_APP} | {
        name: check.app(name, row) for name, row in document.apps.items()
    }
    known = {
        name
        for row in models
        for bare in (row.name, *row.aliases)
        for name in (bare, f"{row.provider}/{bare}")
    }
    for name, app in apps.items():
        if app.model not in known:
            raise check.fail(f"apps.{name}.model", f"{app.model!r} is not in the catalogue")
    developers = {name: check.developer(name, row) for name, row in document.developers.items()}
    return Settings(
        source=source,
        data_dir=data_dir(env),
        environ=env,
        server=document.server,
        tokens=document.tokens,
        embedded=document.embedded,
        limits=document.limits,
        log=document.log,
        routing=document.routing,
        files=document.files,
        margins=margins,
        credit_usd=credit,
        providers=providers,
        models=models,
        apps=apps,
        developers=developers,
    )


def data_dir(environ: Mapping[str, str]) -> Path:
    """HEADGATE_DATA_DIR, else the platform's user data folder."""
    chosen = environ.get("HEADGATE_DATA_DIR")
    return (
        Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("headgate", appauthor=False))
    )


def catalogue_path() -> Path:
    return Path(__file__).parent.parent / "data" / "catalogue.toml"


def demo_model_path() -> Path:
    return Path(__file__).parent.parent / "data" / "demo.gguf"


def read_document(path: Path) -> Document:
    """One TOML file as a Document. ConfigError with file, key and reason."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: the file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        return msgspec.convert(content, Document)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".") or "(top level)"
        raise ConfigError(f"{path}: {_named(key, content)}: {reason}") from None


def _named(key: str, content: Mapping[str, Any]) -> str:
    """msgspec writes `providers[...].kind` for dict values; say which entries that may be."""
    if "[...]" in key:
        table = key.split("[...]", maxsplit=1)[0]
        names = content.get(table)
        if isinstance(names, dict):
            listed = "|".join(names)
            return key.replace("[...]", f".{listed}" if len(names) == 1 else f".({listed})", 1)
    return key


def _refuse_unbuilt(env: Mapping[str, str]) -> None:
    url = env.get("HEADGATE_DATABASE_URL", "")
    if url:
        raise ConfigError(
            "environment: HEADGATE_DATABASE_URL: only the built-in SQLite database in the data folder is supported "
            "by this version; unset it"
        )
    if env.get("HEADGATE_VALKEY_URL"):
        raise ConfigError(
            "environment: HEADGATE_VALKEY_URL: shared state on Valkey is not supported by this version; unset it"
        )


def model_spec(row: ModelSettings, kind: ProviderKind) -> ModelSpec:
    """The catalogue entry of an upstream model's row. Embedded rows get theirs from the GGUF."""
    input_rate = money.rate(money.decimal(row.input_price or "0"))
    cached = row.cached_input_price
    window = row.context_window or 0
    return ModelSpec(
        name=row.name,
        provider=row.provider,
        upstream_name=row.upstream_name or row.name,
        mode=row.mode or "chat",
        context_window=window,
        max_input_tokens=row.max_input_tokens or window,
        max_output_tokens=row.max_output_tokens or window,
        temperature=row.temperature,
        input_rate=input_rate,
        cached_rate=input_rate if cached is None else money.rate(money.decimal(cached)),
        output_rate=money.rate(money.decimal(row.output_price or "0")),
        vision=row.vision,
        logprobs=kind == "openai" if row.logprobs is None else row.logprobs,
        aliases=row.aliases,
        fallbacks=row.fallbacks,
        margin=None
        if row.gross_margin_percent is None
        else money.margin_ppm(money.decimal(row.gross_margin_percent)),
        takes_n=kind == "openai",
        bills_prompt_per_call=kind != "embedded",
    )
