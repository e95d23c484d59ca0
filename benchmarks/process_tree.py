"""CPU time and memory of a process with all its descendants, read from /proc."""

from collections.abc import Iterator

import psutil

ENGINE = "headgate.providers.embedded"
"""Marks the embedded engine's child by its command line. It is another program's work: counted on its own."""


class ProcessTree:
    """A running process and its descendants, without the gateway's engine child."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def cpu_s(self) -> float:
        """User and system seconds so far, those of descendants that ended included."""
        total = 0.0
        for process in self._members():
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += spent.user + spent.system + spent.children_user + spent.children_system
        return total

    def rss_bytes(self) -> int:
        """Resident memory; pages that two processes share count twice."""
        return sum(_rss(process) for process in self._members())

    def engine_rss_bytes(self) -> int | None:
        """Resident memory of the engine child; None without one."""
        engines = [process for process in self._root.children(recursive=True) if _is_engine(process)]
        return sum(_rss(process) for process in engines) if engines else None

    def _members(self) -> Iterator[psutil.Process]:
        yield self._root
        for process in self._root.children(recursive=True):
            if not _is_engine(process):
                yield process


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _is_engine(process: psutil.Process) -> bool:
    try:
        return ENGINE in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
