"""One engine process: how it is started, what it says, how it is ended.

It runs in its own session (a Ctrl-C in the terminal is for the gateway alone), with an environment that holds no
secrets, and listens on two unix sockets in its own folder of mode 0700, the server's and the side door's; where
their paths are too long for a socket it listens on loopback and wants a random key, which it reads from its stdin.
"""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from headgate.providers.embedded.client import Address

MAX_SOCKET_PATH = 100
"""Bytes; systems stop at 104 to 108."""

KEPT_LINES = 40
KEPT_LINE_LENGTH = 300
_PASSED_VARIABLES = frozenset({"HOME", "LANG", "PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "VIRTUAL_ENV"})
_PASSED_PREFIXES = ("CUDA_", "DYLD_", "GGML_", "LC_", "LD_", "OMP_", "PYTHON")
_LOG_PREFIX = re.compile(r"^[\d.]+ [A-Z] (\w+ +)?")
_WARNING_LINE = re.compile(r"^[\d.]+ W |^warning: ")
_ERROR_LINE = re.compile(r"^[\d.]+ E |^error: ")


class Doors(Struct, frozen=True, kw_only=True):
    """Where an engine listens: llama.cpp's server, and the side door for what that lacks."""

    engine: Address
    side: Address


class _ReadyLine(Struct):
    ready: str
    side: str | int


class Child:
    """A started engine process. Call `end` in any case; it leaves nothing behind but `folder`."""

    def __init__(self, process: asyncio.subprocess.Process, doors: Doors, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._doors = doors
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._killed_because: str | None = None
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, file: str, arguments: Sequence[str], folder: Path) -> "Child":
        """Start an engine for the model `file`, its sockets in `folder`. OSError when that is impossible."""
        doors = Doors(
            engine=Address(path=str(folder / "engine.sock")), side=Address(path=str(folder / "side.sock"))
        )
        place = ["--folder", str(folder), "--socket", doors.engine.path, "--side", doors.side.path]
        key = ""
        if len(os.fsencode(doors.engine.path)) > MAX_SOCKET_PATH:
            key = secrets.token_hex(32)
            doors, place = Doors(engine=Address(key=key), side=Address(key=key)), place[:2]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # Not the current folder: a json.py in it must not become part of the engine.
            "-P",
            "-m",
            "headgate.providers.embedded.engine",
            file,
            *place,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(os.environ),
            start_new_session=True,
        )
        if key and process.stdin is not None:
            process.stdin.write(f"{key}\n".encode())
        return cls(process, doors, folder)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ready(self, timeout: float) -> Doors | None:
        """Where it listens, once it does. None when it ended before, or said nothing for `timeout` seconds."""
        assert self._process.stdout is not None  # noqa: S101  # it is a pipe
        try:
            async with asyncio.timeout(timeout):
                line = await self._process.stdout.readline()
                if not line:
                    await self._process.wait()
                    return None
            if self._doors.engine.path:
                return self._doors
            said = msgspec.json.decode(line, type=_ReadyLine)
            return Doors(
                engine=Address(port=int(said.ready.rsplit(":", 1)[1]), key=self._doors.engine.key),
                side=Address(port=int(said.side), key=self._doors.side.key),
            )
        except (TimeoutError, ValueError):  # ValueError: not a ready line
            return None

    async def ended(self) -> None:
        await self._process.wait()
        await self._listener

    def ending(self, *, was_ready: bool, file: str) -> str:
        """How and why it ended, in one line: the first error of a start, the last line of a crash."""
        if self._killed_because is not None:
            return self._killed_because
        ending = _exit(self._process.returncode)
        lines = [line for line in self._lines if not _WARNING_LINE.match(line)]
        if not lines:
            return ending
        errors = () if was_ready else [line for line in lines if _ERROR_LINE.match(line)]
        # Where models lie is the operator's business: the health page is open to all.
        said = _LOG_PREFIX.sub("", errors[0] if errors else lines[-1])
        said = said.replace(file, Path(file).name).replace(f"{self._folder}{os.sep}", "")
        return f"{ending}: {said}"

    def kill(self, because: str) -> None:
        """End it at once, even if it is stopped; `because` becomes its `ending`."""
        self._killed_because = because
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self, grace_s: float) -> None:
        """Terminate, then kill."""
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            # Not asyncio.timeout: in a task that was cancelled before, as this one may be, Python 3.11.2's fails.
            ended = asyncio.ensure_future(process.wait())
            await asyncio.wait({ended}, timeout=grace_s)
            if not ended.done():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await ended
        self._listener.cancel()

    async def _listen(self) -> None:
        """Keep the last lines of stderr, cut; read all of it, or the engine would block."""
        stderr = self._process.stderr
        assert stderr is not None  # noqa: S101  # it is a pipe
        rest = b""
        while piece := await stderr.read(4096):
            *complete, rest = (rest + piece).split(b"\n")
            self._lines.extend(
                line[:KEPT_LINE_LENGTH].decode("utf-8", "replace") for line in complete if line
            )
            rest = rest[-KEPT_LINE_LENGTH:]
        if rest:
            self._lines.append(rest.decode("utf-8", "replace"))


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a child process may know of ours: no secrets."""
    return {
        name: value
        for name, value in environ.items()
        if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)
    }


def _exit(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-returncode).name}"
    return f"exit {returncode}"
