"""The official clients read what the breaking upstream says when it does not break: its formats are the real ones."""

from collections.abc import AsyncIterator

import anthropic
import cohere
import openai
import pytest
from tests.support.fault_upstream import FaultUpstream, Steps, whole
from tests.support.faults import COUNTED, TEXT, events, said, streamed
from tests.support.wires import PROMPT, Anthropic, Chat, Cohere, Completions, Wire

KEY = "sk-canary-7d20"
ASKED = "This is cell-1."


@pytest.fixture
async def up() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as running:
        yield running


def blocking(wire: Wire) -> Steps:
    return (whole(said(wire)),)


def streaming(wire: Wire) -> Steps:
    return streamed(events(wire))


async def test_openais_client_reads_completions(up: FaultUpstream) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=up.url, max_retries=0) as client:
        up.play("cell-1", blocking(Completions()))
        answer = await client.completions.create(model="plain", prompt=ASKED)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT, COUNTED)
        up.play("cell-1", streaming(Completions()))
        chunks = [
            piece async for piece in await client.completions.create(model="plain", prompt=ASKED, stream=True)
        ]
    assert "".join(choice.text for piece in chunks for choice in piece.choices) == TEXT
    assert chunks[-1].usage == answer.usage


async def test_openais_client_reads_chats(up: FaultUpstream) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=up.url, max_retries=0) as client:
        up.play("cell-1", blocking(Chat()))
        answer = await client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": ASKED}]
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (TEXT, "stop")
        up.play("cell-1", streaming(Chat()))
        stream = await client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": ASKED}], stream=True
        )
        chunks = [piece async for piece in stream]
    assert "".join(choice.delta.content or "" for piece in chunks for choice in piece.choices) == TEXT
    assert chunks[-1].usage == answer.usage
    assert answer.usage is not None and answer.usage.total_tokens == PROMPT + COUNTED


async def test_openais_client_raises_on_the_error_event(up: FaultUpstream) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=up.url, max_retries=0) as client:
        up.play("cell-1", streamed([Chat().piece("a"), Chat().error_event()]))
        with pytest.raises(openai.APIError, match="Told to fail"):
            async for _ in await client.chat.completions.create(
                model="plain", messages=[{"role": "user", "content": ASKED}], stream=True
            ):
                pass


async def test_anthropics_client_reads_messages(up: FaultUpstream) -> None:
    async with anthropic.AsyncAnthropic(api_key=KEY, base_url=up.origin, max_retries=0) as client:
        up.play("cell-1", blocking(Anthropic()))
        answer = await client.messages.create(
            model="plain", max_tokens=8, messages=[{"role": "user", "content": ASKED}]
        )
        up.play("cell-1", streaming(Anthropic()))
        async with client.messages.stream(
            model="plain", max_tokens=8, messages=[{"role": "user", "content": ASKED}]
        ) as stream:
            message = await stream.get_final_message()
    for found in (answer, message):
        assert [block.text for block in found.content if block.type == "text"] == [TEXT]
        assert found.stop_reason == "end_turn"
        assert found.usage.output_tokens == COUNTED
        assert found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0) == PROMPT - 1


async def test_anthropics_client_raises_on_the_error_event(up: FaultUpstream) -> None:
    wire = Anthropic()
    async with anthropic.AsyncAnthropic(api_key=KEY, base_url=up.origin, max_retries=0) as client:
        up.play("cell-1", streamed([wire.opening(), wire.piece("a"), wire.error_event(529)]))
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
            async with client.messages.stream(
                model="plain", max_tokens=8, messages=[{"role": "user", "content": ASKED}]
            ) as stream:
                await stream.get_final_message()


async def test_coheres_client_reads_chats(up: FaultUpstream) -> None:
    asked = [cohere.UserChatMessageV2(content=ASKED)]
    async with cohere.AsyncClientV2(api_key=KEY, base_url=up.origin) as client:
        up.play("cell-1", blocking(Cohere()))
        answer = await client.chat(model="plain", messages=asked)
        up.play("cell-1", streaming(Cohere()))
        events_read = [event async for event in client.chat_stream(model="plain", messages=asked)]
    assert answer.message.content is not None
    assert [content.text for content in answer.message.content if content.type == "text"] == [TEXT]
    assert answer.finish_reason == "COMPLETE"
    assert [event.type for event in events_read][-1] == "message-end"
    deltas = [event.delta for event in events_read if event.type == "content-delta"]
    texts = [
        delta.message.content.text for delta in deltas if delta and delta.message and delta.message.content
    ]
    assert "".join(text or "" for text in texts) == TEXT
