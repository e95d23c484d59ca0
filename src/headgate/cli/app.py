"""The command line: which commands there are, and how whatever goes wrong leaves: one message, no traceback."""

import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import Annotated, Any

import typer

from headgate import __version__
from headgate.cli import arguments as arg
from headgate.cli.accounts import accounts
from headgate.cli.books import ledger, usage
from headgate.cli.catalogue import apps, models
from headgate.cli.keys import keys
from headgate.cli.output import show_error
from headgate.cli.reload import reload
from headgate.cli.serve import serve
from headgate.cli.tokens import tokens
from headgate.config import ConfigError
from headgate.core.errors import GatewayError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headgate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: arg.Config = None,
    json: arg.Json = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Headgate: one metered gateway for text completion."""
    ctx.default_map = _defaults(ctx.command, {"config": config, "json": json})


def _defaults(group: Any, options: dict[str, object]) -> MutableMapping[str, Any]:
    """--config and --json written before the command count for every command below."""
    return {
        name: _defaults(command, options) if hasattr(command, "commands") else options
        for name, command in group.commands.items()
    }


app.command()(serve)
app.command()(reload)
app.add_typer(accounts, name="accounts")
app.add_typer(keys, name="keys")
app.add_typer(tokens, name="tokens")
app.add_typer(models, name="models")
app.add_typer(apps, name="apps")
app.command()(usage)
app.add_typer(ledger, name="ledger")


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit status: 0, 1 for what failed, 2 for bad usage.

    Results go to stdout, errors to stderr, as JSON where --json was given.
    """
    as_json = "--json" in arguments
    try:
        status = app(list(arguments), prog_name="headgate", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        message = error.format_message()
        if message:  # none where the help was shown instead
            show_error(message, as_json=as_json)
        return error.exit_code
    except (ConfigError, GatewayError) as error:
        show_error(str(error), as_json=as_json)
        return 1
    except typer.Abort:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        show_error(f"unexpected {type(error).__name__}: {error}", as_json=as_json)
        return 1
    return status if isinstance(status, int) else 0
