"""`headgate reload`: a running server reads its catalogue again."""

import os

from headgate.cli import arguments as arg
from headgate.cli.output import show_fields, show_json
from headgate.config import ConfigError, data_dir


def reload(_config: arg.Config = None, json: arg.Json = False) -> None:
    """Make the running server read providers, models and prices again (as SIGHUP does).

    A configuration with a mistake changes nothing, and this command says what is wrong with it. The server reads the
    file that it was started with, whatever --config says here; HEADGATE_DATA_DIR says which server.
    """
    # Imported here: the other short commands do without.
    from headgate.bootstrap.reloading import ask_to_reload

    report = ask_to_reload(data_dir(os.environ))
    if report.problem is not None:
        raise ConfigError(report.problem)
    changes = {
        "models": report.models,
        "added": list(report.added),
        "removed": list(report.removed),
        "changed": list(report.changed),
        "providers": list(report.providers),
        "needs_restart": list(report.needs_restart),
    }
    if json:
        show_json(changes)
        return
    show_fields(
        {
            name: ", ".join(value) or None if isinstance(value, list) else value
            for name, value in changes.items()
        }
    )
