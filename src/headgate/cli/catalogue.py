"""`headgate models` and `headgate apps`: what the configuration offers."""

import typer

from headgate import bootstrap
from headgate.cli import arguments as arg
from headgate.cli.output import show_json, show_table
from headgate.config import load

models = typer.Typer(help="Show the models of the catalogue.")
apps = typer.Typer(help="Show the configured apps.")


@models.command("list")
def list_models(config: arg.Config = None, json: arg.Json = False) -> None:
    """List all models, why one cannot be called now, and which one answers for a retired one."""
    rows = bootstrap.catalog(load(config))
    if json:
        show_json(
            {
                "models": [
                    {
                        "name": row.name,
                        "provider": row.provider,
                        "available": row.reason is None,
                        "reason": row.reason,
                        "successor": row.successor,
                    }
                    for row in rows
                ]
            }
        )
        return
    show_table(
        ("NAME", "PROVIDER", "AVAILABLE", "REASON", "SUCCESSOR"),
        [(row.name, row.provider, row.reason is None, row.reason, row.successor) for row in rows],
        empty="There are no models.",
    )


@apps.command("list")
def list_apps(config: arg.Config = None, json: arg.Json = False) -> None:
    """List the apps and their models."""
    rows = [(app.name, app.model) for app in load(config).apps.values()]
    if json:
        show_json({"apps": [{"name": name, "model": model} for name, model in rows]})
        return
    show_table(("NAME", "MODEL"), rows, empty="There are no apps.")
