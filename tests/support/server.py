"""A real `headgate serve` process, and the command line beside it, for tests that go through the front door."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.steady import steady

from headgate.config import Settings, load

READY_SECONDS = 60


class Server:
    """`async with Server(toml) as server:` starts the gateway on a free port and ends it afterwards.

    Unless `toml` has a [routing], failures of upstreams are neither repeated nor remembered. `folder` keeps the data
    between two servers. `cli(...)` runs a command with --json and returns its document.
    """

    def __init__(
        self, toml: str = "", *, folder: Path, env: dict[str, str] | None = None, demo: bool = False
    ) -> None:
        self.folder = folder
        self.url = ""
        self.stdout: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._demo = demo
        self._config = folder / "test.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(steady(toml))
        keep = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR")
        self._env = {name: os.environ[name] for name in keep if name in os.environ}
        self._env |= {"HEADGATE_DATA_DIR": str(folder / "data"), **(env or {})}
        with tempfile.NamedTemporaryFile(dir=folder, prefix="server-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)

    async def __aenter__(self) -> "Server":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        command = [sys.executable, "-m", "headgate", "serve", "--port", "0", "--config", str(self._config)]
        if self._demo:
            command.append("--demo")
        stderr = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        try:
            self.process = await asyncio.create_subprocess_exec(
                *command, env=self._env, cwd=self.folder, stdout=subprocess.PIPE, stderr=stderr
            )
        finally:
            os.close(stderr)
        stdout = self.process.stdout
        assert stdout is not None
        async with asyncio.timeout(READY_SECONDS):
            async for raw in stdout:
                line = raw.decode().rstrip("\n")
                self.stdout.append(line)
                if line.startswith("ready "):
                    self.url = line.removeprefix("ready ")
                    return
        code = await self.process.wait()
        raise AssertionError(f"the server ended with {code} before it was ready:\n{self.log}")

    async def stop(self, number: int = signal.SIGTERM, timeout: float = 45) -> int:
        """Signal it and wait; returns the exit status."""
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(timeout):
            return await self.process.wait()

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def settings(self) -> Settings:
        """The server's configuration as it reads it, for looking into its data folder."""
        return load(self._config, self._env)

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def cli(self, *arguments: str, expect: int = 0) -> Any:
        """Run `headgate ARGUMENTS --json`; the document from stdout, or from stderr when it failed as expected."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "headgate", *arguments, "--config", str(self._config), "--json",
            env=self._env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode == expect, (arguments, process.returncode, out.decode(), err.decode())
        return json.loads(out if expect == 0 else err)

    async def account(self, name: str, credit: str = "10") -> str:
        """A new account with credit and one key; returns the key."""
        await self.cli("accounts", "create", name, "--credit", credit)
        return str((await self.cli("keys", "create", "--account", name))["key"])

    async def token(self, account: str) -> str:
        return str((await self.cli("tokens", "create", "--account", account))["token"])
