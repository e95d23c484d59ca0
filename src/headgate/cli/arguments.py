"""Arguments and options that several commands share. What does not parse is bad usage: exit 2."""

import re
from pathlib import Path
from typing import Annotated

import typer

from headgate.config import ACCOUNT_NAME
from headgate.core.money import parse_usd

_DURATION = re.compile(r"([0-9]{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_DURATION_S = 3650 * 86400


def account_name(text: str) -> str:
    """An account's name."""
    if ACCOUNT_NAME.fullmatch(text) is None:
        raise typer.BadParameter(f"{text!r}: an account's name is 1 to 64 letters, digits and . _ -")
    return text


def usd(text: str) -> int:
    """Nano-USD from USD."""
    try:
        return parse_usd(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}; write USD such as 10 or 0.25") from None


def duration(text: str) -> int:
    """Seconds from 30s, 15m, 1h or 7d."""
    match = _DURATION.fullmatch(text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= MAX_DURATION_S:
        raise typer.BadParameter(f"{text!r}: write a duration such as 30s, 15m, 1h or 7d, at most 3650d")
    return seconds


Name = Annotated[str, typer.Argument(parser=account_name, metavar="NAME", help="The account's name.")]
Usd = Annotated[int, typer.Argument(parser=usd, metavar="USD", help="Amount in USD, such as 10 or 0.25.")]
FirstCredit = Annotated[
    int | None, typer.Option("--credit", parser=usd, metavar="USD", help="Money to start with, in USD.")
]
OfAccount = Annotated[
    str, typer.Option("--account", parser=account_name, metavar="NAME", help="The account it belongs to.")
]
OnlyAccount = Annotated[
    str | None,
    typer.Option("--account", parser=account_name, metavar="NAME", help="This account only."),
]
Ttl = Annotated[
    int | None,
    typer.Option(
        "--ttl", parser=duration, metavar="DURATION", help="How long it is valid: 30s, 15m, 1h (default), 7d."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Configuration file; default ./headgate.toml if there is one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
