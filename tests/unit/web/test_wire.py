"""Reading requests at the ASGI level."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.exchange import Exchange, scope_of

from headgate.core.errors import BodyTooLarge, InvalidRequest, UnsupportedContentType
from headgate.web.wire import ClientGone, check_content_type, encoded, read_body, request_id, respond

LIMIT = 10


def exchange(*parts: bytes, **headers: str) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange(*parts, scope=scope_of(headers=named))


class TestBody:
    @given(st.lists(st.binary(max_size=6), min_size=1, max_size=6), st.booleans())
    async def test_it_is_read_whole_or_refused_when_it_is_too_large(
        self, parts: list[bytes], declared: bool
    ) -> None:
        whole = b"".join(parts)
        given = exchange(*parts, **({"content_length": str(len(whole))} if declared else {}))
        if len(whole) > LIMIT:
            with pytest.raises(BodyTooLarge, match="at most 10 bytes"):
                await read_body(given.scope, given.receive, LIMIT)
        else:
            assert await read_body(given.scope, given.receive, LIMIT) == whole

    async def test_a_length_that_is_too_much_is_refused_before_anything_is_read(self) -> None:
        given = exchange(b"x", content_length="11")
        with pytest.raises(BodyTooLarge):
            await read_body(given.scope, given.receive, LIMIT)
        assert await given.receive() == {"type": "http.request", "body": b"x", "more_body": False}

    @pytest.mark.parametrize("length", ["9" * 20, "9" * 5000])
    async def test_an_absurd_length_too(self, length: str) -> None:
        with pytest.raises(BodyTooLarge):
            await read_body(scope_of(headers={"content-length": length}), exchange().receive, LIMIT)

    @pytest.mark.parametrize("length", ["-1", "ten", "1.5", "0x5", "²"])
    async def test_a_length_that_is_no_number_is_refused(self, length: str) -> None:
        given = exchange(content_length=length)
        with pytest.raises(InvalidRequest, match="Content-Length"):
            await read_body(given.scope, given.receive, LIMIT)

    async def test_without_a_length_it_stops_reading_at_the_limit(self) -> None:
        given = exchange(*[b"x" * 6] * 100)
        with pytest.raises(BodyTooLarge):
            await read_body(given.scope, given.receive, LIMIT)
        assert (await given.receive())["more_body"]

    @pytest.mark.parametrize("parts", [(), (b"half",)])
    async def test_a_client_that_leaves_before_its_end_is_gone(self, parts: tuple[bytes, ...]) -> None:
        given = exchange()
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

        async def receive() -> dict[str, object]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        with pytest.raises(ClientGone):
            await read_body(given.scope, receive, LIMIT)


class TestContentType:
    @pytest.mark.parametrize(
        "given",
        [None, "", "application/json", "APPLICATION/JSON", "application/json; charset=utf-8"],
    )
    def test_json_passes_and_so_does_none(self, given: str | None) -> None:
        check_content_type(scope_of(headers={} if given is None else {"content-type": given}))

    @pytest.mark.parametrize(
        "given",
        ["text/plain", "application/x-www-form-urlencoded", "application/problem+json", "json", "é" * 500],
    )
    def test_everything_else_is_refused_by_name(self, given: str) -> None:
        with pytest.raises(UnsupportedContentType) as refusal:
            check_content_type(scope_of(headers={"content-type": given}))
        assert given[:50] in refusal.value.message and len(refusal.value.message) < 200


class TestRequestId:
    @pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 128])
    def test_a_clients_own_is_kept_where_it_has_the_form(self, given: str) -> None:
        assert request_id(scope_of(headers={"x-request-id": given})) == given

    @pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\nb", "ä", 'a"b', "<script>"])
    def test_any_other_is_replaced(self, given: str) -> None:
        made = request_id(scope_of(headers={"x-request-id": given}))
        assert made != given and len(made) == 32 and int(made, 16) >= 0

    def test_one_request_keeps_one_id_and_two_have_two(self) -> None:
        scope = scope_of()
        assert request_id(scope) == request_id(scope) != request_id(scope_of())


async def test_a_whole_response_says_its_length() -> None:
    got = exchange()
    await respond(got.send, 418, b"teapot", (("X-Kind", "short"),))
    assert (got.status, got.body, got.ended) == (418, b"teapot", True)
    assert got.headers == {"content-type": "application/json", "content-length": "6", "x-kind": "short"}


def test_header_names_are_sent_in_lower_case() -> None:
    assert encoded([("X-Stream-Id", "a")]) == [(b"x-stream-id", b"a")]
