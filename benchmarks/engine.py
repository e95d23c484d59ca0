"""The embedded engine by itself, and plain HTTP to it and to the gateway."""

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.kit import BenchmarkError, Cores, Target, pinned, stop
from headgate.config import EmbeddedSettings, demo_model_path

CONTEXT = 512
"""Tokens the bundled model reads and writes at most."""

KEY = "benchmark"


class _Ready(Struct):
    ready: str
    side: int


class Engine(Struct, frozen=True, kw_only=True):
    """llama.cpp's own HTTP server as a target, and the port of the side door beside it."""

    target: Target
    side: int


@contextmanager
def engine(folder: Path, cores: Cores) -> Iterator[Engine]:
    """The engine process that the gateway starts, with the gateway's defaults, on loopback ports of its own.

    Asked directly it is llama.cpp's server and nothing else: same model, precision, slots and threads.
    """
    place = folder / "engine"
    place.mkdir(mode=0o700)
    settings = EmbeddedSettings()
    command = [sys.executable, "-m", "headgate.providers.embedded.engine", str(demo_model_path())]
    command += ["--folder", str(place), "--slots", str(settings.slots), "--threads", str(settings.threads)]
    command += ["--context", str(CONTEXT), "--precision", settings.precision]
    started = time.monotonic()
    with (folder / "engine.log").open("wb") as log, pinned(cores.target):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{KEY}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the engine did not start\n{(folder / 'engine.log').read_text()}")
        ready = msgspec.json.decode(line, type=_Ready)
        target = Target(
            name="engine",
            pid=process.pid,
            port=int(ready.ready.rsplit(":", 1)[1]),
            start_s=time.monotonic() - started,
            model="demo",
            key=KEY,
        )
        yield Engine(target=target, side=ready.side)
    finally:
        stop(process)
        process.stdin.close()
        process.stdout.close()


def post(port: int, path: str, body: dict[str, Any], key: str) -> Any:
    """The JSON answer. BenchmarkError for anything but a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", path, msgspec.json.encode(body), headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise BenchmarkError(f"POST {path}: {response.status} {content.decode(errors='replace')[:500]}")
    return msgspec.json.decode(content)
