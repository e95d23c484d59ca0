"""Money: integers in nano-USD, and the one rounding rule.

Prices are Decimal USD per million tokens with at most nine decimals. One such price is a whole number of
femto-USD (1e-15 USD) per token, so every exact cost is an integer and nothing here ever touches a float.
Rounding happens once, at the end, and always up.
"""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NewType

NanoUSD = NewType("NanoUSD", int)
"""An amount in 1e-9 USD."""

FemtoUSD = NewType("FemtoUSD", int)
"""An exact amount in 1e-15 USD; also a price per token in that unit."""

MarginPPM = NewType("MarginPPM", int)
"""A gross margin in millionths: 12.5 percent is 125_000."""

NANO_PER_USD = 10**9
FEMTO_PER_NANO = 10**6
FULL_MARGIN = 10**6
MAX_PRICE_DECIMALS = 9
_AMOUNT = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?", re.ASCII)
MAX_DIGITS = 24
"""Of any amount or percentage: within the 28 that decimal arithmetic keeps exactly."""
MAX_CREDIT = NanoUSD(10**9 * NANO_PER_USD)
"""No single credit may exceed a billion USD: such a one is a typing error."""


def decimal(text: str | int | Decimal) -> Decimal:
    """A finite Decimal, or ValueError. Floats are not taken."""
    try:
        value = Decimal(text)
    except (InvalidOperation, TypeError, ValueError):
        raise ValueError(f"{text!r} is not a decimal number") from None
    if not value.is_finite():
        raise ValueError(f"{text!r} is not a finite number")
    digits, exponent = value.as_tuple()[1:]
    if len(digits) > MAX_DIGITS or (value and not -MAX_DIGITS < int(exponent) < MAX_DIGITS):
        raise ValueError(f"{str(text)[:40]!r} has too many digits")
    return value


def rate(usd_per_million: Decimal) -> FemtoUSD:
    """Femto-USD per token from USD per million tokens. ValueError when negative or finer than 1e-9 USD."""
    scaled = usd_per_million.scaleb(MAX_PRICE_DECIMALS)
    if usd_per_million < 0 or scaled != scaled.to_integral_value():
        raise ValueError("a price is not negative and has at most nine decimals")
    return FemtoUSD(int(scaled))


def margin_ppm(percent: Decimal) -> MarginPPM:
    """Millionths from percent. ValueError outside 0 to 99 or finer than four decimals."""
    scaled = percent.scaleb(4)
    if not 0 <= percent <= 99 or scaled != scaled.to_integral_value():
        raise ValueError("a margin is 0 to 99 percent with at most four decimals")
    return MarginPPM(int(scaled))


def margin_percent(margin: MarginPPM) -> Decimal:
    """Percent from millionths, without trailing zeros."""
    return plain(Decimal(margin).scaleb(-4))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def cost_of(exact: FemtoUSD) -> NanoUSD:
    """The provider's cost in nano-USD: the exact cost, rounded up."""
    return NanoUSD(_ceil_div(exact, FEMTO_PER_NANO))


def price_of(exact: FemtoUSD, margin: MarginPPM) -> NanoUSD:
    """The price charged: ceil(exact cost / (1 - margin))."""
    # exact / 1e6 nano, divided by (1e6 - margin) / 1e6: the two millions cancel.
    return NanoUSD(_ceil_div(exact, FULL_MARGIN - margin))


def platform_share(margin_amount: int, platform_percent: Decimal) -> tuple[NanoUSD, NanoUSD]:
    """Divide a margin in nano-USD into (developer, platform); the developer's part is rounded down."""
    developer = int(margin_amount * (100 - Fraction(platform_percent)) / 100)
    return NanoUSD(developer), NanoUSD(margin_amount - developer)


def plain(value: Decimal) -> Decimal:
    """The same number without trailing zeros; str() of it may still carry an exponent, see `text`."""
    return value.normalize() if value else Decimal(0)


def text(value: Decimal) -> str:
    """Exact decimal string: no exponent, no trailing zeros."""
    return format(plain(value), "f")


def usd_text(nano: int) -> str:
    """Nano-USD as an exact decimal string in USD."""
    return text(Decimal(nano).scaleb(-9))


def femto_text(femto: int) -> str:
    """Femto-USD as an exact decimal string in USD."""
    return text(Decimal(femto).scaleb(-15))


def parse_usd(amount: str) -> NanoUSD:
    """Nano-USD from a decimal string in USD; ValueError when not positive, finer than a nano-USD, or absurd."""
    if _AMOUNT.fullmatch(amount) is None:
        raise ValueError("an amount is a plain decimal number")
    value = decimal(amount)
    scaled = value.scaleb(9)
    if value <= 0:
        raise ValueError("the amount must be greater than 0 USD")
    if scaled > MAX_CREDIT:
        raise ValueError("the amount must be at most 1000000000 USD")
    if scaled != scaled.to_integral_value():
        raise ValueError("the amount has more than nine decimals")
    return NanoUSD(int(scaled))


class Credits:
    """Converts nano-USD to genstack credits; one credit is `credit_usd` USD.

    ValueError when a nano-USD would have endless decimals as credits.
    """

    def __init__(self, credit_usd: Decimal) -> None:
        if credit_usd <= 0:
            raise ValueError("one credit must be worth more than 0 USD")
        per_nano = Fraction(1, NANO_PER_USD) / Fraction(credit_usd)
        denominator = per_nano.denominator
        for prime in (2, 5):
            while denominator % prime == 0:
                denominator //= prime
        if denominator != 1:
            raise ValueError("amounts in credits would have endless decimals; use factors of 2 and 5 only")
        self._numerator = per_nano.numerator
        self._denominator = per_nano.denominator
        digits = 0
        while 10**digits % self._denominator:
            digits += 1
        self._digits = digits
        self._multiplier = self._numerator * (10**digits // self._denominator)

    def text(self, nano: int) -> str:
        """Exact decimal string of the amount in credits."""
        scaled = nano * self._multiplier
        sign, magnitude = ("-", -scaled) if scaled < 0 else ("", scaled)
        if not self._digits:
            return f"{sign}{magnitude}"
        whole, rest = divmod(magnitude, 10**self._digits)
        fraction = str(rest).rjust(self._digits, "0").rstrip("0")
        return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"
