"""Does the gateway's memory stay flat over 20,000 mixed requests, faults among them? README.md explains it."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import psutil
from msgspec import Struct
from tests.support.doors import Caller
from tests.support.fault_upstream import FaultUpstream
from tests.support.wires import WIRES, Wire

from benchmarks import targets
from benchmarks.kit import BenchmarkError, Target, choose_cores, pinned
from benchmarks.mixture import MODEL_KINDS, MOST_TOKENS, SHARES, Visitors
from benchmarks.process_tree import ProcessTree
from benchmarks.table import aligned

REQUESTS, WARM_UP, EVERY = 20_000, 2_000, 1_000
AT_A_TIME = 32
MOST_GROWTH = 0.05
DEADLINE_S = 330.0

# Retries and circuits are on. Their pauses are short and circuits bear more than by default, so that the faults cost
# no waiting and mostly reach the upstream.
_HEAD = """
[routing]
retry_wait_s = 0.02
retry_max_wait_s = 0.1
breaker_failures = 10
breaker_error_percent = 90
breaker_open_s = 0.02
"""
_PROVIDER = """
[providers.{name}]
kind = "{kind}"
base_url = "{url}"
api_key_env = "BENCHMARK_UPSTREAM_KEY"
{times}
"""
_HASTY = """timeout_s = 0.3
total_timeout_s = 0.6"""
_MODEL = """
[[models]]
name = "{name}"
provider = "{provider}"
mode = "{mode}"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
cached_input_price = "0.25"
output_price = "1.50"

[apps.{name}]
model = "{name}"
prompt = "{{{{query}}}}"
max_tokens = {most_tokens}
variables = [{{ name = "query", type = "paragraph", required = true }}]
"""

Seen = Mapping[tuple[str, str], int]
"""How often a share of the requests came to a result."""


class Point(Struct, frozen=True, kw_only=True):
    """The gateway after so many requests, while none is under way. Sizes in bytes."""

    requests: int
    rss: int
    files: int
    seconds: float


def run(folder: Path, requests: int = REQUESTS) -> None:
    """Measure and print; `folder` is new and takes the ledger. BenchmarkError if the memory grew, which less than
    `REQUESTS` cannot tell."""
    # It warns of broken connections, of which there are many.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    cores = choose_cores()
    with pinned(cores.kit):
        points, seen = asyncio.run(_measure(folder, requests))
    print(f"{requests:,} mixed requests, {AT_A_TIME} at a time, in {points[-1].seconds:.0f} s\n")
    print(f"{render(points)}\n\n{render_mix(seen)}\n")
    targets.check_ledger(folder, sum(times for (_, result), times in seen.items() if result == "whole"))
    log = (folder / "headgate.log").read_text(encoding="utf-8", errors="replace")
    if "Traceback" in log:
        raise BenchmarkError(f"the gateway met an unexpected error:\n{log[log.index('Traceback') :][:3000]}")
    grown = growth(points)
    verdict = f"memory grew by {grown:.1%} from {points[0].requests:,} to {points[-1].requests:,} requests"
    if requests >= REQUESTS and grown >= MOST_GROWTH:
        raise BenchmarkError(f"{verdict}; the aim is less than {MOST_GROWTH:.0%}")
    print(f"{verdict} (aim: less than {MOST_GROWTH:.0%})")


async def _measure(folder: Path, requests: int) -> tuple[list[Point], Seen]:
    cores = choose_cores()
    async with FaultUpstream() as up:
        with targets.configured_headgate(folder, _settings(up.origin), cores) as gateway:
            caller = _caller(folder, gateway)
            # Idle connections are closed by us before the gateway does it, lest a request meet that.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
            async with aiohttp.ClientSession(connector=connector) as session:
                visitors = Visitors(f"http://127.0.0.1:{gateway.port}", up, caller, session, seed=7)
                try:
                    async with asyncio.timeout(DEADLINE_S):
                        points = await _points(visitors, gateway, requests)
                except TimeoutError as error:
                    late = f"only {visitors.asked:,} requests were sent within {DEADLINE_S:.0f} s"
                    raise BenchmarkError(late) from error
    return points, visitors.seen


async def _points(visitors: Visitors, gateway: Target, requests: int) -> list[Point]:
    """The gateway's sizes after the warm-up, and after every part of the rest."""
    warm_up, every = requests * WARM_UP // REQUESTS, requests * EVERY // REQUESTS
    started = time.monotonic()
    tree, process = ProcessTree(gateway.pid), psutil.Process(gateway.pid)
    points = []
    await visitors.visit(warm_up, AT_A_TIME)
    while True:
        points.append(
            Point(
                requests=visitors.asked,
                rss=tree.rss_bytes(),
                files=process.num_fds(),
                seconds=time.monotonic() - started,
            )
        )
        if visitors.asked >= requests:
            return points
        await visitors.visit(every, AT_A_TIME)


def growth(points: Sequence[Point]) -> float:
    """From the first to the last, as a part of the first."""
    return points[-1].rss / points[0].rss - 1


def render(points: Sequence[Point]) -> str:
    rows = [["requests", "RSS MB", "growth", "open files", "seconds"]]
    for point in points:
        grown = growth([points[0], point])
        sizes = [f"{point.rss / 1e6:.1f}", f"{grown:+.1%}", str(point.files), f"{point.seconds:.0f}"]
        rows.append([f"{point.requests:,}", *sizes])
    return aligned(rows, titles=0)


def render_mix(seen: Seen) -> str:
    """How many requests of each share came to what: whole, a status, a stream that broke off, a client that left."""
    rows = [["", "requests", "came to"]]
    for share in SHARES:
        results = sorted((result, times) for (of, result), times in seen.items() if of == share)
        came_to = ", ".join(f"{times:,} {result}" for result, times in results)
        rows.append([share, f"{sum(times for _, times in results):,}", came_to])
    return aligned(rows, titles=3)


def _settings(upstream: str) -> str:
    return _HEAD + "".join(_rows(wire, upstream) for wire in WIRES)


def _rows(wire: Wire, upstream: str) -> str:
    url = upstream + wire.root
    hasty = f"hasty-{wire.name}"
    providers = _PROVIDER.format(name=wire.name, kind=wire.kind, url=url, times="")
    providers += _PROVIDER.format(name=hasty, kind=wire.kind, url=url, times=_HASTY)
    names = {f"{kind}-{wire.name}": hasty if kind == "hasty" else wire.name for kind in MODEL_KINDS}
    return providers + "".join(
        _MODEL.format(name=name, provider=provider, mode=wire.mode, most_tokens=MOST_TOKENS)
        for name, provider in names.items()
    )


def _caller(folder: Path, gateway: Target) -> Caller:
    """Credentials of every kind; Dify's questions go to the app that bears the model's name."""
    of_account = ("--account", targets.ACCOUNT)
    token = targets.headgate_json(folder, "tokens", "create", *of_account)["token"]
    names = [f"{kind}-{wire.name}" for kind in MODEL_KINDS for wire in WIRES]
    keys = {
        name: targets.headgate_json(folder, "keys", "create", *of_account, "--app", name)["key"]
        for name in names
    }
    return Caller(account=targets.ACCOUNT, key=gateway.key, token=token, app_keys=keys)
