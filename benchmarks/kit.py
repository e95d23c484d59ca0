"""The load kit: builds mock.c and load.c, runs the mock upstream, puts a target under load.

The kit has one core and whatever is measured has the other, so neither takes time from the other.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

HERE = Path(__file__).parent
BIN = HERE / "bin"
CHUNKS = 100
"""Text chunks of one streamed answer of the mock."""


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says why."""


class Cores(Struct, frozen=True, kw_only=True):
    """Where things run: what is measured on `target`, mock and load on `kit`. None: wherever the system likes."""

    target: int | None
    kit: int | None


ANYWHERE = Cores(target=None, kit=None)


class Workload(Struct, frozen=True, kw_only=True):
    """One kind of request, sent over so many connections at once. `more` are further fields of its body."""

    name: str
    streamed: bool
    connections: int
    prompt: str = "Tell me about the harbour."
    max_tokens: int = 128
    more: dict[str, object] = {}


BLOCKING = Workload(name="blocking", streamed=False, connections=32)
STREAMED = Workload(name="streamed", streamed=True, connections=16)


class Dialect(Struct, frozen=True, kw_only=True):
    """How a target is asked. `ending` begins the line that ends a whole stream; `bearer`: the key goes in a header."""

    path: str
    stream_path: str
    ending: str
    bearer: bool
    body: "Callable[[Target, Workload], dict[str, object]]"


def _openai_body(target: "Target", workload: Workload) -> dict[str, object]:
    body = {"model": target.model, "prompt": workload.prompt, "max_tokens": workload.max_tokens}
    return body | {"stream": True} if workload.streamed else body


def _genstack_body(target: "Target", workload: Workload) -> dict[str, object]:
    return {
        "genstackToken": target.key,
        "model": target.model,
        "messages": [{"role": "user", "content": workload.prompt}],
        "maxOutputTokens": workload.max_tokens,
    }


OPENAI = Dialect(
    path="/v1/completions",
    stream_path="/v1/completions",
    ending="data: [DONE]",
    bearer=True,
    body=_openai_body,
)
GENSTACK = Dialect(
    path="/",
    stream_path="/stream",
    ending='data: {"completed":true',
    bearer=False,
    body=_genstack_body,
)


class Target(Struct, frozen=True, kw_only=True):
    """A running server to measure. `start_s` is the time from its exec until it serves."""

    name: str
    pid: int
    port: int
    start_s: float
    model: str = "mock-model"
    key: str = "none"
    dialect: Dialect = OPENAI


class LoadResult(Struct, frozen=True, kw_only=True):
    """What load.c prints: latencies in µs, from the request's send to the first and the last byte."""

    ok: int
    errors: int
    events: int
    seconds: float
    p50: int
    p99: int
    first_p50: int
    first_p99: int


def choose_cores() -> Cores:
    """The first two cores we may use; on a machine with one core both are the same."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(target=allowed[0], kit=allowed[1 % len(allowed)])


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes started inside inherit the core, with every thread they will ever have."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def build() -> None:
    """Compile the mock and the load generator where their source is newer."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BenchmarkError("gcc is not installed; the mock upstream and the load generator need it")
    BIN.mkdir(exist_ok=True)
    for name in ("mock", "load"):
        source, binary = HERE / f"{name}.c", BIN / name
        if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
            continue
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source)]
        if subprocess.run(command, check=False).returncode:
            raise BenchmarkError(f"{source} does not compile")


@contextmanager
def mock_upstream(cores: Cores) -> Iterator[int]:
    """A running mock; yields its port."""
    with pinned(cores.kit):
        process = subprocess.Popen([BIN / "mock", "-n", str(CHUNKS)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().removeprefix("port "))
    finally:
        stop(process)


def request_body(target: Target, workload: Workload) -> dict[str, object]:
    return target.dialect.body(target, workload) | workload.more


def put_under_load(target: Target, workload: Workload, seconds: float, cores: Cores) -> LoadResult:
    """Load the target for so long. BenchmarkError if a single answer is not a complete 200."""
    dialect = target.dialect
    options = {
        "-p": str(target.port),
        "-u": dialect.stream_path if workload.streamed else dialect.path,
        "-k": target.key if dialect.bearer else "",
        "-b": msgspec.json.encode(request_body(target, workload)).decode(),
        "-e": dialect.ending,
        "-c": str(workload.connections),
        "-s": str(seconds),
    }
    command = [str(BIN / "load"), *(word for option in options.items() for word in option)]
    with pinned(cores.kit):
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 30)
    if finished.returncode:
        raise BenchmarkError(f"{target.name}, {workload.name}: load failed: {finished.stderr}")
    result = msgspec.json.decode(finished.stdout, type=LoadResult)
    if result.errors or not result.ok:
        raise BenchmarkError(
            f"{target.name}, {workload.name}: {result.errors} of {result.ok + result.errors} answers were errors\n"
            f"{finished.stderr}"
        )
    return result


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[str], log: Path, deadline_s: float
) -> float:
    """Seconds until `ready`. BenchmarkError with the log's end if the process ends or takes too long."""
    start = time.monotonic()
    while not ready():
        ended = process.poll() is not None
        if ended or time.monotonic() - start > deadline_s:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            why = f"ended with {process.returncode}" if ended else f"was not ready within {deadline_s:.0f} s"
            raise BenchmarkError(f"{process.args!r} {why}\n{tail}")
        time.sleep(0.005)
    return time.monotonic() - start


def stop(process: subprocess.Popen[str]) -> None:
    """Ask the process to end, and insist after a while."""
    process.terminate()
    try:
        process.wait(timeout=35)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
