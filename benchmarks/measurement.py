"""Interleaved rounds of load, and the medians over them."""

from collections.abc import Callable, Sequence
from statistics import median

from msgspec import Struct

from benchmarks.kit import CHUNKS, Cores, LoadResult, Target, Workload, put_under_load
from benchmarks.process_tree import ProcessTree


class Sample(Struct, frozen=True, kw_only=True):
    """One target under one workload in one round. CPU is the target's whole process tree, in µs."""

    target: str
    workload: str
    round: int
    cpu_us: float
    load: LoadResult

    @property
    def cpu_per_request(self) -> float:
        return self.cpu_us / self.load.ok

    @property
    def cpu_per_chunk(self) -> float:
        """The whole streamed request's CPU over its text chunks: the request's fixed part is in it."""
        return self.cpu_per_request / CHUNKS

    @property
    def requests_per_s(self) -> float:
        return self.load.ok / self.load.seconds

    @property
    def events_per_request(self) -> float:
        return self.load.events / self.load.ok


class Memory(Struct, frozen=True, kw_only=True):
    """Resident bytes of a target before any load and after all of it, and of the gateway's engine child."""

    target: str
    idle: int
    loaded: int
    engine: int | None


def measure(
    targets: Sequence[Target], workloads: Sequence[Workload], rounds: int, seconds: float, cores: Cores
) -> list[Sample]:
    """Each round takes the targets in turn, so that a busy moment of the machine hits all of them."""
    samples = []
    trees = {target.name: ProcessTree(target.pid) for target in targets}
    for workload in workloads:
        for target in targets:
            put_under_load(target, workload, min(seconds, 1.0), cores)  # warm up: caches, pools, first growth
    for number in range(rounds):
        for workload in workloads:
            for target in targets:
                before = trees[target.name].cpu_s()
                load = put_under_load(target, workload, seconds, cores)
                cpu_us = (trees[target.name].cpu_s() - before) * 1e6
                samples.append(
                    Sample(target=target.name, workload=workload.name, round=number, cpu_us=cpu_us, load=load)
                )
    return samples


def middle(
    samples: Sequence[Sample], target: str, workload: Workload, figure: Callable[[Sample], float]
) -> float:
    """The median over the rounds."""
    return median(figure(sample) for sample in _of(samples, target, workload))


def ratio(
    samples: Sequence[Sample], target: str, base: str, workload: Workload, figure: Callable[[Sample], float]
) -> float:
    """The median of the rounds' own ratios, which a drift of the whole machine leaves alone."""
    pairs = zip(_of(samples, target, workload), _of(samples, base, workload), strict=True)
    return median(figure(sample) / figure(other) for sample, other in pairs)


def _of(samples: Sequence[Sample], target: str, workload: Workload) -> list[Sample]:
    return [sample for sample in samples if (sample.target, sample.workload) == (target, workload.name)]
