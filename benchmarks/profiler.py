"""Where the gateway's time goes: py-spy samples it under load, and the busiest functions are listed."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.kit import BIN, BenchmarkError, Cores, Target, Workload, pinned, put_under_load

SAMPLES_PER_S = 400
SHOWN = 25


def profile(target: Target, workload: Workload, seconds: float, cores: Cores) -> str:
    """Record the target under load into bin/profile-WORKLOAD.txt (folded stacks); returns the busiest functions.

    BenchmarkError if py-spy is missing or may not look into the process.
    """
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None:
        raise BenchmarkError("py-spy is not installed")
    path = BIN / f"profile-{workload.name}.txt"
    command = [py_spy, "record", "--pid", str(target.pid), "--format", "raw", "--function", "--threads"]
    command += [
        "--rate",
        str(SAMPLES_PER_S),
        "--duration",
        str(max(1, round(seconds))),
        "--output",
        str(path),
    ]
    with pinned(cores.kit):
        recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    put_under_load(target, workload, seconds + 1, cores)
    _, complaint = recorder.communicate(timeout=60)
    if recorder.returncode:
        raise BenchmarkError(f"py-spy could not record: {complaint.strip()}")
    return f"{workload.name} ({path}):\n{summarize(path.read_text(encoding='utf-8'))}"


def summarize(folded: str) -> str:
    """Shares of the samples: each thread, then each function itself and with what it calls."""
    threads: Counter[str] = Counter()
    itself: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        threads[thread] += int(count)
        if frames:
            itself[frames[-1]] += int(count)
        for frame in set(frames):
            inclusive[frame] += int(count)
    total = threads.total()
    if not total:
        return "  no samples: the process was idle"
    lines = [f"  {count / total:6.1%}          {thread}" for thread, count in threads.most_common(5)]
    lines.append("    self   with callees")
    lines += [
        f"  {count / total:6.1%}  {inclusive[frame] / total:6.1%}  {frame}"
        for frame, count in itself.most_common(SHOWN)
    ]
    return "\n".join(lines)
