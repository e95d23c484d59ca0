"""What is refused before anything is held, and the greatest price that is set aside."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.jobs import job
from tests.support.workbench import ANN, Workbench, request, said, spec

from headgate.core.accounts import Developer, Principal
from headgate.core.completion import (
    Chunk,
    CompletionRequest,
    Image,
    Message,
    ResponseFormat,
    Sampling,
    Tool,
    ToolCall,
    Tools,
    Usage,
)
from headgate.core.errors import (
    AmbiguousModel,
    GatewayError,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    UnknownModel,
)
from headgate.core.models import ModelSpec
from headgate.core.money import FULL_MARGIN, FemtoUSD, MarginPPM, cost_of, price_of
from headgate.providers.fake import Fake
from headgate.service import plan as plan_module
from headgate.service.estimates import at_least, at_most, likely, likely_in_text
from headgate.service.meter import ModelMeter
from headgate.service.plan import Plan, bounded

STUDIO = Developer(id="studio", account="studio", applications=("com.example.app",))


class Counting(Fake):
    """Knows every prompt's size, and how often it was asked."""

    def __init__(self, tokens: int | GatewayError) -> None:
        super().__init__()
        self.tokens = tokens
        self.asked = 0

    async def count_prompt(self, job: object) -> int:
        self.asked += 1
        if isinstance(self.tokens, GatewayError):
            raise self.tokens
        return self.tokens


async def plan(asked: CompletionRequest, *models: ModelSpec, **bench: Any) -> Plan:
    return await Workbench(*models, **bench).planner.plan(asked, ANN)


async def refused(asked: CompletionRequest, *models: ModelSpec, **bench: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        await plan(asked, *models, **bench)
    return refusal.value


class TestNames:
    async def test_an_unknown_name_is_refused_by_name(self) -> None:
        with pytest.raises(UnknownModel, match="'slow'") as refusal:
            await plan(request(models=("slow",)))
        assert refusal.value.param == "model"

    async def test_an_unknown_name_among_known_ones_refuses_the_request_even_with_partial_failure(
        self,
    ) -> None:
        with pytest.raises(UnknownModel):
            await plan(request(models=("fast", "slow"), partial_failure=True))

    @pytest.mark.parametrize("name", ["fast", "fake/fast", "quick", "fake/quick"])
    async def test_a_model_answers_to_its_name_its_alias_and_both_with_its_provider(self, name: str) -> None:
        planned = await plan(request(models=(name,)), spec(aliases=("quick",)))
        assert (planned.models[0].requested, planned.models[0].spec.name) == (name, "fast")

    async def test_a_name_that_two_providers_bear_is_refused_with_the_candidates(self) -> None:
        models = (spec(provider="one"), spec(provider="two"))
        fakes = (Fake("one"), Fake("two"))
        with pytest.raises(AmbiguousModel, match="one/fast, two/fast") as refusal:
            await plan(request(), *models, fakes=fakes)
        assert refusal.value.allowed == "one/fast, two/fast"
        planned = await plan(request(models=("two/fast",)), *models, fakes=fakes)
        assert planned.models[0].spec.provider == "two"

    async def test_a_name_of_another_provider_is_unknown(self) -> None:
        with pytest.raises(UnknownModel):
            await plan(request(models=("other/fast",)))


class TestOrder:
    async def test_fields_are_refused_before_an_unavailable_model(self) -> None:
        fake = Fake(reason="set FAKE_KEY")
        hot = request(sampling=Sampling(temperature=3))
        assert (await refused(hot, fakes=[fake])).param == "temperature"

    async def test_a_developer_is_looked_at_before_the_model(self) -> None:
        error = await refused(request(models=("nobody's",), developer_id="unknown"))
        assert error.param == "developerId"

    async def test_a_wrong_field_for_the_second_model_is_refused_before_the_first_is_asked(self) -> None:
        counting = Counting(1)
        models = (spec(), spec("cold", temperature=(0, 1)))
        asked = request(models=("fast", "cold"), sampling=Sampling(temperature=1.5), partial_failure=True)
        assert "cold" in (await refused(asked, *models, fakes=[counting])).message
        assert counting.asked == 0


class TestDevelopers:
    async def test_a_known_developer_and_its_application_are_planned_for(self) -> None:
        asked = request(developer_id="studio", application_id="com.example.app")
        assert (await plan(asked, developers={"studio": STUDIO})).developer == STUDIO
        assert (await plan(request(developer_id="studio"), developers={"studio": STUDIO})).developer == STUDIO

    @pytest.mark.parametrize(
        ("developer", "application", "param"),
        [
            ("nobody", None, "developerId"),
            ("nobody", "com.example.app", "developerId"),
            ("studio", "com.example.other", "applicationId"),
            (None, "com.example.app", "applicationId"),
        ],
    )
    async def test_unknown_and_foreign_ones_are_refused(
        self, developer: str | None, application: str | None, param: str
    ) -> None:
        asked = request(developer_id=developer, application_id=application)
        assert (await refused(asked, developers={"studio": STUDIO})).param == param


class TestLimitsOfTheModel:
    @pytest.mark.parametrize("temperature", [0.2, 1.0, None])
    async def test_a_temperature_in_range_passes(self, temperature: float | None) -> None:
        planned = await plan(
            request(sampling=Sampling(temperature=temperature)), spec(temperature=(0.2, 1.0))
        )
        assert planned.models[0].jobs[0].job.sampling.temperature == temperature

    @pytest.mark.parametrize("temperature", [0.1, 1.0001, float("nan")])
    async def test_a_temperature_out_of_range_is_refused_with_the_range(self, temperature: float) -> None:
        asked = request(sampling=Sampling(temperature=temperature))
        error = await refused(asked, spec(temperature=(0.2, 1.0)))
        assert (error.param, error.allowed) == ("temperature", "0.2 to 1")

    async def test_more_output_than_the_model_gives_is_refused_under_the_callers_name(self) -> None:
        asked = request(max_tokens=4097, max_tokens_param="maxOutputTokens")
        error = await refused(asked)
        assert (error.param, error.allowed) == ("maxOutputTokens", "at most 4096")
        assert (await plan(request(max_tokens=4096))).models[0].jobs[0].job.max_tokens == 4096


class TestContext:
    async def test_a_prompt_beyond_the_input_limit_is_refused_with_both_numbers(self) -> None:
        error = await refused(request(), spec(max_input_tokens=100), fakes=[Counting(101)])
        assert error.code == "context_length_exceeded"
        assert "has 101 tokens" in error.message and "at most 100" in error.message

    async def test_prompt_and_limit_beyond_the_context_are_refused_with_both_numbers(self) -> None:
        error = await refused(request(max_tokens=60), spec(context_window=100), fakes=[Counting(41)])
        assert error.code == "context_length_exceeded"
        assert all(number in error.message for number in ("41", "60", "100"))
        planned = await plan(request(max_tokens=60), spec(context_window=100), fakes=[Counting(40)])
        assert planned.models[0].jobs[0].job.max_tokens == 60

    async def test_messages_are_named_as_the_field(self) -> None:
        asked = request(messages=said("a", "b"))
        error = await refused(asked, spec(max_input_tokens=100), fakes=[Counting(101)])
        assert error.param == "messages"

    async def test_without_a_limit_the_output_is_what_is_left_of_the_context(self) -> None:
        planned = await plan(request(max_tokens=None), spec(context_window=100), fakes=[Counting(40)])
        assert planned.models[0].jobs[0].job.max_tokens == 60

    async def test_without_a_limit_the_output_is_the_models_cap_where_the_context_allows(self) -> None:
        planned = await plan(request(max_tokens=None), spec(max_output_tokens=50), fakes=[Counting(40)])
        assert planned.models[0].jobs[0].job.max_tokens == 50

    @pytest.mark.parametrize(("context", "expected"), [(8192, 16), (50, 10)])
    async def test_a_default_counts_where_nothing_was_given(self, context: int, expected: int) -> None:
        asked = request(max_tokens=None, default_max_tokens=16)
        planned = await plan(asked, spec(context_window=context), fakes=[Counting(40)])
        assert planned.models[0].jobs[0].job.max_tokens == expected

    async def test_a_default_is_never_above_the_models_cap(self) -> None:
        asked = request(max_tokens=None, default_max_tokens=16)
        planned = await plan(asked, spec(max_output_tokens=5))
        assert planned.models[0].jobs[0].job.max_tokens == 5

    async def test_a_prompt_that_fills_the_context_is_refused(self) -> None:
        error = await refused(request(max_tokens=None), spec(context_window=100), fakes=[Counting(100)])
        assert error.code == "context_length_exceeded"

    async def test_without_a_tokenizer_only_what_surely_does_not_fit_is_refused(self) -> None:
        model = spec(context_window=100, max_input_tokens=100)
        error = await refused(request("x" * 16 * 101), model)
        assert "at least 101" in error.message
        planned = await plan(request("x" * 16 * 30, max_tokens=64), model)
        assert planned.models[0].jobs[0].counted is None

    async def test_without_a_tokenizer_a_full_context_still_leaves_room_for_one_token(self) -> None:
        planned = await plan(request("x" * 4 * 200, max_tokens=None), spec(context_window=100))
        assert planned.models[0].jobs[0].job.max_tokens == 1

    async def test_a_limit_of_no_tokens_stays(self) -> None:
        assert (await plan(request(max_tokens=0))).models[0].jobs[0].job.max_tokens == 0

    async def test_a_prompt_is_counted_once_for_all_its_calls(self) -> None:
        counting = Counting(3)
        await plan(request("a", "b", n=3), spec(takes_n=False), fakes=[counting])
        assert counting.asked == 2


class TestUnavailable:
    async def test_a_model_without_a_key_is_refused_with_advice(self) -> None:
        fakes = (Fake("one", reason="set ONE_KEY"), Fake("two"))
        with pytest.raises(ModelUnavailable, match=r"set ONE_KEY.*work now: able\.") as refusal:
            await plan(request(), spec(provider="one"), spec("able", provider="two"), fakes=fakes)
        assert refusal.value.param == "model"

    async def test_advice_names_at_most_ten_models(self) -> None:
        models = [spec(f"able-{number}") for number in range(11)]
        dead = spec("dead", broken="the file is broken")
        with pytest.raises(ModelUnavailable, match=r"able-9, …\."):
            await plan(request(models=("dead",)), *models, dead)

    async def test_advice_says_so_when_nothing_works(self) -> None:
        with pytest.raises(ModelUnavailable, match="work now: none"):
            await plan(request(), fakes=[Fake(reason="set FAKE_KEY")])

    async def test_of_several_models_the_others_go_on(self) -> None:
        models = (spec(), spec("dead", broken="the file is broken"))
        asked = request(models=("dead", "fast"), partial_failure=True)
        planned = await plan(asked, *models)
        dead, fast = planned.models
        assert isinstance(dead.failure, ModelUnavailable) and dead.jobs == () and dead.ceiling == 0
        assert fast.failure is None and fast.first_index == 1 and fast.jobs[0].job.first_index == 1
        assert planned.ceiling == fast.ceiling > 0

    async def test_of_several_models_none_left_is_a_refusal(self) -> None:
        asked = request(models=("fast", "fast"), partial_failure=True)
        with pytest.raises(ModelUnavailable):
            await plan(asked, fakes=[Fake(reason="set FAKE_KEY")])

    async def test_a_tokenizer_that_is_down_fails_its_model_only(self) -> None:
        down = Counting(Overloaded("The engine is down."))
        with pytest.raises(Overloaded):
            await plan(request(), fakes=[down])
        down.name = "down"
        models = (spec(), spec("busy", provider="down"))
        asked = request(models=("busy", "fast"), partial_failure=True)
        planned = await plan(asked, *models, fakes=[Fake(), down])
        assert [type(model.failure) for model in planned.models] == [Overloaded, type(None)]

    async def test_a_prompt_too_long_for_one_of_several_refuses_the_request(self) -> None:
        models = (spec(), spec("small", context_window=10, max_input_tokens=10, max_output_tokens=5))
        asked = request("x" * 1000, models=("fast", "small"), partial_failure=True, max_tokens=5)
        assert "small" in (await refused(asked, *models)).message


class TestCeiling:
    async def test_it_is_prompt_and_limit_at_the_models_prices(self) -> None:
        planned = await plan(request(max_tokens=10), fakes=[Counting(7)])
        assert planned.ceiling == 7 * 500 + 10 * 1500
        assert planned.token_ceiling == 17

    async def test_without_a_tokenizer_every_byte_may_be_a_token(self) -> None:
        planned = await plan(request("größe", max_tokens=10))
        assert planned.ceiling == 7 * 500 + 10 * 1500

    async def test_messages_add_what_a_template_adds(self) -> None:
        planned = await plan(request(messages=said("abc", "de"), max_tokens=10))
        assert planned.ceiling == (5 + 2 * 16) * 500 + 10 * 1500

    async def test_cached_input_that_costs_more_counts_as_the_dearer(self) -> None:
        dear = spec(cached_rate=FemtoUSD(700_000_000))
        assert (await plan(request(max_tokens=0), dear, fakes=[Counting(10)])).ceiling == 7000

    @pytest.mark.parametrize(
        ("takes_n", "bills", "prompts_billed"), [(True, True, 1), (False, True, 3), (False, False, 1)]
    )
    async def test_a_prompt_counts_once_per_call_that_bills_it(
        self, takes_n: bool, bills: bool, prompts_billed: int
    ) -> None:
        model = spec(takes_n=takes_n, bills_prompt_per_call=bills)
        planned = await plan(request(n=3, max_tokens=10), model, fakes=[Counting(7)])
        assert planned.ceiling == prompts_billed * 7 * 500 + 3 * 10 * 1500
        assert planned.token_ceiling == prompts_billed * 7 + 30

    async def test_several_prompts_and_models_add_up(self) -> None:
        one = await plan(request("a", max_tokens=10), fakes=[Counting(7)])
        two = await plan(request("a", "b", max_tokens=10), fakes=[Counting(7)])
        asked = request("a", models=("fast", "fast"), partial_failure=True, max_tokens=10)
        both = await plan(asked, fakes=[Counting(7)])
        assert two.ceiling == both.ceiling == 2 * one.ceiling

    @given(
        rates=st.tuples(*[st.integers(0, 10**13)] * 3),
        margin=st.integers(0, 990_000),
        text=st.text(max_size=60),
        chats=st.booleans(),
        n=st.integers(1, 4),
        limit=st.integers(0, 100),
        takes_n=st.booleans(),
        bills=st.booleans(),
        counted=st.none() | st.integers(0, 100),
        data=st.data(),
    )
    def test_no_usage_within_the_bounds_costs_more(
        self,
        rates: tuple[int, int, int],
        margin: int,
        text: str,
        chats: bool,
        n: int,
        limit: int,
        takes_n: bool,
        bills: bool,
        counted: int | None,
        data: st.DataObject,
    ) -> None:
        """Whatever a provider reports inside the hold's bounds, and whatever is estimated, the hold covers it."""
        model = spec(
            mode="chat" if chats else "completion",
            input_rate=FemtoUSD(rates[0]),
            cached_rate=FemtoUSD(rates[1]),
            output_rate=FemtoUSD(rates[2]),
            margin=MarginPPM(margin),
            takes_n=takes_n,
            bills_prompt_per_call=bills,
        )
        asked = request(text, n=n, max_tokens=limit)
        bench = Workbench(model, fakes=[Counting(counted)] if counted is not None else None)
        planned = finish(bench.planner.plan(asked, ANN)).models[0]
        meter = ModelMeter(planned)
        for part in meter.jobs:
            part.mark_sent()
            job_n = part.planned.job.n
            if data.draw(st.booleans(), label="reported"):
                prompt = data.draw(st.integers(0, part.planned.bound), label="prompt")
                usage = Usage(
                    prompt_tokens=prompt,
                    cached_tokens=data.draw(st.integers(0, prompt), label="cached"),
                    completion_tokens=data.draw(st.integers(0, limit * job_n), label="completion"),
                )
                part.add([Chunk(-1, usage=usage)])
            else:
                part.add([Chunk(index, data.draw(st.text(max_size=600))) for index in range(job_n)])
        exact = FemtoUSD(sum(meter.exact(meter.usage())))
        assert price_of(exact, planned.margin) <= planned.ceiling
        assert cost_of(exact) <= price_of(exact, planned.margin)


def finish(coroutine: Any) -> Any:
    """Run a coroutine that never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


class TestEstimates:
    @given(st.text(max_size=200), st.booleans())
    def test_floor_likely_value_and_ceiling_are_in_order(self, text: str, chats: bool) -> None:
        asked = job(prompt=text, shape="chat" if chats else "completion")
        assert 0 <= at_least(asked) <= likely(asked) <= at_most(asked)

    @given(st.lists(st.text(max_size=50), min_size=1, max_size=5))
    def test_messages_too(self, contents: list[str]) -> None:
        asked = job(messages=said(*contents))
        assert 0 <= at_least(asked) <= likely(asked) <= at_most(asked)
        assert at_most(asked) == sum(len(content.encode()) for content in contents) + 16 * len(contents)

    @given(st.text())
    def test_text_comes_to_at_least_one_token_where_there_is_any(self, text: str) -> None:
        assert (likely_in_text(len(text.encode())) == 0) == (text == "")
        assert likely_in_text(len(text.encode())) <= len(text.encode())


class TestMargins:
    @pytest.mark.parametrize("percent", ["0", "12.5", "99"])
    async def test_the_ceiling_bears_the_margin(self, percent: str) -> None:
        margin = int(Decimal(percent) * 10_000)
        planned = await plan(request(max_tokens=10), spec(margin=MarginPPM(margin)), fakes=[Counting(7)])
        exact = (7 * 500 + 10 * 1500) * 10**6
        assert planned.ceiling == -(-exact // (FULL_MARGIN - margin))


def test_planning_leaves_the_job_as_it_was() -> None:
    original = job(max_tokens=0)
    planned = bounded(request(max_tokens=5), original, 3)
    assert original.max_tokens == 0
    assert msgspec.structs.replace(planned.job, max_tokens=0) == original


class TestSeveralPromptsInOneCall:
    async def test_the_hold_is_that_of_single_calls_and_each_prompt_must_fit(self) -> None:
        asked = request("one two", "three" * 9, "x", n=2, max_tokens=10)
        together = (await Workbench(spec(takes_prompts=True)).planner.plan(asked, ANN)).models[0]
        apart = (await Workbench(spec()).planner.plan(asked, ANN)).models[0]
        assert (len(together.jobs), len(apart.jobs)) == (1, 3)
        assert together.ceiling == apart.ceiling
        assert together.jobs[0].likely == sum(job.likely for job in apart.jobs)
        small = spec(takes_prompts=True, context_window=64, max_input_tokens=64)
        with pytest.raises(InvalidRequest, match=r"context|takes at most"):
            await Workbench(small).planner.plan(request("a", "b" * 4000), ANN)


class TestImagesAndTools:
    """What the prompt is held for besides its text."""

    async def test_every_image_counts_as_much_as_the_model_says(self) -> None:
        image = Image(data=b"x", media_type="image/png")
        asked = request(
            messages=(Message(role="user", content="hi", parts=("hi", image, image)),), looks=True
        )
        plain = request(messages=(Message(role="user", content="hi"),))
        bench = Workbench(spec(mode="chat", vision=True, image_tokens=900))
        with_images, without = [
            (await bench.planner.plan(one, ANN)).models[0].jobs[0] for one in (asked, plain)
        ]
        assert with_images.bound == without.bound + 2 * 900
        assert without.likely < with_images.likely <= with_images.bound

    async def test_tools_and_calls_count_by_their_words(self) -> None:
        tool = Tool(name="weather", description="d" * 50, parameters=b"p" * 100)
        call = ToolCall(id="c", name="weather", arguments="a" * 200)
        turns = (Message(role="assistant", content="", tool_calls=(call,)),)
        bench = Workbench(spec(mode="chat", tools=True))
        without = (await bench.planner.plan(request(messages=said("hi")), ANN)).models[0].jobs[0].bound
        asked = request(messages=(*said("hi"), *turns), tools=Tools(tools=(tool,)))
        assert (await bench.planner.plan(asked, ANN)).models[0].jobs[0].bound >= without + 7 + 50 + 100 + 200

    async def test_images_are_not_sent_more_often_than_is_good_for_anybody(self) -> None:
        image = Image(data=b"x" * 2**20, media_type="image/png")

        class Loader:
            async def load(
                self, asked: CompletionRequest, principal: Principal, *, keep_urls: bool
            ) -> CompletionRequest:
                return asked

        loader: Any = Loader()
        messages = (Message(role="user", content="", parts=(image,)),)
        bench = Workbench(spec(mode="chat", vision=True, takes_n=False), images=loader)
        await bench.ask(request(messages=messages, looks=True, n=64, max_tokens=1))
        with pytest.raises(InvalidRequest, match="at most 64 with images") as refusal:
            await bench.ask(request(messages=messages, looks=True, n=65, max_tokens=1))
        assert refusal.value.param == "n"

    async def test_images_by_name_are_loaded_before_anything_is_held(self) -> None:
        class Loader:
            def __init__(self) -> None:
                self.kept_urls: list[bool] = []

            async def load(
                self, asked: CompletionRequest, principal: Principal, *, keep_urls: bool
            ) -> CompletionRequest:
                self.kept_urls.append(keep_urls)
                raise InvalidRequest("no such file", param="files[0]")

        for image_urls, kept in (("fetch", False), ("pass", True)):
            loader: Any = Loader()
            bench = Workbench(spec(mode="chat", vision=True, image_urls=image_urls), images=loader)
            asked = request(messages=said("hi"), looks=True)
            with pytest.raises(InvalidRequest):
                await bench.ask(asked)
            assert (loader.kept_urls, bench.memory.amounts) == ([kept], [])


class TestTokenPrompts:
    def test_ids_are_counted_as_they_are(self) -> None:
        asked = job(prompt=(1, 2, 3))
        assert (at_least(asked), likely(asked)) == (3, 3)
        assert at_most(asked) == 4  # a start token may be added

    def test_a_suffix_and_a_schema_count_as_input(self) -> None:
        schema = ResponseFormat(kind="json_schema", schema=b'{"type":"object"}')
        assert at_most(job(prompt="ab", suffix="cde")) == 5
        assert at_most(job(prompt="ab", response_format=schema)) == 2 + 17
        assert at_most(job(messages=said("ab"), response_format=schema)) == 2 + 17 + 16

    async def test_all_candidates_are_held_for(self) -> None:
        single = await plan(request("a", max_tokens=10))
        best = await plan(request("a", max_tokens=10, best_of=5))
        chosen_here = await plan(request("a", max_tokens=10, best_of=5), spec(takes_n=False))
        assert best.ceiling - single.ceiling == 4 * 10 * 1500
        assert chosen_here.ceiling - best.ceiling == 4 * at_most(job(prompt="a")) * 500
        assert best.token_ceiling - single.token_ceiling == 40

    async def test_what_a_model_cannot_do_is_refused_in_planning(self) -> None:
        refusal = await refused(request("a", suffix="b"), spec(mode="chat"))
        assert refusal.param == "suffix"

    @pytest.mark.parametrize(
        ("fields", "scores"),
        [
            ({"max_tokens": 64, "n": 128, "logprobs": 5}, 64 * 128 * 6),
            (
                {"prompts": (tuple(range(2000)),), "n": 64, "logprobs": 5, "echo": True, "max_tokens": 1},
                2001 * 64 * 6,
            ),
            ({"prompts": (tuple(range(2000)),), "n": 64, "logprobs": 5, "max_tokens": 1}, 64 * 6),
        ],
    )
    async def test_an_answer_of_too_many_scores_is_refused_with_the_numbers(
        self, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], scores: int
    ) -> None:
        monkeypatch.setattr(plan_module, "MAX_SCORES", scores)
        await plan(request(**fields))
        monkeypatch.setattr(plan_module, "MAX_SCORES", scores - 1)
        refusal = await refused(request(**fields))
        assert refusal.param == "logprobs"
        assert str(scores) in refusal.message and str(scores - 1) in refusal.message
