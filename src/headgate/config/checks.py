"""Checks that types alone do not make; each failure names the file, the key and the reason."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import get_args

from headgate.config.settings import (
    ACCOUNT_NAME,
    MODEL_NAME,
    AppSettings,
    BillingSettings,
    ConfigError,
    DeveloperSettings,
    Document,
    EmbeddedSettings,
    LimitSettings,
    Margins,
    ModelSettings,
    ProviderKind,
    ProviderSettings,
    ServerSettings,
    Settings,
    TokenSettings,
)
from headgate.core import money
from headgate.core.accounts import FUNDING_ACCOUNT, PLATFORM_ACCOUNT, App, Developer, Variable, VariableType
from headgate.core.models import Catalog, ModelSpec
from headgate.core.money import MarginPPM


class Checks:
    """`source` is the file that the settings come from."""

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
        if provider.kind == "embedded" or name == "embedded":
            raise self.fail(
                f"{key}.kind", "the embedded provider is built in; add rows to [[models]] instead"
            )
        if not provider.base_url.startswith(("http://", "https://")):
            raise self.fail(f"{key}.base_url", "must start with http:// or https://")
        if not 0 < provider.timeout_s <= provider.total_timeout_s:
            raise self.fail(f"{key}.timeout_s", "must be greater than 0 and at most total_timeout_s")
        if provider.max_concurrency < 1:
            raise self.fail(f"{key}.max_concurrency", "must be at least 1")

    def _can(self, key: str, row: ModelSettings, kind: ProviderKind) -> None:
        """What an upstream of this kind offers at all."""
        if kind == "openai":
            return
        if row.mode not in (None, "chat"):
            raise self.fail(f"{key}.mode", f"models of {kind!r} providers chat; it can only be 'chat'")
        if row.logprobs:
            raise self.fail(f"{key}.logprobs", f"{kind!r} providers give no log probabilities")

    def model(self, key: str, row: ModelSettings, providers: Mapping[str, ProviderSettings]) -> None:
        for name in (row.name, *row.aliases):
            if not MODEL_NAME.fullmatch(name):
                where = "name" if name == row.name else "aliases"
                raise self.fail(f"{key}.{where}", f"{name!r}: a model's name is letters, digits and . _ : -")
        if row.provider not in providers and row.provider != "embedded":
            raise self.fail(f"{key}.provider", f"{row.provider!r} is not in [providers]")
        if row.provider == "embedded" and row.path is None and row.name != "demo":
            raise self.fail(f"{key}.path", "an embedded model needs the path of its GGUF file")
        if row.provider != "embedded" and row.path is not None:
            raise self.fail(f"{key}.path", "only embedded models have a path")
        if row.provider != "embedded":
            self._can(key, row, providers[row.provider].kind)
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
        for limit_key in ("max_input_tokens", "max_output_tokens"):
            if row.context_window and (getattr(row, limit_key) or 0) > row.context_window:
                raise self.fail(f"{key}.{limit_key}", "is above context_window")

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
        if row.temperature is not None and not 0 <= row.temperature < math.inf:
            raise self.fail(f"{key}.temperature", "must be 0 or more")
        if row.top_p is not None and not 0 <= row.top_p <= 1:
            raise self.fail(f"{key}.top_p", "must be 0 to 1")
        if not all(row.stop):
            raise self.fail(f"{key}.stop", "must be non-empty strings")
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
            if variable.default is not None and (problem := wrong_default(variable)):
                raise self.fail(f"{where}.default", problem)
        margin = None
        if row.gross_margin_percent is not None:
            margin = money.margin_percent(
                self.percent(f"{key}.gross_margin_percent", row.gross_margin_percent)
            )
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

    def margin_bounds(self, document: Document, margins: Margins) -> None:
        """The margins of models and apps are at most what the installation allows."""
        rows = [(f"models[{index}]", row.gross_margin_percent) for index, row in enumerate(document.models)]
        rows += [(f"apps.{name}", app.gross_margin_percent) for name, app in document.apps.items()]
        for key, percent in rows:
            if percent is not None and self.percent(f"{key}.gross_margin_percent", percent) > margins.cap:
                raise self.fail(f"{key}.gross_margin_percent", "is above billing.max_gross_margin_percent")

    def app_model(self, app: App, spec: ModelSpec) -> None:
        """An app's settings against the limits of its model (a broken model has none)."""
        low, high = spec.temperature
        if app.temperature is not None and not low <= app.temperature <= high:
            raise self.fail(f"apps.{app.name}.temperature", f"must be {low:g} to {high:g} for {spec.name}")
        if app.max_tokens is not None and spec.broken is None and app.max_tokens > spec.max_output_tokens:
            raise self.fail(
                f"apps.{app.name}.max_tokens", f"must be at most {spec.max_output_tokens} for {spec.name}"
            )

    def developer(self, name: str, row: DeveloperSettings) -> Developer:
        if not ACCOUNT_NAME.fullmatch(row.account):
            raise self.fail(
                f"developers.{name}.account", "an account's name is 1 to 64 letters, digits and . _ -"
            )
        if row.account in (PLATFORM_ACCOUNT, FUNDING_ACCOUNT):
            raise self.fail(f"developers.{name}.account", f"{row.account!r} belongs to the ledger itself")
        return Developer(id=name, account=row.account, applications=row.applications)


def check_apps(settings: Settings, catalog: Catalog) -> None:
    """Apps against the limits of their models, which for embedded ones are known only now. ConfigError."""
    check = Checks(settings.source)
    for app in settings.apps.values():
        check.app_model(app, catalog.resolve(app.model))


def wrong_default(variable: Variable) -> str | None:
    """Why clients that leave the variable out would be refused, or None."""
    default = variable.default
    if variable.type == "select":
        return None if default in variable.options else "is not among the options"
    if variable.type == "checkbox":
        return None if isinstance(default, bool) else "must be true or false"
    if variable.type == "number":
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        return None if is_number or is_numeric(default) else "must be a number"
    if not isinstance(default, str):
        return "must be a string"
    if variable.max_length is not None and len(default) > variable.max_length:
        return "is longer than max_length"
    return None


def is_numeric(text: object) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False
