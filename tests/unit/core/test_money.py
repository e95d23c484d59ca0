"""Money is exact: integers, one rounding rule, no floats."""

from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core import money
from headgate.core.money import Credits, FemtoUSD, MarginPPM

prices = st.integers(0, 10**12).map(lambda n: Decimal(n).scaleb(-9))
margins = st.integers(0, 990_000).map(MarginPPM)
tokens = st.integers(0, 10**7)


@given(prices, prices, tokens, tokens, margins)
def test_cost_and_price_are_the_exact_amounts_rounded_up_once(
    input_price: Decimal, output_price: Decimal, prompt: int, completion: int, margin: MarginPPM
) -> None:
    exact = FemtoUSD(prompt * money.rate(input_price) + completion * money.rate(output_price))
    usd = (Fraction(input_price) * prompt + Fraction(output_price) * completion) / 10**6
    assert money.cost_of(exact) == ceil(usd * 10**9)
    assert money.price_of(exact, margin) == ceil(usd * 10**9 / (1 - Fraction(margin, 10**6)))
    assert money.price_of(exact, margin) >= money.cost_of(exact)


@given(st.integers(0, 10**15), st.integers(0, 10_000).map(lambda n: Decimal(n).scaleb(-2)))
def test_shares_of_a_margin_add_up_and_the_developers_part_is_rounded_down(
    amount: int, percent: Decimal
) -> None:
    developer, platform = money.platform_share(amount, percent)
    assert developer + platform == amount
    assert developer == int(Fraction(amount) * (100 - Fraction(percent)) / 100)


@pytest.mark.parametrize(
    ("credit", "nano", "text"),
    [
        ("0.0001", 100_000_000, "1000"),
        ("0.0001", 34_000_000, "340"),
        ("0.0001", 1, "0.00001"),
        ("0.0001", 0, "0"),
        ("0.0001", -150_000, "-1.5"),
        ("1", 1_500_000_000, "1.5"),
        ("0.000000001", 7, "7"),
        ("4", 1_000_000_000, "0.25"),
    ],
)
def test_credits_are_exact_decimal_strings(credit: str, nano: int, text: str) -> None:
    assert Credits(Decimal(credit)).text(nano) == text


@given(st.integers(-(10**18), 10**18), st.sampled_from(["0.0001", "0.00025", "2", "0.000000001", "0.064"]))
def test_credits_times_their_worth_give_the_amount_back(nano: int, credit: str) -> None:
    assert Fraction(Credits(Decimal(credit)).text(nano)) * Fraction(credit) == Fraction(nano, 10**9)


@pytest.mark.parametrize("credit", ["0.0003", "0", "-1", "7"])
def test_a_credit_that_makes_endless_decimals_is_refused(credit: str) -> None:
    with pytest.raises(ValueError, match="credit"):
        Credits(Decimal(credit))


@pytest.mark.parametrize(
    "amount",
    [
        "0",
        "-1",
        "0.0000000001",
        "1000000001",
        "ten",
        "",
        "NaN",
        "Infinity",
        "1e999999999999",
        "1e-999999",
        "9" * 60,
    ],
)
def test_absurd_amounts_are_refused(amount: str) -> None:
    with pytest.raises(ValueError):
        money.parse_usd(amount)


def test_amounts_are_shown_without_exponent_and_trailing_zeros() -> None:
    assert money.usd_text(1) == "0.000000001"
    assert money.usd_text(10_000_000_000) == "10"
    assert money.femto_text(5_000_000_000) == "0.000005"
    assert money.text(Decimal("1E+3")) == "1000"


@pytest.mark.parametrize("percent", ["100", "-1", "12.34567"])
def test_margins_out_of_range_or_too_fine_are_refused(percent: str) -> None:
    with pytest.raises(ValueError, match="margin"):
        money.margin_ppm(Decimal(percent))
