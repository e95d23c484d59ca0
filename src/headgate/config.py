"""Settings, read once: defaults < headgate.toml < environment. Frozen afterwards.

`load` raises ConfigError naming file, key and reason; nothing starts on a setting that is not understood.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import platformdirs
from msgspec import Struct

from headgate.core import money
from headgate.core.accounts import App, Developer, Variable, VariableType
from headgate.core.models import Mode, ModelSpec
from headgate.core.money import MarginPPM

ACCOUNT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
ProviderKind = Literal["openai", "anthropic", "cohere", "embedded"]
Algorithm = Literal["HS256", "RS256", "ES256"]
BUILT_KINDS = ("openai", "embedded")


class ConfigError(Exception):
    """A setting is wrong; the message names the file, the key and the reason."""


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    env: str = "production"
    public_url: str = ""
    cors_origins: tuple[str, ...] = ("*",)
    first_chunk_wait_s: float = 5.0
    ping_interval_s: float = 10.0
    drain_deadline_s: float = 30.0
    write_timeout_s: float = 60.0
    max_body_bytes: int = 10 * 1024 * 1024
    max_choices: int = 128
    max_models: int = 16
    max_stops: int = 4


class TokenSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    algorithm: Algorithm = "HS256"
    secret_env: str = ""
    public_key_file: str = ""
    jwks_file: str = ""


class BillingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    credit_usd: str = "0.0001"
    gross_margin_percent: str = "0"
    min_gross_margin_percent: str | None = None
    max_gross_margin_percent: str = "99"
    platform_share_percent: str = "0"


class EmbeddedSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The embedded engine: parallel slots and threads per model, and how many requests may wait."""

    slots: int = 4
    threads: int = 1
    max_queue: int = 256


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class LogSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class ProviderSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One upstream service. Times in seconds; `timeout_s` is the longest silence."""

    kind: ProviderKind
    base_url: str = ""
    api_key_env: str = ""
    timeout_s: float = 60.0
    total_timeout_s: float = 600.0
    max_concurrency: int = 512


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[models]]` row as written; prices in USD per million tokens, as strings."""

    name: str
    provider: str
    upstream_name: str = ""
    mode: Mode | None = None
    context_window: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: tuple[float, float] = (0.0, 2.0)
    input_price: str | None = None
    cached_input_price: str | None = None
    output_price: str | None = None
    gross_margin_percent: str | None = None
    vision: bool = False
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    path: str | None = None


class AppSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    prompt: str
    variables: tuple[Variable, ...]
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    description: str = ""
    gross_margin_percent: str | None = None


class DeveloperSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    account: str
    applications: tuple[str, ...] = ()


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """headgate.toml, and the catalogue file (which uses providers and models only)."""

    server: ServerSettings = ServerSettings()
    tokens: TokenSettings = TokenSettings()
    billing: BillingSettings = BillingSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    providers: dict[str, ProviderSettings] = {}
    models: tuple[ModelSettings, ...] = ()
    apps: dict[str, AppSettings] = {}
    developers: dict[str, DeveloperSettings] = {}


class Margins(Struct, frozen=True, kw_only=True):
    """The installation's gross margins in millionths, and the platform's percentage of a developer's margin."""

    default: MarginPPM
    floor: MarginPPM | None
    cap: MarginPPM
    platform_share_percent: Decimal


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that was decided before the start. `environ` is the environment as it was read."""

    source: str
    data_dir: Path
    environ: Mapping[str, str]
    server: ServerSettings
    tokens: TokenSettings
    embedded: EmbeddedSettings
    limits: LimitSettings
    log: LogSettings
    margins: Margins
    credit_usd: Decimal
    providers: Mapping[str, ProviderSettings]
    models: tuple[ModelSettings, ...]
    apps: Mapping[str, App]
    developers: Mapping[str, Developer]

    def key(self, variable: str) -> str | None:
        """The value of an environment variable; an empty one counts as not set."""
        return self.environ.get(variable) or None


DEFAULT_APP = App(
    name="default",
    model="demo",
    prompt="{{query}}",
    variables=(Variable(name="query", label="Query", type="paragraph", required=True),),
    description="Answers one query.",
)


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
    own_models = {(row.provider, row.name) for row in document.models} | {row.name for row in document.models}
    models = document.models + tuple(row for row in built_in.models if row.name not in own_models)
    providers = {**built_in.providers, **document.providers}
    check = _Check(source)
    for name, provider in document.providers.items():
        check.provider(name, provider)
    for index, row in enumerate(document.models):
        check.model(f"models[{index}]", row, providers)
    check.duplicates(document.models)
    margins = check.margins(document.billing)
    credit = check.credit(document.billing)
    check.server(document.server)
    check.embedded(document.embedded)
    check.limits(document.limits)
    check.tokens(document.tokens, env)
    apps = {DEFAULT_APP.name: DEFAULT_APP} | {
        name: check.app(name, row) for name, row in document.apps.items()
    }
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
    return Path(__file__).parent / "data" / "catalogue.toml"


def demo_model_path() -> Path:
    return Path(__file__).parent / "data" / "demo.gguf"


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
        return msgspec.convert(content, Document, dec_hook=None)
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


class _Check:
    """Checks that types alone do not make; each failure names the file, the key and the reason."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, key: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: {reason}")

    def decimal(self, key: str, text: str) -> Decimal:
        try:
            return money.decimal(text)
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def percent(self, key: str, text: str) -> MarginPPM:
        try:
            return money.margin_ppm(self.decimal(key, text))
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def margins(self, billing: BillingSettings) -> Margins:
        default = self.percent("billing.gross_margin_percent", billing.gross_margin_percent)
        cap = self.percent("billing.max_gross_margin_percent", billing.max_gross_margin_percent)
        floor = None
        if billing.min_gross_margin_percent is not None:
            floor = self.percent("billing.min_gross_margin_percent", billing.min_gross_margin_percent)
        share = self.decimal("billing.platform_share_percent", billing.platform_share_percent)
        if not 0 <= share <= 100:
            raise self.fail("billing.platform_share_percent", "must be 0 to 100")
        if default > cap:
            raise self.fail("billing.gross_margin_percent", "is above max_gross_margin_percent")
        if floor is not None and floor > cap:
            raise self.fail("billing.min_gross_margin_percent", "is above max_gross_margin_percent")
        return Margins(default=default, floor=floor, cap=cap, platform_share_percent=share)

    def credit(self, billing: BillingSettings) -> Decimal:
        credit = self.decimal("billing.credit_usd", billing.credit_usd)
        try:
            money.Credits(credit)
        except ValueError as error:
            raise self.fail("billing.credit_usd", str(error)) from None
        return credit

    def server(self, server: ServerSettings) -> None:
        for key in ("first_chunk_wait_s", "ping_interval_s", "drain_deadline_s", "write_timeout_s"):
            if not 0 < getattr(server, key) <= 3600:
                raise self.fail(f"server.{key}", "must be greater than 0 and at most 3600 seconds")
        for key in ("max_body_bytes", "max_choices", "max_models", "max_stops"):
            if getattr(server, key) < 1:
                raise self.fail(f"server.{key}", "must be at least 1")
        if server.public_url and not server.public_url.startswith(("http://", "https://")):
            raise self.fail("server.public_url", "must start with http:// or https://")

    def embedded(self, embedded: EmbeddedSettings) -> None:
        for key, low, high in (("slots", 1, 64), ("threads", 1, 256), ("max_queue", 0, 100_000)):
            if not low <= getattr(embedded, key) <= high:
                raise self.fail(f"embedded.{key}", f"must be {low} to {high}")

    def limits(self, limits: LimitSettings) -> None:
        for key in ("requests_per_minute", "tokens_per_minute"):
            if getattr(limits, key) < 0:
                raise self.fail(f"limits.{key}", "must be 0 (none) or more")

    def tokens(self, tokens: TokenSettings, env: Mapping[str, str]) -> None:
        symmetric = tokens.algorithm == "HS256"
        files = [key for key in ("public_key_file", "jwks_file") if getattr(tokens, key)]
        if symmetric and files:
            raise self.fail(f"tokens.{files[0]}", "belongs to RS256 and ES256, not to HS256")
        if not symmetric and len(files) != 1:
            raise self.fail(
                "tokens.public_key_file", f"{tokens.algorithm} needs public_key_file or jwks_file"
            )
        if not symmetric and tokens.secret_env:
            raise self.fail("tokens.secret_env", "belongs to HS256")
        if tokens.secret_env and len(env.get(tokens.secret_env, "").encode()) < 32:
            raise self.fail(
                "tokens.secret_env",
                f"the variable {tokens.secret_env} must hold a secret of at least 32 bytes",
            )

    def provider(self, name: str, provider: ProviderSettings) -> None:
        key = f"providers.{name}"
        if not MODEL_NAME.fullmatch(name):
            raise self.fail(key, "a provider's name is letters, digits and . _ : -")
        if provider.kind not in BUILT_KINDS:
            raise self.fail(
                f"{key}.kind", f"{provider.kind!r} is not supported by this version; use 'openai'"
            )
        if provider.kind == "embedded":
            raise self.fail(
                f"{key}.kind", "the embedded provider is built in; add rows to [[models]] instead"
            )
        if not provider.base_url.startswith(("http://", "https://")):
            raise self.fail(f"{key}.base_url", "must start with http:// or https://")
        if not 0 < provider.timeout_s <= provider.total_timeout_s:
            raise self.fail(f"{key}.timeout_s", "must be greater than 0 and at most total_timeout_s")
        if provider.max_concurrency < 1:
            raise self.fail(f"{key}.max_concurrency", "must be at least 1")

    def model(self, key: str, row: ModelSettings, providers: Mapping[str, ProviderSettings]) -> None:
        for name in (row.name, *row.aliases):
            if not MODEL_NAME.fullmatch(name):
                raise self.fail(f"{key}.name", f"{name!r}: a model's name is letters, digits and . _ : -")
        if row.provider not in providers and row.provider != "embedded":
            raise self.fail(f"{key}.provider", f"{row.provider!r} is not in [providers]")
        if row.provider == "embedded" and row.path is None and row.name != "demo":
            raise self.fail(f"{key}.path", "an embedded model needs the path of its GGUF file")
        if row.provider != "embedded" and row.path is not None:
            raise self.fail(f"{key}.path", "only embedded models have a path")
        if row.fallbacks:
            raise self.fail(f"{key}.fallbacks", "fallbacks are not supported by this version")
        if row.vision:
            raise self.fail(f"{key}.vision", "image input is not supported by this version")
        low, high = row.temperature
        if not 0 <= low <= high:
            raise self.fail(f"{key}.temperature", "must be [low, high] with 0 <= low <= high")
        for price_key in ("input_price", "cached_input_price", "output_price"):
            text = getattr(row, price_key)
            if text is None:
                if row.provider == "embedded" or price_key == "cached_input_price":
                    continue
                raise self.fail(
                    f"{key}.{price_key}", "a price in USD per million tokens is required, as a string"
                )
            try:
                money.rate(self.decimal(f"{key}.{price_key}", text))
            except ValueError as error:
                raise self.fail(f"{key}.{price_key}", str(error)) from None
        if row.gross_margin_percent is not None:
            self.percent(f"{key}.gross_margin_percent", row.gross_margin_percent)
        for limit_key in ("context_window", "max_input_tokens", "max_output_tokens"):
            limit = getattr(row, limit_key)
            if limit is None and row.provider != "embedded" and limit_key != "max_input_tokens":
                raise self.fail(f"{key}.{limit_key}", "is required for a model of an upstream provider")
            if limit is not None and limit < 1:
                raise self.fail(f"{key}.{limit_key}", "must be at least 1")
        if row.context_window and row.max_output_tokens and row.max_output_tokens > row.context_window:
            raise self.fail(f"{key}.max_output_tokens", "is above context_window")

    def duplicates(self, rows: tuple[ModelSettings, ...]) -> None:
        seen: set[tuple[str, str]] = set()
        for index, row in enumerate(rows):
            for name in (row.name, *row.aliases):
                if (row.provider, name) in seen:
                    raise self.fail(f"models[{index}].name", f"{row.provider}/{name} is given twice")
                seen.add((row.provider, name))

    def app(self, name: str, row: AppSettings) -> App:
        key = f"apps.{name}"
        if not ACCOUNT_NAME.fullmatch(name):
            raise self.fail(key, "an app's name is 1 to 64 letters, digits and . _ -")
        if not row.variables:
            raise self.fail(f"{key}.variables", "an app declares at least one variable")
        if row.max_tokens is not None and row.max_tokens < 1:
            raise self.fail(f"{key}.max_tokens", "must be at least 1")
        names: set[str] = set()
        for index, variable in enumerate(row.variables):
            where = f"{key}.variables[{index}]"
            if variable.name in names:
                raise self.fail(f"{where}.name", f"{variable.name!r} is declared twice")
            names.add(variable.name)
            if variable.type not in get_args(VariableType):
                raise self.fail(f"{where}.type", "unknown type")
            if variable.type == "select" and not variable.options:
                raise self.fail(f"{where}.options", "a select variable needs options")
            if variable.max_length is not None and variable.max_length < 1:
                raise self.fail(f"{where}.max_length", "must be at least 1")
        margin = None
        if row.gross_margin_percent is not None:
            self.percent(f"{key}.gross_margin_percent", row.gross_margin_percent)
            margin = money.decimal(row.gross_margin_percent)
        return App(
            name=name,
            model=row.model,
            prompt=row.prompt,
            variables=row.variables,
            temperature=row.temperature,
            top_p=row.top_p,
            max_tokens=row.max_tokens,
            stop=row.stop,
            description=row.description,
            margin_percent=margin,
        )

    def developer(self, name: str, row: DeveloperSettings) -> Developer:
        if not ACCOUNT_NAME.fullmatch(row.account):
            raise self.fail(
                f"developers.{name}.account", "an account's name is 1 to 64 letters, digits and . _ -"
            )
        return Developer(id=name, account=row.account, applications=row.applications)


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
        aliases=row.aliases,
        fallbacks=row.fallbacks,
        margin=None
        if row.gross_margin_percent is None
        else money.margin_ppm(money.decimal(row.gross_margin_percent)),
        takes_n=kind == "openai",
        bills_prompt_per_call=kind != "embedded",
    )
