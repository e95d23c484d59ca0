"""What else a job may ask of Anthropic's format: images, answers that hold to a schema, what single models refuse."""

import asyncio
from base64 import b64encode
from typing import Any

import pytest
from anthropic.types import ImageBlockParam, OutputConfigParam, TextBlockParam
from pydantic import TypeAdapter
from tests.support.anthropic_asking import before_failure, chat, streamed
from tests.support.anthropic_upstream import AnthropicUpstream, error, start, streaming
from tests.support.asking import nothing
from tests.support.jobs import model
from tests.support.script import Script

from headgate.core.completion import Image, Message, ResponseFormat, Sampling, ToolCall
from headgate.core.errors import InvalidRequest, UpstreamTimeout, UpstreamUnavailable
from headgate.providers.anthropic import Anthropic

PNG = bytes(range(256))
DRAWN = Image(data=PNG, media_type="image/png", detail="high", param="messages[0].content[1]")
LINKED = Image(url="https://example.org/a.png", detail="auto")
SCHEMA = b'{"type": "object", "properties": {}, "additionalProperties": false}'


async def sent(upstream: AnthropicUpstream, provider: Anthropic, **fields: Any) -> dict[str, Any]:
    asked = chat(**fields)
    assert await provider.count_prompt(asked) is None
    await provider.complete(asked, nothing)
    body = upstream.requests[-1].json
    assert isinstance(body, dict)
    return body


# --- images -----------------------------------------------------------------------------------------------------


async def test_text_and_images_keep_their_order(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    parts = ("What is", DRAWN, " \n", LINKED, "and this?")
    body = await sent(
        upstream,
        provider,
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content="What is \nand this?", parts=parts),
            Message(role="user", content="Quick!"),
        ),
    )
    assert body["system"] == "Be brief."
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is"},
                {
                    "type": "image",
                    "source": {
                        "type": "base64",
                        "media_type": "image/png",
                        "data": b64encode(PNG).decode(),
                    },
                },
                {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
                {"type": "text", "text": "and this?"},
                {"type": "text", "text": "Quick!"},
            ],
        }
    ]
    TypeAdapter(list[TextBlockParam | ImageBlockParam]).validate_python(body["messages"][0]["content"])


async def test_a_tool_may_answer_with_an_image(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    call = ToolCall(id="call_1", name="look", arguments="{}")
    said = (
        Message(role="user", content="Look."),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="", parts=(LINKED,), tool_call_id="call_1"),
    )
    body = await sent(upstream, provider, messages=said)
    [result] = body["messages"][-1]["content"]
    assert [block["type"] for block in result["content"]] == ["image"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (Message(role="user", content="", parts=(Image(data=PNG, media_type="image/bmp", param="x"),)), "x"),
        (Message(role="user", content="", parts=(Image(url="https://a/b", detail="low", param="x"),)), "x"),
        (Message(role="assistant", content="", parts=(LINKED,)), "messages[1].content"),
        (Message(role="system", content="", parts=(LINKED,)), "messages[1].content"),
    ],
)
async def test_images_it_does_not_look_at_are_refused_by_their_place(
    provider: Anthropic, message: Message, param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(messages=(Message(role="user", content="Hi"), message)))
    assert raised.value.param == param
    assert raised.value.allowed


async def test_an_upload_that_is_not_read_yet_is_no_reason_to_refuse(provider: Anthropic) -> None:
    seen = Message(role="user", content="", parts=(Image(file_id="file-1"),))
    assert await provider.count_prompt(chat(messages=(seen,))) is None


# --- answers that hold to a schema ------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [None, False, True])
async def test_a_schema_is_held_to(
    upstream: AnthropicUpstream, provider: Anthropic, strict: bool | None
) -> None:
    held = ResponseFormat(kind="json_schema", schema=SCHEMA, name="thing", strict=strict)
    body = await sent(upstream, provider, response_format=held)
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    TypeAdapter(OutputConfigParam).validate_python(body["output_config"])


@pytest.mark.parametrize(
    ("own", "description"),
    [(b"{}", "A thing."), (b'{"description": "Its own."}', "Its own.")],
)
async def test_a_schema_s_description_stands_in_it(
    upstream: AnthropicUpstream, provider: Anthropic, own: bytes, description: str
) -> None:
    held = ResponseFormat(kind="json_schema", schema=own, name="thing", description="A thing.")
    body = await sent(upstream, provider, response_format=held)
    assert body["output_config"]["format"]["schema"] == {"description": description}


# --- what single models refuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p", "steering"),
    [
        (0.5, None, {"temperature": 0.5}),
        (None, 0.5, {"top_p": 0.5}),
        (0.5, 1.0, {"temperature": 0.5}),
        (1.0, 0.5, {"top_p": 0.5}),
        (1.0, 1.0, {"temperature": 1.0}),
    ],
)
async def test_a_model_that_takes_one_of_temperature_and_top_p_gets_one(
    upstream: AnthropicUpstream,
    provider: Anthropic,
    temperature: float | None,
    top_p: float | None,
    steering: dict[str, float],
) -> None:
    picky = model(refuses=("temperature+top_p",))
    body = await sent(
        upstream, provider, model=picky, sampling=Sampling(temperature=temperature, top_p=top_p)
    )
    assert {name: body[name] for name in ("temperature", "top_p") if name in body} == steering


async def test_a_last_word_of_the_assistant_s_is_refused_where_the_model_refuses_it(
    provider: Anthropic,
) -> None:
    said = (Message(role="user", content="Hi"), Message(role="assistant", content="Hello,"))
    assert await provider.count_prompt(chat(messages=said)) is None
    picky = model(refuses=("prefill",))
    assert await provider.count_prompt(chat(messages=said[:1], model=picky)) is None
    assert await provider.count_prompt(chat(model=picky)) is None
    with pytest.raises(InvalidRequest) as raised:
        await provider.count_prompt(chat(messages=said, model=picky))
    assert (raised.value.param, raised.value.code) == ("messages", "unsupported_parameter")
    with pytest.raises(InvalidRequest):
        await provider.count_prompt(
            chat(messages=(*said, Message(role="system", content="Be brief.")), model=picky)
        )


# --- deadlines, and what failures cost --------------------------------------------------------------------------


async def test_a_deadline_is_kept_both_ways(upstream: AnthropicUpstream, provider: Anthropic) -> None:
    upstream.on("plain", Script(silent=True))
    soon = asyncio.get_running_loop().time() + 0.2
    with pytest.raises(UpstreamTimeout):
        await provider.complete(chat(deadline=soon), nothing)
    with pytest.raises(UpstreamTimeout):
        await streamed(provider, chat(deadline=soon))


async def test_a_stream_that_fails_before_any_output_says_what_was_reported(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(streaming(start(), error("overloaded_error")))
    chunks, raised = await before_failure(provider, chat(), UpstreamUnavailable)
    assert not any(chunk.text or chunk.finish_reason for chunk in chunks)
    assert raised.usage is not None
    assert (raised.usage.prompt_tokens, raised.usage.cached_tokens) == (11, 3)


async def test_a_blocking_error_says_what_was_reported(
    upstream: AnthropicUpstream, provider: Anthropic
) -> None:
    upstream.script(
        Script(body=error("overloaded_error") | {"usage": {"input_tokens": 5, "output_tokens": 0}})
    )
    with pytest.raises(UpstreamUnavailable) as raised:
        await provider.complete(chat(), nothing)
    assert raised.value.usage is not None
    assert raised.value.usage.prompt_tokens == 5
