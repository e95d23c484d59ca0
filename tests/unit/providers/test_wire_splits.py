"""Streams of every format mean the same however they are cut into blocks, good ones and garbage alike."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.answer_readers import read
from tests.support.fault_upstream import cut
from tests.support.wires import CACHED, PROMPT, WIRES, Wire, data

from headgate.core.completion import Usage
from headgate.core.errors import UpstreamError, UpstreamFailed
from headgate.providers.sse_reader import SSEReader

PIECES = ("Grüße, ", "世界 ", "👩‍👩‍👧 ", "🌍\n\ndata: [DONE]\n\n", 'e\u0301"\\\u2028')
USAGE = Usage(prompt_tokens=PROMPT, completion_tokens=len(PIECES), cached_tokens=CACHED)
NEWLINES = [b"\n", b"\r\n", b"\r"]

COUNTED = {wire.name: [] if wire.name == "cohere" else [wire.counted("x", 3)] for wire in WIRES}
"""Usage in the middle of a stream, in the formats that have that."""

every_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
places = st.lists(st.integers(0, 4000), max_size=40)


def stream_of(wire: Wire, newline: bytes = b"\n") -> bytes:
    events = (wire.opening(), *map(wire.piece, PIECES), wire.ending(len(PIECES)))
    return b"".join(events).replace(b"\n", newline)


def cut_at(stream: bytes, cuts: list[int]) -> list[bytes]:
    return cut(stream, *(place for place in cuts if place < len(stream)))


@every_wire
@pytest.mark.parametrize("newline", NEWLINES)
def test_one_cut_at_every_place_changes_nothing(wire: Wire, newline: bytes) -> None:
    stream = stream_of(wire, newline)
    whole = read(wire.name, [stream])
    assert (whole.pieces, whole.finishes, whole.usage, whole.failure) == (PIECES, ("stop",), USAGE, None)
    for place in range(1, len(stream)):
        assert read(wire.name, [stream[:place], stream[place:]]) == whole, place


@every_wire
@pytest.mark.parametrize("newline", NEWLINES)
def test_a_byte_at_a_time_changes_nothing(wire: Wire, newline: bytes) -> None:
    stream = stream_of(wire, newline)
    assert read(wire.name, cut(stream, *range(len(stream)))) == read(wire.name, [stream])


@every_wire
@given(newline=st.sampled_from(NEWLINES), cuts=places)
def test_any_cuts_change_nothing(wire: Wire, newline: bytes, cuts: list[int]) -> None:
    stream = stream_of(wire, newline)
    assert read(wire.name, cut_at(stream, cuts)) == read(wire.name, [stream])


@every_wire
def test_a_stream_that_ends_at_any_place_gives_a_beginning_and_says_that_it_is_none_or_is_whole(
    wire: Wire,
) -> None:
    stream = stream_of(wire)
    for place in range(len(stream)):
        found = read(wire.name, [stream[:place]])
        assert found.pieces == PIECES[: len(found.pieces)], place
        assert found.failure in (UpstreamFailed, None), place
        assert (found.failure is None) == bool(found.finishes), place
        assert found.pieces == PIECES or found.failure is UpstreamFailed, place


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "choices", "index", "text", "delta", "content", "finish_reason", "usage", "error", "type", "message",
    "content_block", "stop_reason", "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens",
)  # fmt: skip
TYPES = (
    "message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop", "error",
    "message-start", "content-start", "content-delta", "message-end", "ping",
)  # fmt: skip


def known(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the fields that the formats have, and anything in them."""
    return st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)


def _encodes(content: dict[str, Any]) -> bool:
    try:
        data(content)
    except UnicodeEncodeError:
        return False
    return True


odd_events = (
    st.tuples(known(JSON | known(JSON) | st.lists(known(JSON), max_size=2)), st.sampled_from(TYPES) | JSON)
    .map(lambda made: made[0] | {"type": made[1]})
    .filter(_encodes)
    .map(data)
)
garbage = st.binary(max_size=30).map(lambda noise: b"data: " + noise + b"\n\n") | st.binary(max_size=30)


@every_wire
@given(drawn=st.data(), cuts=places)
def test_garbage_fails_in_the_same_way_however_it_is_cut_and_never_otherwise_than_as_the_upstreams_failure(
    wire: Wire, drawn: st.DataObject, cuts: list[int]
) -> None:
    good = st.sampled_from([wire.opening(), *map(wire.piece, PIECES), *COUNTED[wire.name]])
    last = st.sampled_from([b"", wire.ending(3), wire.half_ending(None), wire.error_event()])
    events = drawn.draw(st.lists(good | odd_events | garbage, max_size=8))
    stream = b"".join(events) + drawn.draw(last)
    whole = read(wire.name, [stream])
    assert whole.failure is None or issubclass(whole.failure, UpstreamError)
    assert read(wire.name, cut_at(stream, cuts)) == whole
    assert read(wire.name, cut(stream, *range(len(stream)))) == whole


@given(noise=st.binary(max_size=300), cuts=places)
def test_events_in_noise_are_the_same_however_it_is_cut(noise: bytes, cuts: list[int]) -> None:
    noise = (
        noise.replace(b"\x00", b"\n")
        .replace(b"\x01", b"\r")
        .replace(b"\x02", b"\n\n")
        .replace(b"\x03", b"data:")
    )
    found = []
    for blocks in ([noise], cut_at(noise, cuts), cut(noise, *range(len(noise)))):
        reader = SSEReader()
        found.append([event for block in blocks for event in reader.feed(block)] + reader.last())
    assert found[0] == found[1] == found[2]
