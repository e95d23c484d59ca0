"""`headgate usage` and `headgate ledger`: what was recorded, and whether it adds up."""

from typing import Annotated

import typer

from headgate import bootstrap
from headgate.cli import arguments as arg
from headgate.cli.output import show_fields, show_json, show_table, timestamp
from headgate.config import load
from headgate.core.money import usd_text

ledger = typer.Typer(help="Check the books.")

SHOWN_ROWS = 50


def usage(
    account: arg.OnlyAccount = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help=f"Newest rows to show; default all with --json, else {SHOWN_ROWS}."
        ),
    ] = None,
    config: arg.Config = None,
    json: arg.Json = False,
) -> None:
    """Show what requests used and cost, newest first."""
    with bootstrap.administration(load(config)) as administration:
        records = administration.usage(account, limit if json or limit else SHOWN_ROWS)
    if json:
        show_json(
            {
                "usage": [
                    {
                        "request_id": record.row.request_id,
                        "account": record.account,
                        "dialect": record.row.dialect,
                        "model": record.row.model,
                        "prompt_tokens": record.row.prompt_tokens,
                        "completion_tokens": record.row.completion_tokens,
                        "source": record.row.source,
                        "cost_nano_usd": record.row.cost,
                        "price_nano_usd": record.row.price,
                        "provider": record.row.provider,
                        "attempts": record.row.attempts,
                        "failed_cost_nano_usd": record.row.failed_cost,
                        "error": record.row.error,
                        "created": record.created_ms // 1000,
                    }
                    for record in records
                ]
            }
        )
        return
    show_table(
        ("TIME", "ACCOUNT", "DIALECT", "MODEL", "PROMPT", "COMPLETION", "PRICE USD", "ERROR", "REQUEST"),
        [
            (
                timestamp(record.created_ms),
                record.account,
                record.row.dialect,
                record.row.model,
                record.row.prompt_tokens,
                record.row.completion_tokens,
                usd_text(record.row.price),
                record.row.error,
                record.row.request_id,
            )
            for record in records
        ],
        empty="Nothing was used yet.",
    )


@ledger.callback()
def _group() -> None:
    # With a single command typer would drop the group's own name.
    pass


@ledger.command()
def check(config: arg.Config = None, json: arg.Json = False) -> None:
    """Prove that every transfer sums to zero and every balance equals its entries; exit 1 if not."""
    with bootstrap.administration(load(config)) as administration:
        report = administration.audit()
    if json:
        show_json(
            {
                "ok": report.ok,
                "transfers": report.transfers,
                "open_holds": report.open_holds,
                "held_nano_usd": report.held,
                "problems": list(report.problems),
            }
        )
    else:
        show_fields(
            {
                "ok": report.ok,
                "transfers": report.transfers,
                "open holds": report.open_holds,
                "held": f"{usd_text(report.held)} USD",
            }
        )
        for problem in report.problems:
            print(f"problem: {problem}")
    if not report.ok:
        raise typer.Exit(1)
