"""`headgate keys`: API keys."""

from typing import Annotated

import typer

from headgate import bootstrap
from headgate.cli import arguments as arg
from headgate.cli.output import show_fields, show_json, show_table, timestamp
from headgate.config import load

keys = typer.Typer(help="Create, list and revoke API keys.")


@keys.command()
def create(
    account: arg.OfAccount,
    app: Annotated[
        str | None, typer.Option("--app", metavar="APP", help="Bind the key to one configured app.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Let the key administrate.")] = False,
    config: arg.Config = None,
    json: arg.Json = False,
) -> None:
    """Create an API key. It is shown this once; only its SHA-256 is kept."""
    with bootstrap.administration(load(config)) as administration:
        minted = administration.create_key(account, app=app, admin=admin)
    document = {
        "key": minted.key,
        "id": minted.record.id,
        "account": minted.record.account,
        "app": minted.record.app,
        "admin": minted.record.admin,
    }
    (show_json if json else show_fields)(document)


@keys.command("list")
def list_keys(config: arg.Config = None, json: arg.Json = False) -> None:
    """List all keys, revoked ones too."""
    with bootstrap.administration(load(config)) as administration:
        records = administration.keys()
    if json:
        show_json(
            {
                "keys": [
                    {
                        "id": record.id,
                        "prefix": record.prefix,
                        "account": record.account,
                        "app": record.app,
                        "admin": record.admin,
                        "created": record.created_ms // 1000,
                        "revoked": record.revoked_ms is not None,
                    }
                    for record in records
                ]
            }
        )
        return
    show_table(
        ("ID", "PREFIX", "ACCOUNT", "APP", "ADMIN", "CREATED", "REVOKED"),
        [
            (
                record.id,
                f"{record.prefix}...",
                record.account,
                record.app,
                record.admin,
                timestamp(record.created_ms),
                None if record.revoked_ms is None else timestamp(record.revoked_ms),
            )
            for record in records
        ],
        empty="There are no keys; `headgate keys create --account NAME` makes one.",
    )


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID|KEY", help="The key's id, or the key.")],
    config: arg.Config = None,
    json: arg.Json = False,
) -> None:
    """Revoke a key; a running server refuses it within a second."""
    with bootstrap.administration(load(config)) as administration:
        key_id = administration.revoke_key(key)
    (show_json if json else show_fields)({"id": key_id, "revoked": True})
