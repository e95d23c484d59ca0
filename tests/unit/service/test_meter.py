"""Where token counts come from, and that a provider's own figures win."""

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.jobs import job, model
from tests.support.workbench import request, spec

from headgate.core.completion import Choice, Chunk, Completion, TokenLogprob, Usage
from headgate.core.errors import UpstreamFailed
from headgate.core.money import MarginPPM
from headgate.providers.fake import Fake
from headgate.service.meter import JobMeter, Meter, ModelMeter
from headgate.service.plan import PlannedJob, PlannedModel

REPORTED = Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=2)
NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


def planned(counted: int | None = None, likely: int = 4, **fields: Any) -> PlannedJob:
    bound = 9 if counted is None else counted
    return PlannedJob(
        job=job(**fields), counted=counted, bound=bound, likely=likely if counted is None else counted
    )


def metered(*chunks: Chunk, sent: bool = True, counted: int | None = None, **fields: Any) -> JobMeter:
    meter = JobMeter(planned(counted, **fields))
    if sent:
        meter.mark_sent()
    meter.add(chunks)
    return meter


def of_model(*jobs: JobMeter) -> ModelMeter:
    meter = ModelMeter(
        PlannedModel(
            requested="fast", shown="fast", spec=spec(), provider=Fake(), margin=MarginPPM(0), first_index=0,
            jobs=tuple(part.planned for part in jobs),
        )
    )  # fmt: skip
    meter.jobs = list(jobs)
    return meter


@pytest.mark.parametrize("reported", [REPORTED, NOTHING, Usage(prompt_tokens=0, completion_tokens=3)])
def test_what_the_provider_reports_wins_and_a_zero_stays_zero(reported: Usage) -> None:
    meter = metered(Chunk(0, "some text", tokens=2), Chunk(-1, usage=reported), counted=11)
    assert meter.usage() == reported


def test_the_last_report_counts() -> None:
    meter = metered(Chunk(0, "a", usage=NOTHING), Chunk(0, "b", usage=REPORTED))
    assert meter.usage() == REPORTED


def test_a_blocking_answers_report_wins_too() -> None:
    meter = metered(counted=11)
    choices = (Choice(index=0, text="text", finish_reason="stop"),)
    meter.complete(Completion(choices=choices, usage=NOTHING))
    assert meter.usage() == NOTHING


def test_without_a_report_exact_tokens_count() -> None:
    meter = metered(Chunk(0, "one", tokens=1), Chunk(0, " two", tokens=2), Chunk(0, tokens=1), counted=11)
    assert meter.usage() == Usage(prompt_tokens=11, completion_tokens=4, source="tokenizer")


def test_one_piece_of_unknown_size_makes_it_an_estimate() -> None:
    meter = metered(Chunk(0, "one", tokens=1), Chunk(0, "twelve chars"), counted=11)
    assert meter.usage() == Usage(prompt_tokens=11, completion_tokens=4, source="estimate")


def test_a_prompt_that_nobody_counted_makes_it_an_estimate() -> None:
    meter = metered(Chunk(0, "one", tokens=1))
    assert meter.usage() == Usage(prompt_tokens=4, completion_tokens=1, source="estimate")


def test_an_estimate_is_made_of_each_choice_whole_text() -> None:
    """So a stream of many small pieces is estimated as the blocking answer is."""
    streamed = metered(*(Chunk(index, letter) for letter in "abcdefghi" for index in (0, 1)), n=2)
    blocking = metered(n=2)
    choices = tuple(Choice(index=index, text="abcdefghi", finish_reason="stop") for index in (0, 1))
    blocking.complete(Completion(choices=choices, usage=None))
    assert streamed.usage() == blocking.usage()
    assert streamed.usage().completion_tokens == 2 * 3


def test_no_estimate_is_above_what_was_asked_for() -> None:
    meter = metered(Chunk(0, "internationalization " * 20), Chunk(1, "a"), n=2, max_tokens=20)
    assert meter.usage().completion_tokens == 20 + 1


def test_a_call_that_never_left_owes_no_prompt() -> None:
    assert metered(sent=False, counted=11).usage() == Usage(
        prompt_tokens=0, completion_tokens=0, source="tokenizer"
    )


class TestFurtherCallsForTheSamePrompt:
    def test_the_report_counts_without_its_prompt(self) -> None:
        meter = metered(Chunk(-1, usage=REPORTED), counts_prompt=False)
        assert meter.usage() == Usage(prompt_tokens=0, completion_tokens=7, cached_tokens=0)

    def test_the_tokenizers_figures_too(self) -> None:
        meter = metered(Chunk(0, "x", tokens=3), counted=11, counts_prompt=False)
        assert meter.usage() == Usage(prompt_tokens=0, completion_tokens=3, source="tokenizer")


class TestSums:
    def test_the_calls_of_a_model_add_up(self) -> None:
        meter = of_model(
            metered(Chunk(0, "a", usage=REPORTED), first_index=0),
            metered(Chunk(0, "b", usage=REPORTED), first_index=1, counts_prompt=False),
        )
        assert meter.usage() == Usage(prompt_tokens=5, completion_tokens=14, cached_tokens=2)

    @pytest.mark.parametrize(
        ("sources", "combined"),
        [
            (("provider", "provider"), "provider"),
            (("provider", "tokenizer"), "tokenizer"),
            (("tokenizer", "tokenizer"), "tokenizer"),
            (("provider", "estimate"), "estimate"),
            (("tokenizer", "estimate"), "estimate"),
        ],
    )
    def test_the_weakest_source_names_the_sum(self, sources: Sequence[str], combined: str) -> None:
        def part(source: str) -> JobMeter:
            if source == "provider":
                return metered(Chunk(-1, usage=REPORTED))
            return metered(Chunk(0, "a", tokens=1 if source == "tokenizer" else None), counted=3)

        assert of_model(*map(part, sources)).usage().source == combined

    def test_costs_are_exact_and_cached_input_has_its_own_price(self) -> None:
        meter = of_model(metered(Chunk(-1, usage=REPORTED)))
        rates = model()
        assert meter.exact(REPORTED) == (3 * rates.input_rate + 2 * rates.cached_rate, 7 * rates.output_rate)

    def test_a_model_that_could_not_be_called_used_nothing(self) -> None:
        failure = UpstreamFailed("broken")
        unplanned = PlannedModel(
            requested="fast", shown="fast", spec=spec(), provider=Fake(), margin=MarginPPM(0), first_index=0,
            failure=failure,
        )  # fmt: skip
        meter = ModelMeter(unplanned)
        assert meter.failure is failure
        assert (meter.choices(request()), meter.usage().total_tokens, meter.produced) == ((), 0, False)


class TestText:
    def test_choices_are_put_together_in_their_places(self) -> None:
        first = metered(
            Chunk(0, "a"), Chunk(1, "b"), Chunk(0, "c", "stop"), Chunk(1, "", "stop"), n=2, first_index=0
        )
        later = metered(Chunk(1, "y", "stop"), Chunk(0, "x", "length"), n=2, first_index=2, prompt_index=1)
        assert of_model(first, later).choices(request(n=2)) == (
            Choice(index=0, text="ac", finish_reason="stop"),
            Choice(index=1, text="b", finish_reason="stop"),
            Choice(index=2, text="x", finish_reason="length"),
            Choice(index=3, text="y", finish_reason="stop"),
        )

    def test_a_choice_that_broke_off_has_no_finish_reason(self) -> None:
        assert metered(Chunk(0, "a")).choices() == [Choice(index=0, text="a", finish_reason=None)]

    def test_only_text_is_something_produced(self) -> None:
        assert not metered(Chunk(0, "", "stop"), Chunk(-1, usage=REPORTED)).produced
        assert metered(Chunk(0, "a")).produced


class TestEchoedPrompts:
    def test_an_echoed_prompt_is_text_but_nothing_generated(self) -> None:
        meter = metered(
            Chunk(0, "say hello", tokens=0, echoed=True),
            Chunk(0, " you", "stop", tokens=1),
            counted=2,
            echo=True,
        )
        assert meter.choices()[0].text == "say hello you"
        assert meter.usage() == Usage(prompt_tokens=2, completion_tokens=1, source="tokenizer")

    def test_an_estimate_of_a_blocking_answer_leaves_the_prompt_out(self) -> None:
        plain, echoed = metered(), metered(echo=True)
        plain.complete(Completion(choices=(Choice(index=0, text=" you there", finish_reason="stop"),)))
        echoed.complete(
            Completion(choices=(Choice(index=0, text="say hello you there", finish_reason="stop"),))
        )
        assert echoed.usage() == plain.usage()
        assert echoed.usage().source == "estimate"


class TestLogProbabilities:
    def test_entries_are_collected_where_they_were_asked_for(self) -> None:
        one, two = TokenLogprob(b"a", -1.0), TokenLogprob(b"b", -2.0)
        asked = metered(Chunk(0, "a", logprobs=(one,)), Chunk(0, "b", "stop", logprobs=(two,)), logprobs=0)
        assert asked.choices()[0].logprobs == (one, two)
        assert metered(Chunk(0, "", "stop"), logprobs=0).choices()[0].logprobs == ()
        assert metered(Chunk(0, "a", "stop")).choices()[0].logprobs is None

    def test_the_best_candidates_are_kept_better_first_judged_without_the_prompt(self) -> None:
        def candidate(name: str, *logprobs: float, prompt_index: int = 0) -> JobMeter:
            entries = tuple(TokenLogprob(b"x", value) for value in logprobs)
            prompt = (TokenLogprob(b"p", None), TokenLogprob(b"q", -50.0 if name == "good" else -0.1))
            return metered(
                Chunk(0, "pq", tokens=0, logprobs=prompt, echoed=True),
                Chunk(0, name, "stop", logprobs=entries),
                logprobs=0, prompt_index=prompt_index, echo=True,
            )  # fmt: skip

        jobs = (
            candidate("bad", -3.0), candidate("good", -1.0, -1.0), candidate("fair", -2.0, -1.0),
            candidate("other", -9.0, prompt_index=1), candidate("best", -0.5, prompt_index=1),
        )  # fmt: skip
        chosen = of_model(*jobs).choices(request(n=2, best_of=3))
        assert [(choice.index, choice.text) for choice in chosen] == [
            (0, "pqgood"), (1, "pqfair"), (2, "pqbest"), (3, "pqother"),
        ]  # fmt: skip
        assert [choice.text for choice in of_model(*jobs).choices(request(n=1, best_of=3))] == [
            "pqgood",
            "pqbest",
        ]


def test_each_change_is_reported_once() -> None:
    part = JobMeter(planned())
    meter = Meter([])
    meter.models = [of_model(part)]
    seen = [meter.take_dirty()]
    part.mark_sent()
    seen += [meter.take_dirty(), meter.take_dirty()]
    part.add([Chunk(0, "a")])
    seen += [meter.take_dirty(), meter.take_dirty()]
    assert seen == [False, True, False, True, False]


def test_input_reported_before_the_end_is_charged_as_reported_and_the_output_estimated() -> None:
    begun = Chunk(-1, usage=Usage(prompt_tokens=20, completion_tokens=1, cached_tokens=5, final=False))
    left = metered(begun, Chunk(0, "x" * 40), max_tokens=64)
    assert left.usage() == Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=5, source="estimate")
    assert metered(begun, Chunk(0, "a"), Chunk(-1, usage=REPORTED)).usage() == REPORTED
