"""Builds the running gateway from the settings."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType

import structlog

from headgate.bootstrap.token_keys import load_tokens
from headgate.config import ProviderSettings, Settings, check_apps, demo_model_path, model_spec
from headgate.core.errors import LedgerUnavailable
from headgate.core.models import Catalog, ModelSpec
from headgate.core.ports import Clock, Provider
from headgate.providers.anthropic import Anthropic
from headgate.providers.cohere import Cohere
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.spec import spec_for
from headgate.providers.openai_compatible import OpenAICompatible
from headgate.service.billing import Billing
from headgate.service.complete import Completions
from headgate.service.gateway import EngineStatus, Gateway
from headgate.service.identity import Identity
from headgate.service.ids import Ids
from headgate.service.limits import Limiter
from headgate.service.margins import MarginRules
from headgate.service.metrics import Metrics
from headgate.service.planning import Planner
from headgate.service.streams import Streams
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.credentials import SqliteAccountStore
from headgate.stores.database import open_database
from headgate.stores.ledger import SqliteLedger
from headgate.stores.lock import folder_lock

ENGINE_START_SECONDS = 30.0
UPSTREAMS: Mapping[str, Callable[[str, ProviderSettings, str | None], Provider]] = MappingProxyType(
    {"openai": OpenAICompatible, "anthropic": Anthropic, "cohere": Cohere}
)
"""Providers by their kind in the settings."""


log = structlog.get_logger("headgate.bootstrap")


class SystemClock:
    """core.ports.Clock on the system's clocks."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


def model_specs(settings: Settings) -> tuple[ModelSpec, ...]:
    """The catalogue's rows; an embedded model's limits come from its GGUF."""
    return tuple(
        spec_for(row, row.path or demo_model_path())
        if row.provider == "embedded"
        else model_spec(row, settings.providers[row.provider].kind)
        for row in settings.models
    )


def make_providers(settings: Settings, specs: Sequence[ModelSpec]) -> dict[str, Provider]:
    """One provider per row of [providers], and the embedded one. Nothing is started or connected yet."""
    providers: dict[str, Provider] = {"embedded": EmbeddedProvider(specs, settings.embedded)}
    for name, row in settings.providers.items():
        providers[name] = UPSTREAMS[row.kind](name, row, settings.key(row.api_key_env))
    return providers


@asynccontextmanager
async def open_gateway(
    settings: Settings, *, clock: Clock | None = None, providers: Mapping[str, Provider] | None = None
) -> AsyncGenerator[Gateway, None]:
    """A gateway ready to serve: database migrated, left-over holds resolved, engines up or declared failed.

    Holds the data folder's lock until it is closed. `providers` replace or add to the configured ones.
    ConfigError for an app its model cannot serve; LedgerUnavailable when the folder or its database cannot be used.
    """
    clock, ids = clock or SystemClock(), Ids()
    async with AsyncExitStack() as stack:
        stack.enter_context(folder_lock(settings.data_dir))
        # Before the engines: while there is none yet, the command line takes the running server's file for lost.
        database = open_database(settings.data_dir, locked=True)
        specs = model_specs(settings)
        models = Catalog(specs)
        check_apps(settings, models)
        table = {**make_providers(settings, specs), **(providers or {})}
        embedded = table["embedded"]
        if isinstance(embedded, EmbeddedProvider):
            await embedded.start()
            stack.push_async_callback(embedded.aclose)
        ledger = SqliteLedger(database, clock)
        ledger.start()
        stack.push_async_callback(ledger.close)
        try:
            await ledger.recover()
        except LedgerUnavailable as error:
            raise database.unusable(error.__cause__ or error) from error
        developers = [developer.account for developer in settings.developers.values()]
        if developers:
            SqliteAccounts(database).ensure(developers, int(clock.time() * 1000))
        accounts = SqliteAccountStore(database)
        stack.push_async_callback(accounts.close)
        billing = Billing(ledger, clock, settings.margins.platform_share_percent, ids)
        streams, metrics = Streams(), Metrics()
        planner = Planner(models, table, MarginRules(settings.margins, settings.apps), settings.developers)
        gateway = Gateway(
            completions=Completions(
                planner, Limiter(settings.limits, clock), billing, streams, clock, metrics
            ),
            identity=Identity(accounts, load_tokens(settings), clock),
            streams=streams,
            billing=billing,
            ledger=ledger,
            catalog=models,
            providers=table,
            metrics=metrics,
            clock=clock,
            ids=ids,
            drain_deadline_s=settings.server.drain_deadline_s,
            engine_statuses=_engine_statuses(embedded),
        )
        gateway.start()
        stack.push_async_callback(gateway.aclose)
        if isinstance(embedded, EmbeddedProvider):
            await embedded.ready_or_failed(ENGINE_START_SECONDS)
        yield gateway


def _engine_statuses(provider: Provider) -> Callable[[], Mapping[str, EngineStatus]]:
    if not isinstance(provider, EmbeddedProvider):
        return dict
    return lambda: {status.model: status for status in provider.status()}
