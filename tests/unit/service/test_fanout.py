"""How a request becomes calls, and where each call's choices belong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.workbench import request, said, spec

from headgate.core.completion import Message, Sampling
from headgate.service.fanout import jobs_for
from headgate.service.mapping import shape_for, transcript


@pytest.mark.parametrize(
    ("mode", "prompt", "prompt_chat_first", "messages"),
    [
        ("both", "completion", "chat", "chat"),
        ("chat", "chat", "chat", "chat"),
        ("completion", "completion", "completion", "completion"),
    ],
)
def test_a_model_is_spoken_to_in_a_shape_it_has(
    mode: str, prompt: str, prompt_chat_first: str, messages: str
) -> None:
    model = spec(mode=mode)
    assert shape_for(request(), model) == prompt
    assert shape_for(request(chat_first=True), model) == prompt_chat_first
    assert shape_for(request(messages=said("hi")), model) == messages


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 7))
def test_every_choice_has_exactly_one_place(prompts: int, n: int, takes_n: bool, first: int) -> None:
    texts = [f"p{number}" for number in range(prompts)]
    jobs = list(jobs_for(request(*texts, n=n), spec(takes_n=takes_n), first))
    places = {job.first_index + index: job.prompt for job in jobs for index in range(job.n)}
    assert places == {first + p * n + j: texts[p] for p in range(prompts) for j in range(n)}
    assert sum(job.n for job in jobs) == prompts * n
    assert len(jobs) == prompts * (1 if takes_n else n)


@pytest.mark.parametrize(("bills", "expected"), [(True, [True] * 4), (False, [True, False, True, False])])
def test_further_calls_count_the_prompt_only_where_the_provider_bills_it(
    bills: bool, expected: list[bool]
) -> None:
    jobs = jobs_for(request("a", "b", n=2), spec(takes_n=False, bills_prompt_per_call=bills), 0)
    assert [job.counts_prompt for job in jobs] == expected


def test_choices_of_separate_calls_differ_though_the_seed_is_fixed() -> None:
    model = spec(takes_n=False)
    jobs = list(jobs_for(request(n=3, sampling=Sampling(seed=7, top_p=0.5)), model, 0))
    seeds = [job.sampling.seed or 0 for job in jobs]
    assert seeds[0] == 7 and len(set(seeds)) == 3
    (again,) = jobs_for(request(sampling=Sampling(seed=7)), model, 0)
    assert again.sampling.seed == 7  # the first choice is the same however many there are
    others = jobs_for(request(n=3, sampling=Sampling(seed=8)), model, 0)
    assert not set(seeds) & {job.sampling.seed for job in others}
    assert {job.sampling.top_p for job in jobs} == {0.5}
    unseeded = jobs_for(request(n=3), model, 0)
    assert [job.sampling.seed for job in unseeded] == [None] * 3


def test_a_conversation_becomes_a_transcript_for_models_that_only_complete() -> None:
    messages = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello"),
        Message(role="user", content="Bye"),
    )
    (job,) = jobs_for(request(messages=messages), spec(mode="completion"), 0)
    assert job.prompt == "System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    assert (job.messages, job.shape, job.plain) == (None, "completion", True)
    assert transcript(messages[:1]) == "System: Be brief.\nAssistant:"


def test_words_of_end_users_stay_plain_and_raw_prompts_do_not() -> None:
    def plain(mode: str, **fields: object) -> bool:
        (job,) = jobs_for(request(**fields), spec(mode=mode), 0)
        return job.plain

    assert not plain("completion")
    assert plain("completion", plain=True)
    assert plain("chat")  # there it is one user message
    assert plain("both", plain=True, chat_first=True)


class TestBestOf:
    def test_a_provider_that_completes_several_at_once_chooses_itself(self) -> None:
        (job,) = jobs_for(request(n=2, best_of=5), spec(mode="completion"), 0)
        assert (job.n, job.best_of, job.candidates, job.logprobs) == (2, 5, 5, None)

    def test_a_model_that_chats_gives_all_candidates_with_scores(self) -> None:
        (job,) = jobs_for(request(n=2, best_of=5), spec(mode="chat"), 0)
        assert (job.n, job.best_of, job.candidates, job.logprobs) == (5, None, 5, 0)

    def test_single_calls_are_made_for_every_candidate_with_scores_and_seeds_of_their_own(self) -> None:
        asked = request("a", "b", n=2, best_of=3, sampling=Sampling(seed=1))
        jobs = list(jobs_for(asked, spec(takes_n=False, bills_prompt_per_call=False), 0))
        assert [(job.prompt, job.prompt_index) for job in jobs] == [("a", 0)] * 3 + [("b", 1)] * 3
        assert len({job.sampling.seed for job in jobs}) == 6
        assert {(job.n, job.best_of, job.logprobs) for job in jobs} == {(1, None, 0)}
        assert [job.counts_prompt for job in jobs] == [True, False, False] * 2

    def test_log_probabilities_asked_for_stay_as_asked(self) -> None:
        (job,) = jobs_for(request(best_of=2, logprobs=4), spec(mode="chat"), 0)
        assert job.logprobs == 4


def test_what_was_asked_of_a_text_reaches_every_call() -> None:
    jobs = jobs_for(request("a", (1, 2), echo=True, logprobs=3, suffix="."), spec(mode="completion"), 0)
    assert [(job.prompt, job.echo, job.logprobs, job.suffix) for job in jobs] == [
        ("a", True, 3, "."),
        ((1, 2), True, 3, "."),
    ]


@pytest.mark.parametrize("takes_n", [False, True])
@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_equal_prompts_of_one_request_get_seeds_of_their_own_that_any_upstream_takes(
    takes_n: bool, seed: int
) -> None:
    asked = request("a", "a", "a", n=2, sampling=Sampling(seed=seed))
    seeds = [job.sampling.seed or 0 for job in jobs_for(asked, spec(takes_n=takes_n), 0)]
    assert len(set(seeds)) == len(seeds) and seeds[0] == seed
    assert all(-(2**63) <= given < 2**63 for given in seeds)
    assert len({given % (2**32 - 1) for given in seeds}) == len(
        seeds
    )  # the embedded engine's are 32 bits wide


def test_a_model_that_takes_several_prompts_is_asked_once() -> None:
    model = spec(takes_prompts=True)
    (job,) = jobs_for(request("a", "b", "c", n=2), model, 5)
    assert (job.prompt, job.more_prompts, job.n, job.first_index) == ("a", ("b", "c"), 6, 5)
    (single,) = jobs_for(request("a", n=2), model, 0)
    assert (single.prompt, single.more_prompts, single.n) == ("a", (), 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"logprobs": 0},
        {"best_of": 2},
        {"suffix": "."},
        {"sampling": Sampling(seed=1)},
        {"prompts": ((1, 2), (3,))},
        {"models": ("fast",), "chat_first": True},
    ],
)
def test_what_is_looked_at_prompt_by_prompt_is_asked_prompt_by_prompt(fields: dict[str, Any]) -> None:
    asked = request(**({"prompts": ("a", "b")} | fields))
    assert len(list(jobs_for(asked, spec(mode="both", takes_prompts=True), 0))) == 2
