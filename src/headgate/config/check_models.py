"""What is checked of [[models]]: each row by itself, and the names that rows call each other by."""

from collections.abc import Mapping
from typing import get_args

from headgate.config.check_providers import check_variant
from headgate.config.checks import Checks
from headgate.config.settings import MODEL_NAME, ModelSettings, ProviderSettings
from headgate.config.templates import template_names
from headgate.config.variants import Parameter
from headgate.core.money import MarginPPM

MOST_FALLBACKS = 8
MOST_DEPLOYMENTS = 32
MOST_WEIGHT = 1000
REFUSABLE = (*get_args(Parameter), "prefill", "temperature+top_p")
"""What `refuses` may name: parameters, an answer begun by the client, and two that exclude each other."""

PRICES = ("input_price", "cached_input_price", "output_price")
RETIRED_FIELDS = frozenset({"name", "provider", "aliases", "successor"})

Providers = Mapping[str, ProviderSettings]


def check_model(check: Checks, key: str, row: ModelSettings, providers: Providers) -> None:
    """One row, which may be a retired model's."""
    for name in (row.name, *row.aliases):
        if not MODEL_NAME.fullmatch(name):
            where = "name" if name == row.name else "aliases"
            raise check.fail(f"{key}.{where}", f"{name!r}: a model's name is letters, digits and . _ : -")
    if row.provider not in providers and row.provider != "embedded":
        raise check.fail(f"{key}.provider", f"{row.provider!r} is not in [providers]")
    if row.successor is not None:
        _retired(check, key, row)
        return
    if row.provider == "embedded":
        _embedded(check, key, row)
    else:
        if row.path is not None:
            raise check.fail(f"{key}.path", "only embedded models have a path")
        check_kind(check, key, row, providers[row.provider])
        _deployments(check, key, row, providers)
    low, high = row.temperature
    if not 0 <= low <= high:
        raise check.fail(f"{key}.temperature", "must be [low, high] with 0 <= low <= high")
    _prices(check, key, row)
    _limits(check, key, row)
    _abilities(check, key, row)
    check.count(f"{key}.weight", row.weight, 1, MOST_WEIGHT)
    if len(row.fallbacks) > MOST_FALLBACKS:
        raise check.fail(f"{key}.fallbacks", f"at most {MOST_FALLBACKS}")


def check_kind(check: Checks, key: str, row: ModelSettings, provider: ProviderSettings) -> None:
    """What an upstream of this kind offers at all."""
    if provider.kind == "openai":
        if row.logprobs and "logprobs" in check_variant(check, f"providers.{row.provider}", provider).refuses:
            raise check.fail(f"{key}.logprobs", f"{provider.variant!r} gives no log probabilities")
        return
    if row.mode not in (None, "chat"):
        raise check.fail(f"{key}.mode", f"models of {provider.kind!r} providers chat; it can only be 'chat'")
    if row.logprobs:
        raise check.fail(f"{key}.logprobs", f"{provider.kind!r} providers give no log probabilities")


def _retired(check: Checks, key: str, row: ModelSettings) -> None:
    blank = ModelSettings(name=row.name, provider=row.provider)
    for field in row.__struct_fields__:
        if field not in RETIRED_FIELDS and getattr(row, field) != getattr(blank, field):
            raise check.fail(
                f"{key}.{field}", "a retired model has only name, provider, aliases and successor"
            )


def _embedded(check: Checks, key: str, row: ModelSettings) -> None:
    if row.path is None and row.name != "demo":
        raise check.fail(f"{key}.path", "an embedded model needs the path of its GGUF file")
    if row.vision:
        raise check.fail(f"{key}.vision", "embedded models take no images")
    if row.tools:
        raise check.fail(f"{key}.tools", "embedded models call no functions")
    if row.refuses:
        raise check.fail(f"{key}.refuses", "embedded models take every parameter")
    if row.deployments:
        raise check.fail(f"{key}.deployments", "an embedded model is served here alone; give it fallbacks")


def _deployments(check: Checks, key: str, row: ModelSettings, providers: Providers) -> None:
    if len(row.deployments) > MOST_DEPLOYMENTS:
        raise check.fail(f"{key}.deployments", f"at most {MOST_DEPLOYMENTS}")
    own_upstream = row.upstream_name or row.name
    seen = {(row.provider, own_upstream)}
    for index, deployment in enumerate(row.deployments):
        where = f"{key}.deployments[{index}]"
        if deployment.provider == "embedded":
            raise check.fail(f"{where}.provider", "an embedded model is a row of its own; name it a fallback")
        if deployment.provider not in providers:
            raise check.fail(f"{where}.provider", f"{deployment.provider!r} is not in [providers]")
        place = (deployment.provider, deployment.upstream_name or own_upstream)
        if place in seen:
            raise check.fail(where, f"{'/'.join(place)} is given twice")
        seen.add(place)
        check.count(f"{where}.weight", deployment.weight, 1, MOST_WEIGHT)
        check_kind(check, where, row, providers[deployment.provider])
        for price_key in PRICES:
            text = getattr(deployment, price_key)
            if text is not None:
                check.price(f"{where}.{price_key}", text)


def _prices(check: Checks, key: str, row: ModelSettings) -> None:
    for price_key in PRICES:
        text = getattr(row, price_key)
        if text is not None:
            check.price(f"{key}.{price_key}", text)
        elif row.provider != "embedded" and price_key != "cached_input_price":
            raise check.fail(
                f"{key}.{price_key}", "a price in USD per million tokens is required, as a string"
            )
    if row.gross_margin_percent is not None:
        check.percent(f"{key}.gross_margin_percent", row.gross_margin_percent)


def _limits(check: Checks, key: str, row: ModelSettings) -> None:
    for limit_key in ("context_window", "max_input_tokens", "max_output_tokens"):
        limit = getattr(row, limit_key)
        if limit is None and row.provider != "embedded" and limit_key != "max_input_tokens":
            raise check.fail(f"{key}.{limit_key}", "is required for a model of an upstream provider")
        if limit is not None and limit < 1:
            raise check.fail(f"{key}.{limit_key}", "must be at least 1")
    for limit_key in ("max_input_tokens", "max_output_tokens"):
        if row.context_window and (getattr(row, limit_key) or 0) > row.context_window:
            raise check.fail(f"{key}.{limit_key}", "is above context_window")


def _abilities(check: Checks, key: str, row: ModelSettings) -> None:
    only_completes = row.mode == "completion"
    for ability in ("vision", "tools"):
        if only_completes and getattr(row, ability):
            raise check.fail(f"{key}.{ability}", "needs a model that chats: mode 'chat' or 'both'")
    if row.image_tokens is not None:
        if not row.vision:
            raise check.fail(f"{key}.image_tokens", "belongs to vision = true")
        if row.image_tokens < 1:
            raise check.fail(f"{key}.image_tokens", "must be at least 1")
    for name in row.refuses:
        if name not in REFUSABLE:
            raise check.fail(f"{key}.refuses", f"{name!r} is not one of {', '.join(REFUSABLE)}")
    if row.tools and "tools" in row.refuses:
        raise check.fail(f"{key}.refuses", "'tools' contradicts tools = true")
    if row.logprobs and "logprobs" in row.refuses:
        raise check.fail(f"{key}.refuses", "'logprobs' contradicts logprobs = true")
    if row.template is not None and not only_completes:
        raise check.fail(f"{key}.template", "belongs to mode 'completion'; a model that chats has its own")
    if isinstance(row.template, str) and row.template not in template_names():
        raise check.fail(
            f"{key}.template", f"{row.template!r} is not one of {', '.join(template_names())}, nor a table"
        )


def check_duplicates(check: Checks, rows: tuple[ModelSettings, ...]) -> None:
    seen: set[tuple[str, str]] = set()
    for index, row in enumerate(rows):
        for name in (row.name, *row.aliases):
            if (row.provider, name) in seen:
                raise check.fail(f"models[{index}].name", f"{row.provider}/{name} is given twice")
            seen.add((row.provider, name))


def check_margin_bound(check: Checks, key: str, percent: str | None, cap: MarginPPM) -> None:
    """A model's or an app's margin is at most what the installation allows."""
    if percent is not None and check.percent(f"{key}.gross_margin_percent", percent) > cap:
        raise check.fail(f"{key}.gross_margin_percent", "is above billing.max_gross_margin_percent")


class Names:
    """Which rows a name means, as core.models.Catalog resolves it."""

    def __init__(self, rows: tuple[ModelSettings, ...]) -> None:
        self._rows: dict[str, list[ModelSettings]] = {}
        for row in rows:
            for bare in (row.name, *row.aliases):
                for name in (bare, f"{row.provider}/{bare}"):
                    bearers = self._rows.setdefault(name, [])
                    if row not in bearers:
                        bearers.append(row)

    def rows(self, name: str) -> tuple[ModelSettings, ...]:
        """Rows in use bear a name before retired ones do."""
        bearers = self._rows.get(name, [])
        live = tuple(row for row in bearers if row.successor is None)
        return live or tuple(bearers)

    def check(self, check: Checks, key: str, row: ModelSettings) -> None:
        """What the row calls other rows by: its successor, its fallbacks."""
        if row.successor is not None:
            successor = self._one(check, f"{key}.successor", row.successor)
            if successor.successor is not None:
                raise check.fail(f"{key}.successor", f"{row.successor!r} is itself retired")
        met: list[ModelSettings] = []
        for name in row.fallbacks:
            fallback = self._one(check, f"{key}.fallbacks", name)
            if fallback.successor is not None:
                fallback = self._one(check, f"{key}.fallbacks", fallback.successor)
            if fallback == row:
                raise check.fail(f"{key}.fallbacks", f"{name!r} is the model itself")
            if fallback in met:
                raise check.fail(f"{key}.fallbacks", f"{name!r} is given twice")
            met.append(fallback)

    def _one(self, check: Checks, key: str, name: str) -> ModelSettings:
        rows = self.rows(name)
        if not rows:
            raise check.fail(key, f"{name!r} is not in the catalogue")
        if len(rows) > 1:
            candidates = ", ".join(sorted(f"{row.provider}/{name}" for row in rows))
            raise check.fail(key, f"{name!r} is ambiguous; use one of: {candidates}")
        return rows[0]
