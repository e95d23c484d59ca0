"""dialects/openai_logprobs.py: scored tokens in the legacy and in the chat form."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.completion_choice import Logprobs as SDKLogprobs

from headgate.core.completion import TokenLogprob
from headgate.dialects.openai_logprobs import (
    LOWEST,
    ChatLogprobs,
    LegacyLogprobs,
    LegacyScores,
    chat_logprobs,
    shown,
)

FINITE = st.floats(-50, 0)
PIECES = st.one_of(st.binary(min_size=1, max_size=6), st.text(min_size=1, max_size=3).map(str.encode))
TOPS = st.lists(st.tuples(PIECES, FINITE), max_size=5).map(
    lambda top: tuple(sorted(top, key=lambda alternative: -alternative[1]))
)


def legacy(entries: Sequence[TokenLogprob], most: int = 0) -> LegacyLogprobs:
    return LegacyScores(most).add(entries)


def scored(*pieces: bytes) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(piece, -1.0, end=not piece) for piece in pieces)


def cut(data: bytes, places: Sequence[int]) -> tuple[bytes, ...]:
    """The data in tokens that begin at these places."""
    starts = sorted({0, *(place % max(len(data), 1) for place in places)})
    return tuple(data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True))


TEXTS = st.text(min_size=1, max_size=30)
PLACES = st.lists(st.integers(0, 200), max_size=30)


# --- the legacy form

SHOWN: list[tuple[bytes, str]] = [
    (b"word", "word"),
    (" é😀".encode(), " é😀"),
    (b"\n", "\n"),
    (b"", ""),
    (b"\xf0\x9f", r"bytes:\xf0\x9f"),
    (b"\x98", r"bytes:\x98"),
    (b" a\xf0\x9f", r"bytes:\x20\x61\xf0\x9f"),
    (b"\x80\n", r"bytes:\x80\x0a"),
    (b"\xed\xa0\x80", r"bytes:\xed\xa0\x80"),  # a surrogate is no character
]


@pytest.mark.parametrize(("data", "text"), SHOWN, ids=str)
def test_a_token_of_whole_characters_is_text_and_any_other_is_its_bytes(data: bytes, text: str) -> None:
    assert shown(data) == text
    assert legacy(scored(data)).tokens == [text]


OFFSETS: list[tuple[tuple[bytes, ...], list[int]]] = [
    ((b"Hello", b" world", b"!"), [0, 5, 11]),
    (("日本".encode(), "語".encode()), [0, 2]),
    ((b"a\xf0", b"\x9f", b"\x98", b"\x80b", b"c"), [0, 1, 1, 1, 3]),
    ((b"a", b"\xf0\x9f", b""), [0, 1, 1]),  # cut short inside a character, then the end token
    ((b"ab", b""), [0, 2]),
    ((b"", b"ab"), [0, 0]),
    # What can never become a character stands as one U+FFFD in the text, so the next one is a place further.
    ((b"\xf0\x9f", b"a", b"b"), [0, 1, 2]),
    ((b"\xe0", b"\x80", b"x"), [0, 1, 2]),
    ((b"\x80", b"\x80", b"\xc3", b"\xa9"), [0, 1, 2, 2]),
]


@pytest.mark.parametrize(("pieces", "offsets"), OFFSETS, ids=str)
def test_offsets_count_characters_and_parts_of_one_share_its_place(
    pieces: tuple[bytes, ...], offsets: list[int]
) -> None:
    assert legacy(scored(*pieces)).text_offset == offsets


@given(text=TEXTS, places=PLACES)
def test_each_token_begins_at_the_character_its_first_byte_belongs_to(text: str, places: list[int]) -> None:
    pieces = cut(text.encode(), places)
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    assert legacy(scored(*pieces)).text_offset == [owner[start] for start in starts]


@given(pieces=st.lists(st.one_of(PIECES, st.just(b"")), max_size=20))
def test_offsets_never_fall_and_never_leave_the_text_whatever_the_bytes(pieces: list[bytes]) -> None:
    text = b"".join(pieces).decode(errors="replace")
    offsets = legacy(scored(*pieces)).text_offset
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)


@given(text=TEXTS, places=PLACES)
def test_tokens_of_whole_characters_joined_are_the_text(text: str, places: list[int]) -> None:
    starts = sorted({0, *(place % len(text) for place in places)})
    words = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    scores = legacy(scored(*(word.encode() for word in words)))
    assert "".join(scores.tokens) == text
    for offset, token in zip(scores.text_offset, scores.tokens, strict=True):
        assert text.startswith(token, offset)


@st.composite
def entries(draw: st.DrawFn) -> list[TokenLogprob]:
    pieces = draw(st.lists(PIECES, max_size=12))
    begins, ends = draw(st.booleans()), draw(st.booleans())
    drawn = [TokenLogprob(piece, draw(FINITE), draw(TOPS)) for piece in pieces]
    if drawn and begins:
        drawn[0] = TokenLogprob(drawn[0].data, None, None)
    if ends:
        drawn.append(TokenLogprob(b"", draw(FINITE), draw(TOPS), end=True))
    return drawn


@given(entries=entries(), places=st.lists(st.integers(0, 12), max_size=6), most=st.integers(0, 5))
def test_pieces_joined_are_the_whole_however_the_entries_are_split(
    entries: list[TokenLogprob], places: list[int], most: int
) -> None:
    whole = legacy(entries, most)
    bounds = sorted({0, len(entries), *(min(place, len(entries)) for place in places)})
    scores = LegacyScores(most)
    pieces = [scores.add(entries[start:end]) for start, end in pairwise(bounds)]
    for name in LegacyLogprobs.__struct_fields__:
        assert [item for piece in pieces for item in getattr(piece, name)] == getattr(whole, name)


@given(entries=entries(), most=st.integers(0, 5))
def test_each_token_is_among_its_alternatives_and_a_greedy_one_equals_their_best(
    entries: list[TokenLogprob], most: int
) -> None:
    scores = legacy(entries, most)
    assert len({len(getattr(scores, name)) for name in LegacyLogprobs.__struct_fields__}) == 1
    for entry, token, logprob, top in zip(
        entries, scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True
    ):
        assert logprob == entry.logprob
        if entry.logprob is None:
            assert top is None
            continue
        best = (entry.top or ())[:most]
        assert top is not None
        assert 1 <= len(top) <= most + 1
        # A token without text that is among the best stands there without its name.
        others = [data for data, value in best if entry.data or value != entry.logprob]
        assert set(top) == {shown(data) for data in others} | {token}
        assert max(top.values()) == max([entry.logprob, *(value for _, value in best)])


def test_without_alternatives_each_token_is_shown_alone() -> None:
    entry = TokenLogprob(b"a", -0.5, ((b"b", -0.25),))
    assert legacy([entry], 0).top_logprobs == [{"a": -0.5}]


def test_a_sampled_token_comes_after_the_best_ones_it_is_not_among() -> None:
    top = ((b"b", -0.25), (b"c", -0.75))
    assert list((legacy([TokenLogprob(b"a", -2.5, top)], 2).top_logprobs[0] or {}).items()) == [
        ("b", -0.25),
        ("c", -0.75),
        ("a", -2.5),
    ]
    assert legacy([TokenLogprob(b"c", -0.75, top)], 2).top_logprobs == [{"b": -0.25, "c": -0.75}]


def test_of_two_alternatives_written_alike_the_likelier_is_kept() -> None:
    ends = ((b"", -0.5), (b"", -1.5))
    assert legacy([TokenLogprob(b"", -1.5, ends, end=True)], 2).top_logprobs == [{"": -0.5}]
    rising = ((b"x", -1.5), (b"x", -0.5))
    assert legacy([TokenLogprob(b"x", -1.5, rising)], 2).top_logprobs == [{"x": -0.5}]


def test_a_prompts_first_token_has_no_score() -> None:
    for most in (0, 2):
        scores = legacy([TokenLogprob(b"a", None, None), TokenLogprob(b"b", -1.0, ((b"b", -1.0),))], most)
        assert scores.token_logprobs == [None, -1.0]
        assert scores.top_logprobs == [None, {"b": -1.0}]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30, -9999.5])
def test_nothing_below_the_lowest_value_is_shown(value: float) -> None:
    entry = TokenLogprob(b"a", value, ((b"b", -1.0), (b"c", value)))
    assert json.loads(msgspec.json.encode(legacy([entry], 2))) == {
        "tokens": ["a"],
        "token_logprobs": [LOWEST],
        "top_logprobs": [{"b": -1.0, "c": LOWEST, "a": LOWEST}],
        "text_offset": [0],
    }
    (content,) = chat_logprobs([entry], 2).content
    assert (content.logprob, content.top_logprobs[1].logprob) == (LOWEST, LOWEST)


def test_offsets_can_be_held_within_a_known_text() -> None:
    scores = LegacyScores(0)
    assert scores.add(scored(b"abc", b"def"), within=2).text_offset == [0, 2]
    assert scores.add(scored(b"g"), within=7).text_offset == [6]


@given(entries=entries())
def test_scored_tokens_are_what_the_sdk_expects(entries: list[TokenLogprob]) -> None:
    known = [entry for entry in entries if entry.logprob is not None]
    SDKLogprobs.model_validate_json(msgspec.json.encode(legacy(known, 5)), strict=True)
    for item in json.loads(msgspec.json.encode(chat_logprobs(entries, 5)))["content"]:
        ChatCompletionTokenLogprob.model_validate(item, strict=True)


# --- the chat form


def test_chat_shows_each_token_with_its_bytes_and_its_best_alternatives() -> None:
    given_entries = (
        TokenLogprob(b"\xf0\x9f", -2.5, ((b"!", -0.25), (b"?", -0.5), (b".", -0.75))),
        TokenLogprob("é".encode(), -0.5, (("é".encode(), -0.5),)),
        TokenLogprob(b"", -0.1, ((b"", -0.1),), end=True),
    )
    rendered = json.loads(msgspec.json.encode(chat_logprobs(given_entries, 2)))
    assert rendered == {
        "content": [
            {
                "token": r"bytes:\xf0\x9f",
                "logprob": -2.5,
                "bytes": [0xF0, 0x9F],
                "top_logprobs": [
                    {"token": "!", "logprob": -0.25, "bytes": [33]},
                    {"token": "?", "logprob": -0.5, "bytes": [63]},
                ],
            },
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [0xC3, 0xA9],
                "top_logprobs": [{"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}],
            },
        ],
        "refusal": None,
    }


def test_chat_without_alternatives_has_empty_lists_of_them() -> None:
    (content,) = chat_logprobs([TokenLogprob(b"a", -0.5, ((b"a", -0.5),))], 0).content
    assert content.top_logprobs == []


def test_chat_without_entries_has_an_empty_content() -> None:
    assert chat_logprobs((), 3) == ChatLogprobs(content=[])
    assert chat_logprobs([TokenLogprob(b"", -1.0, end=True)], 3) == ChatLogprobs(content=[])
