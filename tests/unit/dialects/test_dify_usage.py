"""dialects/dify_usage.py: the prices Dify answers show."""

from decimal import ROUND_HALF_UP, Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.completion import Answer, Charge, CompletionRequest, ModelAnswer, Usage
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD
from headgate.dialects.dify_usage import DifyUsage, usage_of


def shown(*, prompt: int, completion: int, input_rate: int, output_rate: int, margin: int = 0) -> DifyUsage:
    """Rates in femto-USD a token: 10**9 is 1 USD per million."""
    spec = ModelSpec(
        name="m",
        provider="p",
        upstream_name="m",
        mode="chat",
        context_window=1,
        max_input_tokens=1,
        max_output_tokens=1,
        input_rate=FemtoUSD(input_rate),
        cached_rate=FemtoUSD(input_rate),
        output_rate=FemtoUSD(output_rate),
    )
    charge = Charge(
        model="m",
        provider="p",
        usage=Usage(prompt_tokens=prompt, completion_tokens=completion),
        exact_input=FemtoUSD(0),
        exact_output=FemtoUSD(0),
        cost=NanoUSD(0),
        price=NanoUSD(0),
        margin=MarginPPM(margin),
    )
    model = ModelAnswer(
        requested="m", model="m", provider="p", spec=spec, choices=(), charge=charge, elapsed_s=9.0, created=1
    )
    request = CompletionRequest(
        request_id="r", answer_id="a", stream_id="s", created=1, dialect="dify", models=("m",)
    )
    return usage_of(
        Answer(
            request=request,
            models=(model,),
            price=NanoUSD(0),
            balance_before=NanoUSD(0),
            balance_after=NanoUSD(0),
            elapsed_s=0.25,
        )
    )


def test_the_seeds_figures() -> None:
    usage = shown(prompt=1033, completion=128, input_rate=10**9, output_rate=2 * 10**9)
    assert msgspec.to_builtins(usage) == {
        "prompt_tokens": 1033,
        "prompt_unit_price": "0.001",
        "prompt_price_unit": "0.001",
        "prompt_price": "0.0010330",
        "completion_tokens": 128,
        "completion_unit_price": "0.002",
        "completion_price_unit": "0.001",
        "completion_price": "0.0002560",
        "total_tokens": 1161,
        "total_price": "0.0012890",
        "currency": "USD",
        "latency": 0.25,
    }


@pytest.mark.parametrize(
    ("rate", "margin", "unit_price"),
    [
        (100_000_000, 0, "0.0001"),
        (100_000_000, 500_000, "0.0002"),
        (100_000_000, 990_000, "0.01"),
        (10**9, 333_333, "0.0015"),
        (10**9, 125_000, "0.0011429"),
        (149_999, 0, "0.0000001"),
        (150_000, 0, "0.0000002"),
        (49_999, 0, "0"),
        (0, 500_000, "0"),
        (10**13, 0, "10"),
        (10**15, 0, "1000"),
    ],
)
def test_unit_prices_include_the_margin_and_round_half_up(rate: int, margin: int, unit_price: str) -> None:
    usage = shown(prompt=1, completion=1, input_rate=rate, output_rate=rate, margin=margin)
    assert usage.prompt_unit_price == usage.completion_unit_price == unit_price


def test_prices_have_seven_decimals_and_no_exponent() -> None:
    usage = shown(prompt=0, completion=1, input_rate=10**9, output_rate=10**8)
    assert (usage.prompt_price, usage.completion_price, usage.total_price) == (
        "0.0000000",
        "0.0000001",
        "0.0000001",
    )


COUNTS = st.integers(0, 10**6)
RATES = st.integers(0, 10**12)


@given(prompt=COUNTS, completion=COUNTS, input_rate=RATES, output_rate=RATES, margin=st.integers(0, 990_000))
def test_each_price_follows_from_the_figures_shown_beside_it(
    prompt: int, completion: int, input_rate: int, output_rate: int, margin: int
) -> None:
    usage = shown(
        prompt=prompt, completion=completion, input_rate=input_rate, output_rate=output_rate, margin=margin
    )
    step = Decimal("0.0000001")
    for tokens, rate, unit, price in (
        (prompt, input_rate, usage.prompt_unit_price, usage.prompt_price),
        (completion, output_rate, usage.completion_unit_price, usage.completion_price),
    ):
        exact = Decimal(rate) / 10**12 / (1 - Decimal(margin) / 10**6)
        assert Decimal(unit) == exact.quantize(step, ROUND_HALF_UP)
        assert Decimal(price) == (tokens * Decimal(unit) * Decimal("0.001")).quantize(step, ROUND_HALF_UP)
    assert Decimal(usage.total_price) == Decimal(usage.prompt_price) + Decimal(usage.completion_price)
    assert usage.total_tokens == prompt + completion
