"""`headgate tokens`: JWTs."""

from typing import Annotated

import typer

from headgate import bootstrap
from headgate.cli import arguments as arg
from headgate.cli.output import show_fields, show_json, timestamp
from headgate.config import load

tokens = typer.Typer(help="Create and revoke tokens (JWTs).")

HOUR_S = 3600


@tokens.command()
def create(
    account: arg.OfAccount, ttl: arg.Ttl = None, config: arg.Config = None, json: arg.Json = False
) -> None:
    """Create a token for an account. `expires_at` is in Unix seconds."""
    with bootstrap.administration(load(config)) as administration:
        issued = administration.create_token(account, ttl or HOUR_S)
    document: dict[str, object] = {
        "token": issued.token,
        "jti": issued.jti,
        "account": account,
        "expires_at": issued.expires_at,
    }
    if json:
        show_json(document)
    else:
        show_fields(document | {"expires_at": timestamp(issued.expires_at * 1000)})


@tokens.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="TOKEN|JTI", help="The token, or its id (jti).")],
    config: arg.Config = None,
    json: arg.Json = False,
) -> None:
    """Revoke a token before it expires; a running server refuses it within a second."""
    with bootstrap.administration(load(config)) as administration:
        jti = administration.revoke_token(token)
    (show_json if json else show_fields)({"jti": jti, "revoked": True})
