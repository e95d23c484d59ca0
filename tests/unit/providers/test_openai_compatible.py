"""An OpenAI-compatible upstream: what it is sent, what is made of its answers, and what is not believed."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from tests.support.asking import KEY, nothing, provider_for, streamed, text_before_failure
from tests.support.jobs import job, model
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.config import ProviderSettings
from headgate.core.completion import Message, Sampling, Usage
from headgate.core.errors import (
    ModelUnavailable,
    Overloaded,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.openai_compatible import OpenAICompatible

# --- what goes out ----------------------------------------------------------------------------------------------


async def test_only_what_is_set_is_sent(upstream: Upstream, provider: OpenAICompatible) -> None:
    await provider.complete(job("up-name", max_tokens=9), nothing)
    [request] = upstream.requests
    assert request.path == "/v1/completions"
    assert request.json == {"model": "up-name", "prompt": "say hello", "max_tokens": 9}
    assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_everything_that_is_set_is_sent(upstream: Upstream, provider: OpenAICompatible) -> None:
    sampling = Sampling(
        temperature=0.0, top_p=0.5, presence_penalty=-1.0, frequency_penalty=2.0, seed=0, stop=("\n", "END")
    )
    await streamed(provider, job(n=2, sampling=sampling))
    assert upstream.requests[0].json == {
        "model": "plain",
        "prompt": "say hello",
        "max_tokens": 64,
        "n": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "seed": 0,
        "stop": ["\n", "END"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_an_empty_prompt_is_still_a_prompt(upstream: Upstream, provider: OpenAICompatible) -> None:
    await provider.complete(job(prompt=""), nothing)
    assert upstream.requests[0].json["prompt"] == ""


async def test_the_chat_shape_goes_to_its_own_path(upstream: Upstream, provider: OpenAICompatible) -> None:
    messages = (Message(role="system", content="Be é."), Message(role="user", content="Hi"))
    completion = await provider.complete(job(messages=messages), nothing)
    await provider.complete(job(shape="chat", prompt="Hello"), nothing)
    assert completion.choices[0].text == "echo: Hi"
    assert [request.path for request in upstream.requests] == ["/v1/chat/completions"] * 2
    assert upstream.requests[0].json["messages"] == [
        {"role": "system", "content": "Be é."},
        {"role": "user", "content": "Hi"},
    ]
    assert upstream.requests[1].json["messages"] == [{"role": "user", "content": "Hello"}]
    assert "prompt" not in upstream.requests[0].json


async def test_a_base_url_may_end_with_a_slash(upstream: Upstream) -> None:
    provider = provider_for(upstream.url + "/")
    await provider.complete(job(), nothing)
    assert upstream.requests[0].path == "/v1/completions"
    await provider.aclose()


# --- availability -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_without_its_key_the_reason_names_the_variable(key: str | None) -> None:
    provider = provider_for("http://127.0.0.1:1/v1", key)
    assert provider.unavailable(model()) == "set ACME_KEY"
    with pytest.raises(ModelUnavailable, match="set ACME_KEY"):
        await provider.complete(job(), nothing)
    with pytest.raises(ModelUnavailable, match="set ACME_KEY"):
        await streamed(provider, job())
    await provider.aclose()


async def test_a_key_that_no_header_can_carry_is_not_used() -> None:
    reason = provider_for("http://127.0.0.1:1/v1", "sk-\nX-Evil: 1").unavailable(model())
    assert reason is not None
    assert "ACME_KEY" in reason
    assert "Evil" not in reason


async def test_an_upstream_that_needs_no_key_gets_none(upstream: Upstream) -> None:
    provider = OpenAICompatible("local", ProviderSettings(kind="openai", base_url=upstream.url), None)
    assert provider.unavailable(model()) is None
    await provider.complete(job(), nothing)
    assert "authorization" not in upstream.requests[0].headers
    await provider.aclose()


# --- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "stop"),
        ("function_call", "stop"),
        ("eos", "stop"),
        (None, "stop"),
    ],
)
async def test_finish_reasons_are_ours_both_ways(
    upstream: Upstream, provider: OpenAICompatible, given: str | None, ours: str
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), finish=given))
    completion = await provider.complete(job(), nothing)
    chunks = await streamed(provider, job())
    assert completion.choices[0].finish_reason == ours
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [ours]


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage(prompt_tokens=0, completion_tokens=0)),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
            Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 99}},
            Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=9),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": None}},
            Usage(prompt_tokens=9, completion_tokens=2),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": None, "other": []},
            Usage(prompt_tokens=9, completion_tokens=2),
        ),
        ({"prompt_tokens": -1, "completion_tokens": 2}, None),
        ({"prompt_tokens": 1, "completion_tokens": 2**70}, None),
        ({"prompt_tokens": 1}, None),
        ({"prompt_tokens": "many", "completion_tokens": 2}, None),
        ("none", None),
    ],
)
async def test_usage_is_the_upstreams_or_unknown_both_ways(
    upstream: Upstream, provider: OpenAICompatible, reported: Any, usage: Usage | None
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), usage=reported))
    completion = await provider.complete(job(), nothing)
    chunks = await streamed(provider, job())
    assert completion.usage == usage
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([] if usage is None else [usage])
    assert "".join(chunk.text for chunk in chunks) == "ab"


async def test_what_arrives_together_comes_together(upstream: Upstream, provider: OpenAICompatible) -> None:
    upstream.on("plain", Script(pieces=tuple(f" w{i}" for i in range(50)), block=True))
    batches = [batch async for batch in provider.stream(job(), nothing)]
    assert len(batches) < 10
    assert "".join(chunk.text for batch in batches for chunk in batch) == "".join(f" w{i}" for i in range(50))


async def test_a_stream_whose_choices_all_finished_needs_no_done(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    chunks = await streamed(provider, job("no-done"))
    assert "".join(chunk.text for chunk in chunks) == "alpha beta gamma delta"
    assert [chunk.usage is not None for chunk in chunks].count(True) == 1


async def test_the_connection_is_used_again_after_a_stream(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    for _ in range(3):
        await streamed(provider, job())
        await asyncio.sleep(0.05)  # the response's last bytes arrive while nobody waits for them
    assert upstream.accepted == 1


# --- what is not believed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cut", "reset"])
async def test_a_stream_that_breaks_off_fails_after_what_came(
    upstream: Upstream, provider: OpenAICompatible, name: str
) -> None:
    text, _ = await text_before_failure(provider, job(name), UpstreamFailed)
    assert text == "alpha beta"


async def test_a_stream_that_ends_in_order_but_too_early_fails(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    upstream.script(Script(pieces=("a", "b"), finish=None, done=False))
    text, error = await text_before_failure(provider, job(), UpstreamFailed)
    assert text == "ab"
    assert "too early" in error.message


async def test_an_error_event_fails_after_what_came(upstream: Upstream, provider: OpenAICompatible) -> None:
    text, error = await text_before_failure(provider, job("error-event"), UpstreamFailed)
    assert text == "alpha beta"
    assert "fell over" not in error.message


async def test_an_answer_that_says_200_and_error_is_an_error_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    with pytest.raises(UpstreamUnavailable):
        await provider.complete(job("error-200"), nothing)
    text, _ = await text_before_failure(provider, job("error-200"), UpstreamUnavailable)
    assert text == ""


@pytest.mark.parametrize(
    "script",
    [
        Script(body="<html>busy</html>", headers={"Content-Type": "text/html"}),
        Script(body="{not json"),
        Script(body="[" * 100_000),
        Script(body='{"choices": "none"}'),
        Script(body="{}"),
        Script(body={"choices": []}),
        Script(body={"choices": [{"index": 1, "text": "a"}]}),
        Script(body={"choices": [{"index": 0, "text": "a"}, {"index": 0, "text": "b"}]}),
        Script(status=204),
        Script(status=302, headers={"Location": "/v1/elsewhere"}),
        Script(close_at=0),
        Script(reset_at=1),
    ],
)
async def test_strange_answers_are_upstream_failures_both_ways(
    upstream: Upstream, provider: OpenAICompatible, script: Script
) -> None:
    upstream.on("plain", script)
    with pytest.raises(UpstreamFailed):
        await provider.complete(job(), nothing)
    with pytest.raises(UpstreamFailed):
        await streamed(provider, job())


async def test_fewer_choices_than_asked_for_are_a_failure_both_ways(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    one = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}
    events = 'data: {"choices":[{"index":0,"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    upstream.script(Script(body=one), Script(body=events, headers={"Content-Type": "text/event-stream"}))
    with pytest.raises(UpstreamFailed):
        await provider.complete(job(n=2), nothing)
    with pytest.raises(UpstreamFailed):
        await streamed(provider, job(n=2))


async def test_a_silent_upstream_is_a_time_out_both_ways(upstream: Upstream) -> None:
    provider = provider_for(upstream.url, timeout_s=0.2)
    with pytest.raises(UpstreamTimeout):
        await provider.complete(job("silent"), nothing)
    with pytest.raises(UpstreamTimeout):
        await streamed(provider, job("silent"))
    await provider.aclose()


async def test_a_jobs_own_deadline_holds_both_ways(upstream: Upstream, provider: OpenAICompatible) -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(UpstreamTimeout):
        await provider.complete(job("silent", deadline=loop.time() + 0.1), nothing)
    with pytest.raises(UpstreamTimeout):
        await streamed(provider, job("held-after-2", deadline=loop.time() + 0.1))
    for request in upstream.requests:
        await request.closed.wait()


async def test_the_cap_of_the_settings_holds(upstream: Upstream) -> None:
    provider = provider_for(upstream.url, max_concurrency=1)
    first = asyncio.create_task(provider.complete(job("held"), nothing))
    await upstream.request(0)
    second = asyncio.create_task(provider.complete(job(), nothing))
    await asyncio.sleep(0)  # it takes its place in the queue, which holds as many as the cap
    with pytest.raises(Overloaded):
        await provider.complete(job(), nothing)
    upstream.release()
    await first
    await second
    assert upstream.accepted == 1
    await provider.aclose()


def test_without_a_key_no_http_client_is_loaded() -> None:
    script = (
        "import sys\n"
        "from headgate.config import ProviderSettings\n"
        "from headgate.providers.openai_compatible import OpenAICompatible\n"
        "settings = ProviderSettings(kind='openai', base_url='http://127.0.0.1:1', api_key_env='KEY')\n"
        "OpenAICompatible('acme', settings, None)\n"
        "assert 'aiohttp' not in sys.modules\n"
        "OpenAICompatible('acme', settings, 'key')\n"
        "assert 'aiohttp' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
