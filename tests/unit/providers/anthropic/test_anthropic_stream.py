"""A streamed answer in Anthropic's format, event by event and byte by byte."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.anthropic_asking import told
from tests.support.anthropic_upstream import (
    COUNTED,
    PING,
    STOP,
    closed,
    ending,
    error,
    events,
    opened,
    piece,
    start,
    text_block,
    thinking_block,
    thought,
)
from tests.support.jobs import job

from headgate.core.completion import Chunk, Tool, Tools, Usage
from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.anthropic_stream import StreamedMessage
from headgate.providers.sse_reader import SSEReader

USAGE = Usage(prompt_tokens=11, completion_tokens=4, cached_tokens=3)
OPEN = (start(), opened(0, text_block("")))


class Told(StreamedMessage):
    """Without the input's count at the beginning, which the end repeats."""

    def take(self, events: Sequence[bytes]) -> list[Chunk]:
        return told(super().take(events))


def answer_to(**fields: Any) -> StreamedMessage:
    return Told("acme", job(shape="chat", **fields), None)


def data(*contents: Any) -> list[bytes]:
    return [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]


def test_a_stream_is_its_texts_a_reason_and_usage() -> None:
    answer = answer_to()
    assert answer.take(data(*OPEN, PING, piece(0, "Hel"), piece(0, "lo"))) == [
        Chunk(0, "Hel"),
        Chunk(0, "lo"),
    ]
    assert not answer.whole
    last = [Chunk(0, "", "length"), Chunk(-1, usage=USAGE)]
    assert answer.take(data(closed(0), ending("max_tokens"))) == last
    assert answer.whole
    assert not answer.ended
    assert answer.take(data(STOP, piece(0, "more"))) == []
    assert answer.ended
    assert answer.failure is None
    assert answer.reported() == []


def test_thinking_and_tools_are_not_text() -> None:
    answer = answer_to()
    signature = {"type": "signature_delta", "signature": "Eq"}
    tool = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    partial = {"type": "input_json_delta", "partial_json": '{"text": "no"}'}
    chunks = answer.take(
        data(
            start(),
            opened(0, thinking_block("")),
            thought(0, "Let me see."),
            {"type": "content_block_delta", "index": 0, "delta": signature},
            closed(0),
            opened(1, text_block("So")),
            piece(1, ": yes"),
            closed(1),
            opened(2, tool),
            {"type": "content_block_delta", "index": 2, "delta": partial},
            closed(2),
            ending("tool_use"),
        )
    )
    assert chunks == [Chunk(0, "So"), Chunk(0, ": yes"), Chunk(0, "", "stop"), Chunk(-1, usage=USAGE)]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "ping"},
        {"type": "message_paused", "delta": "one", "message": [], "usage": 7},
        {"type": "vendor_event", "content_block": {"type": 3}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "future_delta", "future": [1]}},
        {"type": "content_block_delta"},
        {},
    ],
)
def test_events_of_unknown_kinds_change_nothing(event: Any) -> None:
    answer = answer_to()
    chunks = answer.take(data(*OPEN, event, piece(0, "a"), event, ending(), event, STOP))
    assert chunks == [Chunk(0, "a"), Chunk(0, "", "stop"), Chunk(-1, usage=USAGE)]
    assert answer.failure is None


@pytest.mark.parametrize(
    ("first", "last", "usage"),
    [
        (COUNTED, {"output_tokens": 9}, Usage(prompt_tokens=11, completion_tokens=9, cached_tokens=3)),
        (
            {"input_tokens": 5, "output_tokens": 1},
            {"output_tokens": 2},
            Usage(prompt_tokens=5, completion_tokens=2),
        ),
        (
            {"input_tokens": 5, "cache_read_input_tokens": None, "output_tokens": 1},
            {"input_tokens": 6, "cache_read_input_tokens": 2, "output_tokens": 2},
            Usage(prompt_tokens=8, completion_tokens=2, cached_tokens=2),
        ),
        (None, {"input_tokens": 6, "output_tokens": 2}, Usage(prompt_tokens=6, completion_tokens=2)),
        (
            {"input_tokens": 0, "output_tokens": 0},
            {"output_tokens": 0},
            Usage(prompt_tokens=0, completion_tokens=0),
        ),
        (None, {"output_tokens": 2}, None),
        (COUNTED, {"output_tokens": -2}, None),
        (COUNTED, {"output_tokens": "many"}, None),
        (COUNTED, {"output_tokens": 2**70}, None),
        (COUNTED, {"output_tokens": 2.5}, None),
        ({"input_tokens": -1, "output_tokens": 1}, {"input_tokens": 5, "output_tokens": 2}, None),
        ("none", {"output_tokens": 2}, None),
    ],
)
def test_reports_of_usage_are_merged_and_nonsense_is_none(first: Any, last: Any, usage: Usage | None) -> None:
    answer = answer_to()
    chunks = answer.take(data(start(usage=first), piece(0, "a"), ending(usage=last), STOP))
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([] if usage is None else [usage])
    assert answer.failure is None


def test_several_message_deltas_give_one_reason_and_the_last_usage() -> None:
    answer = answer_to()
    deltas = (ending(None, {"output_tokens": 2}), ending("refusal", {"output_tokens": 3}), ending("end_turn"))
    chunks = answer.take(data(*OPEN, piece(0, "a"), *deltas, STOP))
    assert chunks == [Chunk(0, "a"), Chunk(0, "", "content_filter"), Chunk(-1, usage=USAGE)]


def test_an_end_without_a_reason_is_a_stop() -> None:
    assert answer_to().take(data(start(usage=None), STOP)) == [Chunk(0, "", "stop")]


def test_a_connection_may_end_after_the_reason_and_not_before() -> None:
    early, late = answer_to(), answer_to()
    early.take(data(*OPEN, piece(0, "a")))
    assert late.take(data(*OPEN, piece(0, "a"), ending()))[-1] == Chunk(-1, usage=USAGE)
    early.connection_ended()
    late.connection_ended()
    assert isinstance(early.failure, UpstreamFailed)
    assert late.failure is None
    assert late.reported() == []


def test_text_nobody_counted_is_estimated_when_the_stream_breaks_off() -> None:
    answer = answer_to()
    answer.take(data(*OPEN, piece(0, "abcdefgh"), piece(0, "é")))
    answer.connection_ended()
    [chunk] = answer.reported()
    # 10 bytes, a token per 4; the 1 that a message begins with is no count of what it comes to.
    assert chunk.usage == Usage(prompt_tokens=11, completion_tokens=3, cached_tokens=3, source="estimate")


def test_no_estimate_is_above_the_limit() -> None:
    answer = answer_to(max_tokens=5)
    answer.take(data(*OPEN, piece(0, "x" * 400)))
    answer.connection_ended()
    [chunk] = answer.reported()
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 5


def test_a_stream_that_breaks_off_before_any_text_owes_what_was_reported() -> None:
    answer = answer_to()
    answer.take(data(*OPEN))
    answer.connection_ended()
    assert answer.reported() == [
        Chunk(-1, usage=Usage(prompt_tokens=11, completion_tokens=1, cached_tokens=3))
    ]


def test_an_echo_comes_once_and_before_all_else() -> None:
    answer = answer_to(echo=True)
    assert answer.take(data(*OPEN)) == []
    echoed = Chunk(0, "say hello", tokens=0, echoed=True)
    assert answer.take(data(piece(0, "a"))) == [echoed, Chunk(0, "a")]
    ended = [Chunk(0, "b"), Chunk(0, "", "stop"), Chunk(-1, usage=USAGE)]
    assert answer.take(data(piece(0, "b"), ending())) == ended
    assert answer_to(echo=True).take(data(start(usage=None), ending(usage=None))) == [
        echoed,
        Chunk(0, "", "stop"),
    ]


@pytest.mark.parametrize(
    ("kind", "expected", "status"),
    [
        ("invalid_request_error", UpstreamRejected, 400),
        ("authentication_error", UpstreamAuth, 401),
        ("billing_error", UpstreamAuth, 402),
        ("permission_error", UpstreamAuth, 403),
        ("not_found_error", UpstreamFailed, 404),
        ("conflict_error", UpstreamFailed, 409),
        ("request_too_large", UpstreamRejected, 413),
        ("rate_limit_error", UpstreamRateLimited, 429),
        ("api_error", UpstreamFailed, 500),
        ("timeout_error", UpstreamTimeout, 504),
        ("overloaded_error", UpstreamUnavailable, 529),
        ("some_new_error", UpstreamFailed, 500),
    ],
)
def test_error_events_mean_what_their_status_would(
    kind: str, expected: type[UpstreamError], status: int
) -> None:
    answer = answer_to()
    assert answer.take(data(*OPEN, piece(0, "a"), ending(None), error(kind), piece(0, "b"))) == [
        Chunk(0, "a"),
        Chunk(-1, usage=USAGE),
    ]
    assert type(answer.failure) is expected
    assert answer.failure.status == status
    assert ("Told to fail" in answer.failure.message) == (expected is UpstreamRejected)


@pytest.mark.parametrize(
    "reported",
    [None, [], 7, "words", {"type": ["api_error"]}, {"message": {}}, {"code": "9" * 5000}, {"code": 10**30}],
)
def test_errors_told_strangely_are_failures(reported: Any) -> None:
    answer = answer_to()
    answer.take(data(*OPEN, {"type": "error", "error": reported}))
    assert type(answer.failure) is UpstreamFailed


@pytest.mark.parametrize(
    "event",
    [
        b"{",
        b"not json",
        b"[]",
        b'"message_stop"',
        b'{"type": 7}',
        b'{"type":"content_block_delta","delta":"text"}',
        b'{"type":"content_block_delta","delta":{"type":"text_delta","text":7}}',
        b'{"type":"content_block_delta","delta":{"type":"text_delta","text":"\xff"}}',
        b'{"type":"content_block_start","content_block":[]}',
        b'{"type":"message_start","message":"hi"}',
        b'{"type":"message_delta","delta":{"stop_reason":["end_turn"]}}',
        b'{"type":"message_stop"}',
        b'{"type":"ping","x":' + b"[" * 100_000,
        b'{"type":"message_delta","usage":' + b"[" * 100_000,
    ],
)
def test_what_cannot_be_believed_fails_the_answer(event: bytes) -> None:
    answer = answer_to()
    assert answer.take([event]) == []
    assert answer.ended
    assert isinstance(answer.failure, UpstreamFailed)


def test_text_after_the_end_of_the_message_is_a_failure() -> None:
    answer = answer_to()
    answer.take(data(*OPEN, piece(0, "a"), ending(), piece(0, "b")))
    assert isinstance(answer.failure, UpstreamFailed)


TEXTS = ("Grüße", " ", "\n\n", "🦙 data: x", "end")
STREAM = events(*OPEN, PING, *(piece(0, text) for text in TEXTS), closed(0), ending(), STOP).encode()


def chunks_of(stream: bytes, places: list[int]) -> list[Chunk]:
    reader, answer = SSEReader(), answer_to()
    borders = [0, *sorted(place % len(stream) for place in places), len(stream)]
    chunks: list[Chunk] = []
    for first, last in pairwise(borders):
        chunks += answer.take(reader.feed(stream[first:last]))
    chunks += answer.take(reader.last())
    answer.connection_ended()
    assert answer.failure is None
    return chunks + answer.reported()


EXPECTED = [*(Chunk(0, text) for text in TEXTS), Chunk(0, "", "stop"), Chunk(-1, usage=USAGE)]
UNESCAPED = STREAM.replace(json.dumps("🦙")[1:-1].encode(), "🦙".encode()).replace(b"\\u00fc", "ü".encode())


@pytest.mark.parametrize("stream", [STREAM, UNESCAPED, UNESCAPED.replace(b"\n", b"\r\n")])
def test_a_cut_at_any_byte_gives_the_same_chunks(stream: bytes) -> None:
    for place in range(len(stream)):
        assert chunks_of(stream, [place]) == EXPECTED


@given(places=st.lists(st.integers(0, 100_000), max_size=60))
def test_any_cuts_give_the_same_chunks(places: list[int]) -> None:
    assert chunks_of(UNESCAPED, places) == EXPECTED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KINDS = (
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "error",
    "other",
)
PARTS = ("type", "text", "stop_reason", "usage", "output_tokens", "id", "name", "input", "partial_json")
TOOLS = Tools(tools=(Tool(name="look"),))
FIELDS = ("delta", "content_block", "message", "usage", "error", "index")


@given(
    kind=st.sampled_from(KINDS) | JSON,
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON),
    inner=st.dictionaries(st.sampled_from(PARTS), JSON | st.just("tool_use") | st.just("input_json_delta")),
    tools=st.none() | st.just(TOOLS),
)
def test_no_event_raises_anything(
    kind: Any, fields: dict[str, Any], inner: dict[str, Any], tools: Tools | None
) -> None:
    answer = answer_to(tools=tools)
    answer.take(data({"type": kind} | fields))
    if not answer.ended:
        answer.take(data({"type": kind} | dict.fromkeys(FIELDS[:4], inner)))
    answer.connection_ended()
    assert all(chunk.index in (0, -1) for chunk in answer.reported())


def test_what_the_prompt_came_to_is_told_at_the_beginning() -> None:
    (chunk,) = StreamedMessage("acme", job(shape="chat"), None).take(data(start()))
    assert chunk.index == -1 and chunk.usage is not None
    assert (chunk.usage.prompt_tokens, chunk.usage.cached_tokens) == (
        USAGE.prompt_tokens,
        USAGE.cached_tokens,
    )
    assert not chunk.usage.final


@pytest.mark.parametrize("rest", [b'{"type":"message_s', b"[DONE]"])
def test_what_comes_after_the_reason_to_stop_cannot_spoil_the_answer(rest: bytes) -> None:
    answer = answer_to()
    assert answer.take(data(*OPEN, piece(0, "a"), ending()))[-1] == Chunk(-1, usage=USAGE)
    assert answer.take([rest]) == []
    assert answer.ended and answer.failure is None
