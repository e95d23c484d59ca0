"""Builds the running gateway from the settings."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Protocol

import stamina.instrumentation
import structlog
from msgspec.structs import replace

from headgate.bootstrap.token_keys import load_tokens
from headgate.config import (
    ConfigError,
    ProviderSettings,
    Settings,
    check_apps,
    demo_model_path,
    model_spec,
    retired_rows,
    template_of,
)
from headgate.core.accounts import App
from headgate.core.errors import LedgerUnavailable
from headgate.core.models import Catalog, ModelSpec
from headgate.core.ports import Clock, ImageSource, Provider
from headgate.providers.anthropic import Anthropic
from headgate.providers.cohere import Cohere
from headgate.providers.egress.late import LateImages
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.spec import spec_for
from headgate.providers.openai_compatible import OpenAICompatible
from headgate.service.billing import Billing
from headgate.service.circuits import Circuits
from headgate.service.complete import Completions
from headgate.service.gateway import EngineStatus, Gateway
from headgate.service.identity import Identity
from headgate.service.ids import Ids
from headgate.service.images import Images
from headgate.service.limits import Limiter
from headgate.service.margins import MarginRules
from headgate.service.metrics import Metrics
from headgate.service.planning import Planner
from headgate.service.routing import Router
from headgate.service.serving import Serving
from headgate.service.streams import Streams
from headgate.stores.accounts import SqliteAccounts
from headgate.stores.credentials import SqliteAccountStore
from headgate.stores.database import open_database
from headgate.stores.files import FolderFiles
from headgate.stores.ledger import SqliteLedger
from headgate.stores.lock import folder_lock

ENGINE_START_SECONDS = 30.0


class _Kind(Protocol):
    """How a provider of one kind is made."""

    def __call__(
        self, name: str, settings: ProviderSettings, api_key: str | None, *, proxy: str | None
    ) -> Provider: ...


UPSTREAMS: Mapping[str, _Kind] = MappingProxyType(
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
    """The catalogue's rows but the retired ones; an embedded model's limits come from its GGUF."""
    return tuple(
        replace(spec_for(row, row.path or demo_model_path()), template=template_of(row.template))
        if row.provider == "embedded"
        else model_spec(row, settings.providers)
        for row in settings.models
        if row.successor is None
    )


def make_providers(settings: Settings, specs: Sequence[ModelSpec]) -> dict[str, Provider]:
    """One provider per row of [providers], and the embedded one. Nothing is started or connected yet."""
    providers: dict[str, Provider] = {"embedded": EmbeddedProvider(specs, settings.embedded)}
    for name, row in settings.providers.items():
        providers[name] = make_provider(settings, name, row)
    return providers


def make_provider(settings: Settings, name: str, row: ProviderSettings) -> Provider:
    """One provider, with its key and its proxy out of the environment."""
    proxy = settings.key(row.proxy_env) if row.proxy_env else None
    return UPSTREAMS[row.kind](name, row, settings.key(row.api_key_env), proxy=proxy)


def check_catalogue(
    settings: Settings, specs: Sequence[ModelSpec], apps: Mapping[str, App] | None = None
) -> Catalog:
    """The catalogue of these models. ConfigError where a retired one has no successor, or an app's model cannot serve
    it (`apps`: those that run already, else the settings')."""
    try:
        catalog = Catalog(specs, retired_rows(settings))
    except ValueError as error:
        raise ConfigError(f"{settings.source}: models: {error}") from None
    check_apps(settings if apps is None else replace(settings, apps=apps), catalog)
    return catalog


@asynccontextmanager
async def open_gateway(
    settings: Settings, *, clock: Clock | None = None, providers: Mapping[str, Provider] | None = None
) -> AsyncGenerator[Gateway, None]:
    """A gateway ready to serve: database migrated, left-over holds resolved, engines up or declared failed.

    Holds the data folder's lock until it is closed. `providers` replace or add to the configured ones.
    ConfigError for an app its model cannot serve; LedgerUnavailable when the folder or its database cannot be used.
    """
    clock, ids = clock or SystemClock(), Ids()
    # Retries are logged and counted where they are made; stamina would do so once more, in global counters.
    stamina.instrumentation.set_on_retry_hooks(())
    async with AsyncExitStack() as stack:
        stack.enter_context(folder_lock(settings.data_dir))
        # Before the engines: while there is none yet, the command line takes the running server's file for lost.
        database = open_database(settings.data_dir, locked=True)
        specs = model_specs(settings)
        models = check_catalogue(settings, specs)
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
        streams, metrics, limits = Streams(), Metrics(), Limiter(settings.limits, clock)
        circuits = Circuits(settings.routing, clock)
        serving = Serving(models, table, circuits)
        router = Router(circuits, settings.routing, metrics)
        margins = MarginRules(settings.margins, settings.apps)
        files = FolderFiles(
            settings.data_dir / "files", clock, settings.files.max_total_bytes, settings.files.account_bytes
        )
        fetcher = LateImages(partial(_image_fetcher, settings.files.max_bytes))
        stack.push_async_callback(fetcher.aclose)
        images = Images(fetcher, files, settings.files.max_bytes)
        planner = Planner(serving, router, margins, settings.developers, images)
        gateway = Gateway(
            completions=Completions(planner, router, limits, billing, streams, clock, metrics),
            limits=limits,
            identity=Identity(accounts, load_tokens(settings), clock),
            streams=streams,
            billing=billing,
            ledger=ledger,
            serving=serving,
            files=files,
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


def _image_fetcher(max_bytes: int) -> ImageSource:
    # Imported late, like the providers' own: an installation without upstreams has no HTTP client in memory.
    from headgate.providers.egress.images import ImageFetcher

    return ImageFetcher(max_bytes)


def _engine_statuses(provider: Provider) -> Callable[[], Mapping[str, EngineStatus]]:
    if not isinstance(provider, EmbeddedProvider):
        return dict
    return lambda: {status.model: status for status in provider.status()}
