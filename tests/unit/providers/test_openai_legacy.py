"""The whole legacy contract against an OpenAI-compatible upstream: what goes out natively, and what is made of it."""

import json
from typing import Any

import pytest
from tests.support.asking import nothing, streamed, text_before_failure
from tests.support.jobs import job
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.completion import (
    Chunk,
    Completion,
    Job,
    Message,
    ResponseFormat,
    Sampling,
    TokenLogprob,
    Usage,
)
from headgate.core.errors import InvalidRequest, UpstreamFailed
from headgate.providers.openai_compatible import OpenAICompatible

TALK = (Message(role="user", content="Hi"),)


def entries(chunks: list[Chunk], index: int = 0) -> tuple[TokenLogprob, ...]:
    return tuple(entry for chunk in chunks if chunk.index == index for entry in chunk.logprobs or ())


async def both_ways(provider: OpenAICompatible, asked: Job) -> tuple[Completion, list[Chunk]]:
    """The blocking and the streamed answer, once they are seen to be the same."""
    completion = await provider.complete(asked, nothing)
    chunks = await streamed(provider, asked)
    for choice in completion.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert choice.text == "".join(chunk.text for chunk in own)
        assert choice.finish_reason == own[-1].finish_reason
        assert (choice.logprobs or ()) == entries(own, choice.index)
    return completion, chunks


# --- what goes out ----------------------------------------------------------------------------------------------


async def test_the_legacy_parameters_go_out_as_they_are(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    asked = job(
        n=2,
        best_of=3,
        max_tokens=0,
        logprobs=0,
        echo=True,
        suffix=" end",
        sampling=Sampling(logit_bias=((50256, -100.0), (7, 1.5))),
    )
    await provider.complete(asked, nothing)
    assert upstream.requests[0].json == {
        "model": "plain",
        "prompt": "say hello",
        "max_tokens": 0,
        "n": 2,
        "best_of": 3,
        "logprobs": 0,
        "echo": True,
        "suffix": " end",
        "logit_bias": {"50256": -100.0, "7": 1.5},
    }


async def test_token_ids_and_best_of_one_choice_go_out_as_they_are(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    await provider.complete(job(prompt=(5, 0, 7), best_of=4), nothing)
    assert upstream.requests[0].json == {
        "model": "plain",
        "prompt": [5, 0, 7],
        "max_tokens": 64,
        "n": 1,
        "best_of": 4,
    }


@pytest.mark.parametrize(("logprobs", "sent"), [(0, {}), (5, {"top_logprobs": 5})])
async def test_chat_asks_for_log_probabilities_in_its_own_words(
    upstream: Upstream, provider: OpenAICompatible, logprobs: int, sent: dict[str, int]
) -> None:
    await provider.complete(job(messages=TALK, logprobs=logprobs), nothing)
    asked = upstream.requests[0].json
    assert {name: asked[name] for name in asked if "logprobs" in name} == {"logprobs": True} | sent


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (ResponseFormat(kind="json_object"), {"type": "json_object"}),
        (
            ResponseFormat(
                kind="json_schema", name="it", description="All.", schema=b'{"type": "object"}', strict=False
            ),
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "it",
                    "description": "All.",
                    "schema": {"type": "object"},
                    "strict": False,
                },
            },
        ),
        (
            ResponseFormat(kind="json_schema", name="it", schema=b"{}"),
            {"type": "json_schema", "json_schema": {"name": "it", "schema": {}}},
        ),
    ],
)
async def test_response_formats_go_out_as_they_are(
    upstream: Upstream, provider: OpenAICompatible, asked: ResponseFormat, sent: dict[str, Any]
) -> None:
    await provider.complete(job(messages=TALK, response_format=asked), nothing)
    assert upstream.requests[0].json["response_format"] == sent


async def test_an_echo_is_not_asked_of_a_chat(upstream: Upstream, provider: OpenAICompatible) -> None:
    asked = job(shape="chat", prompt="Hi you", echo=True, n=2)
    completion, chunks = await both_ways(provider, asked)
    assert upstream.requests[0].json == {
        "model": "plain",
        "messages": [{"role": "user", "content": "Hi you"}],
        "max_tokens": 64,
        "n": 2,
    }
    assert [choice.text for choice in completion.choices] == ["Hi you0:echo: Hi you", "Hi you1:echo: Hi you"]
    assert [chunk for chunk in chunks if chunk.echoed] == [
        Chunk(index, "Hi you", tokens=0, echoed=True) for index in range(2)
    ]


# --- what is refused before anything is held ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (job(shape="chat", prompt=(1, 2)), "prompt"),
        (job(shape="chat", echo=True, logprobs=0), "echo"),
        (job(messages=TALK, echo=True), "echo"),
        (job(messages=TALK, suffix="."), "suffix"),
        (job(messages=TALK, best_of=2), "best_of"),
        (job(response_format=ResponseFormat(kind="json_object")), "response_format"),
    ],
)
async def test_what_a_shape_has_no_words_for_is_refused_by_name(
    upstream: Upstream, provider: OpenAICompatible, asked: Job, param: str
) -> None:
    with pytest.raises(InvalidRequest, match="acme-large") as raised:
        await provider.count_prompt(asked)
    assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")
    assert upstream.requests == []


async def test_token_ids_count_themselves(provider: OpenAICompatible) -> None:
    assert await provider.count_prompt(job(prompt=(4, 4, 4), echo=True, logprobs=1, best_of=2)) == 3
    assert await provider.count_prompt(job(shape="chat", prompt="Hi", echo=True)) is None
    assert provider.tokenizer is None


# --- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["completion", "chat"])
@pytest.mark.parametrize("alternatives", [0, 1, 3])
@pytest.mark.parametrize("end_token", [None, "", "<|endoftext|>"])
async def test_log_probabilities_are_the_same_both_ways(
    upstream: Upstream, provider: OpenAICompatible, shape: str, alternatives: int, end_token: str | None
) -> None:
    upstream.on("plain", Script(pieces=("a", " bc", " é"), end_token=end_token))
    completion, chunks = await both_ways(provider, job(shape=shape, logprobs=alternatives))
    found = completion.choices[0].logprobs
    assert found is not None
    end = () if end_token is None else (b"",)
    assert tuple(entry.data for entry in found) == (b"a", b" bc", " é".encode(), *end)
    assert [entry.end for entry in found] == [False] * 3 + [True] * len(end)
    assert [entry.logprob for entry in found[:3]] == [-1 / 8, -3 / 8, -2 / 8]
    expected = ((b" bc", -0.375), (b" other1", -1.375), (b" other2", -2.375))
    assert found[1].top == expected[:alternatives]
    assert [entries([chunk])[0].data for chunk in chunks[:3]] == [b"a", b" bc", " é".encode()]


async def test_parts_of_a_character_stay_apart(upstream: Upstream, provider: OpenAICompatible) -> None:
    tokens = {"\U0001f600": ("bytes:\\xf0\\x9f", "bytes:\\x98\\x80")}
    upstream.on("plain", Script(pieces=("a", "\U0001f600"), tokens=tokens))
    completion, _ = await both_ways(provider, job(logprobs=1))
    assert [entry.data for entry in completion.choices[0].logprobs or ()] == [b"a", b"\xf0\x9f", b"\x98\x80"]


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
async def test_an_echoed_prompt_comes_first_and_is_marked(
    upstream: Upstream, provider: OpenAICompatible, crosses: bool, logprobs: int | None
) -> None:
    upstream.on("plain", Script(pieces=(" a", " b"), crosses=crosses))
    asked = job(prompt="say héllo", echo=True, logprobs=logprobs, n=2)
    completion, chunks = await both_ways(provider, asked)
    assert [choice.text for choice in completion.choices] == ["say héllo0: a b", "say héllo1: a b"]
    for index in range(2):
        echoed = [chunk for chunk in chunks if chunk.echoed and chunk.index == index]
        assert "".join(chunk.text for chunk in echoed) == "say héllo"
        assert all(chunk.tokens == 0 for chunk in echoed)
        if logprobs is not None:
            assert [entry.data for entry in entries(echoed, index)] == [b"say", " héllo".encode()]
            assert (entries(echoed, index)[0].logprob, entries(echoed, index)[0].top) == (None, None)
            assert len(entries(chunks, index)) == 4
        else:
            assert completion.choices[index].logprobs is None


async def test_a_prompt_is_scored_alone(upstream: Upstream, provider: OpenAICompatible) -> None:
    completion, chunks = await both_ways(provider, job(echo=True, logprobs=1, max_tokens=0))
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason) == ("say hello", "length")
    assert [entry.data for entry in choice.logprobs or ()] == [b"say", b" hello"]
    assert all(chunk.echoed for chunk in chunks if chunk.text)


async def test_a_prompt_of_token_ids_is_scored_without_a_border(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.on("plain", Script(pieces=(" a",)))
    completion, chunks = await both_ways(provider, job(prompt=(5, 6), echo=True, logprobs=1, max_tokens=1))
    assert completion.choices[0].text == "t5 t6 a"
    found = completion.choices[0].logprobs or ()
    assert [entry.logprob is None for entry in found] == [True, False, False]
    assert not any(chunk.echoed for chunk in chunks)


async def test_best_of_answers_n_choices(upstream: Upstream, provider: OpenAICompatible) -> None:
    completion = await provider.complete(job(n=2, best_of=5), nothing)
    assert len(completion.choices) == 2
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 15


async def test_log_probabilities_nobody_asked_for_are_not_looked_at(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.on("plain", Script(pieces=("a",), scores="nonsense"))
    completion, chunks = await both_ways(provider, job())
    assert completion.choices[0].logprobs is None
    assert [chunk.logprobs for chunk in chunks] == [None] * len(chunks)


async def test_completions_answered_in_the_chat_form_are_understood(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    token = {"id": 3, "token": "a", "bytes": [97], "logprob": -1.5}
    content = {"content": [token | {"top_logprobs": [token]}]}
    upstream.on("plain", Script(pieces=("a",), scores=content))
    completion = await provider.complete(job(logprobs=1), nothing)
    assert completion.choices[0].logprobs == (TokenLogprob(b"a", -1.5, ((b"a", -1.5),)),)


async def test_a_long_scored_prompt_may_come_as_one_event(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    prompt = " word" * 20_000
    tokens = [" word"] * 20_000
    tops = [None, *({f" {'x' * 60}{i}": -1.0 - i for i in range(5)} for _ in tokens[1:])]
    scores = {"tokens": tokens, "token_logprobs": [None, *[-1.0] * 19_999], "top_logprobs": tops}
    choice = {"index": 0, "text": prompt, "logprobs": scores, "finish_reason": "length"}
    event = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    assert len(event) > 5 * 1024 * 1024
    upstream.on("plain", Script(body=event, headers={"Content-Type": "text/event-stream"}))
    chunks = await streamed(provider, job(prompt=prompt, echo=True, logprobs=5, max_tokens=0))
    assert len(entries(chunks)) == 20_000


async def test_a_token_without_any_chance_does_not_fail_the_answer(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    scores = {"tokens": ["a"], "token_logprobs": [-3.4e38], "top_logprobs": [{"b": -0.5, "c": None}]}
    upstream.on("plain", Script(pieces=("a",), scores=scores))
    completion, _ = await both_ways(provider, job(logprobs=2))
    assert completion.choices[0].logprobs == (TokenLogprob(b"a", -9999.0, ((b"b", -0.5), (b"c", -9999.0))),)


# --- what is not believed ---------------------------------------------------------------------------------------


async def failure_both_ways(provider: OpenAICompatible, asked: Job) -> tuple[str, str]:
    """What the failure says, and the text that a stream gave before it."""
    with pytest.raises(UpstreamFailed) as raised:
        await provider.complete(asked, nothing)
    text, error = await text_before_failure(provider, asked, UpstreamFailed)
    assert error.message == raised.value.message
    return error.message, text


@pytest.mark.parametrize("shape", ["completion", "chat"])
async def test_an_upstream_without_log_probabilities_is_a_failure_before_any_text(
    upstream: Upstream, provider: OpenAICompatible, shape: str
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), ignores=("logprobs",)))
    message, text = await failure_both_ways(provider, job(shape=shape, logprobs=0))
    assert message.startswith("The provider acme gave no log probabilities; ")
    assert "logprobs = false" in message
    assert text == ""


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_an_upstream_that_ignores_echo_is_a_failure_before_any_text(
    upstream: Upstream, provider: OpenAICompatible, logprobs: int | None
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), ignores=("echo",)))
    message, text = await failure_both_ways(provider, job(echo=True, logprobs=logprobs))
    assert (message, text) == ("The provider acme ignored echo.", "")


async def test_an_upstream_that_ignores_echo_of_token_ids_is_caught_by_the_scores(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), ignores=("echo",)))
    message, _ = await failure_both_ways(provider, job(prompt=(5, 6), echo=True, logprobs=0))
    assert message == "The provider acme gave no log probabilities for the prompt."


@pytest.mark.parametrize(
    "scores",
    [
        "all of them",
        [],
        {"tokens": ["a"]},
        {"tokens": ["a"], "token_logprobs": ["-1"], "top_logprobs": [{}]},
        {"tokens": ["a"], "token_logprobs": [1e300], "top_logprobs": [{}]},
        {"tokens": ["a"], "token_logprobs": [-1.0, -1.0], "top_logprobs": [{}]},
        {"tokens": ["a"] * 5000, "token_logprobs": [-1.0] * 5000, "top_logprobs": [{}] * 5000},
        {"content": [{"token": "a", "logprob": None}]},
    ],
    ids=lambda scores: str(scores)[:40],
)
async def test_log_probabilities_that_cannot_be_read_are_a_failure(
    upstream: Upstream, provider: OpenAICompatible, scores: Any
) -> None:
    upstream.on("plain", Script(pieces=("a",), scores=scores))
    message, text = await failure_both_ways(provider, job(logprobs=1))
    assert message == "The provider acme sent log probabilities that cannot be read."
    assert text == ""


async def test_a_million_log_probabilities_are_a_failure(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    scores = {"tokens": ["a"] * 10**6, "token_logprobs": [-1.0] * 10**6}
    upstream.on("plain", Script(pieces=("a",), scores=scores))
    with pytest.raises(UpstreamFailed, match="too large"):
        await provider.complete(job(logprobs=0), nothing)
    with pytest.raises(UpstreamFailed, match="too large"):
        await streamed(provider, job(logprobs=0))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
async def test_numbers_that_are_none_are_a_failure(
    upstream: Upstream, provider: OpenAICompatible, number: str
) -> None:
    scores = f'{{"tokens":["a"],"token_logprobs":[{number}],"top_logprobs":[{{}}]}}'
    body = f'{{"choices":[{{"index":0,"text":"a","logprobs":{scores},"finish_reason":"stop"}}]}}'
    upstream.script(
        Script(body=body),
        Script(body=f"data: {body}\n\ndata: [DONE]\n\n", headers={"Content-Type": "text/event-stream"}),
    )
    with pytest.raises(UpstreamFailed):
        await provider.complete(job(logprobs=1), nothing)
    text, _ = await text_before_failure(provider, job(logprobs=1), UpstreamFailed)
    assert text == ""


async def test_what_came_before_unreadable_log_probabilities_is_given(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    good = {"tokens": ["a"], "token_logprobs": [-1.0]}
    events = "".join(
        f"data: {json.dumps({'choices': [{'index': 0, 'text': 'a', 'logprobs': scores}]})}\n\n"
        for scores in (good, "none")
    )
    upstream.script(Script(body=events, headers={"Content-Type": "text/event-stream"}))
    text, _ = await text_before_failure(provider, job(logprobs=0), UpstreamFailed)
    assert text == "a"


async def test_choices_that_never_got_a_finish_reason_are_checked_at_the_end(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.on("plain", Script(pieces=("a",), finish=None))
    completion, _ = await both_ways(provider, job(echo=True, logprobs=0))
    assert completion.choices[0].finish_reason == "stop"
    upstream.on("plain", Script(pieces=("say",), finish=None, ignores=("echo",)))
    assert (await failure_both_ways(provider, job(echo=True)))[0] == "The provider acme ignored echo."


def as_events(*answers: dict[str, Any]) -> Script:
    body = "".join(f"data: {json.dumps(answer)}\n\n" for answer in answers)
    return Script(body=body, headers={"Content-Type": "text/event-stream"})


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("echo", [False, True])
async def test_a_token_that_an_upstream_makes_though_none_was_asked_for_is_not_passed_on(
    upstream: Upstream, provider: OpenAICompatible, echo: bool, logprobs: int | None
) -> None:
    tokens = [*(["say", " hello"] if echo else []), " w00"]
    scores = {
        "tokens": tokens,
        "token_logprobs": [None if echo and not place else -1.0 for place in range(len(tokens))],
        "top_logprobs": [None if echo and not place else {" x": -0.5} for place in range(len(tokens))],
    }
    choice = {"index": 0, "text": "".join(tokens), "logprobs": scores, "finish_reason": "length"}
    asked = job(echo=echo, logprobs=logprobs, max_tokens=0)
    upstream.on("plain", Script(body={"choices": [choice]}))
    [answered] = (await provider.complete(asked, nothing)).choices
    upstream.on("plain", as_events({"choices": [choice]}))
    chunks = await streamed(provider, asked)
    assert answered.text == "".join(chunk.text for chunk in chunks) == ("say hello" if echo else "")
    kept = [b"say", b" hello"] if echo and logprobs is not None else []
    assert [entry.data for entry in answered.logprobs or ()] == kept
    assert [entry.data for entry in entries(chunks)] == kept
    assert answered.finish_reason == "length"


async def test_an_answer_that_breaks_off_after_its_usage_still_tells_it(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    upstream.on("plain", as_events({"choices": [{"index": 0, "text": "a"}]}, {"choices": [], "usage": usage}))
    chunks: list[Chunk] = []
    with pytest.raises(UpstreamFailed, match="ended its answer too early"):
        async for batch in provider.stream(job(), nothing):
            chunks += batch
    assert [chunk.usage for chunk in chunks if chunk.usage] == [Usage(prompt_tokens=3, completion_tokens=1)]
