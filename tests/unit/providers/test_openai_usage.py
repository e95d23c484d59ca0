"""What an OpenAI-compatible upstream says it used, in the forms of different services, and when it failed."""

import json
import tracemalloc
from typing import Any

import pytest
from tests.support.asking import nothing, streamed, text_before_failure
from tests.support.jobs import job
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import UpstreamError, UpstreamFailed, UpstreamRateLimited
from headgate.providers.openai_compatible import OpenAICompatible
from headgate.providers.openai_stream import StreamedAnswer

COUNTS = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
EVENTS = {"Content-Type": "text/event-stream"}


@pytest.mark.parametrize(
    ("more", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 4}}, 4),
        ({"prompt_cache_hit_tokens": 5, "prompt_cache_miss_tokens": 4}, 5),
        ({"prompt_tokens_details": {"cached_tokens": 5}, "prompt_cache_hit_tokens": 5}, 5),
        ({"cached_tokens": 6}, 6),
        ({"prompt_cache_hit_tokens": 12}, 9),
        ({"prompt_cache_hit_tokens": -3}, 0),
        ({"prompt_tokens_details": {}, "completion_tokens_details": {"reasoning_tokens": 1}}, 0),
    ],
)
async def test_cached_tokens_are_found_wherever_they_stand_both_ways(
    upstream: Upstream, provider: OpenAICompatible, more: dict[str, Any], cached: int
) -> None:
    upstream.on("plain", Script(pieces=("a",), usage=COUNTS | more))
    usage = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=cached)
    assert (await provider.complete(job(), nothing)).usage == usage
    assert [chunk.usage for chunk in await streamed(provider, job()) if chunk.usage] == [usage]


def test_usage_in_the_last_chunk_of_text_counts() -> None:
    answer = StreamedAnswer("acme", 1, None)
    last = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}], "usage": COUNTS}
    assert answer.take([json.dumps(last).encode(), b"[DONE]"]) == [
        Chunk(0, "a", "stop"),
        Chunk(-1, usage=Usage(prompt_tokens=9, completion_tokens=2)),
    ]


def test_usage_that_is_none_costs_no_text() -> None:
    answer = StreamedAnswer("acme", 1, None)
    for strange in ("many", 7, [1], {"prompt_tokens": "9"}, {}, None):
        event = {"choices": [{"index": 0, "text": "a"}], "usage": strange}
        assert answer.take([json.dumps(event).encode()]) == [Chunk(0, "a")]
    assert answer.failure is None


async def test_an_error_in_a_whole_answer_bears_its_usage(
    upstream: Upstream, provider: OpenAICompatible
) -> None:
    body = {"error": {"message": "Slow down.", "code": 429}, "usage": COUNTS, "choices": []}
    upstream.on("plain", Script(body=body))
    with pytest.raises(UpstreamRateLimited) as raised:
        await provider.complete(job(), nothing)
    _, error = await text_before_failure(provider, job(), UpstreamRateLimited)
    assert raised.value.usage == error.usage == Usage(prompt_tokens=9, completion_tokens=2)


@pytest.mark.parametrize("usage", [None, "none", {"prompt_tokens": -1, "completion_tokens": 0}])
async def test_an_error_without_usage_has_none(
    upstream: Upstream, provider: OpenAICompatible, usage: Any
) -> None:
    upstream.on("plain", Script(body={"error": "Out of order.", "usage": usage}))
    with pytest.raises(UpstreamFailed) as raised:
        await provider.complete(job(), nothing)
    assert raised.value.usage is None


@pytest.mark.parametrize("apart", [True, False])
async def test_an_error_event_bears_the_usage_reported_with_or_before_it(
    upstream: Upstream, provider: OpenAICompatible, *, apart: bool
) -> None:
    error = {"error": {"message": "Overloaded.", "code": 503}}
    counted = {"choices": [{"index": 0, "text": "a"}], "usage": COUNTS}
    events = [counted, error] if apart else [error | {"usage": COUNTS}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    upstream.on("plain", Script(body=body, headers=EVENTS))
    text, raised = await text_before_failure(provider, job(), UpstreamError)
    assert text == ("a" if apart else "")
    assert raised.status == 503
    assert raised.usage == Usage(prompt_tokens=9, completion_tokens=2)


@pytest.mark.parametrize("error", ["null", '{"message":null}', '{"message":7}', "[]", '""', "false"])
async def test_only_a_null_is_no_error(upstream: Upstream, provider: OpenAICompatible, error: str) -> None:
    answer = f'{{"choices":[{{"index":0,"text":"a","finish_reason":"stop"}}],"error":{error},"usage":null}}'
    upstream.on("plain", Script(body=answer))
    if error == "null":
        completion = await provider.complete(job(), nothing)
        assert (completion.choices[0].text, completion.usage) == ("a", None)
    else:
        with pytest.raises(UpstreamFailed):
            await provider.complete(job(), nothing)


MIB = 1024 * 1024
FLOOD = "[" + "{}," * MIB + "{}]"  # 3 MiB


@pytest.mark.parametrize(
    "answer",
    [
        f'{{"choices":{FLOOD}}}',
        f'{{"usage":{FLOOD},"choices":[]}}',
        f'{{"error":{FLOOD}}}',
        f'{{"error":{{"message":{FLOOD}}}}}',
        f'{{"choices":[{{"index":0,"delta":{{"tool_calls":{FLOOD}}}}}]}}',
        f'{{"choices":[{{"index":0,"delta":{{"content":{FLOOD}}}}}]}}',
        f'{{"choices":[{{"index":0,"logprobs":{FLOOD}}}]}}',
        f'{{"other":{FLOOD}}}',
    ],
)
def test_a_flood_of_objects_takes_little_memory(answer: str) -> None:
    events = [answer.encode()]
    reader = StreamedAnswer("acme", 1, None, has_tools=True)
    tracemalloc.start()
    reader.take(events)
    reader.connection_ended()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(reader.failure, UpstreamFailed)
    assert peak < 4 * MIB
