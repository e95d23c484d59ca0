"""Log probabilities as upstreams write them, and what is not believed."""

import json
from typing import Any

import msgspec
import pytest

from headgate.core.completion import TokenLogprob
from headgate.core.errors import UpstreamFailed
from headgate.providers.openai_logprobs_wire import LOWEST, entries, offsets


def read(content: Any, alternatives: int = 2, most: int = 100) -> tuple[TokenLogprob, ...]:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return entries("acme", msgspec.Raw(raw), alternatives, most)


def legacy(tokens: Any, logprobs: Any, tops: Any = None) -> dict[str, Any]:
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": []}


def chat(token: str, logprob: Any = -0.5, data: Any = None, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": data, "top_logprobs": []} | more


def test_no_field_and_null_are_no_entries() -> None:
    assert read(b"") == read(b"null") == read(legacy([], [])) == read({"content": []}) == ()
    assert read({}) == read({"content": None, "refusal": []}) == ()


def test_the_legacy_form_is_read_with_its_alternatives_best_first() -> None:
    tops = [None, {" b": -0.5, " c": -0.25}]
    assert read(legacy(["a", " b"], [None, -0.5], tops)) == (
        TokenLogprob(b"a", None, None),
        TokenLogprob(b" b", -0.5, ((b" c", -0.25), (b" b", -0.5))),
    )


def test_the_chat_form_is_read_with_its_alternatives_best_first() -> None:
    top = [chat("y", -2), chat("x", -1, [120])]
    [entry] = read({"content": [chat("z", -3.5, None, top_logprobs=top)], "refusal": None})
    assert entry == TokenLogprob(b"z", -3.5, ((b"x", -1.0), (b"y", -2.0)))


def test_the_sampled_token_beside_the_best_is_no_alternative() -> None:
    [entry] = read(legacy([" z"], [-9.0], [{" z": -9.0, " a": -1.0, " b": -1.5}]))
    assert entry == TokenLogprob(b" z", -9.0, ((b" a", -1.0), (b" b", -1.5)))
    top = [chat("a", -1.0), chat("b", -1.5), chat("z", -9.0)]
    [entry] = read({"content": [chat("z", -9.0, None, top_logprobs=top)]})
    assert entry.top == ((b"a", -1.0), (b"b", -1.5))


@pytest.mark.parametrize("tops", [None, [None], [{"a": -1.0}]])
def test_without_alternatives_asked_for_there_are_none(tops: Any) -> None:
    assert read(legacy(["a"], [-1], tops), alternatives=0) == (TokenLogprob(b"a", -1.0, ()),)
    assert read({"content": [chat("a", -1, top_logprobs=None)]}, 0) == (TokenLogprob(b"a", -1.0, ()),)


@pytest.mark.parametrize(
    ("written", "data"),
    [
        ("é", "é".encode()),
        ("bytes:\\xf0\\x9f", b"\xf0\x9f"),
        ("bytes:\\xF0", b"\xf0"),
        ("bytes: \\xe2\\x80", b" \xe2\x80"),
        ("bytes:", b"bytes:"),
        ("bytes: of", b"bytes: of"),
        ("bytes:\\xf", b"bytes:\\xf"),
        ("", b""),
    ],
)
def test_tokens_are_bytes_and_parts_of_characters_too(written: str, data: bytes) -> None:
    assert read(legacy([written], [-1.0], [{written: -1.0}]))[0] == TokenLogprob(data, -1.0, ((data, -1.0),))
    assert read({"content": [chat(written)]})[0].data == data


def test_the_bytes_of_a_chat_token_count_more_than_its_text() -> None:
    [entry] = read({"content": [chat("�", -1.0, [0xF0, 0x9F])]})
    assert entry.data == b"\xf0\x9f"


@pytest.mark.parametrize(
    "written", ["-9999.5", "-1e30", "-3.4028234663852886e+38", "-1" + "0" * 400, "-1e999"]
)
def test_no_chance_at_all_is_the_lowest_value_however_it_is_written(written: str) -> None:
    own, top = f'"token_logprobs":[{written}]', f'"top_logprobs":[{{"a":-0.5,"b":{written}}}]'
    expected = (TokenLogprob(b"a", LOWEST, ((b"a", -0.5), (b"b", LOWEST))),)
    assert read(f'{{"tokens":["a"],{own},{top}}}'.encode()) == expected
    others = f'[{{"token":"a","logprob":-0.5}},{{"token":"b","logprob":{written},"bytes":[98]}}]'
    entry = f'{{"token":"a","bytes":[97],"logprob":{written},"top_logprobs":{others}}}'
    assert read(f'{{"content":[{entry}]}}'.encode()) == expected


def test_an_alternative_without_a_number_had_no_chance() -> None:
    expected = (TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"b", LOWEST))),)
    assert read(legacy(["a"], [-0.5], [{"b": None, "a": -0.5}])) == expected
    top = [chat("b", None), chat("a", -0.5)]
    assert read({"content": [chat("a", -0.5, top_logprobs=top)]}) == expected


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([0, 2, 2], [0, 2, 2]),
        ([0, 2, 1], None),
        ([0, 2], None),
        ([0, 2, 3, 4], None),
        ([], None),
        (None, None),
        ([0, 2, None], None),
        ([0, 2, 2.5], None),
        (["0", "1", "2"], None),
        ({"0": 0}, None),
        ([0, 1, [[]]], None),
    ],
    ids=str,
)
def test_offsets_are_whole_numbers_that_never_fall_as_many_as_tokens(
    given: Any, found: list[int] | None
) -> None:
    raw = msgspec.Raw(json.dumps(legacy(["a"] * 3, [-1.0] * 3) | {"text_offset": given}).encode())
    assert offsets(raw, 3) == found


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b'{"content":[]}', b'{"text_offset":[1e999]}'])
def test_without_readable_offsets_there_are_none(raw: bytes) -> None:
    assert offsets(msgspec.Raw(raw), 1) is None


@pytest.mark.parametrize(
    "content",
    [
        "all of them",
        7,
        [],
        {"tokens": ["a"]},
        legacy(None, [-1.0]),
        legacy("a", [-1.0]),
        legacy(["a"], [-1.0]),
        legacy(["a"], [-1.0], [None]),
        legacy(["a", "b"], [-1.0], [{}, {}]),
        legacy(["a"], [-1.0, -1.0], [{}]),
        legacy(["a"], [-1.0], [{}, {}]),
        legacy(["a"], [-1.0], {"a": -1.0}),
        legacy(["a"], ["-1"], [{}]),
        legacy(["a"], [True], [{}]),
        legacy(["a"], [1.0], [{}]),
        legacy(["a"], [10**400], [{}]),
        legacy(["a"], [-1.0], [{"b": 1.0}]),
        legacy([None], [-1.0], [{}]),
        b'{"tokens":["a"],"token_logprobs":[NaN],"top_logprobs":[{}]}',
        b'{"tokens":["a"],"token_logprobs":[-Infinity],"top_logprobs":[{}]}',
        b'{"tokens":["a"],"token_logprobs":[1e999],"top_logprobs":[{}]}',
        b'{"tokens":["a"],"token_logprobs":[-1e999,NaN],"top_logprobs":[{},{}]}',
        b'{"tokens":["\\ud800"],"token_logprobs":[-1e999],"top_logprobs":[{}]}',
        b'{"tokens":["\\ud800"],"token_logprobs":[-1],"top_logprobs":[{}]}',
        {"content": "a"},
        {"content": [chat("a", None)]},
        {"content": [chat("a", "-1")]},
        {"content": [chat("a", 2)]},
        {"content": [chat("a", -1, [256])]},
        {"content": [chat("a", -1, [-1])]},
        {"content": [chat("a", -1, "a")]},
        {"content": [chat("a", -1, top_logprobs=None)]},
        {"content": [chat("a", -1, top_logprobs=[{"token": "b"}])]},
        {"content": [{}]},
    ],
)
def test_what_cannot_be_believed_is_refused(content: Any) -> None:
    with pytest.raises(UpstreamFailed, match="acme sent log probabilities that cannot be read"):
        read(content)


@pytest.mark.parametrize("count", [101, 1_000_000])
def test_more_entries_than_any_answer_has_are_refused(count: int) -> None:
    with pytest.raises(UpstreamFailed, match="cannot be read"):
        read(legacy(["a"] * count, [-1.0] * count, [None] * count), alternatives=0)
    with pytest.raises(UpstreamFailed, match="cannot be read"):
        read(b'{"content":[' + b",".join([b'{"token":"a","logprob":-1}'] * count) + b"]}", alternatives=0)
    assert len(read(legacy(["a"] * 100, [-1.0] * 100), alternatives=0)) == 100
