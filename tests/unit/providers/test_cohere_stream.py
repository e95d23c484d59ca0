"""A streamed answer of Cohere's, event by event."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.cohere_upstream import content_start, counts, delta, message_end, message_start, sse

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import UpstreamFailed, UpstreamTimeout
from headgate.providers.cohere_stream import CALLING, StreamedAnswer
from headgate.providers.sse_reader import SSEReader

ANSWER = (
    message_start()
    + content_start("thinking")
    + delta("Hm… ", kind="thinking")
    + sse({"type": "content-end", "index": 0})
    + content_start("text", index=1)
    + delta("Grüße, ", index=1)
    + delta("🌍\n\ndata: x", index=1)
    + sse({"type": "content-end", "index": 1})
    + message_end("MAX_TOKENS", counts(5, 2, unbilled=495, cached_tokens=448.0))
    + b"data: [DONE]\n\n"
)
CHUNKS = [
    Chunk(0, "Grüße, "),
    Chunk(0, "🌍\n\ndata: x"),
    Chunk(0, "", "length"),
    Chunk(-1, usage=Usage(prompt_tokens=5, completion_tokens=2)),
]


def read(blocks: list[bytes], answer: StreamedAnswer) -> list[Chunk]:
    """What Upstream.stream makes of these blocks, if the connection ends after them."""
    reader = SSEReader()
    chunks: list[Chunk] = []
    for block in blocks:
        if not answer.ended:
            chunks += answer.take(reader.feed(block))
    if not answer.ended:
        chunks += answer.take(reader.last())
        answer.connection_ended()
        chunks += answer.reported()
    return chunks


def said(stream: bytes, preface: str = "") -> tuple[list[Chunk], StreamedAnswer]:
    answer = StreamedAnswer("acme", preface)
    return read([stream], answer), answer


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(0, len(ANSWER) * 2)))
def test_cuts_anywhere_change_nothing(newline: bytes, cuts: list[int]) -> None:
    stream = ANSWER.replace(b"\n", newline)
    places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    blocks = [stream[start:end] for start, end in pairwise(places)]
    answer = StreamedAnswer("acme")
    assert read(blocks, answer) == CHUNKS
    assert answer.whole


def test_one_cut_at_every_place_and_a_cut_at_all_places_change_nothing() -> None:
    for place in range(1, len(ANSWER)):
        assert read([ANSWER[:place], ANSWER[place:]], StreamedAnswer("acme")) == CHUNKS
    bytewise = [ANSWER[place : place + 1] for place in range(len(ANSWER))]
    assert read(bytewise, StreamedAnswer("acme")) == CHUNKS


def test_a_stream_that_ends_at_any_place_before_its_last_event_is_broken() -> None:
    end = ANSWER.index(b"event: message-end")
    for place in range(end + 1):
        chunks, answer = said(ANSWER[:place])
        assert isinstance(answer.failure, UpstreamFailed)
        assert not answer.whole
        assert chunks == CHUNKS[: len(chunks)]
        assert len(chunks) <= 2


def test_the_last_event_may_lack_its_empty_line() -> None:
    chunks, answer = said((delta("a") + message_end("COMPLETE")).removesuffix(b"\n\n"))
    assert chunks == [Chunk(0, "a"), Chunk(0, "", "stop")]
    assert answer.whole


def test_done_is_no_end() -> None:
    chunks, answer = said(delta("a") + b"data: [DONE]\n\n")
    assert chunks == [Chunk(0, "a")]
    assert isinstance(answer.failure, UpstreamFailed)


def test_nothing_after_the_last_event_counts() -> None:
    chunks, answer = said(message_end("COMPLETE") + delta("late") + b"data: {\n\n")
    assert chunks == [Chunk(0, "", "stop")]
    assert answer.whole


@pytest.mark.parametrize(
    "event",
    [
        {"type": "debug", "prompt": "<|START_OF_TURN_TOKEN|>"},
        {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": "I will look."}}},
        {"type": "tool-call-start", "index": 0, "delta": {"message": {"tool_calls": {"id": "x"}}}},
        {"type": "tool-call-end", "index": 0},
        {"type": "citation-start", "index": 0, "delta": {"message": {"citations": {"start": 1}}}},
        {"type": "citation-end", "index": 0},
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": ""}}}},
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": None}}}},
        {"type": "content-delta", "index": 0, "delta": {"message": None}},
        {"type": "what-comes-next", "delta": [1, 2], "content": 7},
    ],
)
def test_events_without_text_are_passed_over(event: dict[str, Any]) -> None:
    chunks, answer = said(delta("a") + sse(event) + delta("b") + message_end("COMPLETE"))
    assert "".join(chunk.text for chunk in chunks) == "ab"
    assert len(chunks) == 3
    assert answer.whole


def test_text_at_the_start_of_a_content_counts() -> None:
    start = {"type": "content-start", "index": 0, "delta": {"message": {"content": {"text": "He"}}}}
    chunks, _ = said(sse(start) + delta("llo") + message_end("COMPLETE"))
    assert "".join(chunk.text for chunk in chunks) == "Hello"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("COMPLETE", "stop"),
        ("STOP_SEQUENCE", "stop"),
        ("TOOL_CALL", "stop"),
        ("MAX_TOKENS", "length"),
        ("WHAT_COMES_NEXT", "stop"),
        (None, "stop"),
    ],
)
def test_finish_reasons(given: str | None, expected: str) -> None:
    chunks, _ = said(message_end(given))
    assert [chunk.finish_reason for chunk in chunks] == [expected]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"finish_reason": "ERROR"}, UpstreamFailed),
        ({"finish_reason": "ERROR_TOXIC"}, UpstreamFailed),
        ({"finish_reason": "ERROR_LIMIT", "error": "too long"}, UpstreamFailed),
        ({"finish_reason": "TIMEOUT", "error": "too slow"}, UpstreamTimeout),
        ({"finish_reason": "COMPLETE", "error": "it fell over"}, UpstreamFailed),
        ({"error": {"why": "no reason"}}, UpstreamFailed),
    ],
)
def test_an_end_with_an_error_is_a_failure_and_its_usage_counts(
    end: dict[str, Any], expected: type[Exception]
) -> None:
    last = {"type": "message-end", "delta": end | {"usage": counts(3, 1)}}
    chunks, answer = said(delta("a") + sse(last))
    assert chunks == [Chunk(0, "a"), Chunk(-1, usage=Usage(prompt_tokens=3, completion_tokens=1))]
    assert type(answer.failure) is expected
    assert not answer.whole


def test_the_echoed_prompt_comes_first_and_once() -> None:
    chunks, _ = said(message_start() + delta("b") + delta("c") + message_end("COMPLETE"), "a")
    assert chunks == [
        Chunk(0, "a", tokens=0, echoed=True),
        Chunk(0, "b"),
        Chunk(0, "c"),
        Chunk(0, "", "stop"),
    ]
    assert said(message_end("COMPLETE"), "a")[0][0] == Chunk(0, "a", tokens=0, echoed=True)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"not json",
        b"[]",
        b'"message-end"',
        b'{"type":7}',
        b'{"type":"content-delta","delta":null}',
        b'{"type":"content-delta","delta":[]}',
        b'{"type":"content-delta","delta":{"message":{"content":[]}}}',
        b'{"type":"content-delta","delta":{"message":{"content":{"text":7}}}}',
        b'{"type":"content-delta","delta":{"message":{"content":{"text":"\xff"}}}}',
        b'{"type":"content-delta","delta":{"message":{"content":{"text":"\\ud800"}}}}',
        b'{"type":"message-end","delta":"COMPLETE"}',
        b'{"type":"message-end","delta":{"finish_reason":7}}',
        b'{"message":"internal server error","id":"x"}',
        b'{"x":' + b"[" * 100_000,
        b'{"type":"message-end","delta":{"usage":' + b"[" * 100_000,
    ],
)
def test_what_cannot_be_believed_fails_the_answer(data: bytes) -> None:
    answer = StreamedAnswer("acme")
    good = json.dumps({"type": "content-delta", "delta": {"message": {"content": {"text": "a"}}}}).encode()
    assert answer.take([good, data, good]) == [Chunk(0, "a")]
    assert answer.ended
    assert isinstance(answer.failure, UpstreamFailed)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (counts(5, 2), Usage(prompt_tokens=5, completion_tokens=2)),
        (counts(0, 0), Usage(prompt_tokens=0, completion_tokens=0)),
        # What is not billed comes first in the prompt, so the cache covers it first.
        (counts(5, 2, unbilled=495, cached_tokens=448.0), Usage(prompt_tokens=5, completion_tokens=2)),
        (
            counts(100, 2, unbilled=495, cached_tokens=512),
            Usage(prompt_tokens=100, completion_tokens=2, cached_tokens=17),
        ),
        (
            counts(10, 2, cached_tokens=64.0),
            Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=10),
        ),
        (counts(10, 2, cached_tokens=-64), Usage(prompt_tokens=10, completion_tokens=2)),
        (counts(10, 2, cached_tokens=0.5), Usage(prompt_tokens=10, completion_tokens=2)),
        (
            {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": 7, "output_tokens": 3}},
            Usage(prompt_tokens=7, completion_tokens=3),
        ),
        (
            {"billed_units": {"input_tokens": 5, "output_tokens": 1.5}, **{"tokens": counts(8, 2)["tokens"]}},
            Usage(prompt_tokens=8, completion_tokens=2),
        ),
        (
            {"billed_units": {"input_tokens": 5, "output_tokens": 2}, "cached_tokens": 4},
            Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4),
        ),
        (counts(2.5, 1), None),
        (counts(-1, 1), None),
        (counts(1e300, 1), None),
        ({"tokens": {"input_tokens": 7}}, None),
        ({"tokens": {"input_tokens": True, "output_tokens": 1}}, None),
        ({"tokens": {"input_tokens": "7", "output_tokens": "1"}}, None),
        ({}, None),
    ],
)
def test_usage_is_what_is_billed(usage: dict[str, Any], expected: Usage | None) -> None:
    chunks, answer = said(message_end("COMPLETE", usage))
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([] if expected is None else [expected])
    assert answer.whole


@given(st.binary())
def test_no_bytes_raise_anything_but_upstream_errors(stream: bytes) -> None:
    _, answer = said(stream)
    assert isinstance(answer.failure, UpstreamFailed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)

KINDS = ("message-start", "content-start", "content-delta", "message-end", "debug", *sorted(CALLING))


@given(
    kind=st.sampled_from(KINDS),
    fields=st.dictionaries(st.sampled_from(["delta", "message", "index"]), JSON),
    end=st.dictionaries(st.sampled_from(["finish_reason", "usage", "error"]), JSON),
    call=st.dictionaries(st.sampled_from(["id", "type", "function"]), JSON),
)
def test_events_of_any_shape_end_in_an_answer_or_a_failure(
    kind: str, fields: dict[str, Any], end: dict[str, Any], call: dict[str, Any]
) -> None:
    called = {"type": kind, "delta": {"message": {"tool_calls": call}}}
    answer = StreamedAnswer("acme", tools=True)
    read([sse({"type": kind, **fields}) + sse(called) + sse({"type": "message-end", "delta": end})], answer)
    assert answer.ended
    assert answer.whole == (answer.failure is None)
    for event in ({"type": kind, **fields}, {"type": "message-end", "delta": end}):
        _, answer = said(sse(event))
        assert answer.ended
        assert answer.whole == (answer.failure is None)
