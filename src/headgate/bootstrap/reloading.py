"""Reloading the catalogue: providers, models and prices as the configuration says now, in a server that runs on.

SIGHUP asks for it. All or nothing: what cannot be understood, or would leave a configured app without its model,
changes nothing and says why. Requests under way end with what they began with.

`headgate reload` leaves a request in the data folder, sends the signal and reads the report that takes its place.
"""

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from headgate.bootstrap.gateway import check_catalogue, make_provider, model_specs
from headgate.config import ConfigError, Settings
from headgate.core.errors import NotFound
from headgate.core.models import ModelSpec
from headgate.core.ports import Provider
from headgate.service.gateway import Gateway
from headgate.stores.lock import server_pid

log = structlog.get_logger("headgate.reload")

REQUEST, REPORT = "reload-*.request", "reload-*.report"
PATIENCE_S = 30.0
POLL_S = 0.05
FIXED = {field.name for field in msgspec.structs.fields(Settings)} - {
    "source",
    "data_dir",
    "environ",
    "providers",
    "models",
}
"""Settings that are read at the start alone."""


class ReloadReport(Struct, frozen=True, kw_only=True):
    """What a reload did. `problem`: why nothing was changed. Names of models are qualified (provider/name).

    `providers` are new, changed or gone; their connections, and what counts them, begin anew. `needs_restart`: sections
    that differ from what runs and that a reload does not touch.
    """

    problem: str | None = None
    models: int = 0
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class Hangups:
    """SIGHUP from the first moment on: before the gateway is there it is remembered, not deadly."""

    def __init__(self) -> None:
        self._reload: Callable[[], None] | None = None
        self._early = False

    def signalled(self) -> None:
        if self._reload is None:
            self._early = True
        else:
            self._reload()

    def lead_to(self, reload: Callable[[], None]) -> None:
        self._reload = reload
        if self._early:
            reload()


class Reloading:
    """Reloads one gateway. `read` reads the configuration again; `settings` is what it started with."""

    def __init__(self, gateway: Gateway, settings: Settings, read: Callable[[], Settings]) -> None:
        self._gateway = gateway
        self._started_with = settings
        self._in_force = settings
        self._read = read
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    def begin(self) -> None:
        """Reload in the background: for a signal's handler."""
        self._later(self.reload())

    async def reload(self) -> ReloadReport:
        async with self._turn:
            folder = self._started_with.data_dir
            # Before the configuration is read: what is asked for later is answered by a later reload.
            requests = await asyncio.to_thread(lambda: list(folder.glob(REQUEST)))
            try:
                report = await self._replace()
            except ConfigError as error:
                report = ReloadReport(problem=str(error), models=len(self._gateway.catalog.models))
                log.error("reload refused; the catalogue stays as it was", problem=str(error))
            except Exception as error:
                report = ReloadReport(problem=f"{type(error).__name__}: {error}")
                log.exception("reload failed; the catalogue stays as it was")
            else:
                log.info(
                    "reloaded",
                    models=report.models,
                    added=len(report.added),
                    removed=len(report.removed),
                    changed=len(report.changed),
                    needs_restart=list(report.needs_restart),
                )
            await asyncio.to_thread(_answer, requests, report)
            return report

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _replace(self) -> ReloadReport:
        settings = await asyncio.to_thread(self._read)
        specs = await asyncio.to_thread(model_specs, settings)
        gateway = self._gateway
        before = gateway.serving.now
        engines = [spec for spec in before.catalog.models if spec.provider == "embedded"]
        fixed = sorted(name for name in FIXED if getattr(settings, name) != getattr(self._started_with, name))
        if [spec for spec in specs if spec.provider == "embedded"] != engines:
            # Their engines run: what is served of them stays as it is.
            fixed.append("models of the embedded provider")
            specs = (*(spec for spec in specs if spec.provider != "embedded"), *engines)
        catalog = check_catalogue(settings, specs, apps=self._started_with.apps)
        # In a thread: certificates are read.
        providers = await asyncio.to_thread(self._providers, settings, before.providers)
        kept = {name for name, provider in before.providers.items() if providers.get(name) is provider}
        gateway.serving.replace(catalog, providers)
        self._in_force = settings
        everywhere = [one for spec in catalog.models for one in (spec.deployments or (spec,))]
        gateway.serving.circuits.keep(one for one in everywhere if one.provider in kept)
        gone = [provider for name, provider in before.providers.items() if name not in kept]
        self._later(self._close(gone))
        new = [name for name in providers if name not in before.providers]
        report = _report(before.catalog.models, catalog.models, fixed)
        return msgspec.structs.replace(
            report, providers=tuple(dict.fromkeys([*(one.name for one in gone), *new]))
        )

    def _providers(self, settings: Settings, before: Mapping[str, Provider]) -> dict[str, Provider]:
        """Those whose settings are the same stay as they are, unless they go by files: those may be new."""
        made = {"embedded": before["embedded"]}
        for name, row in settings.providers.items():
            by_files = row.ca_file or row.client_cert_file or row.client_key_file
            stays = name in before and self._in_force.providers.get(name) == row and not by_files
            made[name] = before[name] if stays else make_provider(settings, name, row)
        return made

    async def _close(self, gone: Iterable[Provider]) -> None:
        """Once nothing uses them any more."""
        for running in self._gateway.streams:
            await running.settled.wait()
        for provider in gone:
            try:
                await provider.aclose()
            except Exception:
                log.exception("a replaced provider did not close", provider=provider.name)

    def _later(self, coroutine: Coroutine[object, object, object]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def ask_to_reload(folder: Path, patience_s: float = PATIENCE_S) -> ReloadReport:
    """Make the server that runs on this data folder reload, and wait for its report.

    NotFound when none runs or none answers.
    """
    pid = server_pid(folder)
    if pid is None:
        raise NotFound(f"{folder}: no server runs on this data folder, so there is nothing to reload")
    number = uuid.uuid4().hex
    request = folder / REQUEST.replace("*", number)
    report = folder / REPORT.replace("*", number)
    request.touch(mode=0o600)
    try:
        os.kill(pid, signal.SIGHUP)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if report.exists():
                return msgspec.json.decode(report.read_bytes(), type=ReloadReport)
            time.sleep(POLL_S)
    except OSError as error:
        raise NotFound(f"the server (process {pid}) cannot be signalled: {error.strerror}") from error
    finally:
        request.unlink(missing_ok=True)
        report.unlink(missing_ok=True)
    raise NotFound(f"the server (process {pid}) did not report within {patience_s:g} seconds; see its log")


def _report(before: Iterable[ModelSpec], now: Iterable[ModelSpec], fixed: Iterable[str]) -> ReloadReport:
    old = {spec.qualified_name: spec for spec in before}
    new = {spec.qualified_name: spec for spec in now}
    return ReloadReport(
        models=len(new),
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name, spec in new.items() if name in old and old[name] != spec),
        needs_restart=tuple(fixed),
    )


def _answer(requests: Iterable[Path], report: ReloadReport) -> None:
    """Put the report in each request's place; whoever asked and left has taken the request away."""
    content = msgspec.json.encode(report)
    for request in requests:
        draft = request.with_suffix(".draft")
        with contextlib.suppress(OSError):
            request.rename(draft)
            draft.write_bytes(content)
            draft.rename(request.with_suffix(".report"))
