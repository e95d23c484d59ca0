"""lm-evaluation-harness scores the demo model through the gateway as its weights say it must.

llama.cpp's own server ignores `echo` with `logprobs`; the harness then scores at chance and nobody notices. So not
only the accuracies are compared, but every single sum, with a forward pass that does not go through the engine.
"""

import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from msgspec import Struct
from tests.evaluation.harness import TASKS, Report, evaluate
from tests.evaluation.vocabulary import Vocabulary
from tests.support.house import House
from tests.support.reference import Reference

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

PER_TOKEN = 1e-3
"""How far a sum may be from the weights', for each token in it."""

KNOWLEDGE, COMPLETION, SENTENCES = "demo_knowledge", "demo_completion", "demo_sentences"
MOST_TOKENS = 12
STOPS = (".", "\n", "<|endoftext|>")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def report(house: House, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One run of all tasks, several prompts a request."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tasks = (KNOWLEDGE, COMPLETION, SENTENCES)
    return await evaluate(house.url, house.key, folder, tasks, batch=8)


class Tokens:
    """The tokenizer route as the harness asks it: without a key and without a start token."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def of(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        async with self._http.post("/tokenize", json=body) as response:
            assert response.status == 200, await response.text()
            tokens: list[int] = (await response.json())["tokens"]
            return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tokens(house: House) -> AsyncIterator[Tokens]:
    async with aiohttp.ClientSession(house.url) as http:
        yield Tokens(http)


def documents(task: str) -> list[dict[str, Any]]:
    name = task.removeprefix("demo_")
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def score(reference: Reference, ids: Sequence[int], first: int) -> tuple[float, bool]:
    """The sum of the log probabilities from `ids[first]` on, and whether each was the greatest."""
    rows = reference.logprobs(ids)[first - 1 : -1]
    own = rows[np.arange(len(rows)), list(ids[first:])]
    return float(own.sum()), bool((own == rows.max(axis=-1)).all())


async def test_the_server_says_what_the_harness_wants_to_know_without_a_key(
    house: House, vocabulary: Vocabulary, tokens: Tokens
) -> None:
    async with aiohttp.ClientSession(house.url) as http, http.get("/tokenizer_info") as response:
        assert response.status == 200
        told = await response.json()
    for name in ("bos_token", "eos_token"):
        assert await tokens.of(told[name]) == [vocabulary.pieces.index(told[name].encode())]
    text = "Once 😀 upon\n日本 <|im_start|>"
    assert vocabulary.joined(await tokens.of(text)) == text.encode()


class Answer(Struct, frozen=True):
    """What the weights give for one possible answer: the sum, whether it is the greedy one, and its tokens."""

    sum: float
    greedy: bool
    tokens: int


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(reference: Reference, tokens: Tokens) -> list[list[Answer]]:
    """The weights' view of every document's choices."""
    found = []
    for document in documents(KNOWLEDGE):
        context = await tokens.of(document["question"])
        row = []
        for choice in document["choices"]:
            ids = await tokens.of(f"{document['question']} {choice}")
            assert ids[: len(context)] == context
            row.append(Answer(*score(reference, ids, len(context)), len(ids) - len(context)))
        found.append(row)
    return found


async def test_every_answer_s_log_likelihood_is_the_sum_the_weights_give(
    report: Report, answers: list[list[Answer]]
) -> None:
    assert len(answers) >= 60
    for document, row, sample in zip(documents(KNOWLEDGE), answers, report.samples[KNOWLEDGE], strict=True):
        assert sample["doc"] == document
        for answer, told in zip(row, sample["filtered_resps"], strict=True):
            assert float(told[0]) == pytest.approx(answer.sum, abs=PER_TOKEN * answer.tokens)
            assert told[1] == str(answer.greedy), document


async def test_the_accuracy_is_the_weights_own_and_far_above_chance(
    report: Report, answers: list[list[Answer]]
) -> None:
    right = []
    for document, row in zip(documents(KNOWLEDGE), answers, strict=True):
        sums = [answer.sum for answer in row]
        right.append(sums.index(max(sums)) == document["answer"])
    accuracy = report.results[KNOWLEDGE]["acc,none"]
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert accuracy >= 0.8
    assert not all(right), "nothing in it that could go wrong"


async def test_parallel_requests_give_the_same_sums(
    report: Report, house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("lm-eval-parallel")
    parallel = await evaluate(house.url, house.key, folder, (KNOWLEDGE,), parallel=4)
    for one, other in zip(parallel.samples[KNOWLEDGE], report.samples[KNOWLEDGE], strict=True):
        for (alone, _), (together, _) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(alone) == pytest.approx(float(together), abs=PER_TOKEN)
    assert parallel.results[KNOWLEDGE]["acc,none"] == report.results[KNOWLEDGE]["acc,none"]


def decoded(reference: Reference, vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """What the weights say next, the likeliest token each time, up to a stop or the limit."""
    said: list[int] = []
    for _ in range(MOST_TOKENS):
        token = int(reference.logprobs([*ids, *said])[-1].argmax())
        if token in vocabulary.ends:
            break
        said.append(token)
        text = vocabulary.said(said).decode(errors="ignore")
        ends = [text.index(stop) for stop in STOPS if stop in text]
        if ends:
            return text[: min(ends)]
    return vocabulary.said(said).decode(errors="ignore")


async def test_generated_answers_are_those_of_greedy_decoding_and_so_is_their_accuracy(
    report: Report, reference: Reference, vocabulary: Vocabulary, tokens: Tokens
) -> None:
    right = []
    for document, sample in zip(documents(COMPLETION), report.samples[COMPLETION], strict=True):
        wanted = decoded(reference, vocabulary, await tokens.of(document["question"]))
        assert sample["resps"] == [[wanted]], document
        right.append(wanted.strip() == document["answer"])
    accuracy = report.results[COMPLETION]["exact_match,stripped"]
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert accuracy >= 0.8
    assert not all(right), "nothing in it that could go wrong"


async def test_rolling_perplexities_are_those_of_the_weights(
    report: Report, reference: Reference, vocabulary: Vocabulary, tokens: Tokens
) -> None:
    total, words, size, length = 0.0, 0, 0, 0
    for document, sample in zip(documents(SENTENCES), report.samples[SENTENCES], strict=True):
        ids = [vocabulary.start, *await tokens.of(document["text"])]
        wanted, _ = score(reference, ids, 1)
        (told,) = sample["filtered_resps"]
        assert float(told) == pytest.approx(wanted, abs=PER_TOKEN * (len(ids) - 1)), document
        total += wanted
        words += len(re.split(r"\s+", document["text"]))
        size += len(document["text"].encode())
        length += len(ids) - 1
    results = report.results[SENTENCES]
    for metric, units in (("word_perplexity", words), ("byte_perplexity", size)):
        assert math.log(results[f"{metric},none"]) == pytest.approx(
            -total / units, abs=PER_TOKEN * length / units
        )
    assert results["bits_per_byte,none"] == pytest.approx(
        -total / size / math.log(2), abs=PER_TOKEN * length / size / math.log(2)
    )
