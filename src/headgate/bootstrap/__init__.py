"""Wiring: the only place that names concrete stores and providers. What is built here is passed down as arguments."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from headgate.config import Settings
from headgate.service.accounts import Administration

if TYPE_CHECKING:
    from headgate.core.models import ModelSpec
    from headgate.service.tokens import Tokens


@contextmanager
def administration(settings: Settings) -> Iterator[Administration]:
    """An operator's door to the data folder, which it creates and migrates; safe beside a running server.

    LedgerUnavailable, with the file and the reason, when the database cannot be used.
    """
    # Imported here: most of a short command's time would be these, and `--help` needs none of them.
    from headgate.stores.accounts import SqliteAccounts
    from headgate.stores.audit import audit
    from headgate.stores.database import open_database
    from headgate.stores.usage import recent_usage

    def tokens() -> "Tokens":
        from headgate.bootstrap.token_keys import load_tokens

        return load_tokens(settings)

    database = open_database(settings.data_dir)
    accounts = SqliteAccounts(database)
    yield Administration(
        accounts=accounts,
        credentials=accounts,
        usage=partial(recent_usage, database),
        audit=partial(audit, database),
        tokens=tokens,
        apps=settings.apps,
        clock=time,
    )


def catalog(settings: Settings) -> "list[tuple[ModelSpec, str | None]]":
    """Every model with the reason why it cannot be called, or None. Starts no engine."""
    from headgate.bootstrap.gateway import make_providers, model_specs

    specs = model_specs(settings)
    providers = make_providers(settings, specs)
    return [(spec, providers[spec.provider].unavailable(spec)) for spec in specs]
