"""Anthropic's Messages API as an upstream: what it is sent, what is refused, and what is made of its answers."""

import asyncio
from typing import Any

import pytest
from tests.support.anthropic_asking import (
    CONVERSATION,
    USAGE,
    WORDS,
    both,
    chat,
    provider_for,
    streamed,
    streaming_of,
    text,
)
from tests.support.anthropic_upstream import (
    STOP,
    AnthropicUpstream,
    closed,
    ending,
    message,
    opened,
    piece,
    start,
    streaming,
    text_block,
    thinking_block,
    thought,
)
from tests.support.asking import KEY, nothing
from tests.support.jobs import job, model
from tests.support.script import Script

from headgate.core.completion import Message, ResponseFormat, Sampling, Usage
from headgate.core.errors import (
    InvalidRequest,
    ModelUnavailable,
)
from headgate.providers.anthropic import Anthropic

# --- what goes out ----------------------------------------------------------------------------------------------


async def test_only_what_is_set_is_sent(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    await provider.complete(chat("up-name", max_tokens=9), nothing)
    [request] = upstream.requests
    assert request.path == "/v1/messages"
    assert request.json == {
        "model": "up-name",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "say hello"}],
    }
    assert request.headers["x-api-key"] == KEY
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers


async def test_everything_that_is_set_is_sent(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    sampling = Sampling(
        temperature=0.0, top_p=0.5, stop=("\nEND", "é"), presence_penalty=0.0, frequency_penalty=0.0
    )
    asked = chat(messages=CONVERSATION, sampling=sampling)
    assert await provider.count_prompt(asked) is None
    await streamed(provider, asked)
    assert upstream.requests[0].json == {
        "model": "plain",
        "max_tokens": 64,
        "system": "Be brief.\n\nBe é.",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Who?\n\nAnd why?"},
        ],
        "temperature": 0.0,
        "top_p": 0.5,
        "stop_sequences": ["\nEND", "é"],
        "stream": True,
    }


async def test_the_connection_is_used_again_after_a_stream(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    for _ in range(3):
        await streamed(provider, chat())
        await asyncio.sleep(0.05)  # the response's last bytes arrive while nobody waits for them
    assert upstream.accepted == 1


# --- what is refused before anything goes out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 2, "echo": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": (1, 2)}, "prompt"),
        ({"messages": CONVERSATION, "echo": True}, "echo"),
        ({"response_format": ResponseFormat(kind="json_object")}, "response_format"),
        ({"response_format": ResponseFormat(kind="json_schema")}, "response_format"),
        ({"sampling": Sampling(logit_bias=((5, 1.0),))}, "logit_bias"),
        ({"sampling": Sampling(seed=0)}, "seed"),
        ({"sampling": Sampling(presence_penalty=0.5)}, "presence_penalty"),
        ({"sampling": Sampling(frequency_penalty=-1.0)}, "frequency_penalty"),
    ],
)
async def test_what_the_format_has_no_words_for_is_refused_by_name(
    provider: Anthropic, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(**fields))
    assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")
    assert "acme-large" in raised.value.message


async def test_a_raw_completion_is_refused(provider: Anthropic) -> None:
    with pytest.raises(InvalidRequest, match="only chats") as raised:
        await provider.count_prompt(job())
    assert (raised.value.param, raised.value.code) == ("model", "unsupported_parameter")


@pytest.mark.parametrize("stop", [(" ",), ("\n",), ("END", "\n\n\t"), ("",)])
async def test_stops_of_blanks_are_refused(provider: Anthropic, stop: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(sampling=Sampling(stop=stop)))
    assert raised.value.param == "stop"
    assert raised.value.allowed


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ([("assistant", "Hi")], "begin with a user message"),
        ([("system", "Be."), ("assistant", "Hi"), ("user", "Hi")], "begin with a user message"),
        ([("system", "Be.")], "begin with a user message"),
        ([("user", "")], "empty"),
        ([("user", "Hi"), ("assistant", " \n"), ("user", "Hi")], "empty"),
    ],
)
async def test_conversations_it_would_not_answer_are_refused(
    provider: Anthropic, roles: list[tuple[Any, str]], words: str
) -> None:
    asked = chat(messages=tuple(Message(role=role, content=content) for role, content in roles))
    with pytest.raises(InvalidRequest, match=words) as raised:
        await provider.count_prompt(asked)
    assert raised.value.param == "messages"


async def test_an_empty_prompt_is_refused(provider: Anthropic) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(prompt=" "))
    assert raised.value.param == "prompt"


async def test_empty_parts_of_a_turn_add_nothing(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    said = (("system", ""), ("user", "Hi"), ("user", ""), ("system", " "), ("user", "there"))
    asked = chat(messages=tuple(Message(role=role, content=content) for role, content in said))  # type: ignore[arg-type]
    assert await provider.count_prompt(asked) is None
    await provider.complete(asked, nothing)
    assert upstream.requests[0].json["messages"] == [{"role": "user", "content": "Hi\n\nthere"}]
    assert "system" not in upstream.requests[0].json


# --- availability -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_without_its_key_the_reason_names_the_variable(key: str | None) -> None:
    provider = provider_for("http://127.0.0.1:1/v1", key)
    assert provider.unavailable(model()) == "set ACME_KEY"
    with pytest.raises(ModelUnavailable, match="set ACME_KEY"):
        await provider.complete(chat(), nothing)
    with pytest.raises(ModelUnavailable, match="set ACME_KEY"):
        await streamed(provider, chat())
    await provider.aclose()
    await provider.aclose()


async def test_a_broken_model_says_so_and_others_are_available(provider: Anthropic) -> None:
    assert provider.unavailable(model()) is None
    assert provider.unavailable(model(broken="its file is cut")) == "its file is cut"


# --- what comes back --------------------------------------------------------------------------------------------


async def test_blocking_and_streamed_say_the_same(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    for asked in (chat(), chat(messages=CONVERSATION)):
        completion = await both(provider, asked)
        assert completion.choices[0].text == "one two three four"
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage == USAGE


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("tool_use", "stop"),
        ("pause_turn", "stop"),
        ("a_new_reason", "stop"),
        (None, "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
    ],
)
async def test_finish_reasons_are_ours_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic, given: str | None, ours: str
) -> None:
    upstream.script(
        Script(body=message(text_block("ab"), stop_reason=given)),
        streaming(start(), opened(0, text_block("")), piece(0, "ab"), closed(0), ending(given), STOP),
    )
    assert (await both(provider, chat())).choices[0].finish_reason == ours


async def test_only_text_is_answered_both_ways(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    tool = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"text": ["no"]}}
    upstream.script(
        Script(body=message(thinking_block("Hm."), text_block("So"), tool, text_block(" it is."))),
        streaming(
            start(),
            opened(0, thinking_block("")),
            thought(0, "Hm."),
            closed(0),
            opened(1, text_block("")),
            piece(1, "So"),
            closed(1),
            opened(2, tool),
            closed(2),
            opened(3, text_block("")),
            piece(3, " it is."),
            closed(3),
            ending(),
            STOP,
        ),
    )
    assert (await both(provider, chat())).choices[0].text == "So it is."


async def test_an_answer_without_content_is_empty_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(Script(body=message()), streaming(start(), ending(), STOP))
    completion = await both(provider, chat())
    assert (completion.choices[0].text, completion.usage) == ("", USAGE)


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        ({"input_tokens": 0, "output_tokens": 0}, Usage(prompt_tokens=0, completion_tokens=0)),
        ({"input_tokens": 9, "output_tokens": 2}, Usage(prompt_tokens=9, completion_tokens=2)),
        (
            {"input_tokens": 9, "cache_creation_input_tokens": 20, "output_tokens": 2},
            Usage(prompt_tokens=29, completion_tokens=2),
        ),
        (
            {
                "input_tokens": 9,
                "cache_creation_input_tokens": 20,
                "cache_read_input_tokens": 300,
                "output_tokens": 2,
            },
            Usage(prompt_tokens=329, completion_tokens=2, cached_tokens=300),
        ),
        (
            {
                "input_tokens": 9,
                "cache_creation_input_tokens": None,
                "output_tokens": 2,
                "service_tier": "standard",
            },
            Usage(prompt_tokens=9, completion_tokens=2),
        ),
        ({"input_tokens": 9, "cache_read_input_tokens": -1, "output_tokens": 2}, None),
        ({"input_tokens": 2**70, "output_tokens": 2}, None),
        ({"input_tokens": 9}, None),
        ({"output_tokens": 9}, None),
        ([9, 2], None),
        ("none", None),
    ],
)
async def test_usage_is_the_upstreams_or_unknown_both_ways(
    upstream: AnthropicUpstream, provider: Anthropic, reported: Any, usage: Usage | None
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), usage=reported))
    assert (await both(provider, chat())).usage == usage


async def test_an_echoed_prompt_comes_first(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    asked = chat(prompt="say héllo", echo=True)
    assert await provider.count_prompt(asked) is None
    assert (await both(provider, asked)).choices[0].text == "say hélloone two three four"
    [echoed] = [chunk for chunk in await streamed(provider, asked) if chunk.echoed]
    assert (echoed.text, echoed.tokens) == ("say héllo", 0)
    assert "echo" not in upstream.requests[0].json


async def test_sent_is_said_once_and_before_the_answer_comes(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(Script(pieces=WORDS, hold_at=0), Script(pieces=WORDS, hold_at=0))
    for ask in (provider.complete, streaming_of(provider)):
        sent = asyncio.Semaphore(0)
        upstream.hold()
        call = asyncio.create_task(ask(chat(), sent.release))
        await sent.acquire()
        assert not call.done()
        upstream.release()
        await call
        assert sent.locked()


async def test_batches_are_never_empty_and_what_arrives_together_comes_together(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(Script(pieces=tuple(f" w{i}" for i in range(50)), block=True))
    batches = [batch async for batch in provider.stream(chat(), nothing)]
    assert all(batches)
    assert len(batches) < 10
    assert text([chunk for batch in batches for chunk in batch]) == "".join(f" w{i}" for i in range(50))
