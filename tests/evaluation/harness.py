"""EleutherAI's evaluation harness as its users start it, and what it wrote down."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

TASKS = Path(__file__).parent / "tasks"
SECONDS = 100


class Report(Struct, frozen=True):
    """One run: the harness's own figures by task and `metric,filter`, and its samples by task, in order."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


async def evaluate(
    url: str, key: str, folder: Path, tasks: Sequence[str], *, batch: int = 1, parallel: int = 1
) -> Report:
    """Run `lm_eval` against the completions endpoint of the gateway at `url`, on tasks of our own, offline.

    `folder` is new and takes all that it writes. `batch` prompts go into each request, and `parallel` requests are
    under way at a time.
    """
    arguments = {
        "model": "demo",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": 512,
        "max_retries": 1,
        "num_concurrent": parallel,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--batch_size", str(batch)),
        *("--include_path", str(TASKS), "--tasks", ",".join(tasks)),
        *("--output_path", str(folder / "output"), "--log_samples"),
    ]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": key,
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        cwd=TASKS,  # where the tasks' files are looked for
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()[-4000:]
    (results,) = (folder / "output").rglob("results_*.json")
    samples = {}
    for task in tasks:
        (file,) = (folder / "output").rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda sample: int(sample["doc_id"]))
    return Report(json.loads(results.read_text())["results"], samples)
