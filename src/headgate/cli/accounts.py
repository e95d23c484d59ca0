"""`headgate accounts`: who has money, and how much."""

import typer

from headgate import bootstrap
from headgate.cli import arguments as arg
from headgate.cli.output import show_fields, show_json
from headgate.config import load
from headgate.core.accounts import Balance
from headgate.core.money import NanoUSD, usd_text
from headgate.service.accounts import RESERVED

accounts = typer.Typer(help="Create accounts, add money, show balances.")


@accounts.command()
def create(
    name: arg.Name, credit: arg.FirstCredit = None, config: arg.Config = None, json: arg.Json = False
) -> None:
    """Create an account."""
    if name in RESERVED:
        raise typer.BadParameter(f"{name!r}: this name belongs to the ledger itself; choose another")
    with bootstrap.administration(load(config)) as administration:
        balance = administration.create_account(name, None if credit is None else NanoUSD(credit))
    _show(balance, json=json)


@accounts.command()
def credit(name: arg.Name, amount: arg.Usd, config: arg.Config = None, json: arg.Json = False) -> None:
    """Add money to an account."""
    with bootstrap.administration(load(config)) as administration:
        balance = administration.credit(name, NanoUSD(amount))
    _show(balance, json=json)


@accounts.command()
def show(name: arg.Name, config: arg.Config = None, json: arg.Json = False) -> None:
    """Show an account's balance and what is held of it."""
    with bootstrap.administration(load(config)) as administration:
        balance = administration.balance(name)
    _show(balance, json=json)


def _show(balance: Balance, *, json: bool) -> None:
    if json:
        show_json(
            {
                "account": balance.account,
                "balance_nano_usd": balance.balance,
                "held_nano_usd": balance.held,
                "available_nano_usd": balance.available,
                "open_holds": balance.open_holds,
            }
        )
        return
    show_fields(
        {
            "account": balance.account,
            "balance": f"{usd_text(balance.balance)} USD",
            "held": f"{usd_text(balance.held)} USD in {balance.open_holds} open holds",
            "available": f"{usd_text(balance.available)} USD",
        }
    )
