"""Wiring: the only place that names concrete stores and providers. What is built here is passed down as arguments."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from headgate.config import Settings
from headgate.service.accounts import Administration

if TYPE_CHECKING:
    from headgate.core.models import ModelSpec
    from headgate.service.tokens import Tokens


class Listed(Struct, frozen=True, kw_only=True):
    """A name of the catalogue and what answers to it. `retired_from`: the provider that no longer has it."""

    name: str
    spec: "ModelSpec"
    reason: str | None = None
    retired_from: str | None = None

    @property
    def provider(self) -> str:
        return self.retired_from or self.spec.provider

    @property
    def successor(self) -> str | None:
        return None if self.retired_from is None else self.spec.name


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


def catalog(settings: Settings) -> "list[Listed]":
    """Every name of the catalogue with the reason why it cannot be called, or None. Starts no engine."""
    from headgate.bootstrap.gateway import make_providers, model_specs
    from headgate.config import retired_rows
    from headgate.core.models import Catalog
    from headgate.service.serving import Served

    specs = model_specs(settings)
    models = Catalog(specs, retired_rows(settings))
    served = Served(models, make_providers(settings, specs))
    rows = [Listed(name=spec.name, spec=spec, reason=served.unavailable(spec)) for spec in specs]
    for retired in models.retired:
        spec = models.resolve(f"{retired.provider}/{retired.name}")
        reason = served.unavailable(spec)
        rows.append(Listed(name=retired.name, spec=spec, reason=reason, retired_from=retired.provider))
    return rows
