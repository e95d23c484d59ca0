"""Reloading the catalogue: providers, models and prices as the configuration says now, in a server that runs on.

SIGHUP asks for it. All or nothing: what cannot be understood, or would leave a configured app without its model,
changes nothing and says why. Requests under way end with what they began with.

`headgate reload` leaves a request's number in the data folder, sends the signal and reads the report beside it.
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

REQUEST_NAME = "reload.request"
REPORT_NAME = "reload.report"
PATIENCE_S = 30.0
POLL_S = 0.05
FIXED = (
    "server",
    "tokens",
    "embedded",
    "limits",
    "log",
    "routing",
    "files",
    "margins",
    "credit_usd",
    "apps",
    "developers",
)
"""Settings that are read at the start alone."""


class ReloadReport(Struct, frozen=True, kw_only=True):
    """What a reload did. `problem`: why nothing was changed. Names of models are qualified (provider/name).

    `needs_restart`: sections that differ from what runs and that a reload does not touch.
    """

    request: str = ""
    problem: str | None = None
    models: int = 0
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


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
            request = await asyncio.to_thread(_asked_by, folder)
            try:
                report = await self._replace()
            except ConfigError as error:
                report = ReloadReport(problem=str(error), models=len(self._gateway.catalog.models))
                log.error("reload refused; the catalogue stays as it was", problem=str(error))
            except Exception as error:
                log.exception("reload failed; the catalogue stays as it was")
                report = ReloadReport(problem=f"{type(error).__name__}: {error}")
            else:
                log.info(
                    "reloaded",
                    models=report.models,
                    added=len(report.added),
                    removed=len(report.removed),
                    changed=len(report.changed),
                    needs_restart=list(report.needs_restart),
                )
            report = msgspec.structs.replace(report, request=request)
            await asyncio.to_thread(_write, folder / REPORT_NAME, msgspec.json.encode(report))
            return report

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _replace(self) -> ReloadReport:
        settings = await asyncio.to_thread(self._read)
        specs = await asyncio.to_thread(model_specs, settings)
        before = self._gateway.serving.now
        engines = [spec for spec in before.catalog.models if spec.provider == "embedded"]
        fixed = [name for name in FIXED if getattr(settings, name) != getattr(self._started_with, name)]
        if [spec for spec in specs if spec.provider == "embedded"] != engines:
            # Their engines run: what is served of them stays as it is.
            fixed.append("models of the embedded provider")
            specs = (*(spec for spec in specs if spec.provider != "embedded"), *engines)
        catalog = check_catalogue(settings, specs, apps=self._started_with.apps)
        providers = self._providers(settings, before.providers)
        retired = [
            provider for name, provider in before.providers.items() if providers.get(name) is not provider
        ]
        self._gateway.serving.replace(catalog, providers)
        self._in_force = settings
        self._later(self._close(retired))
        return _report(before.catalog.models, catalog.models, fixed)

    def _providers(self, settings: Settings, before: Mapping[str, Provider]) -> dict[str, Provider]:
        """Those whose settings are the same stay, connections and all."""
        kept = {"embedded": before["embedded"]}
        for name, row in settings.providers.items():
            same = self._in_force.providers.get(name) == row and name in before
            kept[name] = before[name] if same else make_provider(settings, name, row)
        return kept

    async def _close(self, retired: Iterable[Provider]) -> None:
        """Once nothing uses them any more."""
        for running in self._gateway.streams:
            await running.settled.wait()
        for provider in retired:
            await provider.aclose()

    def _later(self, coroutine: Coroutine[object, object, object]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def ask_to_reload(settings: Settings, patience_s: float = PATIENCE_S) -> ReloadReport:
    """Make the running server reload, and wait for its report. NotFound when none runs or none answers."""
    folder = settings.data_dir
    pid = server_pid(folder)
    if pid is None:
        raise NotFound(f"{folder}: no server runs on this data folder, so there is nothing to reload")
    number = uuid.uuid4().hex
    _write(folder / REQUEST_NAME, number.encode())
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise NotFound(f"the server (process {pid}) cannot be signalled: {error.strerror}") from error
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            report = msgspec.json.decode((folder / REPORT_NAME).read_bytes(), type=ReloadReport)
            if report.request == number:
                return report
        time.sleep(POLL_S)
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


def _asked_by(folder: Path) -> str:
    """The number of the request that a command left, or "" where the signal came by itself."""
    try:
        return (folder / REQUEST_NAME).read_text(encoding="ascii")[:64]
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: Path, content: bytes) -> None:
    """The whole file or the old one: readers never see a part."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
