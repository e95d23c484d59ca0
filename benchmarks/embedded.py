"""Tokens per second of the embedded model: through the gateway, and from the engine's own HTTP server.

Both take turns; the load is the same program with the same request, whose answer has the same tokens on both. Nothing
is bound to a core: the engine and the gateway are two processes, and may run side by side as they do for users.
README.md explains it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from msgspec.structs import replace

from benchmarks import targets
from benchmarks.engine import engine, post
from benchmarks.kit import ANYWHERE, BenchmarkError, Target, Workload, request_body
from benchmarks.measurement import Sample, measure, middle, ratio
from benchmarks.table import aligned

AIM = 0.85
"""The least part of the engine's own speed that the gateway should reach."""

NOBODY = 9
"""A port for the upstream that this benchmark does not have."""


def _workload(streamed: bool, connections: int) -> Workload:
    # The likeliest text, so that every answer is the same; and no prompt cache, which the gateway does not use for
    # such requests either (other fields of llama.cpp's are unknown keys to the gateway, and ignored).
    return Workload(
        name=f"{'streamed' if streamed else 'blocking'}, {connections} at a time",
        streamed=streamed,
        connections=connections,
        prompt="Once upon a time, there was a little girl named Lily.",
        max_tokens=64,
        more={"temperature": 0, "cache_prompt": False},
    )


WORKLOADS = tuple(_workload(streamed, connections) for streamed in (False, True) for connections in (1, 8))


def run(folder: Path, rounds: int, seconds: float) -> None:
    """Measure and print one table; `folder` is new and takes the ledger."""
    with ExitStack() as stack:
        own = stack.enter_context(engine(folder, ANYWHERE)).target
        gateway = stack.enter_context(targets.headgate(folder, NOBODY, ANYWHERE))
        both = (own, replace(gateway, model="demo"))
        tokens = answer_tokens(both)
        samples = measure(both, WORKLOADS, rounds, seconds, ANYWHERE)
    print(f"Embedded model, {rounds} rounds of {seconds:g} s, medians; {tokens} tokens an answer")
    print(f"\n{render(samples, tokens)}\n")


def answer_tokens(both: Sequence[Target]) -> int:
    """How many tokens an answer has. BenchmarkError unless both say exactly the same."""
    answers = []
    for target in both:
        answer = post(target.port, "/v1/completions", request_body(target, WORKLOADS[0]), target.key)
        (choice,) = answer["choices"]
        answers.append((choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]))
    if answers[0] != answers[1]:
        raise BenchmarkError(f"the gateway and the engine answer differently: {answers}")
    return int(answers[0][2])


def render(samples: Sequence[Sample], tokens: int) -> str:
    figures: tuple[tuple[str, int, Callable[[Sample], float]], ...] = (
        ("tokens/s", 0, lambda sample: sample.requests_per_s * tokens),
        ("p50 ms", 1, lambda sample: sample.load.p50 / 1000),
        # The gateway's without its engine's: what it adds.
        ("CPU µs per token", 0, lambda sample: sample.cpu_per_request / tokens),
    )
    rows = [["", "", "engine", "headgate", "headgate/engine", "aim"]]
    for workload in WORKLOADS:
        for title, digits, figure in figures:
            values = [middle(samples, name, workload, figure) for name in ("engine", "headgate")]
            part = ratio(samples, "headgate", "engine", workload, figure)
            aim = ""
            if title == "tokens/s":
                aim = f"{AIM:.2f} {'reached' if part >= AIM else 'missed'}"
            cells = [f"{value:,.{digits}f}" for value in values]
            rows.append([workload.name, title, *cells, f"{part:.2f}", aim])
    return aligned(rows)
