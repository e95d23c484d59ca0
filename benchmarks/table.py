"""The result as one table: a row per figure, a column per target, and how each compares to nginx."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from benchmarks.kit import BLOCKING, STREAMED, Target, Workload
from benchmarks.measurement import Memory, Sample, middle, ratio

BASE = "nginx"
Figure = Callable[[Sample], float]

FIGURES: tuple[tuple[Workload, str, int, Figure], ...] = (
    (BLOCKING, "CPU µs per request", 1, lambda sample: sample.cpu_per_request),
    (BLOCKING, "requests/s", 0, lambda sample: sample.requests_per_s),
    (BLOCKING, "p50 ms", 2, lambda sample: sample.load.p50 / 1000),
    (BLOCKING, "p99 ms", 2, lambda sample: sample.load.p99 / 1000),
    (STREAMED, "CPU µs per chunk", 2, lambda sample: sample.cpu_per_chunk),
    (STREAMED, "CPU µs per stream", 0, lambda sample: sample.cpu_per_request),
    (STREAMED, "streams/s", 0, lambda sample: sample.requests_per_s),
    (STREAMED, "events per stream", 0, lambda sample: sample.events_per_request),
    (STREAMED, "p50 ms", 2, lambda sample: sample.load.p50 / 1000),
    (STREAMED, "p99 ms", 2, lambda sample: sample.load.p99 / 1000),
    (STREAMED, "first byte p50 ms", 2, lambda sample: sample.load.first_p50 / 1000),
    (STREAMED, "first byte p99 ms", 2, lambda sample: sample.load.first_p99 / 1000),
)


class Cost(Struct, frozen=True, kw_only=True):
    """What a workload costs the gateway, and the most it should: in µs and as often as nginx on the native way, and
    as often as the native way on the others."""

    workload: Workload
    title: str
    digits: int
    figure: Figure
    rate: str
    most: float
    most_to_base: float
    most_to_native: float = 1.4


COSTS = (
    Cost(
        workload=BLOCKING,
        title="CPU µs per request",
        digits=1,
        figure=lambda sample: sample.cpu_per_request,
        rate="requests/s",
        most=450,
        most_to_base=25,
    ),
    Cost(
        workload=STREAMED,
        title="CPU µs per chunk",
        digits=2,
        figure=lambda sample: sample.cpu_per_chunk,
        rate="streams/s",
        most=16,
        most_to_base=3.5,
    ),
)


def render(targets: Sequence[Target], samples: Sequence[Sample], memories: Sequence[Memory]) -> str:
    """The table as Markdown, which reads well in a terminal and can be pasted into the README."""
    names = [target.name for target in targets]
    compared = [name for name in names if name != BASE] if BASE in names else []
    rows = [["", "", *names, *(f"{name}/{BASE}" for name in compared)]]
    for workload, title, digits, figure in FIGURES:
        figures = [f"{middle(samples, name, workload, figure):,.{digits}f}" for name in names]
        ratios = [f"{ratio(samples, name, BASE, workload, figure):.2f}" for name in compared]
        rows.append([workload.name, title, *figures, *ratios])
    rows.append(
        ["process", "start s", *(f"{target.start_s:.2f}" for target in targets), *("" for _ in compared)]
    )
    sizes: dict[str, Sequence[int | None]] = {
        "RSS idle MB": [memory.idle for memory in memories],
        "RSS after load MB": [memory.loaded for memory in memories],
        "engine child MB": [memory.engine for memory in memories],
    }
    for title, values in sizes.items():
        rows.append(["process", title, *map(_megabytes, values), *("" for _ in compared)])
    return aligned(rows)


def render_ways(native: Target, mapped: Sequence[Target], samples: Sequence[Sample]) -> str:
    """What the ways through the gateway cost next to each other, and whether they reach the aims."""
    ways = (native, *mapped)
    compares = any(sample.target == BASE for sample in samples)
    rows = [["", "", "openai → openai", *(way.name for way in mapped), "aim"]]
    for cost in COSTS:
        workload, figure = cost.workload, cost.figure
        own = [middle(samples, way.name, workload, figure) for way in ways]
        costs = [f"{value:,.{cost.digits}f}" for value in own]
        rows.append([workload.name, cost.title, *costs, _aim(cost.most, own[:1])])
        if compares:
            to_base = [ratio(samples, way.name, BASE, workload, figure) for way in ways]
            cells = [f"{value:.2f}" for value in to_base]
            rows.append([workload.name, f"of {BASE}", *cells, _aim(cost.most_to_base, to_base[:1])])
        to_native = [ratio(samples, way.name, native.name, workload, figure) for way in mapped]
        cells = [f"{value:.2f}" for value in to_native]
        rows.append([workload.name, "of the native way", "", *cells, _aim(cost.most_to_native, to_native)])
        rates = [middle(samples, way.name, workload, lambda sample: sample.requests_per_s) for way in ways]
        rows.append([workload.name, cost.rate, *(f"{value:,.0f}" for value in rates), ""])
    return aligned(rows)


def _aim(most: float, values: Sequence[float]) -> str:
    return f"≤ {most:g} {'reached' if max(values) <= most else 'missed'}"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f}"


def aligned(rows: list[list[str]], titles: int = 2) -> str:
    """A Markdown table; the first row is its head, the first columns are titles, and the others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < titles else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = [
        "-" * width if column < titles else "-" * (width - 1) + ":" for column, width in enumerate(widths)
    ]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)
