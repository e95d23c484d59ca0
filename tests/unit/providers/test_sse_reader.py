"""However a stream of events is cut into blocks, the same data comes out."""

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.errors import UpstreamFailed
from headgate.providers.sse_reader import MAX_DATA_LINES, SSEReader


def read(blocks: list[bytes]) -> list[bytes]:
    reader = SSEReader()
    found = [data for block in blocks for data in reader.feed(block)]
    return found + reader.last()


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges) if start < end]


def test_a_burst_of_events_comes_out_in_order() -> None:
    assert read([b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n']) == [
        b'{"a":1}',
        b'{"b":2}',
        b"[DONE]",
    ]


def test_each_event_is_given_with_the_block_that_completes_it() -> None:
    reader = SSEReader()
    assert reader.feed(b"data: one\n\ndata: tw") == [b"one"]
    assert reader.feed(b"o") == []
    assert reader.feed(b"\n") == []
    assert reader.feed(b"\ndata: three\n\n") == [b"two", b"three"]


def test_comments_other_fields_and_empty_events_are_skipped() -> None:
    stream = (
        b": ping\n\nevent: message\nid: 7\nretry: 3\ndata: x\n\n\n\n\nevent: ping\n\ndatabase: no\n\ndata\n\n"
    )
    assert read([stream]) == [b"x"]


@pytest.mark.parametrize("nothing", [b"data: ", b"data:", b"data", b"data: \nid: 7", b"id: 7\ndata: "])
def test_an_event_of_no_data_is_none_however_it_comes(nothing: bytes) -> None:
    stream = nothing + b"\n\ndata: x\n\n"
    assert read([stream]) == [b"x"]
    assert read([stream[k : k + 1] for k in range(len(stream))]) == [b"x"]


def test_data_may_stand_anywhere_in_an_event() -> None:
    assert read([b"event: data\ndata: a\n\nid: 1\ndata:b\nid: 2\ndata\ndatabase: c\ndata: d\n\n"]) == [
        b"a",
        b"b\n\nd",
    ]


def test_an_event_of_a_flood_of_lines_costs_little_or_fails() -> None:
    reader = SSEReader()
    tracemalloc.start()
    try:
        assert reader.feed(b"ab\n" * 300_000 + b"data: x\n\n") == [b"x"]
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(UpstreamFailed, match="too many lines"):
        reader.feed(b"data:\n" * (MAX_DATA_LINES + 1) + b"\n")
    assert reader.feed(b"data:\n" * MAX_DATA_LINES + b"\n") == [b"\n" * (MAX_DATA_LINES - 1)]


def test_several_data_lines_are_one_event() -> None:
    assert read([b"data: {\ndata:  1\n: between\ndata:}\n\n"]) == [b"{\n 1\n}"]


def test_an_event_without_its_empty_line_is_given_at_the_end() -> None:
    assert read([b"data: [DONE]"]) == [b"[DONE]"]
    assert read([b"data: [DONE]\n"]) == [b"[DONE]"]
    assert read([b"data: a\r\n\r"]) == [b"a"]


@given(
    events=st.lists(
        st.tuples(
            st.lists(st.text('{}[]:," daté1', min_size=1).map(str.encode), min_size=1, max_size=3),
            st.sampled_from([b"", b": ping", b"event: x"]),
        ),
        max_size=6,
    ),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    places=st.lists(st.integers(0, 10_000), max_size=40),
)
def test_any_cut_gives_the_same_data(
    events: list[tuple[list[bytes], bytes]], newline: bytes, places: list[int]
) -> None:
    stream = b""
    for lines, other in events:
        stream += b"".join(b"data: " + line + newline for line in lines)
        stream += (other + newline if other else b"") + newline
    expected = [b"\n".join(lines) for lines, _ in events]
    assert read(cut(stream, places)) == expected
    assert read([stream[i : i + 1] for i in range(len(stream))]) == expected


def test_an_event_that_never_ends_is_refused() -> None:
    reader = SSEReader(max_event_bytes=100)
    reader.feed(b"data: " + b"x" * 90)
    with pytest.raises(UpstreamFailed, match="too large"):
        reader.feed(b"x" * 20)


def test_many_events_may_be_larger_together_than_one_may_be_alone() -> None:
    reader = SSEReader(max_event_bytes=100)
    assert len(reader.feed(b"data: 0123456789\n\n" * 50 + b"da")) == 50
