"""A choice with log probabilities or an echoed prompt, piece by piece."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.support.jobs import job

from headgate.core.completion import Chunk, FinishReason, Job, TokenLogprob
from headgate.core.errors import UpstreamFailed
from headgate.providers.openai_choice import CheckedChoice

SCORED = job(logprobs=0)
ECHOED = job(prompt="héy you", echo=True)
BOTH = job(prompt="héy you", echo=True, logprobs=0)

Piece = tuple[str, Sequence[str] | None, FinishReason | None]
"""A text, its tokens, and a finish reason."""


def scores(tokens: Sequence[str] | None, first: bool = False) -> msgspec.Raw:
    if tokens is None:
        return msgspec.Raw(b"null")
    logprobs: list[float | None] = [-float(len(token)) for token in tokens]
    if first and tokens:
        logprobs[0] = None
    return msgspec.Raw(json.dumps({"tokens": list(tokens), "token_logprobs": logprobs}).encode())


def taken(asked: Job, *pieces: Piece) -> list[Chunk]:
    """The chunks of these pieces; the first token of an echoed prompt has no score."""
    choice = CheckedChoice("acme", asked, 0)
    return [
        chunk
        for number, (text, tokens, finish) in enumerate(pieces)
        for chunk in choice.take(text, scores(tokens, first=asked.echo and number == 0), finish)
    ]


def at_once(asked: Job, *pieces: Piece) -> list[Chunk]:
    """The same, had it come in one piece."""
    tokens = [token for piece in pieces for token in piece[1] or ()]
    return taken(asked, ("".join(piece[0] for piece in pieces), tokens or None, pieces[-1][2]))


def entries(chunks: list[Chunk]) -> list[TokenLogprob]:
    return [entry for chunk in chunks for entry in chunk.logprobs or ()]


def shown(chunks: list[Chunk]) -> list[tuple[str, list[bytes], bool]]:
    return [(chunk.text, [e.data for e in chunk.logprobs or ()], chunk.echoed) for chunk in chunks]


# --- log probabilities ------------------------------------------------------------------------------------------


def test_pieces_carry_the_entries_of_their_tokens() -> None:
    chunks = taken(SCORED, ("a", ["a"], None), (" b c", [" b", " c"], None), ("", None, "length"))
    assert shown(chunks) == [("a", [b"a"], False), (" b c", [b" b", b" c"], False), ("", [], False)]
    assert chunks[-1] == Chunk(0, "", "length")
    assert entries(chunks)[1] == TokenLogprob(b" b", -2.0)


@pytest.mark.parametrize("token", ["", "<|endoftext|>", "</s>"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_last_token_beyond_the_text_is_the_end_token(token: str, apart: bool) -> None:
    ending: list[Piece] = [("", [token], None), ("", None, "stop")] if apart else [("", [token], "stop")]
    pieces: list[Piece] = [("a", ["a"], None), *ending]
    chunks = taken(SCORED, *pieces)
    assert entries(chunks) == [TokenLogprob(b"a", -1.0), TokenLogprob(b"", -float(len(token)), end=True)]
    assert entries(chunks) == entries(at_once(SCORED, *pieces))


def test_an_answer_that_ends_at_once_has_its_end_token_alone() -> None:
    [chunk] = taken(SCORED, ("", ["</s>"], "stop"))
    assert chunk.logprobs == (TokenLogprob(b"", -4.0, end=True),)


def test_nothing_generated_needs_no_entries() -> None:
    assert taken(SCORED, ("", None, "stop")) == [Chunk(0, "", "stop")]


def test_a_token_cut_off_by_the_limit_is_no_end_token() -> None:
    pieces: list[Piece] = [("a", ["a"], None), ("", ["bytes:\\xf0"], "length")]
    assert entries(taken(SCORED, *pieces))[-1] == TokenLogprob(b"\xf0", -10.0)
    assert entries(taken(SCORED, *pieces)) == entries(at_once(SCORED, *pieces))


def test_parts_of_a_character_come_whenever_the_upstream_gives_them() -> None:
    pieces: list[Piece] = [
        ("", ["bytes:\\xf0\\x9f"], None),
        ("", ["bytes:\\x98"], None),
        ("\U0001f600", ["bytes:\\x80"], None),
        ("!", ["!"], "stop"),
    ]
    chunks = taken(SCORED, *pieces)
    assert b"".join(entry.data for entry in entries(chunks)) == "\U0001f600!".encode()
    assert entries(chunks) == entries(at_once(SCORED, *pieces))
    assert not any(entry.end for entry in entries(chunks))


def test_text_without_log_probabilities_is_a_failure_at_its_first_piece() -> None:
    with pytest.raises(
        UpstreamFailed, match=r"The provider acme gave no log probabilities; .*logprobs = false"
    ):
        taken(SCORED, ("", None, None), ("a", None, None))


def test_entries_without_end_are_a_failure() -> None:
    piece: Piece = ("", ["a"] * 900, None)
    with pytest.raises(UpstreamFailed, match="more log probabilities than tokens"):
        taken(SCORED, ("a", ["a"], None), piece, piece)


def test_what_was_not_asked_for_is_not_given() -> None:
    assert taken(ECHOED, ("héy you", ["héy"], None), ("!", ["!"], "stop")) == [
        Chunk(0, "héy you", tokens=0, echoed=True),
        Chunk(0, "!", "stop"),
    ]


# --- echo -------------------------------------------------------------------------------------------------------


def test_pieces_of_the_prompt_are_echoed_and_one_across_its_end_is_split() -> None:
    chunks = taken(
        ECHOED, ("hé", None, None), ("y", None, None), (" you and", None, None), (" me", None, "stop")
    )
    assert [(chunk.text, chunk.echoed, chunk.tokens) for chunk in chunks] == [
        ("hé", True, 0),
        ("y", True, 0),
        (" you", True, 0),
        (" and", False, None),
        (" me", False, None),
    ]
    assert chunks[-1].finish_reason == "stop"


def test_entries_are_split_at_the_prompts_end_by_their_bytes() -> None:
    pieces: list[Piece] = [("héy you and", ["h", "bytes:\\xc3", "bytes:\\xa9", "y", " you", " and"], "stop")]
    chunks = taken(BOTH, *pieces)
    assert shown(chunks) == [
        ("héy you", [b"h", b"\xc3", b"\xa9", b"y", b" you"], True),
        (" and", [b" and"], False),
    ]
    assert entries(chunks)[0] == TokenLogprob(b"h", None, None)


def test_streamed_entries_of_an_echo_equal_the_blocking_ones() -> None:
    pieces: list[Piece] = [
        ("h", ["h"], None),
        ("", ["bytes:\\xc3"], None),
        ("é", ["bytes:\\xa9"], None),
        ("y yo", ["y", " yo"], None),
        ("u and", ["u", " and"], None),
        ("", ["<end>"], "stop"),
    ]
    chunks = taken(BOTH, *pieces)
    assert entries(chunks) == entries(at_once(BOTH, *pieces))
    echoed = [chunk for chunk in chunks if chunk.echoed]
    assert "".join(chunk.text for chunk in echoed) == "héy you"
    assert b"".join(entry.data for entry in entries(echoed)) == "héy you".encode()
    assert entries(chunks)[-1].end


def test_a_start_token_that_is_not_in_the_text_has_no_bytes_there() -> None:
    pieces: list[Piece] = [("héy", ["<s>", "héy"], None), (" you", [" you"], None), ("!", ["!"], "length")]
    found = entries(taken(BOTH, *pieces))
    assert found[0] == TokenLogprob(b"", None, None)
    assert b"".join(entry.data for entry in found) == "héy you!".encode()
    assert found == entries(at_once(BOTH, *pieces))


@pytest.mark.parametrize("asked", [ECHOED, BOTH])
@pytest.mark.parametrize(
    "pieces",
    [
        [("fine", ["fine"], "stop")],
        [("héy", ["héy"], "stop")],
        [("", None, "stop")],
        [("h", ["h"], None), ("ey you", ["ey", " you"], None)],
        [("héy ", ["héy", " "], None), ("all", ["all"], None)],
        [(" héy you", [" héy", " you"], None)],
    ],
)
def test_an_upstream_that_ignores_echo_is_a_failure(asked: Job, pieces: list[Piece]) -> None:
    with pytest.raises(UpstreamFailed, match="The provider acme ignored echo"):
        taken(asked, *pieces)


def test_a_prompt_without_scores_of_its_own_is_a_failure() -> None:
    choice = CheckedChoice("acme", BOTH, 0)
    with pytest.raises(UpstreamFailed, match="no log probabilities for the prompt"):
        choice.take("héy you and", scores([" and"]), None)
    choice = CheckedChoice("acme", BOTH, 0)
    with pytest.raises(UpstreamFailed, match="no log probabilities for the prompt"):
        choice.take("héy you and on and on", scores([" and", " on", " and", " on"]), "stop")
    choice = CheckedChoice("acme", BOTH, 0)
    with pytest.raises(UpstreamFailed, match="gave no log probabilities"):
        choice.take("héy you", scores(None), "stop")


def test_a_prompt_scored_from_a_start_token_on_is_fine() -> None:
    choice = CheckedChoice("acme", BOTH, 0)
    [echoed, rest] = choice.take("héy you!", scores(["héy", " you", "!"]), "stop")
    assert echoed.logprobs is not None
    assert echoed.logprobs[0].logprob == -3.0
    assert rest.text == "!"


def test_only_the_prompt_finishes_with_length() -> None:
    asked = job(prompt="héy you", echo=True, logprobs=0, max_tokens=0)
    [echoed, last] = taken(asked, ("héy you", ["héy", " you"], "stop"))
    assert (echoed.text, len(echoed.logprobs or ())) == ("héy you", 2)
    assert last == Chunk(0, "", "length")


def test_an_empty_prompt_is_echoed_by_nothing() -> None:
    assert taken(job(prompt="", echo=True, logprobs=0), ("a", ["a"], "stop"))[-1].text == "a"


def test_token_ids_are_no_text_to_compare_but_their_scores_show_them() -> None:
    asked = job(prompt=(5, 6, 7), echo=True, logprobs=0, max_tokens=2)
    chunks = taken(asked, ("ab", ["a", "b"], None), ("cd", ["c", "d"], "stop"))
    assert shown(chunks) == [("ab", [b"a", b"b"], False), ("cd", [b"c", b"d"], False)]
    for tokens, first in ((["a", "b"], True), (["a", "b", "c"], False)):
        with pytest.raises(UpstreamFailed, match="no log probabilities for the prompt"):
            CheckedChoice("acme", asked, 0).take("".join(tokens), scores(tokens, first), "stop")


# --- offsets ----------------------------------------------------------------------------------------------------

Placed = tuple[str, Sequence[tuple[str, int]], FinishReason | None]
"""A text, its tokens with their offsets, and a finish reason."""
BLANKLESS: list[Placed] = [
    ("Hello big", [("Hello", 0), ("big", 5)], None),
    (" world", [("world", 9)], None),
    (" again", [("again", 15)], None),
    (" now", [("now", 21), ("</s>", 25)], "stop"),
]
GREETED = job(prompt="Hello big world", echo=True, logprobs=1)


def placed(asked: Job, *pieces: Placed, all_scored: bool = False) -> list[Chunk]:
    """The chunks of these pieces. Each token is its own alternative; the first of an echo has no score."""
    choice = CheckedChoice("acme", asked, 0)
    chunks: list[Chunk] = []
    for number, (text, tokens, finish) in enumerate(pieces):
        first = asked.echo and number == 0 and not all_scored
        logprobs = {
            "tokens": [token for token, _ in tokens],
            "token_logprobs": [None if first and not index else -1.0 for index in range(len(tokens))],
            "top_logprobs": [{token: -1.0} for token, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }
        chunks += choice.take(text, msgspec.Raw(json.dumps(logprobs).encode()), finish)
    return chunks


def placed_at_once(asked: Job, *pieces: Placed) -> list[Chunk]:
    tokens = [token for piece in pieces for token in piece[1]]
    return placed(asked, ("".join(piece[0] for piece in pieces), tokens, pieces[-1][2]))


def test_tokens_without_their_blanks_get_them_from_the_text() -> None:
    for chunks in (placed(GREETED, *BLANKLESS), placed_at_once(GREETED, *BLANKLESS)):
        echoed = [chunk for chunk in chunks if chunk.echoed]
        assert [entry.data for entry in entries(echoed)] == [b"Hello", b" big", b" world"]
        rest = [chunk for chunk in chunks if not chunk.echoed]
        assert "".join(chunk.text for chunk in rest) == " again now"
        assert entries(rest) == [
            TokenLogprob(b" again", -1.0, ((b" again", -1.0),)),
            TokenLogprob(b" now", -1.0, ((b" now", -1.0),)),
            TokenLogprob(b"", -1.0, ((b"</s>", -1.0),), end=True),
        ]


def test_blanks_come_from_the_text_where_nothing_is_echoed_too() -> None:
    pieces: list[Placed] = [("a b", [("a", 0), ("b", 1)], None), (" c", [("c", 3), ("", 5)], "stop")]
    asked = job(logprobs=1)
    found = entries(placed(asked, *pieces))
    assert [(entry.data, entry.end) for entry in found] == [
        (b"a", False),
        (b" b", False),
        (b" c", False),
        (b"", True),
    ]
    assert found == entries(placed_at_once(asked, *pieces))


def test_offsets_find_the_prompts_end_where_parts_of_characters_are_written_as_unknown() -> None:
    asked = job(prompt="héy", echo=True, logprobs=1)
    tokens = [("h", 0), ("\ufffd", 1), ("\ufffd", 1), ("y", 2), ("\ufffd", 3), ("\ufffd", 3), ("ok", 4)]
    [echoed, rest] = placed(asked, ("héyéok", tokens, "stop"))
    assert (echoed.text, len(echoed.logprobs or ())) == ("héy", 4)
    assert (rest.text, len(rest.logprobs or ())) == ("éok", 3)
    assert rest.logprobs is not None
    assert (rest.logprobs[-1].data, rest.logprobs[-1].end) == (b"ok", False)


def test_a_token_across_the_prompts_end_is_the_prompts() -> None:
    [echoed, rest] = placed(
        job(prompt="Hello w", echo=True, logprobs=1),
        ("Hello world!", [("Hello", 0), ("world", 5), ("!", 11)], "stop"),
    )
    assert [entry.data for entry in echoed.logprobs or ()] == [b"Hello", b" world"]
    assert [entry.data for entry in rest.logprobs or ()] == [b"!"]


def test_tokens_that_a_stop_sequence_cut_away_lie_beyond_the_text() -> None:
    asked = job(prompt="Hello", echo=True, logprobs=1)
    [echoed, rest] = placed(
        asked, ("Hello big", [("Hello", 0), ("bigger", 5), ("END", 12), ("now", 15)], "stop")
    )
    assert [entry.data for entry in echoed.logprobs or ()] == [b"Hello"]
    assert [entry.data for entry in rest.logprobs or ()] == [b"bigger", b"END", b"now"]


def test_only_the_prompt_may_be_scored_by_tokens_without_blanks() -> None:
    asked = job(prompt="Hello big", echo=True, logprobs=1, max_tokens=0)
    [echoed, last] = placed(asked, ("Hello big", [("Hello", 0), ("big", 5)], "stop"))
    assert [entry.data for entry in echoed.logprobs or ()] == [b"Hello", b" big"]
    assert last == Chunk(0, "", "length")


@pytest.mark.parametrize(
    "tokens",
    [
        [("Hello", 0), (" big", 3), (" world", 9)],
        [("Hello", 7), (" big", 12), (" world", 16)],
        [("Hello", 0), (" big", 0), (" world", 0)],
        [("Hello", 5), (" big", 9), (" world", 0)],
    ],
    ids=str,
)
def test_offsets_that_do_not_fit_the_text_give_way_to_the_tokens_bytes(tokens: list[tuple[str, int]]) -> None:
    [echoed, rest] = placed(
        job(prompt="Hello big", echo=True, logprobs=1), ("Hello big world", tokens, "length")
    )
    assert [entry.data for entry in echoed.logprobs or ()] == [b"Hello", b" big"]
    assert [entry.data for entry in rest.logprobs or ()] == [b" world"]


def test_offsets_may_stop_fitting_within_a_stream() -> None:
    pieces: list[Placed] = [
        ("Hello", [("Hello", 0)], None),
        (" big", [(" big", 0)], None),
        (" world", [(" world", 9)], "length"),
    ]
    chunks = placed(job(prompt="Hello big", echo=True, logprobs=1), *pieces)
    assert [(chunk.text, chunk.echoed) for chunk in chunks] == [
        ("Hello", True),
        (" big", True),
        (" world", False),
    ]
    assert [entry.data for entry in entries(chunks)] == [b"Hello", b" big", b" world"]


@pytest.mark.parametrize("start", [0, 9])
def test_offsets_of_the_completion_alone_are_no_scores_of_the_prompt(start: int) -> None:
    asked = job(prompt="Hello big", echo=True, logprobs=1)
    tokens = [(" world", start), (" again", start + 6)]
    for pieces in (
        [("Hello big world again", tokens, "stop")],
        [("Hello big", [], None), (" world again", tokens, None)],
    ):
        with pytest.raises(UpstreamFailed, match="log probabilities"):
            placed(asked, *pieces, all_scored=True)


def test_offsets_do_not_make_up_for_the_scores_of_token_ids() -> None:
    asked = job(prompt=(5, 6, 7), echo=True, logprobs=1, max_tokens=2)
    with pytest.raises(UpstreamFailed, match="no log probabilities for the prompt"):
        placed(asked, ("a b", [("a", 0), ("b", 1)], "stop"))


# --- chat -------------------------------------------------------------------------------------------------------


def test_in_the_chat_shape_the_prompt_is_put_first() -> None:
    asked = job(shape="chat", prompt="héy", echo=True)
    echoed = Chunk(0, "héy", tokens=0, echoed=True)
    assert taken(asked, ("", None, None), ("a", None, None), ("b", None, "stop")) == [
        echoed,
        Chunk(0, "a"),
        Chunk(0, "b", "stop"),
    ]
    assert taken(asked, ("", None, "stop")) == [echoed, Chunk(0, "", "stop")]


def test_an_unreadable_object_is_a_failure() -> None:
    for raw in (b'"all"', b'{"tokens":["a"]}', b"[" * 100_000):
        choice: Any = CheckedChoice("acme", SCORED, 0)
        with pytest.raises(UpstreamFailed, match="cannot be read"):
            choice.take("a", msgspec.Raw(raw), None)
