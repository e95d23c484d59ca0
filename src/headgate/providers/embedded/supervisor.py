"""Keeps one engine alive: starts it, waits until it is ready, asks it whether it still answers, restarts it with
growing delays."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Literal

import msgspec
import structlog
from msgspec import Struct

from headgate.config.settings import Precision
from headgate.core.errors import Overloaded
from headgate.providers.embedded import client
from headgate.providers.embedded.child import Child, Doors
from headgate.providers.embedded.client import Address, EngineGone, EngineRefusal

State = Literal["starting", "up", "down", "failed"]

log = structlog.get_logger("headgate.embedded")


class Restarts(Struct, frozen=True, kw_only=True):
    """Delays double from `first_s` to `longest_s` and start over once an engine has been up for `stable_s`.

    After `attempts` starts in a row that never became ready (within `ready_s`) the engine counts as failed.
    One that is up is asked something small every `ask_s`, and killed when it has no answer for `silence_s`.
    """

    first_s: float = 0.1
    longest_s: float = 10.0
    stable_s: float = 30.0
    ready_s: float = 300.0
    attempts: int = 3
    grace_s: float = 3.0
    ask_s: float = 10.0
    silence_s: float = 30.0


class EngineStatus(Struct, frozen=True, kw_only=True):
    """What an engine says of itself. `model` holds the names it serves, `reason` why it is not up, or why it was
    restarted last.

    `running` and `waiting` count requests that generate and that queue for a slot.
    """

    model: str
    state: State
    reason: str | None = None
    pid: int | None = None
    running: int = 0
    waiting: int = 0


class Supervisor:
    """One engine process for one model file. `name` is what operators know it by; `context` is in tokens per slot;
    `precision` as in EmbeddedSettings."""

    def __init__(
        self,
        file: str,
        *,
        name: str,
        slots: int,
        threads: int,
        context: int,
        precision: Precision = "auto",
        restarts: Restarts | None = None,
        folder: Path | None = None,
    ) -> None:
        self._file = file
        self._arguments = (
            *("--slots", str(slots), "--threads", str(threads)),
            *("--context", str(context), "--precision", precision),
        )
        self._restarts = restarts or Restarts()
        self._folder = folder
        self._status = EngineStatus(model=name, state="starting")
        self._doors: Doors | None = None
        self._decided = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin in the background; see `ready_or_failed`."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_alive(), name=f"engine {self._status.model}")

    def status(self) -> EngineStatus:
        return self._status

    def address(self) -> Address:
        """Where the engine listens. Overloaded while it does not."""
        return self._open_doors().engine

    def side_address(self) -> Address:
        """Where the engine's side door listens. Overloaded while it does not."""
        return self._open_doors().side

    async def ready_or_failed(self, timeout: float) -> EngineStatus:
        """Wait until the engine has been up once, has failed, or `timeout` seconds passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._decided.wait()
        return self._status

    async def aclose(self) -> None:
        """End the engine, by force after the grace time."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._doors = None
        self._status = msgspec.structs.replace(self._status, state="down", reason="closed", pid=None)

    def _open_doors(self) -> Doors:
        if self._doors is None:
            raise Overloaded("The embedded engine is not ready; it is being started.", retry_after=1)
        return self._doors

    async def _keep_alive(self) -> None:
        delay = self._restarts.first_s
        failures = 0
        while True:
            try:
                up_for = await self._run_once()
            except Exception:  # whatever it is, it must not leave the model without an engine for good
                log.exception("engine start failed", model=self._status.model)
                self._fell("the engine cannot be started: an unexpected error")
                up_for = None
            if up_for is None:
                failures += 1
            else:
                failures = 0
                if up_for >= self._restarts.stable_s:
                    delay = self._restarts.first_s
            state: State = "failed" if failures >= self._restarts.attempts else "down"
            self._status = msgspec.structs.replace(self._status, state=state, pid=None)
            log.warning(
                "engine stopped",
                model=self._status.model,
                reason=self._status.reason,
                state=state,
                restart_in_s=delay,
            )
            if state == "failed":
                self._decided.set()
            await asyncio.sleep(delay)
            delay = min(delay * 2, self._restarts.longest_s)

    async def _run_once(self) -> float | None:
        """One life of an engine: seconds it was up, or None when it never was. Leaves the reason in the status."""
        began = time.monotonic()
        folder: Path | None = None
        child: Child | None = None
        watcher: asyncio.Task[None] | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="headgate-", dir=self._folder))
            child = await Child.start(self._file, self._arguments, folder)
            doors = await child.ready(self._restarts.ready_s)
            if doors is None:
                if child.running:
                    self._fell(f"not ready within {self._restarts.ready_s:g} seconds")
                else:
                    await child.ended()
                    self._fell(child.ending(was_ready=False, file=self._file))
                return None
            now = time.monotonic()
            self._rise(child, doors, now - began)
            watcher = asyncio.create_task(self._watch(child, doors))
            await child.ended()
            self._fell(child.ending(was_ready=True, file=self._file))
            return time.monotonic() - now
        except OSError as error:
            self._fell(f"the engine cannot be started: {error.strerror}")
            return None
        finally:
            self._doors = None
            if watcher is not None:
                watcher.cancel()
            if child is not None:
                await child.end(self._restarts.grace_s)
            # The engine removes it too, but not after a SIGKILL.
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    async def _watch(self, child: Child, doors: Doors) -> None:
        """Kill the engine once it is stuck or stopped, behind either door. Only here: what clients wait for may take
        its time."""
        while True:
            await asyncio.sleep(self._restarts.ask_s)
            try:
                async with asyncio.timeout(self._restarts.silence_s):
                    await asyncio.gather(
                        self._answer(doors.engine, "/tokenize", b'{"content":""}'),
                        self._answer(doors.side, "/vocabulary", b"{}"),
                    )
            except TimeoutError:
                self._doors = None
                child.kill(f"silent for {self._restarts.silence_s:g} seconds")
                return

    async def _answer(self, address: Address, path: str, body: bytes) -> None:
        """Return once there has been any answer. Neither question waits for generations or scores."""
        while True:
            try:
                await client.post(address, path, body, 4096)
            except EngineRefusal:
                return
            except EngineGone:  # it may be ending, or have too many connections for the moment
                await asyncio.sleep(self._restarts.ask_s)
            else:
                return

    def _rise(self, child: Child, doors: Doors, took_s: float) -> None:
        self._doors = doors
        self._status = msgspec.structs.replace(self._status, state="up", pid=child.pid)
        log.info("engine up", model=self._status.model, pid=child.pid, took_s=round(took_s, 3))
        self._decided.set()

    def _fell(self, reason: str) -> None:
        self._status = msgspec.structs.replace(self._status, reason=reason)
