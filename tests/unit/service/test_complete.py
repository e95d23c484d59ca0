"""The whole way of a request: what is answered, what is charged, what is given back."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.until import until
from tests.support.workbench import ANN, RICH, Workbench, read_all, request, running_for, said, spec

from headgate.config import LimitSettings, Margins
from headgate.core.accounts import Developer, Principal
from headgate.core.completion import Answer, Chunk, Completion, Job, Usage
from headgate.core.errors import (
    GatewayError,
    InsufficientFunds,
    InternalError,
    LedgerUnavailable,
    Overloaded,
    RateLimited,
    UnknownModel,
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)
from headgate.core.money import MarginPPM
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service import billing as billing_module
from headgate.service.streams import RunningStream

SECRET = "canary-d41d"


class Broken(Fake):
    """A provider with a bug in it."""

    async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
        on_sent()
        raise ValueError(f"{SECRET}: {job.prompt}")

    async def stream(self, job: Job, on_sent: Callable[[], None]) -> AsyncGenerator[Sequence[Chunk], None]:
        on_sent()
        yield [Chunk(0, "some")]
        raise ValueError(f"{SECRET}: {job.prompt}")


def price(prompt: int, completion: int, cached: int = 0) -> int:
    return (prompt - cached) * 500 + cached * 250 + completion * 1500


def text_of(chunks: Sequence[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing_module, "RETRY_SECONDS", (0.001,))


@pytest.fixture
def bench() -> Workbench:
    return Workbench()


class TestGoodAnswers:
    async def test_a_blocking_answer_costs_what_was_used(self, bench: Workbench) -> None:
        answer = await bench.ask(request("one two"))
        assert [choice.text for choice in answer.choices] == ["echo: one two"]
        assert answer.price == price(2, 3)
        assert (answer.balance_before, answer.balance_after) == (RICH, RICH - answer.price)
        (row,) = bench.memory.rows
        assert (row.price, row.cost, row.source, row.error, row.stream) == (
            answer.price,
            answer.price,
            "provider",
            None,
            False,
        )
        bench.memory.assert_balanced()

    async def test_a_stream_is_the_same_text_at_the_same_price(self, bench: Workbench) -> None:
        blocking = await bench.ask(request("one two", n=2))
        chunks, end = await bench.stream(request("one two", n=2, stream=True))
        assert [text_of(chunks, 0), text_of(chunks, 1)] == [choice.text for choice in blocking.choices]
        assert (end.kind, end.answer.price, end.answer.usage) == ("completed", blocking.price, blocking.usage)
        assert [row.price for row in bench.memory.rows] == [blocking.price] * 2

    async def test_without_reported_usage_both_are_estimated_alike(self) -> None:
        fake = Fake(default=FakeAnswer(usage=None, text="a rather long answer, word by word"))
        bench = Workbench(fakes=[fake])
        blocking = await bench.ask(request())
        _, end = await bench.stream(request(stream=True))
        assert blocking.usage == end.answer.usage
        assert blocking.usage.source == "estimate"
        assert blocking.price == end.answer.price > 0

    async def test_a_provider_that_only_streams_answers_blocking_requests_too(self) -> None:
        fake = Fake(stream_only=True)
        bench = Workbench(fakes=[fake])
        assert (await bench.ask(request("a"))).choices[0].text == "echo: a"
        assert fake.calls[0].streamed

    async def test_prompts_times_n_choices_stand_in_order(self) -> None:
        bench = Workbench(spec(takes_n=False, bills_prompt_per_call=False))
        answer = await bench.ask(request("a", "b", n=2))
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (0, "echo: a"),
            (1, "echo: a"),
            (2, "echo: b"),
            (3, "echo: b"),
        ]
        assert answer.price == price(2, 8)  # each prompt once

    async def test_prompts_billed_per_call_are_charged_per_call(self) -> None:
        bench = Workbench(spec(takes_n=False, bills_prompt_per_call=True))
        assert (await bench.ask(request("a", "b", n=2))).price == price(4, 8)

    async def test_streamed_chunks_bear_their_place_in_the_answer(self) -> None:
        bench = Workbench(spec(takes_n=False))
        chunks, _ = await bench.stream(request("a", "b", n=2, stream=True))
        places = {index: text_of(chunks, index) for index in range(4)}
        assert places == {0: "echo: a", 1: "echo: a", 2: "echo: b", 3: "echo: b"}

    async def test_a_text_completed_by_no_tokens_costs_its_prompt(self, bench: Workbench) -> None:
        answer = await bench.ask(request("a b", max_tokens=0, n=2))
        assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("", "length")] * 2
        echoed = await bench.ask(request("a b", echo=True, max_tokens=0))
        assert [(choice.text, choice.finish_reason) for choice in echoed.choices] == [("a b", "length")]
        chunks, end = await bench.stream(request("a b", echo=True, max_tokens=0, stream=True))
        assert (text_of(chunks), end.answer.usage) == ("a b", echoed.usage)
        assert answer.price == echoed.price == end.answer.price == price(2, 0)

    async def test_no_chat_is_asked_for_no_tokens_and_nothing_is_owed(self) -> None:
        bench = Workbench(spec(mode="chat"))
        answer = await bench.ask(request("a b", echo=True, max_tokens=0, n=2))
        assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("a b", "length")] * 2
        chunks, end = await bench.stream(request(max_tokens=0, stream=True))
        assert [chunk.finish_reason for chunk in chunks] == ["length"] and end.kind == "completed"
        assert bench.fake.calls == [] and answer.price == end.answer.price == 0
        assert answer.usage.total_tokens == end.answer.usage.total_tokens == 0

    async def test_of_more_candidates_the_best_are_answered_and_all_are_charged(self) -> None:
        bench = Workbench(spec(takes_n=False, bills_prompt_per_call=False))
        answer = await bench.ask(request("a b", n=2, best_of=4))
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert len(bench.fake.calls) == 4
        assert answer.price == price(2, 4 * 3)

    async def test_an_answer_of_nothing_costs_its_prompt(self) -> None:
        bench = Workbench(fakes=[Fake(default=FakeAnswer(text=""))])
        assert (await bench.ask(request("a b"))).price == price(2, 0)

    async def test_a_reported_zero_is_free(self) -> None:
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        bench = Workbench(fakes=[Fake(default=FakeAnswer(usage=usage))])
        assert (await bench.ask(request())).price == 0
        _, end = await bench.stream(request(stream=True))
        assert end.answer.price == 0
        assert [row.source for row in bench.memory.rows] == ["provider"] * 2

    async def test_more_than_the_hold_is_not_charged_but_recorded(self) -> None:
        usage = Usage(prompt_tokens=10**6, completion_tokens=1)
        bench = Workbench(fakes=[Fake(default=FakeAnswer(usage=usage))])
        answer = await bench.ask(request(max_tokens=1))
        (row,) = bench.memory.rows
        assert answer.price == row.price == len("say hello") * 500 + 1500
        assert row.price + row.excess == price(10**6, 1)
        assert metric(bench, "headgate_charged_nano_usd_total") == row.price
        assert metric(bench, "headgate_excess_nano_usd_total") == row.excess

    async def test_a_developer_earns_the_margin_less_the_platforms_share(self) -> None:
        margins = Margins(
            default=MarginPPM(200_000), floor=None, cap=MarginPPM(990_000), platform_share_percent=Decimal(25)
        )
        studio = Developer(id="studio", account="studio-account")
        bench = Workbench(margins=margins, developers={"studio": studio})
        answer = await bench.ask(request("one two", developer_id="studio"))
        cost = price(2, 3)
        assert answer.price == cost * 5 // 4
        margin = answer.price - cost
        earned = bench.memory.balances
        assert (earned["studio-account"], earned["platform"]) == (margin * 3 // 4, margin - margin * 3 // 4)
        assert earned["provider:fake"] == cost
        bench.memory.assert_balanced()

    async def test_a_row_says_whose_request_it_was(self) -> None:
        caller = Principal(account="ann", key_id="key-9")
        bench = Workbench()
        await bench.ask(request(user="u1", app="story", dialect="dify", request_id="r-1"), principal=caller)
        (row,) = bench.memory.rows
        given = (row.request_id, row.dialect, row.model, row.provider, row.key_id, row.app, row.user)
        assert given == ("r-1", "dify", "fast", "fake", "key-9", "story", "u1")

    async def test_messages_are_answered(self, bench: Workbench) -> None:
        assert (await bench.ask(request(messages=said("hi there")))).choices[0].text == "echo: hi there"


class TestRefusals:
    @pytest.mark.parametrize("streamed", [False, True])
    async def test_what_is_refused_before_the_hold_leaves_no_trace(
        self, bench: Workbench, streamed: bool
    ) -> None:
        with pytest.raises(UnknownModel):
            await ask_either(bench, streamed, models=("nobody",))
        assert (bench.memory.rows, bench.memory.settled, bench.fake.calls) == ([], [], [])
        assert len(bench.streams) == 0

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_without_funds_nobody_is_asked(self, streamed: bool) -> None:
        bench = Workbench()
        bench.memory.balances["ann"] = 1
        with pytest.raises(InsufficientFunds) as refusal:
            await ask_either(bench, streamed)
        assert refusal.value.available_nano == 1
        assert (bench.memory.rows, bench.memory.holds, bench.fake.calls) == ([], {}, [])

    async def test_exactly_what_the_hold_needs_is_enough(self) -> None:
        bench = Workbench()
        bench.memory.balances["ann"] = needed = len("say hello") * 500 + 64 * 1500
        await bench.ask(request())
        bench.memory.balances["ann"] = needed - 1
        with pytest.raises(InsufficientFunds):
            await bench.ask(request())

    async def test_a_refused_hold_gives_back_the_tokens_it_took_from_the_limit(self) -> None:
        limits = LimitSettings(tokens_per_minute=1000)
        bench = Workbench(limits=limits)
        bench.memory.balances["ann"] = 1
        with pytest.raises(InsufficientFunds):
            await bench.ask(request())
        assert dict(bench.limiter.headers(ANN))["x-ratelimit-remaining-tokens"] == "1000"

    async def test_unused_tokens_are_given_back_after_the_answer(self) -> None:
        bench = Workbench(limits=LimitSettings(tokens_per_minute=1000))
        running = running_for(asked := request("one two"))
        await bench.ask(asked, running)
        assert dict(running.limit_headers)["x-ratelimit-remaining-tokens"] == str(1000 - len("one two") - 64)
        assert dict(bench.limiter.headers(ANN))["x-ratelimit-remaining-tokens"] == str(1000 - 2 - 3)

    async def test_tokens_are_given_back_though_the_ledger_is_out_at_the_end(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(gate=gate))
        bench = Workbench(fakes=[fake], limits=LimitSettings(tokens_per_minute=1000))
        asking = asyncio.ensure_future(bench.ask(request("one two")))
        await called(fake)
        bench.memory.fail()
        gate.set()
        with pytest.raises(LedgerUnavailable):
            await asking
        bench.memory.problem = None
        await bench.settle_down()
        assert int(dict(bench.limiter.headers(ANN))["x-ratelimit-remaining-tokens"]) >= 1000 - 2 - 3

    async def test_the_limit_is_looked_at_before_the_funds(self) -> None:
        bench = Workbench(limits=LimitSettings(requests_per_minute=1))
        await bench.ask(request())
        bench.memory.balances["ann"] = 0
        with pytest.raises(RateLimited):
            await bench.ask(request())

    async def test_a_ledger_that_is_out_refuses_before_anybody_is_asked(self, bench: Workbench) -> None:
        bench.memory.fail()
        with pytest.raises(LedgerUnavailable):
            await bench.ask(request())
        assert bench.fake.calls == []


class TestErrors:
    @pytest.mark.parametrize("sent", [False, True])
    @pytest.mark.parametrize("streamed", [False, True])
    async def test_an_error_before_any_output_is_released(self, streamed: bool, sent: bool) -> None:
        failing = FakeAnswer(error=UpstreamTimeout("silence"), sent=sent)
        bench = Workbench(fakes=[Fake(default=failing)])
        with pytest.raises(UpstreamTimeout):
            await ask_either(bench, streamed)
        (row,) = bench.memory.rows
        assert (row.price, row.cost, row.prompt_tokens, row.error) == (0, 0, 0, "upstream_timeout")
        bench.memory.assert_balanced()

    async def test_a_blocking_answer_that_breaks_is_never_charged(self) -> None:
        fake = Fake(stream_only=True, default=FakeAnswer(error=UpstreamFailed("broken"), error_at=1))
        bench = Workbench(fakes=[fake])
        with pytest.raises(UpstreamFailed):
            await bench.ask(request())
        assert bench.memory.balances["ann"] == RICH

    async def test_a_stream_that_breaks_is_charged_for_what_was_delivered(self) -> None:
        fake = Fake(default=FakeAnswer(text="abcd efgh ijkl", error=UpstreamFailed("broken"), error_at=2))
        bench = Workbench(fakes=[fake])
        running = bench.start(request("x" * 40, stream=True))
        chunks: list[Chunk] = []
        with pytest.raises(UpstreamFailed):
            while True:
                chunks += await next_chunks(running)
        assert text_of(chunks) == "abcd efgh"
        (row,) = bench.memory.rows
        assert (row.prompt_tokens, row.completion_tokens, row.source) == (10, 3, "estimate")
        assert (row.price, row.error) == (price(10, 3), "upstream_failed")
        bench.memory.assert_balanced()

    async def test_one_broken_call_of_a_request_ends_the_others(self) -> None:
        gate = asyncio.Event()
        answers = {"held": FakeAnswer(gate=gate), "bad": FakeAnswer(error=UpstreamFailed("broken"))}
        fake = Fake(answers=answers)
        bench = Workbench(fakes=[fake])
        with pytest.raises(UpstreamFailed):
            await bench.ask(request("held", "bad"))
        assert [call.state for call in fake.calls] == ["abandoned", "failed"]
        assert bench.memory.balances["ann"] == RICH

    async def test_of_several_failures_the_first_prompts_is_told(self) -> None:
        answers = {
            name: FakeAnswer(error=UpstreamError(f"failure of {name}")) for name in ("a", "b", "c", "d")
        }
        bench = Workbench(fakes=[Fake(answers=answers)])
        for _ in range(5):
            with pytest.raises(UpstreamError, match="failure of a"):
                await bench.ask(request("a", "b", "c", "d"))

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_a_bug_is_an_internal_error_that_tells_nothing(self, streamed: bool) -> None:
        bench = Workbench(fakes=[Broken()])
        with pytest.raises(InternalError) as failure:
            await ask_either(bench, streamed)
        assert SECRET not in str(failure.value) and "say hello" not in str(failure.value)
        (row,) = bench.memory.rows
        assert row.error == "internal"
        assert (row.price > 0) == streamed  # what the stream delivered before it broke
        bench.memory.assert_balanced()

    async def test_failures_are_counted_by_their_kind(self) -> None:
        bench = Workbench(fakes=[Fake(default=FakeAnswer(error=UpstreamAuth("refused")))])
        with pytest.raises(UpstreamAuth):
            await bench.ask(request())
        assert metric(bench, "headgate_failed_requests_total", kind="upstream_auth", dialect="openai") == 1


class TestPartialFailure:
    MODELS = (spec("good", "good"), spec("bad", "bad"), spec("dead", "dead"))

    def bench(self, bad: FakeAnswer, *, stream_only: bool = False) -> Workbench:
        fakes = (
            Fake("good"),
            Fake("bad", default=bad, stream_only=stream_only),
            Fake("dead", reason="no key"),
        )
        return Workbench(*self.MODELS, fakes=fakes)

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_the_good_ones_are_answered_and_only_they_are_charged(self, streamed: bool) -> None:
        bench = self.bench(FakeAnswer(error=UpstreamTimeout("silence")))
        asked = request("a", models=("bad", "good", "dead", "good"), partial_failure=True, stream=streamed)
        if streamed:
            chunks, end = await bench.stream(asked)
            failed = {chunk.index: chunk for chunk in chunks if chunk.error is not None}
            assert {index: chunk.finish_reason for index, chunk in failed.items()} == {
                0: "timeout",
                2: "error",
            }
            answer = end.answer
        else:
            answer = await bench.ask(asked)
        kinds = [model.error and model.error.kind for model in answer.models]
        assert kinds == ["upstream_timeout", None, "model_unavailable", None]
        assert [[choice.index for choice in model.choices] for model in answer.models] == [[], [1], [], [3]]
        assert answer.price == 2 * price(1, 2)
        assert [row.price for row in bench.memory.rows] == [0, price(1, 2), 0, price(1, 2)]
        assert [row.error for row in bench.memory.rows] == kinds
        assert answer.providers == "good"
        bench.memory.assert_balanced()

    async def test_a_failed_models_half_answer_is_not_charged_where_nobody_saw_it(self) -> None:
        bench = self.bench(FakeAnswer(error=UpstreamFailed("broken"), error_at=1), stream_only=True)
        answer = await bench.ask(request("a", models=("bad", "good"), partial_failure=True))
        assert answer.price == price(1, 2)
        assert [row.price for row in bench.memory.rows] == [0, price(1, 2)]

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize(
        ("errors", "told"),
        [
            ((UpstreamTimeout("t"), UpstreamFailed("f")), UpstreamFailed),
            ((UpstreamAuth("a"), UpstreamTimeout("t")), UpstreamTimeout),
            ((UpstreamAuth("a"), Overloaded("o")), UpstreamAuth),
        ],
    )
    async def test_when_all_fail_the_weightiest_failure_is_the_answer(
        self, errors: tuple[GatewayError, ...], told: type[GatewayError], streamed: bool
    ) -> None:
        fakes = [Fake(f"p{number}", default=FakeAnswer(error=error)) for number, error in enumerate(errors)]
        models = [spec(f"m{number}", f"p{number}") for number in range(len(errors))]
        bench = Workbench(*models, fakes=fakes)
        with pytest.raises(told):
            await ask_either(bench, streamed, models=("m0", "m1"), partial_failure=True)
        assert [row.price for row in bench.memory.rows] == [0, 0]
        bench.memory.assert_balanced()

    async def test_a_bug_in_one_model_ends_the_request(self) -> None:
        broken = Broken("broken")
        bench = Workbench(spec("good", "good"), spec("broken", "broken"), fakes=(Fake("good"), broken))
        with pytest.raises(InternalError):
            await bench.ask(request(models=("good", "broken"), partial_failure=True))
        assert bench.memory.balances["ann"] == RICH

    async def test_models_run_side_by_side(self) -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        fakes = [Fake(f"p{i}", default=FakeAnswer(gate=gate)) for i, gate in enumerate(gates)]
        bench = Workbench(spec("m0", "p0"), spec("m1", "p1"), fakes=fakes)
        asking = asyncio.ensure_future(bench.ask(request(models=("m0", "m1"), partial_failure=True)))
        await called(fakes[0])
        await called(fakes[1])
        gates[1].set()
        gates[0].set()
        assert [model.requested for model in (await asking).models] == ["m0", "m1"]
        assert len(bench.memory.settled) == 1


class TestStops:
    async def test_a_stopped_stream_ends_aborted_and_is_charged_for_what_came(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(text="abcd efgh ijkl", gate=gate, gate_at=2))
        bench = Workbench(fakes=[fake])
        running = bench.start(request("x" * 40, stream=True))
        chunks = await next_chunks(running, 2)
        assert await bench.streams.stop(running, 30)
        more, end = await read_all(running)
        assert text_of([*chunks, *more]) == end.answer.choices[0].text == "abcd efgh"
        assert (end.kind, end.error, end.answer.price) == ("aborted", None, price(10, 3))
        assert fake.calls[0].state == "abandoned"
        assert [row.error for row in bench.memory.rows] == [None]
        bench.memory.assert_balanced()

    async def test_a_client_that_leaves_a_blocking_request_pays_its_prompt(self) -> None:
        fake = Fake(default=FakeAnswer(gate=asyncio.Event()))
        bench = Workbench(fakes=[fake])
        running = running_for(asked := request("x" * 40))
        asking = asyncio.ensure_future(bench.ask(asked, running))
        await called(fake)
        running.stop("disconnected")
        with pytest.raises(Overloaded):
            await asking
        assert fake.calls[0].state == "abandoned"
        assert [row.price for row in bench.memory.rows] == [price(10, 0)]
        bench.memory.assert_balanced()

    async def test_a_client_that_leaves_before_the_request_left_pays_nothing(self) -> None:
        class Connecting(Fake):
            async def complete(self, job: Job, on_sent: Callable[[], None]) -> Completion:
                self.calls.append(None)  # type: ignore[arg-type]
                await asyncio.Event().wait()
                raise AssertionError

        fake = Connecting()
        bench = Workbench(fakes=[fake])
        running = running_for(asked := request())
        asking = asyncio.ensure_future(bench.ask(asked, running))
        await called(fake)
        running.stop("disconnected")
        with pytest.raises(Overloaded):
            await asking
        assert [row.price for row in bench.memory.rows] == [0]
        bench.memory.assert_balanced()

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_draining_ends_a_request_with_an_error_and_charges_only_what_was_delivered(
        self, streamed: bool
    ) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(text="abcd efgh", gate=gate, gate_at=1 if streamed else 0))
        bench = Workbench(fakes=[fake])
        asked = request("x" * 40, stream=streamed)
        if streamed:
            running = bench.start(asked)
            await next_chunks(running)
            running.stop("draining")
            _, end = await read_all(running)
            assert end.kind == "aborted" and isinstance(end.error, Overloaded)
        else:
            running = running_for(asked)
            asking = asyncio.ensure_future(bench.ask(asked, running))
            await called(fake)
            running.stop("draining")
            with pytest.raises(Overloaded, match="shutting down"):
                await asking
        (row,) = bench.memory.rows
        assert (row.price, row.error) == (price(10, 1) if streamed else 0, "overloaded")
        bench.memory.assert_balanced()

    async def test_a_stop_before_the_first_step_of_a_stream_ends_it(self, bench: Workbench) -> None:
        running = bench.start(request(stream=True))
        running.stop("draining")
        with pytest.raises(Overloaded):
            await read_all(running)
        assert len(bench.streams) == 0 and running.settled.is_set()
        await bench.settle_down()
        assert bench.memory.balances["ann"] == RICH
        bench.memory.assert_balanced()

    async def test_a_stop_after_the_end_changes_nothing(self, bench: Workbench) -> None:
        running = bench.start(request("a", stream=True))
        await bench.settle_down()
        running.stop("client")
        _, end = await read_all(running)
        assert end.kind == "completed" and running.stop_reason is None

    async def test_a_stop_is_not_taken_for_the_callers_own_cancellation(self) -> None:
        """The task that was cancelled on purpose lives on: a timeout around it works as before."""
        fake = Fake(default=FakeAnswer(gate=asyncio.Event()))
        bench = Workbench(fakes=[fake])
        running = running_for(asked := request())

        async def caller() -> str:
            try:
                async with asyncio.timeout(None) as limit:
                    with pytest.raises(Overloaded):
                        await bench.ask(asked, running)
                    limit.reschedule(asyncio.get_running_loop().time())
                    await asyncio.Event().wait()
            except TimeoutError:
                return "timed out"
            return "not reached"

        asking = asyncio.ensure_future(caller())
        await called(fake)
        running.stop("disconnected")
        assert await asking == "timed out"


class TestLedgerOutage:
    async def test_a_blocking_answer_becomes_an_error_and_is_released_later(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(gate=gate))
        bench = Workbench(fakes=[fake])
        asking = asyncio.ensure_future(bench.ask(request()))
        await called(fake)
        bench.memory.fail()
        gate.set()
        with pytest.raises(LedgerUnavailable):
            await asking
        assert len(bench.memory.holds) == 1
        bench.memory.problem = None
        await bench.settle_down()
        assert bench.memory.balances["ann"] == RICH
        assert [row.price for row in bench.memory.rows] == [0]
        bench.memory.assert_balanced()

    async def test_a_stream_ends_in_an_error_and_what_it_delivered_is_settled_later(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(text="abcd efgh", gate=gate, gate_at=2))
        bench = Workbench(fakes=[fake])
        running = bench.start(request("a", stream=True))
        chunks = await next_chunks(running, 2)
        bench.memory.fail()
        gate.set()
        with pytest.raises(LedgerUnavailable):
            while True:
                await next_chunks(running)
        assert text_of(chunks) == "abcd efgh"
        assert len(bench.memory.holds) == 1
        bench.memory.problem = None
        await bench.settle_down()
        assert [row.price for row in bench.memory.rows] == [price(1, 2)]
        bench.memory.assert_balanced()


class TestCheckpoints:
    async def test_a_running_stream_is_written_down_when_something_changed(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(text="abcd efgh", gate=gate, gate_at=1))
        bench = Workbench(fakes=[fake])
        running = bench.start(request("x" * 40, stream=True))
        await next_chunks(running)
        bench.completions.checkpoint()
        bench.completions.checkpoint()
        ((row,),) = bench.memory.checkpoints
        assert (row.price, row.error) == (price(10, 1), "interrupted")
        gate.set()
        await read_all(running)
        bench.completions.checkpoint()
        assert len(bench.memory.checkpoints) == 1

    async def test_a_blocking_request_is_not(self) -> None:
        """Its answer dies with the process, and an answer that never came is not charged."""
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(gate=gate))
        bench = Workbench(fakes=[fake])
        asking = asyncio.ensure_future(bench.ask(request()))
        await called(fake)
        assert bench.completions.open_holds == 1
        bench.completions.checkpoint()
        assert bench.memory.checkpoints == []
        gate.set()
        await asking
        assert bench.completions.open_holds == 0

    async def test_at_first_a_hold_knows_rows_that_charge_nothing(self) -> None:
        fake = Fake(default=FakeAnswer(gate=asyncio.Event()))
        models = (spec(), spec("dead", broken="the file is broken"))
        bench = Workbench(*models, fakes=[fake])
        running = bench.start(request(models=("fast", "dead"), partial_failure=True, stream=True))
        await called(fake)
        (hold,) = bench.memory.holds.values()
        assert [(row.model, row.price, row.error) for row in hold.rows] == [
            ("fast", 0, "interrupted"),
            ("dead", 0, "interrupted"),
        ]
        running.stop("client")
        await bench.settle_down()


class TestMetrics:
    async def test_tokens_charges_and_times_are_counted(self) -> None:
        gate = asyncio.Event()
        fake = Fake(default=FakeAnswer(gate=gate, gate_at=1))
        bench = Workbench(fakes=[fake])
        running = bench.start(request("one two", stream=True))
        bench.clock.advance(2)
        await next_chunks(running)
        bench.clock.advance(3)
        gate.set()
        await read_all(running)
        labels = {"dialect": "openai", "model": "fast"}
        assert metric(bench, "headgate_tokens_total", **labels, direction="input") == 2
        assert metric(bench, "headgate_tokens_total", **labels, direction="output") == 3
        assert metric(bench, "headgate_charged_nano_usd_total", **labels) == price(2, 3)
        assert metric(bench, "headgate_request_seconds_count", **labels) == 1
        assert metric(bench, "headgate_time_to_first_token_seconds_count", **labels) == 1

    async def test_nothing_a_client_writes_becomes_a_label(self, bench: Workbench) -> None:
        await bench.ask(request("canary-prompt", user="canary-user", models=("fake/fast",)))
        exposed = bench.metrics.exposition().decode()
        assert "canary" not in exposed and "fake/fast" not in exposed
        assert re.search(r'headgate_request_seconds_count\{dialect="openai",model="fast"\} 1\.0', exposed)


async def ask_either(bench: Workbench, streamed: bool, **fields: Any) -> Answer:
    if streamed:
        _, end = await bench.stream(request(stream=True, **fields))
        return end.answer
    return await bench.ask(request(**fields))


async def called(fake: Fake) -> None:
    """Until the provider was called."""
    await until(lambda: fake.calls)


async def next_chunks(running: RunningStream, count: int = 1) -> list[Chunk]:
    """The next chunks, at least `count`."""
    chunks: list[Chunk] = []
    while len(chunks) < count:
        item = await running.next(60)
        assert isinstance(item, list)
        chunks += item
    return chunks


def metric(bench: Workbench, name: str, **labels: str) -> float:
    """The sum of a metric's samples that bear these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(bench.metrics.exposition().decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
