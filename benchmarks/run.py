"""python -m benchmarks.run: measure the gateway next to nginx and next to its own engine. README.md explains it."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks import embedded, memory, scoring, table, targets
from benchmarks.kit import (
    BLOCKING,
    STREAMED,
    BenchmarkError,
    Cores,
    Target,
    build,
    choose_cores,
    mock_upstream,
)
from benchmarks.measurement import Memory, measure
from benchmarks.process_tree import ProcessTree
from benchmarks.profiler import profile

WORKLOADS = (BLOCKING, STREAMED)
ON_DISK = os.environ.get("TMPDIR", "/var/tmp")
"""Where the ledger goes: /tmp is often memory, where a commit costs no write."""


def main() -> int:
    options = parse_options()
    try:
        build()
        if len(set(msgspec.structs.astuple(choose_cores()))) == 1:
            print(
                "only one core may be used: load and target share it, and latencies mean nothing",
                file=sys.stderr,
            )
        with tempfile.TemporaryDirectory(prefix="headgate-benchmark-", dir=ON_DISK) as folder:
            for part, measure_part in PARTS.items():
                if options.only in (None, part):
                    own = Path(folder) / part
                    own.mkdir()
                    measure_part(options, own)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, help="rounds, interleaved over the targets (5)")
    parser.add_argument("--seconds", type=float, help="load per target and workload in a round (2)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of half a second: does it run at all")
    parser.add_argument("--only", choices=PARTS, help="measure just this part")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every sample of the gateway there too"
    )
    parser.add_argument("--profile", action="store_true", help="afterwards sample the gateway with py-spy")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    return options


def run_gateway(options: argparse.Namespace, folder: Path) -> None:
    cores = choose_cores()
    with ExitStack() as stack:
        upstream = stack.enter_context(mock_upstream(cores))
        running = start(stack, folder, upstream, cores)
        native = next(target for target in running if target.name == targets.NATIVE)
        mapped = targets.mapped(folder, native)
        time.sleep(1)  # what a server still does in the background after its start is not idle memory
        idle = {target.name: ProcessTree(target.pid).rss_bytes() for target in running}
        samples = measure([*running, *mapped], WORKLOADS, options.rounds, options.seconds, cores)
        memories = [sizes(target, idle[target.name]) for target in running]
        print(
            f"{options.rounds} rounds of {options.seconds:g} s, medians; target on core {cores.target}, ",
            end="",
        )
        print(f"mock and load on core {cores.kit}; {BLOCKING.connections} blocking connections, ", end="")
        print(f"{STREAMED.connections} streams at a time\n\n{table.render(running, samples, memories)}\n")
        print(f"{table.render_ways(native, mapped, samples)}\n")
        if options.json:
            started = {target.name: target.start_s for target in running}
            result = {"cores": cores, "start_s": started, "memory": memories, "samples": samples}
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
        ways = (native, *mapped)
        answered = sum(sample.load.ok for sample in samples if sample.target in {way.name for way in ways})
        targets.check_ledger(folder, answered)
        if options.profile:
            for way in ways:
                for workload in WORKLOADS:
                    print(profile(way, workload, max(options.seconds, 5), cores))


def run_embedded(options: argparse.Namespace, folder: Path) -> None:
    embedded.run(folder, options.rounds, options.seconds)


def run_scoring(options: argparse.Namespace, folder: Path) -> None:
    scoring.run(folder, options.rounds)


def run_memory(options: argparse.Namespace, folder: Path) -> None:
    memory.run(folder, memory.REQUESTS // 10 if options.quick else memory.REQUESTS)


PARTS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "gateway": run_gateway,
    "embedded": run_embedded,
    "scoring": run_scoring,
    "memory": run_memory,
}


def start(stack: ExitStack, folder: Path, upstream: int, cores: Cores) -> list[Target]:
    """Start the gateway, and what there is to compare it with; says aloud what is missing."""
    running = []
    if targets.find_nginx():
        running.append(stack.enter_context(targets.nginx(folder, upstream, cores)))
    else:
        print("nginx is not installed: its column and the ratios are left out", file=sys.stderr)
    running.append(stack.enter_context(targets.headgate(folder, upstream, cores)))
    if shutil.which("litellm"):
        running.append(stack.enter_context(targets.litellm(folder, upstream, cores)))
    else:
        print("litellm is not on the path: its column is left out", file=sys.stderr)
    return running


def sizes(target: Target, idle: int) -> Memory:
    tree = ProcessTree(target.pid)
    return Memory(target=target.name, idle=idle, loaded=tree.rss_bytes(), engine=tree.engine_rss_bytes())


if __name__ == "__main__":
    sys.exit(main())
