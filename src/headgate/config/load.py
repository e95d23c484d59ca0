"""Reading the configuration: defaults < headgate.toml < environment."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
from msgspec.structs import replace

from headgate.config.check_apps import checked_app, checked_developer
from headgate.config.check_models import (
    Names,
    check_duplicates,
    check_kind,
    check_margin_bound,
    check_model,
)
from headgate.config.check_providers import check_provider
from headgate.config.checks import Checks
from headgate.config.settings import (
    DEFAULT_APP,
    ConfigError,
    Document,
    Margins,
    ModelSettings,
    ProviderSettings,
    Settings,
)

BUILT_IN = "built-in defaults"
"""The source of settings without a file."""


def load(config_file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration. `config_file` None: ./headgate.toml if there is one, else built-in defaults.

    Changes nothing anywhere: it may be called at any time, and again. ConfigError with file, key and reason.
    """
    env = dict(os.environ if environ is None else environ)
    path = config_file
    if path is None and Path("headgate.toml").is_file():
        path = Path("headgate.toml")
    document = Document() if path is None else read_document(path)
    source = BUILT_IN if path is None else str(path)
    _refuse_unbuilt(env)
    check = Checks(source)
    margins = check.margins(document.billing)
    credit = check.credit(document.billing)
    check.server(document.server)
    check.embedded(document.embedded)
    check.limits(document.limits)
    check.routing(document.routing)
    check.files(document.files)
    check.tokens(document.tokens, env)
    built_in = read_document(catalogue_path())
    providers = {**built_in.providers, **document.providers}
    models = _models(check, document, built_in, providers, margins, env)
    apps = {DEFAULT_APP.name: DEFAULT_APP} | {
        name: checked_app(check, name, row) for name, row in document.apps.items()
    }
    for name, row in document.apps.items():
        check_margin_bound(check, f"apps.{name}", row.gross_margin_percent, margins.cap)
    names = Names(models)
    for name, app in apps.items():
        if not names.rows(app.model):
            raise check.fail(f"apps.{name}.model", f"{app.model!r} is not in the catalogue")
    developers = {name: checked_developer(check, name, row) for name, row in document.developers.items()}
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


def _models(
    check: Checks,
    document: Document,
    built_in: Document,
    providers: Mapping[str, ProviderSettings],
    margins: Margins,
    env: Mapping[str, str],
) -> tuple[ModelSettings, ...]:
    """The operator's rows, checked, before the built-in ones that they leave."""
    for name, provider in document.providers.items():
        check_provider(check, name, provider, env)
    for index, row in enumerate(document.models):
        key = f"models[{index}]"
        check_model(check, key, row, providers)
        check_margin_bound(check, key, row.gross_margin_percent, margins.cap)
    check_duplicates(check, document.models)
    models = document.models + _left(built_in.models, document.models)
    for row in models[len(document.models) :]:
        if row.successor is None and row.provider in document.providers:
            # The operator has put another provider in the place of the one that this row was written for.
            check_kind(
                check,
                f"providers.{row.provider}.kind: the built-in model {row.name}",
                row,
                providers[row.provider],
            )
    names = Names(models)
    for index, row in enumerate(document.models):
        names.check(check, f"models[{index}]", row)
    return models


def _left(built_in: tuple[ModelSettings, ...], own: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
    """The built-in rows, without the names that own rows have taken; a model goes with its own name.

    A retired one whose successor the operator has retired in turn goes to that one's successor. It is left out where
    its successor's name has come to mean several models: then only the operator knows which.
    """
    taken = {name for row in own for name in (row.name, *row.aliases)}
    retired = {name: row.successor for row in own if row.successor for name in (row.name, *row.aliases)}
    left = []
    for row in built_in:
        names = tuple(name for name in (row.name, *row.aliases) if name not in taken)
        if row.successor is not None and names:
            successor = retired.get(row.successor, row.successor)
            left.append(replace(row, name=names[0], aliases=names[1:], successor=successor))
        elif row.successor is None and row.name in names:
            left.append(replace(row, aliases=names[1:]))
    names_now = Names((*own, *left))
    return tuple(row for row in left if row.successor is None or len(names_now.rows(row.successor)) == 1)


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
    _refuse_empty_names(path, content)
    try:
        return msgspec.convert(content, Document)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".") or "(top level)"
        raise ConfigError(f"{path}: {_named(key, content)}: {reason}") from None


def _refuse_empty_names(path: Path, content: Mapping[str, Any]) -> None:
    """A key's variable is left out, or it has a name: an empty one is a slip that would send calls without a key."""
    providers = content.get("providers")
    for name, row in providers.items() if isinstance(providers, dict) else ():
        if isinstance(row, dict) and row.get("api_key_env") == "":
            raise ConfigError(
                f"{path}: providers.{name}.api_key_env: must name an environment variable; leave it out for a service "
                "without keys"
            )


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
