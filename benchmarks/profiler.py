"""Where the gateway's time goes: py-spy samples it under load, and each thread's busiest functions are listed."""

import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import psutil

from benchmarks.kit import BIN, BenchmarkError, Cores, Target, Workload, pinned, put_under_load

SAMPLES_PER_S = 400
SHOWN = 25
THREAD = re.compile(r"thread \((\d+)\)")


def profile(target: Target, workload: Workload, seconds: float, cores: Cores) -> str:
    """Record the target under load into bin/profile-TARGET-WORKLOAD.txt (folded stacks); returns the busiest functions.

    BenchmarkError if py-spy is missing or may not look into the process.
    """
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None:
        raise BenchmarkError("py-spy is not installed")
    path = BIN / f"profile-{target.name.replace(' → ', '-')}-{workload.name}.txt"
    command = [py_spy, "record", "--pid", str(target.pid), "--format", "raw", "--function", "--threads"]
    command += [
        "--rate",
        str(SAMPLES_PER_S),
        "--duration",
        str(max(1, round(seconds))),
        "--output",
        str(path),
    ]
    # Sampling slows the threads unevenly, so their CPU is taken from a run without it.
    before = _thread_cpu_s(target.pid)
    answers = put_under_load(target, workload, seconds, cores).ok
    cpu_us = {
        thread: (spent - before.get(thread, 0.0)) * 1e6 / answers
        for thread, spent in _thread_cpu_s(target.pid).items()
    }
    with pinned(cores.kit):
        recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    put_under_load(target, workload, seconds + 1, cores)
    _, complaint = recorder.communicate(timeout=60)
    if recorder.returncode:
        raise BenchmarkError(f"py-spy could not record: {complaint.strip()}")
    return f"{target.name}, {workload.name} ({path}):\n{summarize(path.read_text(encoding='utf-8'), cpu_us)}"


def summarize(folded: str, cpu_us: dict[int, float]) -> str:
    """Each thread's CPU µs per answer and its functions' shares, alone and with what they call.

    `folded` has a line "thread;frame;…;frame count" per stack. Shares are of the thread's own samples; where
    py-spy cannot tell that a thread waits (for work, for the disk), the wait has a share too.
    """
    stacks: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        stacks[thread][tuple(frames)] += int(count)
    lines = []
    for thread, counts in sorted(stacks.items(), key=lambda item: -_cpu_of(item[0], cpu_us)):
        lines.append(f"  {thread}: {_cpu_of(thread, cpu_us):.0f} µs of CPU per answer")
        if _cpu_of(thread, cpu_us) < 0.02 * sum(cpu_us.values()):
            continue
        itself: Counter[str] = Counter()
        inclusive: Counter[str] = Counter()
        for called, times in counts.items():
            itself[called[-1] if called else "(native)"] += times
            inclusive.update(dict.fromkeys(called, times))
        total = counts.total()
        lines += [
            f"    {count / total:6.1%} alone {inclusive[frame] / total:6.1%} with callees  {frame}"
            for frame, count in itself.most_common(SHOWN)
        ]
    return "\n".join(lines)


def _thread_cpu_s(pid: int) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(pid).threads()}


def _cpu_of(label: str, cpu_us: dict[int, float]) -> float:
    found = THREAD.search(label)
    return cpu_us.get(int(found[1]), 0.0) if found else 0.0
