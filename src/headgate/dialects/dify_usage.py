"""The `usage` object of Dify answers.

Its prices are shown amounts in Dify's own form: unit prices per 1,000 tokens, everything rounded to seven
decimals, half up, our margin included. What is charged is the ledger's exact price, not these.
All arithmetic is on integers of 1e-7 USD.
"""

from decimal import Decimal
from typing import Literal

from msgspec import Struct

from headgate.core import money
from headgate.core.completion import Answer
from headgate.core.money import FULL_MARGIN, FemtoUSD, MarginPPM

PRICE_UNIT = "0.001"
DECIMALS = 7


class DifyUsage(Struct, frozen=True, kw_only=True):
    """Prices are decimal strings in USD, `latency` is in seconds."""

    prompt_tokens: int
    prompt_unit_price: str
    prompt_price_unit: str = PRICE_UNIT
    prompt_price: str
    completion_tokens: int
    completion_unit_price: str
    completion_price_unit: str = PRICE_UNIT
    completion_price: str
    total_tokens: int
    total_price: str
    currency: Literal["USD"] = "USD"
    latency: float


def usage_of(answer: Answer) -> DifyUsage:
    """What the answer used, priced at the rates of the model that served it."""
    served = answer.models[0]
    usage, margin = served.charge.usage, served.charge.margin
    prompt_unit = _unit_price(served.spec.input_rate, margin)
    completion_unit = _unit_price(served.spec.output_rate, margin)
    prompt = _half_up(usage.prompt_tokens * prompt_unit, 1000)
    completion = _half_up(usage.completion_tokens * completion_unit, 1000)
    return DifyUsage(
        prompt_tokens=usage.prompt_tokens,
        prompt_unit_price=money.text(_usd(prompt_unit)),
        prompt_price=format(_usd(prompt), "f"),
        completion_tokens=usage.completion_tokens,
        completion_unit_price=money.text(_usd(completion_unit)),
        completion_price=format(_usd(completion), "f"),
        total_tokens=usage.total_tokens,
        total_price=format(_usd(prompt + completion), "f"),
        latency=answer.elapsed_s,
    )


def _unit_price(rate: FemtoUSD, margin: MarginPPM) -> int:
    # rate femto-USD a token is rate * 1000 / 1e15 USD per 1,000 tokens, or rate / 1e5 in units of 1e-7 USD;
    # divided by (1e6 - margin) / 1e6 that is rate * 10 / (1e6 - margin).
    return _half_up(rate * 10, FULL_MARGIN - margin)


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _usd(amount: int) -> Decimal:
    return Decimal(amount).scaleb(-DECIMALS)
