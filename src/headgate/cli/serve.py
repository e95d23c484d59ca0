"""`headgate serve`: the gateway in the foreground."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headgate.config import BUILT_IN, load


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes any free one.", min=0, max=65535)
    ] = 8080,
    demo: Annotated[
        bool, typer.Option("--demo", help="Create the account 'demo' with 10 USD and print a key to try.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration file; default ./headgate.toml.")] = None,
) -> None:
    """Start the gateway. Logs go to stderr; the last line on stdout is `ready http://HOST:PORT`."""
    # Imported here: `headgate --help` and the short commands do not need a server.
    from headgate.bootstrap.serve import serve as run

    settings = load(config)
    # The file that was found, not another one or none that may be there later.
    again = partial(load, Path(settings.source) if settings.source != BUILT_IN else None)
    run(settings, host=host, port=port, demo=demo, read=again)
