"""Errors an upstream reports inside an answer, and where it puts its words."""

import pytest

from headgate.core.errors import (
    UpstreamAuth,
    UpstreamError,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from headgate.providers.upstream_errors import from_report, from_status


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"message": "no", "code": 400}, UpstreamRejected),
        ({"message": "no", "code": "422"}, UpstreamRejected),
        ({"message": "no", "code": 401}, UpstreamAuth),
        ({"message": "no", "code": 429}, UpstreamRateLimited),
        ({"message": "no", "code": 502}, UpstreamFailed),
        ({"message": "no", "code": 12}, UpstreamFailed),
        ({"message": "no", "code": "rate_limit_exceeded"}, UpstreamRateLimited),
        ({"message": "no", "type": "overloaded_error"}, UpstreamUnavailable),
        ({"message": "no", "type": "invalid_request_error"}, UpstreamRejected),
        ({"message": "no", "type": "invalid_request_error", "code": "invalid_api_key"}, UpstreamAuth),
        ({"message": "no", "code": "timeout"}, UpstreamTimeout),
        ({"message": "no", "code": "unheard_of", "type": "server_error"}, UpstreamFailed),
        ({"message": ["no"]}, UpstreamFailed),
        ({}, UpstreamFailed),
        ("out of memory", UpstreamFailed),
        (True, UpstreamFailed),
    ],
)
def test_a_reported_error_is_understood_from_its_code_or_type(
    reported: object, expected: type[UpstreamError]
) -> None:
    assert type(from_report("acme", reported, None)) is expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "bad field"}}', "bad field"),
        (b'{"error": "bad field"}', "bad field"),
        (b'{"object": "error", "message": "bad field", "code": 400}', "bad field"),
        (b'{"detail": "bad field"}', "bad field"),
        (b'[{"error": {"code": 400, "message": "bad field", "status": "INVALID_ARGUMENT"}}]', "bad field"),
        (b'{"error": {"message": "bad field", "code": [1]}}', "bad field"),
        (b'{"error": {"message": "bad field", "code": 400.0, "type": {}}}', "bad field"),
        (b'{"error": {"message": {"detail": "bad field"}}}', "bad field"),
        (b'{"error": null, "errors": [{"message": "bad"}, {"message": "worse"}]}', "bad; worse"),
        (
            b'{"detail": [{"type": "missing", "loc": ["body", "messages", 0], "msg": "Field required"}]}',
            "body.messages.0: Field required",
        ),
    ],
)
def test_the_words_of_a_rejection_are_found(body: bytes, message: str) -> None:
    error = from_status("acme", 400, {}, body, None)
    assert isinstance(error, UpstreamRejected)
    assert error.message == message


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"\xff\xfe", b"[" * 5000, b'{"error": {"message": 5}}', b"null"]
)
def test_a_rejection_without_readable_words_still_says_something(body: bytes) -> None:
    error = from_status("acme", 413, {}, body, None)
    assert (error.status, error.message) == (413, "The provider acme rejects this request.")


def test_a_code_of_any_length_is_only_a_code() -> None:
    assert type(from_report("acme", {"code": "9" * 5000}, None)) is UpstreamFailed
    assert type(from_report("acme", {"code": "429"}, None)) is UpstreamRateLimited


def test_a_code_that_is_none_leaves_the_type_and_the_words() -> None:
    reported = {"message": "bad field", "code": [1], "type": "invalid_request_error"}
    error = from_report("acme", reported, None)
    assert (type(error), error.message) == (UpstreamRejected, "bad field")


def test_words_about_our_account_are_not_for_clients() -> None:
    words = "Your credit balance is too low to access the API. Please go to Plans & Billing."
    error = from_report("acme", {"message": words, "type": "invalid_request_error"}, None)
    assert type(error) is UpstreamAuth
    assert "credit" not in error.message


NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "7.2"}, 8),
        ({"Retry-After": "0"}, 1),
        ({"Retry-After": "-5"}, 1),
        ({"Retry-After": "999"}, 120),
        ({"Retry-After": "inf"}, 120),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Sun, 06 Nov 1994 08:50:00 GMT"}, 23),
        ({"Retry-After": "Sunday, 06-Nov-94 08:50:00 GMT"}, 23),
        ({"Retry-After": "Sun Nov  6 08:50:00 1994"}, 23),
        ({"Retry-After": "Sun, 06 Nov 1994 09:50:00 +0100"}, 23),
        ({"Retry-After": "Sun, 06 Nov 1994 08:00:00 GMT"}, 1),
        ({"Retry-After": "Sun, 06 Nov 2094 08:49:37 GMT"}, 120),
        ({"Retry-After": "Sun, 99 Nov 1994 08:49:37 GMT"}, None),
        ({"Retry-After": "Sun, 06 Nov 99999999999 08:49:37 GMT"}, None),
        ({"retry-after-ms": "2500"}, 3),
        ({"retry-after-ms": "x"}, None),
        ({"retry-after-ms": "9e9"}, 120),
        ({"Retry-After": "7", "retry-after-ms": "100"}, 7),
        ({"Retry-After": "soon", "retry-after-ms": "2500"}, 3),
    ],
)
@pytest.mark.parametrize("status", [429, 503, 529])
def test_how_long_to_wait_is_kept(status: int, headers: dict[str, str], expected: int | None) -> None:
    error = from_status("acme", status, headers, b"", None, clock=lambda: NOW)
    assert error.retry_after == expected
    assert error.status == status


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (408, UpstreamFailed),
        (504, UpstreamTimeout),
        (409, UpstreamFailed),
        (404, UpstreamFailed),
        (500, UpstreamFailed),
        (529, UpstreamUnavailable),
    ],
)
def test_statuses_that_are_not_about_the_request(status: int, expected: type[UpstreamError]) -> None:
    error = from_status("acme", status, {}, b'{"error": {"message": "secret words"}}', None)
    assert type(error) is expected
    assert error.status == status
    assert "secret" not in error.message
