"""The built-in catalogue beside genai-prices: prices, context windows, and where a dearer tier begins."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal

from genai_prices import types as prices
from genai_prices.data import providers
from msgspec import Struct

from headgate.config import ModelSettings, catalogue_path, read_document

LOOKED_OVER = datetime(2026, 11, 21, tzinfo=UTC)
"""When the rows were last looked over: the prices of that day are compared, whatever today is."""

REASONS = {
    ("gpt-4.1", "context_window"): "rounded there; OpenAI documents 1,047,576",
    ("gpt-4.1-mini", "context_window"): "rounded there; OpenAI documents 1,047,576",
    ("gpt-5.5", "context_window"): "rounded there; OpenAI documents 1,050,000, as for its neighbours",
    ("claude-3.5-sonnet", "context_window"): "the limits that Genstack documents for this name",
}
"""Why a row differs from genai-prices on purpose, by its name and the key."""


class Difference(Struct, frozen=True, kw_only=True):
    """`key` of the row `name` is `ours` here and `theirs` there; `why` that is meant, or None."""

    name: str
    key: str
    ours: str
    theirs: str
    why: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.key} is {self.ours}, genai-prices says {self.theirs} ({self.why or 'why?'})"
        )


def differences() -> list[Difference]:
    """All differences of the built-in rows, those with a reason among them."""
    found = []
    for row in read_document(catalogue_path()).models:
        if row.provider == "embedded" or row.successor is not None:
            continue
        for key, ours, theirs in _compared(row):
            if ours != theirs:
                why = REASONS.get((row.name, key))
                found.append(Difference(name=row.name, key=key, ours=str(ours), theirs=str(theirs), why=why))
    return found


def unused_reasons() -> set[tuple[str, str]]:
    """Reasons for what does not differ (any more)."""
    return set(REASONS) - {(difference.name, difference.key) for difference in differences()}


def _compared(row: ModelSettings) -> Iterator[tuple[str, object, object]]:
    """(key, ours, theirs) of everything that genai-prices has a word on."""
    provider = next(provider for provider in providers if provider.id == row.provider)
    upstream_name = row.upstream_name or row.name
    model = provider.find_model(upstream_name)
    if model is None:
        yield "upstream_name", upstream_name, None
        return
    price = model.get_prices(LOOKED_OVER)
    ours = {
        "input_price": row.input_price,
        "cached_input_price": row.cached_input_price or row.input_price,
        "output_price": row.output_price,
    }
    theirs = {
        "input_price": price.input_mtok,
        "cached_input_price": price.cache_read_mtok or price.input_mtok,
        "output_price": price.output_mtok,
    }
    for key, text in ours.items():
        yield key, Decimal(text or 0).normalize(), _base(theirs[key]).normalize()
    if model.context_window is not None:
        yield "context_window", row.context_window, model.context_window
    tiers = [
        tier.start for one in theirs.values() if isinstance(one, prices.TieredPrices) for tier in one.tiers
    ]
    if tiers:
        # A row has one price: its prompts must stay below the first tier that costs more.
        most = min(tiers)
        yield "max_input_tokens", row.max_input_tokens, min(row.max_input_tokens or most + 1, most)


def _base(price: Decimal | prices.TieredPrices | None) -> Decimal:
    if isinstance(price, prices.TieredPrices):
        return price.base
    return price or Decimal(0)
