"""Filling in text before a suffix, and prompts given as token ids, on the embedded model."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from headgate.core.completion import Job, Prompt
from headgate.core.errors import InvalidRequest
from headgate.core.models import ModelSpec
from headgate.providers.embedded.gguf import read_gguf
from headgate.providers.embedded.prompts import Prompts
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.schemas import Schemas
from headgate.providers.embedded.side_door import SideDoor

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]

FRANCE = "The capital of France is"


def ignore() -> None:
    """For calls whose moment of sending does not matter."""


async def text_of(provider: EmbeddedProvider, job: Job) -> str:
    await provider.count_prompt(job)
    return (await provider.complete(job, ignore)).choices[0].text


async def test_a_suffix_is_written_with_the_models_own_tokens(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec
) -> None:
    provider = await start_provider()
    before, after = "The capital of", " is Paris.<|im_end|>"

    async def ids(text: str, *, special: bool = False) -> tuple[int, ...]:
        return await provider.tokenize(demo, text, add_special=False, parse_special=special)

    by_hand = (
        *(0, *await ids("<|fim_prefix|>", special=True), *await ids(before)),
        *(*await ids("<|fim_suffix|>", special=True), *await ids(after)),
        *await ids("<|fim_middle|>", special=True),
    )
    for prompt in (before, await ids(before)):
        job = build_job(prompt, suffix=after, seed=1, max_tokens=12)
        assert await provider.count_prompt(job) == len(by_hand)
        assert await text_of(provider, job) == await text_of(
            provider, build_job(by_hand, seed=1, max_tokens=12)
        )


async def test_an_echo_before_a_suffix_is_the_prompt_alone(
    start_provider: StartProvider, build_job: BuildJob
) -> None:
    provider = await start_provider()
    job = build_job("One day,", suffix=" The end.", seed=1, max_tokens=4)
    filled = await text_of(provider, job)
    assert await text_of(provider, msgspec.structs.replace(job, echo=True)) == "One day," + filled


async def test_an_empty_suffix_is_none(start_provider: StartProvider, build_job: BuildJob) -> None:
    provider = await start_provider()
    job = build_job(FRANCE, temperature=0)
    assert await text_of(provider, msgspec.structs.replace(job, suffix="")) == await text_of(provider, job)


async def test_a_model_without_the_tokens_cannot_fill_in(demo: ModelSpec, build_job: BuildJob) -> None:
    vocabulary: dict[str, Any] = {"size": 9, "start": 0, "end": 0, "adds_start": True}
    vocabulary |= {"infill_prefix": 3, "infill_suffix": 4, "infill_middle": -1}

    async def post(path: str, body: bytes, most: int) -> bytes:
        assert path == "/vocabulary"
        return msgspec.json.encode(vocabulary)

    prompts = Prompts(read_gguf(demo.file or ""), 512, post, SideDoor(post), Schemas())
    with pytest.raises(InvalidRequest) as caught:
        await prompts.ids(build_job("One day,", suffix=" The end."))
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


@pytest.mark.parametrize(
    ("prompt", "suffix", "param"), [((1, 2), None, "prompt"), ("Hello", " you", "suffix")]
)
async def test_conversations_take_neither_ids_nor_a_suffix(
    start_provider: StartProvider, build_job: BuildJob, prompt: Prompt, suffix: str | None, param: str
) -> None:
    provider = await start_provider()
    with pytest.raises(InvalidRequest) as caught:
        await provider.count_prompt(build_job(prompt, chat=True, suffix=suffix))
    assert caught.value.param == param


async def test_token_ids_are_completed_as_they_are(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec
) -> None:
    provider = await start_provider()
    ids = await provider.tokenize(demo, FRANCE, add_special=True, parse_special=True)
    job = build_job(ids, temperature=0)
    assert await provider.count_prompt(job) == len(ids)
    assert await text_of(provider, job) == await text_of(provider, build_job(FRANCE, temperature=0))
    assert await provider.count_prompt(build_job(ids[1:])) == len(ids) - 1
    assert await text_of(provider, build_job((), seed=1)) == await text_of(provider, build_job("", seed=1))


@pytest.mark.parametrize("stranger", [-1, 1024, 2**40])
async def test_ids_outside_the_vocabulary_are_refused_by_name(
    start_provider: StartProvider, build_job: BuildJob, stranger: int
) -> None:
    provider = await start_provider()
    jobs = {"prompt": build_job((5, stranger)), "logit_bias": build_job("Hi", logit_bias=((stranger, 1.0),))}
    for param, job in jobs.items():
        with pytest.raises(InvalidRequest, match=rf"token id {stranger};.* 1024 tokens") as caught:
            await provider.count_prompt(job)
        assert (caught.value.param, caught.value.allowed) == (param, "0 to 1023")


async def test_a_bias_bans_and_forces_tokens_and_leaves_log_probabilities_alone(
    start_provider: StartProvider, build_job: BuildJob, demo: ModelSpec
) -> None:
    provider = await start_provider()
    paris = (await provider.tokenize(demo, " Paris", add_special=False, parse_special=False))[0]
    free = build_job(FRANCE, temperature=0, max_tokens=1, logprobs=2)
    (natural,) = (await provider.complete(free, ignore)).choices[0].logprobs or ()
    banned = build_job(
        FRANCE, temperature=2.0, max_tokens=1, logprobs=2, logit_bias=((paris, -100.0),), seed=1
    )
    for seed in range(10):
        job = msgspec.structs.replace(banned, sampling=msgspec.structs.replace(banned.sampling, seed=seed))
        (entry,) = (await provider.complete(job, ignore)).choices[0].logprobs or ()
        assert entry.data != natural.data
        assert [data for data, _ in entry.top or ()] == [data for data, _ in natural.top or ()]
        assert dict(entry.top or ())[natural.data] == pytest.approx(natural.logprob, abs=1e-5)
    (lion,) = await provider.tokenize(demo, " lion", add_special=False, parse_special=False)
    forced = build_job(FRANCE, temperature=2.0, max_tokens=5, logit_bias=((lion, 100.0),))
    assert await text_of(provider, forced) == " lion" * 5
