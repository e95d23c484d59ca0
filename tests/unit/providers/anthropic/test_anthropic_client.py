"""The official client sends what we send and reads what is scripted here as we do: the format is the real one."""

from typing import Any

import pytest
from anthropic import APIStatusError
from anthropic.types.message_create_params import (
    MessageCreateParamsNonStreaming,
    MessageCreateParamsStreaming,
)
from tests.support.anthropic_asking import (
    CONVERSATION,
    WORDS,
    chat,
    client_of,
    streamed,
)
from tests.support.anthropic_upstream import (
    STOP,
    AnthropicUpstream,
    closed,
    ending,
    error,
    message,
    opened,
    piece,
    refusal,
    start,
    streaming,
    text_block,
    thinking_block,
    thought,
)
from tests.support.asking import nothing
from tests.support.script import Script

from headgate.core.completion import Sampling, Usage
from headgate.providers.anthropic import Anthropic


async def test_the_official_client_sends_the_same(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    sampling = Sampling(temperature=0.25, top_p=0.5, stop=("END",))
    await provider.complete(chat(messages=CONVERSATION, sampling=sampling), nothing)
    await streamed(provider, chat(messages=CONVERSATION, sampling=sampling))
    ours, ours_streamed = (dict(request.json) for request in upstream.requests)
    # The client speaks a later version by default, without these two; the version we name has them.
    steering = {"temperature": ours.pop("temperature"), "top_p": ours.pop("top_p")}
    assert set(ours) <= set(MessageCreateParamsNonStreaming.__annotations__)
    assert set(ours_streamed) - set(steering) <= set(MessageCreateParamsStreaming.__annotations__)
    async with client_of(upstream) as client:
        await client.messages.create(**ours, extra_body=steering)
    assert upstream.requests[2].json == ours | steering
    assert upstream.requests[2].path == upstream.requests[0].path
    assert (
        upstream.requests[2].headers["anthropic-version"] == upstream.requests[0].headers["anthropic-version"]
    )


ASKED: dict[str, Any] = {
    "model": "plain",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "say hello"}],
}


async def test_the_official_client_reads_a_blocking_answer_as_we_do(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    completion = await provider.complete(chat(), nothing)
    async with client_of(upstream) as client:
        answer = await client.messages.create(**ASKED)
    assert [block.text for block in answer.content if block.type == "text"] == [completion.choices[0].text]
    assert answer.stop_reason == "end_turn"
    assert_same_usage(answer.usage, completion.usage)
    assert answer.model_validate(answer.model_dump()) == answer


async def test_the_official_client_reads_a_stream_as_we_do(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    chunks = await streamed(provider, chat())
    async with client_of(upstream) as client, client.messages.stream(**ASKED) as stream:
        pieces = [piece async for piece in stream.text_stream]
        answer = await stream.get_final_message()
    assert pieces == [chunk.text for chunk in chunks if chunk.text]
    assert answer.stop_reason == "end_turn"
    assert_same_usage(answer.usage, chunks[-1].usage)


async def test_the_official_client_knows_every_event_and_block_that_is_scripted(
    upstream: AnthropicUpstream,
) -> None:
    scripted = (
        start(),
        opened(0, thinking_block("")),
        thought(0, "Hm."),
        closed(0),
        opened(1, text_block("")),
        piece(1, "So"),
        closed(1),
        ending("refusal"),
        STOP,
    )
    upstream.script(streaming(*scripted), Script(body=message(thinking_block("Hm."), text_block("So"))))
    async with client_of(upstream) as client:
        read = [event async for event in await client.messages.create(**ASKED, stream=True)]
        answer = await client.messages.create(**ASKED)
    assert [event.type for event in read] == [event["type"] for event in scripted]
    # Re-validated strictly, since the client itself lets anything pass.
    for event in read:
        assert type(event).model_validate(event.model_dump()) == event
    assert type(answer).model_validate(answer.model_dump()) == answer
    assert [block.type for block in answer.content] == ["thinking", "text"]


async def test_the_official_client_knows_the_errors_that_are_scripted(upstream: AnthropicUpstream) -> None:
    upstream.script(
        refusal(529, "overloaded_error"), Script(pieces=WORDS, error_at=2, error="overloaded_error")
    )
    async with client_of(upstream) as client:
        with pytest.raises(APIStatusError) as refused:
            await client.messages.create(**ASKED)
        with pytest.raises(APIStatusError) as broken:
            async with client.messages.stream(**ASKED) as stream:
                await stream.until_done()
    assert refused.value.status_code == 529
    for raised in (refused.value, broken.value):
        assert raised.body == error("overloaded_error")


def assert_same_usage(theirs: Any, ours: Usage | None) -> None:
    assert ours is not None
    whole = theirs.input_tokens + theirs.cache_creation_input_tokens + theirs.cache_read_input_tokens
    assert (whole, theirs.cache_read_input_tokens) == (ours.prompt_tokens, ours.cached_tokens)
    assert theirs.output_tokens == ours.completion_tokens
