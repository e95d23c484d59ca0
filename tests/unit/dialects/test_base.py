"""dialects/base.py: what every dialect's bodies and fields go through first."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Struct

from headgate.core.errors import InvalidRequest
from headgate.dialects.base import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MalformedBody,
    bearer,
    decode_body,
    integer,
    number,
    stops,
    structure_problem,
    unsupported,
)

# Brackets, quotes and backslashes inside strings are what a careless depth count trips over.
TEXTS = st.text(st.sampled_from('[]{}"\\\n aé'), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=25,
)


class Inner(Struct):
    flag: bool = False


class Body(Struct):
    model: str
    count: int | float | None = None
    inner: Inner | None = None


def depth(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@settings(deadline=None)
@given(value=JSON, limit=st.integers(1, 6), ascii_only=st.booleans())
@example(value=[[["\\"]]], limit=2, ascii_only=True)
@example(value={'"[': ["]", {"\\": []}]}, limit=2, ascii_only=True)
def test_too_deep_agrees_with_a_recursive_count(value: object, limit: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert (structure_problem(body, limit) is not None) == (depth(value) > limit)


def test_the_limit_itself_is_allowed_and_one_more_is_not() -> None:
    assert structure_problem(nested(MAX_DEPTH)) is None
    assert structure_problem(nested(MAX_DEPTH + 1)) is not None


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert structure_problem(b"[" + b",".join([b'{"a":[]}'] * 1000) + b"]") is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "tail",
    [b'"' + b"a" * 200_000, b'"' + b'\\"' * 100_000, b'"' + b"\\" * 200_001, b'"' * 200_001],
    ids=["letters", "escaped quotes", "backslashes", "quotes"],
)
def test_an_unterminated_string_does_not_cost_exponential_or_quadratic_time(tail: bytes) -> None:
    assert structure_problem(b"[" * (MAX_DEPTH + 1) + tail) is not None


def test_decode_gives_the_typed_body_and_ignores_unknown_keys() -> None:
    assert decode_body(b'{"model":"m","count":2,"x":[1]}', Body, endpoint="/e") == Body(model="m", count=2)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"7",
        b"null",
        b'{"model":"m"} x',
        b'{"model":"\xff"}',
        b'{"model":"m","unknown":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"model":"m","unknown":' + nested(MAX_DEPTH) + b"}",
        b'{"model":"m","unknown":' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:32]),
)
def test_what_is_not_a_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        decode_body(body, Body, endpoint="/e")


def test_the_body_object_is_the_first_level_of_the_depth() -> None:
    inside = decode_body(b'{"model":"m","x":' + nested(MAX_DEPTH - 1) + b"}", Body, endpoint="/e")
    assert inside.model == "m"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "model"),
        (b'{"model":7}', "model"),
        (b'{"model":"m","count":"2"}', "count"),
        (b'{"model":"m","count":true}', "count"),
        (b'{"model":"m","inner":{"flag":1}}', "inner.flag"),
    ],
)
def test_a_wrong_field_is_named_with_the_endpoint(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_body(body, Body, endpoint="/v1/things")
    assert not isinstance(caught.value, MalformedBody)
    assert caught.value.param == param
    assert param in caught.value.message
    assert "POST /v1/things" in caught.value.message


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer  ", None),
        ("Basic abc", None),
        ("abc", None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
    ],
)
def test_bearer_reads_the_token_or_nothing(header: str | None, token: str | None) -> None:
    assert bearer(header) == token


@pytest.mark.parametrize(("value", "result"), [(None, None), (1, 1), (500.0, 500), (1000, 1000)])
def test_integers_and_integral_floats_pass(value: float | None, result: int | None) -> None:
    passed = integer(value, "n", 1, 1000)
    assert passed == result
    assert not isinstance(passed, float)


def test_an_integer_keeps_all_its_digits() -> None:
    assert integer(2**63 - 1, "seed", -(2**63), 2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize(
    "value",
    [0, 1001, 1.5, float("inf"), float("nan"), 1e300, 10**400, -(10**400), 10**4299],
    ids=lambda value: str(value)[:9],
)
def test_other_numbers_are_refused_with_the_range(value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        integer(value, "n", 1, 1000)
    assert caught.value.param == "n"
    assert caught.value.allowed == "an integer from 1 to 1000"
    assert "from 1 to 1000" in caught.value.message
    assert len(caught.value.message) < 200


def test_an_integer_may_have_no_upper_end() -> None:
    assert integer(10**400, "n", 1) == 10**400
    with pytest.raises(InvalidRequest, match="at least 1"):
        integer(0, "n", 1)


@pytest.mark.parametrize("value", [-2, -2.0, 0, 0.5, 2])
def test_numbers_within_the_range_pass_ends_included(value: float) -> None:
    assert number(value, "penalty", -2, 2) == value


def test_no_number_is_none() -> None:
    assert number(None, "penalty", -2, 2) is None


@pytest.mark.parametrize(
    "value",
    [-2.01, 2.01, float("nan"), float("inf"), 10**400, -(10**400)],
    ids=lambda value: str(value)[:9],
)
def test_numbers_outside_are_refused_with_the_range(value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        number(value, "penalty", -2, 2)
    assert caught.value.param == "penalty"
    assert caught.value.allowed == "a number from -2 to 2"


@pytest.mark.parametrize(
    ("value", "result"),
    [(None, ()), ([], ()), ("a", ("a",)), (["a", "b"], ("a", "b")), (["a", "b", "c", "d"], tuple("abcd"))],
)
def test_stops_are_none_one_or_several(value: str | list[str] | None, result: tuple[str, ...]) -> None:
    assert stops(value, "stop", 4) == result


@pytest.mark.parametrize("value", ["", [""], ["a", ""], list("abcde")])
def test_empty_and_too_many_stops_are_refused(value: str | list[str]) -> None:
    with pytest.raises(InvalidRequest, match="stop must be up to 4 non-empty strings") as caught:
        stops(value, "stop", 4)
    assert caught.value.param == "stop"


def test_unsupported_names_the_parameter() -> None:
    error = unsupported("echo", "here")
    assert (error.param, error.code, error.message) == (
        "echo",
        "unsupported_parameter",
        "echo is not supported here.",
    )


def test_more_lists_than_anybody_needs_are_refused_before_decoding() -> None:
    many = b"[" + b",".join([b"[]"] * MAX_CONTAINERS) + b"]"
    assert "more than" in (structure_problem(many) or "")
    assert structure_problem(b'["' + b"[" * (3 * MAX_CONTAINERS) + b'"]') is None
