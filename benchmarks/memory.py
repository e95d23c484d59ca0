"""Does the gateway's memory stay flat over 20,000 mixed requests, faults among them? README.md explains it."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
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

# Everything is on as users have it; only the pauses are short, so that the faults cost no waiting.
_HEAD = """
[routing]
retry_wait_s = 0.02
retry_max_wait_s = 0.1
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


class Point(Struct, frozen=True, kw_only=True):
    """The gateway after so many requests, while none is under way. Sizes in bytes."""

    requests: int
    rss: int
    files: int
    seconds: float


def run(folder: Path, requests: int = REQUESTS) -> None:
    """Measure and print one table; `folder` is new and takes the ledger. BenchmarkError if the memory grew."""
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
    if grown >= MOST_GROWTH:
        raise BenchmarkError(f"{verdict}; the aim is less than {MOST_GROWTH:.0%}")
    print(f"{verdict} (aim: less than {MOST_GROWTH:.0%})")
