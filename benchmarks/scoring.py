"""How fast prompts are scored, and how right: through the gateway, and in three ways on the engine itself.

The judge is a forward pass in 64-bit floats over the model file's weights. README.md explains it.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tests.support.reference import Reference

from benchmarks import targets
from benchmarks.embedded import NOBODY
from benchmarks.engine import Engine, engine, post
from benchmarks.kit import ANYWHERE, BenchmarkError, Target
from benchmarks.table import aligned
from headgate.config import demo_model_path

LENGTH = 500
"""Tokens of the prompt."""

TOP = 5
AIM_S = 2.0
FORCE = 100
"""The greatest bias: a token that has it is taken."""

TEXT = (
    "Once upon a time, there was a little girl named Lily. She had a red ball and took it everywhere. One day, Lily "
    "lost the ball in the forest. The capital of France is Berlin. 7 + 8 = 15, and the opposite of early is blue. "
)

Scores = list[float]


def run(folder: Path, rounds: int) -> None:
    """Measure and print one table; `folder` is new and takes the ledger."""
    with ExitStack() as stack:
        own = stack.enter_context(engine(folder, ANYWHERE))
        gateway = stack.enter_context(targets.headgate(folder, NOBODY, ANYWHERE))
        asked = {"content": TEXT * 20, "add_special": True}
        ids = post(own.target.port, "/tokenize", asked, own.target.key)["tokens"][:LENGTH]
        if len(ids) != LENGTH:
            raise BenchmarkError(f"the text has only {len(ids)} tokens")
        truth = Reference(demo_model_path()).scores(ids)
        ways: dict[str, tuple[int, Callable[[], Scores]]] = {
            "through the gateway": (rounds, lambda: through_gateway(gateway, ids)),
            "engine, direct decoding (side door)": (rounds, lambda: side_door(own, ids)),
            "engine, forced grammar": (rounds, lambda: forced_grammar(own.target, ids)),
            # So slow that one round must do.
            "engine, one request per position": (1, lambda: per_position(own.target, ids)),
        }
        rows = [["", "", "seconds", "tokens/s", "largest error", "aim"]]
        for name, (times, way) in ways.items():
            took, scores = timed(way, times)
            error = float(np.abs(np.asarray(scores) - truth).max())
            aim = ""
            if name == "through the gateway":
                aim = f"< {AIM_S:g} s {'reached' if took < AIM_S else 'missed'}"
            rows.append([name, "", f"{took:.3f}", f"{LENGTH / took:,.0f}", f"{error:.1e}", aim])
    print(
        f"Scores of a prompt of {LENGTH} tokens, medians of {rounds} rounds; the error is against 64-bit floats"
    )
    print(f"\n{aligned(rows)}\n")


def timed(way: Callable[[], Scores], times: int) -> tuple[float, Scores]:
    """The median of its seconds, after one run to warm up where there are several, and what it found last."""
    scores = way() if times > 1 else []
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        scores = way()
        seconds.append(time.perf_counter() - start)
    return median(seconds), scores


def through_gateway(gateway: Target, ids: Sequence[int]) -> Scores:
    body = {"model": "demo", "prompt": ids, "echo": True, "logprobs": TOP, "max_tokens": 0}
    answer = post(gateway.port, "/v1/completions", body, gateway.key)
    return list(answer["choices"][0]["logprobs"]["token_logprobs"][1:])


def side_door(own: Engine, ids: Sequence[int]) -> Scores:
    return list(post(own.side, "/score", {"ids": ids, "from": 0, "top": TOP}, own.target.key)["logprobs"])


def forced_grammar(own: Target, ids: Sequence[int]) -> Scores:
    """The model is made to say the prompt, token by token; the scores are those before the grammar bit."""
    body = {
        "prompt": ids[:1],
        "n_predict": len(ids) - 1,
        "temperature": 0,
        "n_probs": TOP,
        "cache_prompt": False,
        "grammar": "%llguidance {}\nstart: " + " ".join(f"<[{token}]>" for token in ids[1:]),
    }
    answer = post(own.port, "/completion", body, own.key)
    return _scores(answer["completion_probabilities"], ids[1:])


def per_position(own: Target, ids: Sequence[int]) -> Scores:
    """Each token is asked for by itself, forced by its bias, after what came before it (from the engine's cache)."""
    entries = []
    for place in range(1, len(ids)):
        body = {
            "prompt": ids[:place],
            "n_predict": 1,
            "temperature": 0,
            "n_probs": TOP,
            "cache_prompt": True,
            "id_slot": 0,
            "logit_bias": [[ids[place], FORCE]],
        }
        entries += post(own.port, "/completion", body, own.key)["completion_probabilities"]
    return _scores(entries, ids[1:])


def _scores(entries: Sequence[Any], ids: Sequence[int]) -> Scores:
    if [entry["id"] for entry in entries] != list(ids):
        raise BenchmarkError("the engine was not made to say the prompt")
    return [float(entry["logprob"]) for entry in entries]
