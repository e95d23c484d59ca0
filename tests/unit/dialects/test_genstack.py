"""dialects/genstack.py: seed 1, sentence by sentence."""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from headgate.core.accounts import Principal
from headgate.core.completion import (
    Answer,
    Charge,
    Choice,
    Chunk,
    CompletionRequest,
    Message,
    ModelAnswer,
    StreamEnd,
    Usage,
)
from headgate.core.errors import (
    BodyTooLarge,
    GatewayError,
    InsufficientFunds,
    InternalError,
    InvalidCredentials,
    InvalidRequest,
    Overloaded,
    RateLimited,
    UnknownModel,
    UpstreamRejected,
    UpstreamTimeout,
)
from headgate.core.models import ModelSpec
from headgate.core.money import Credits, FemtoUSD, MarginPPM, NanoUSD
from headgate.dialects.base import MalformedBody, RequestContext
from headgate.dialects.genstack import ERRORS, SHUTDOWN_DONE, Genstack, render_health

BLOCKING = Genstack(Credits(Decimal("0.0001")), streams=False)
STREAMING = Genstack(Credits(Decimal("0.0001")), streams=True)
CONTEXT = RequestContext(
    principal=Principal(account="ada", key_id="t1", token=True),
    request_id="req-1",
    answer_id="9da23599-e713-473b-982c-4328d4f5c78a",
    stream_id="00112233445566778899aabbccddeeff",
    created=1_705_407_629,
)
SEED_BODY = {
    "genstackToken": "user_auth_token",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Tell me about AI."},
    ],
    "model": "gpt-4-mini",
    "developerId": "developer_genstack_id",
    "applicationId": "com.example.dev.app",
    "temperature": 0.7,
    "maxOutputTokens": 500,
    "overrideGrossMarginPercent": 50,
}
LEAST_BODY = {"genstackToken": "t", "messages": [{"role": "user", "content": "Hi"}], "model": "demo"}


def body_with(**fields: Any) -> bytes:
    return json.dumps(LEAST_BODY | fields).encode()


def parsed(body: bytes, dialect: Genstack = BLOCKING) -> CompletionRequest:
    return dialect.parse(dialect.decode(body), CONTEXT)


def refused(body: bytes) -> tuple[InvalidRequest, dict[str, Any]]:
    with pytest.raises(InvalidRequest) as caught:
        parsed(body)
    response = BLOCKING.render_error(caught.value)
    assert response.status == 400
    error = json.loads(response.body)["error"]
    assert error["type"] == "InvalidRequest"
    assert set(error["details"]) == {"field", "problem", "allowed"}
    return caught.value, error


def answer(
    text: str = "AI, or", *, margin: int = 0, request: CompletionRequest | None = None, choices: int = 1
) -> Answer:
    spec = ModelSpec(
        name="gpt-4-mini",
        provider="acme",
        upstream_name="hidden-upstream-name",
        mode="chat",
        context_window=128_000,
        max_input_tokens=128_000,
        max_output_tokens=16_384,
        input_rate=FemtoUSD(250_000_000),
        cached_rate=FemtoUSD(250_000_000),
        output_rate=FemtoUSD(6_666_666_667),
    )
    charge = Charge(
        model="gpt-4-mini",
        provider="acme",
        usage=Usage(prompt_tokens=20, completion_tokens=150),
        exact_input=FemtoUSD(20 * 250_000_000),
        exact_output=FemtoUSD(150 * 6_666_666_667),
        cost=NanoUSD(1_005_001),
        price=NanoUSD(1_005_001),
        margin=MarginPPM(margin),
    )
    return Answer(
        request=request or parsed(json.dumps(SEED_BODY).encode()),
        models=(
            ModelAnswer(
                requested="gpt-4-mini",
                model="gpt-4-mini",
                provider="acme",
                spec=spec,
                choices=(Choice(index=0, text=text, finish_reason="stop"),) * choices,
                charge=charge,
                elapsed_s=0.5,
                created=1_705_407_629,
            ),
        ),
        price=NanoUSD(1_005_001),
        balance_before=NanoUSD(100_000_000),
        balance_after=NanoUSD(98_994_999),
        elapsed_s=0.5,
    )


def events(stream: bytes) -> list[Any]:
    blocks = stream.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_the_seeds_request_is_translated_whole() -> None:
    request = parsed(json.dumps(SEED_BODY).encode())
    assert request.messages == (
        Message(role="system", content="You are a helpful assistant."),
        Message(role="user", content="Tell me about AI."),
    )
    assert request.prompts is None
    assert request.models == ("gpt-4-mini",)
    assert request.max_tokens == 500
    assert request.sampling.temperature == 0.7
    assert request.developer_id == "developer_genstack_id"
    assert request.application_id == "com.example.dev.app"
    assert request.margin_override == Decimal(50)
    assert (request.request_id, request.answer_id) == ("req-1", CONTEXT.answer_id)
    assert (request.stream_id, request.created) == (CONTEXT.stream_id, 1_705_407_629)
    assert request.dialect == "genstack"
    assert request.max_tokens_param == "maxOutputTokens"
    assert request.plain


def test_the_path_says_whether_the_answer_streams() -> None:
    assert not parsed(body_with()).stream
    assert parsed(body_with(stream=False), STREAMING).stream


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"developerId": None, "applicationId": None, "temperature": None},
        {"maxOutputTokens": None, "overrideGrossMarginPercent": None},
        {"unknown": {"key": [1]}},
    ],
)
def test_optional_fields_may_be_missing_null_or_unknown(fields: dict[str, Any]) -> None:
    request = parsed(body_with(**fields))
    assert request.developer_id is None
    assert request.application_id is None
    assert request.sampling.temperature is None
    assert request.max_tokens is None
    assert request.margin_override is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": ["demo"]}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"maxOutputTokens": 0}, "maxOutputTokens"),
        ({"maxOutputTokens": 1.5}, "maxOutputTokens"),
        ({"maxOutputTokens": True}, "maxOutputTokens"),
        ({"maxOutputTokens": "5"}, "maxOutputTokens"),
        ({"developerId": 5}, "developerId"),
        ({"applicationId": {}}, "applicationId"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], field: str) -> None:
    error, rendered = refused(body_with(**fields))
    assert str(rendered["details"]["field"]).startswith(field)
    assert field.split("[", maxsplit=1)[0] in error.message
    assert rendered["details"]["problem"] == rendered["message"] == error.message


@pytest.mark.parametrize("field", ["messages", "model"])
def test_a_missing_required_field_is_named(field: str) -> None:
    body = {key: value for key, value in LEAST_BODY.items() if key != field}
    _, rendered = refused(json.dumps(body).encode())
    assert rendered["details"]["field"] == field


def test_details_say_what_is_allowed() -> None:
    _, rendered = refused(body_with(messages=[{"role": "tool", "content": "x"}]))
    assert rendered["details"]["allowed"] == "system, user or assistant"
    _, rendered = refused(body_with(maxOutputTokens=0))
    assert rendered["details"]["allowed"] == "an integer of at least 1"


def test_an_absurd_role_is_not_echoed() -> None:
    error, _ = refused(body_with(messages=[{"role": "x" * 100_000, "content": "x"}]))
    assert len(error.message) < 200


def test_integral_floats_are_integers_and_high_temperatures_are_left_to_the_model() -> None:
    request = parsed(body_with(maxOutputTokens=500.0, temperature=5))
    assert request.max_tokens == 500
    assert request.sampling.temperature == 5.0


@pytest.mark.parametrize(
    ("written", "percent"),
    [
        ("0", "0"),
        ("-0.0", "0"),
        ("99", "99"),
        ("12.5", "12.5"),
        ("0.0001", "0.0001"),
        ("33.3333", "33.3333"),
        ("12.500000", "12.5"),
        ("5e1", "50"),
    ],
)
def test_the_margin_is_read_as_the_decimal_it_is_written_as(written: str, percent: str) -> None:
    body = body_with(overrideGrossMarginPercent=0).replace(b'Percent": 0', b'Percent": ' + written.encode())
    assert parsed(body).margin_override == Decimal(percent)


@pytest.mark.parametrize(
    "written",
    [
        *("-1", "99.0001", "100", "0.00001", "12.50000000000000000000000000000000000001", "-0.0001"),
        *("1e999999999", "-1e999999999", "1e99999999999999999999999", "1e-99999999999999999999999"),
        *('"50"', "true", "[50]", '{"percent":50}', '""', "1e-999999999"),
    ],
)
def test_any_other_margin_is_refused(written: str) -> None:
    body = body_with(overrideGrossMarginPercent=0).replace(b'Percent": 0', b'Percent": ' + written.encode())
    _, rendered = refused(body)
    assert rendered["details"]["field"] == "overrideGrossMarginPercent"
    assert rendered["details"]["allowed"] == "a number from 0 to 99 with at most four decimals"


@pytest.mark.parametrize(
    ("body", "token"),
    [
        (body_with(), "t"),
        (body_with(messages=7, temperature="hot", model=None), "t"),
        (body_with(genstackToken=None), None),
        (body_with(genstackToken=""), None),
        (b'{"model": "demo"}', None),
        (body_with(genstackToken=12), "12"),
        (body_with(genstackToken=False), "False"),
        (b"[1]", None),
        (b"not json", None),
        (b'{"genstackToken": "\xff"}', None),
    ],
)
def test_the_credential_is_found_whatever_else_is_wrong(body: bytes, token: str | None) -> None:
    assert BLOCKING.credential("Bearer of-another-dialect", body) == token


@pytest.mark.parametrize("token", [["x"], {"a": 1}, 1.5])
def test_a_token_that_is_not_a_string_is_bad_rather_than_missing(token: object) -> None:
    body = body_with(genstackToken=token)
    assert BLOCKING.credential(None, body)
    with pytest.raises(InvalidRequest):
        BLOCKING.decode(body)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": "\xff"}', b'{"a": ' + b"[" * 100_000])
def test_what_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        BLOCKING.decode(body)


def test_field_errors_name_the_endpoint() -> None:
    for dialect, path in ((BLOCKING, "(POST /)"), (STREAMING, "(POST /stream)")):
        with pytest.raises(InvalidRequest, match="temperature") as caught:
            dialect.decode(body_with(temperature=[]))
        assert path in caught.value.message


def test_the_answer_has_the_seeds_form() -> None:
    assert json.loads(BLOCKING.render(answer(margin=125_000))) == {
        "model": "gpt-4-mini",
        "output": "AI, or",
        "usage": {
            "type": "completion",
            "promptTokens": 20,
            "completionTokens": 150,
            "inputCost": "0.000005",
            "outputCost": "0.00100000000005",
            "price": "0.001005001",
            "grossMarginPercent": "12.5",
        },
        "balanceBefore": "1000",
        "balanceAfter": "989.94999",
    }


@pytest.mark.parametrize(("margin", "text"), [(0, "0"), (500_000, "50"), (1, "0.0001"), (990_000, "99")])
def test_the_margin_is_an_exact_decimal_string(margin: int, text: str) -> None:
    assert json.loads(BLOCKING.render(answer(margin=margin)))["usage"]["grossMarginPercent"] == text


def test_the_stream_id_is_a_header() -> None:
    request = parsed(body_with(), STREAMING)
    assert STREAMING.stream_headers(request) == (("X-Stream-Id", CONTEXT.stream_id),)


def test_tokens_arrive_as_events_and_empty_chunks_as_none() -> None:
    renderer = STREAMING.renderer(parsed(body_with(), STREAMING))
    batch = [Chunk(0, 'A "quote"\n'), Chunk(0, ""), Chunk(0, " żółw 🐢"), Chunk(-1, usage=None)]
    assert events(renderer.chunks(batch)) == [{"token": 'A "quote"\n'}, {"token": " żółw 🐢"}]
    assert renderer.chunks([Chunk(0, finish_reason="stop")]) == b""


def test_a_stream_that_finished_ends_with_the_blocking_response() -> None:
    renderer = STREAMING.renderer(parsed(body_with(), STREAMING))
    (last,) = events(renderer.end(StreamEnd(kind="completed", answer=answer())))
    assert last == {"completed": True, "response": json.loads(BLOCKING.render(answer()))}


@pytest.mark.parametrize("cause", [None, Overloaded("The server is shutting down.")])
def test_a_stopped_stream_ends_with_the_partial_response(cause: GatewayError | None) -> None:
    renderer = STREAMING.renderer(parsed(body_with(), STREAMING))
    (last,) = events(renderer.end(StreamEnd(kind="aborted", answer=answer("AI,"), error=cause)))
    assert last == {"aborted": True, "response": json.loads(BLOCKING.render(answer("AI,")))}


def test_a_stream_stopped_before_its_first_word_has_an_empty_output() -> None:
    renderer = STREAMING.renderer(parsed(body_with(), STREAMING))
    (last,) = events(renderer.end(StreamEnd(kind="aborted", answer=answer(choices=0))))
    assert last["response"]["output"] == ""


def test_a_failure_after_the_start_is_an_error_event() -> None:
    renderer = STREAMING.renderer(parsed(body_with(), STREAMING))
    (last,) = events(renderer.error(UpstreamTimeout("The upstream went silent.")))
    assert last == {"error": {"type": "GatewayError", "message": "The upstream went silent.", "details": {}}}


def kinds(error: type[GatewayError] = GatewayError) -> Iterator[str]:
    yield error.kind
    for child in error.__subclasses__():
        yield from kinds(child)


def test_every_kind_of_error_has_a_status_and_a_type() -> None:
    assert set(kinds()) == set(ERRORS)


@pytest.mark.parametrize(
    ("error", "status", "type_", "details"),
    [
        (
            InvalidRequest("temperature must be lower.", param="temperature", allowed="0 to 2"),
            400,
            "InvalidRequest",
            {"field": "temperature", "problem": "temperature must be lower.", "allowed": "0 to 2"},
        ),
        (
            UnknownModel("No such model.", param="model"),
            400,
            "InvalidRequest",
            {"field": "model", "problem": "No such model.", "allowed": None},
        ),
        (
            UpstreamRejected("Too many tokens.", status=422),
            400,
            "InvalidRequest",
            {"field": None, "problem": "Too many tokens.", "allowed": None},
        ),
        (
            InsufficientFunds(required_nano=12_345, available_nano=-100_000),
            402,
            "InsufficientFunds",
            {"required": "0.12345", "available": "-1"},
        ),
        (InvalidCredentials(), 401, "InvalidCredentials", {}),
        (InternalError(), 500, "InternalError", {}),
        (RateLimited("Slow down."), 429, "GatewayError", {}),
    ],
)
def test_errors_have_a_type_a_message_and_details(
    error: GatewayError, status: int, type_: str, details: dict[str, object]
) -> None:
    response = BLOCKING.render_error(error)
    assert response.status == status
    assert json.loads(response.body) == {
        "error": {"type": type_, "message": error.message, "details": details}
    }


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (RateLimited("Slow down.", retry_after=7), (("Retry-After", "7"),)),
        (RateLimited("Slow down.", retry_after=4000), (("Retry-After", "120"),)),
        (RateLimited("Slow down."), (("Retry-After", "1"),)),
        (Overloaded("The queue is full.", retry_after=2), (("Retry-After", "2"),)),
        (BodyTooLarge("Too large."), ()),
    ],
)
def test_retry_after_is_a_header(error: GatewayError, headers: tuple[tuple[str, str], ...]) -> None:
    assert BLOCKING.render_error(error).headers == headers


@pytest.mark.parametrize("token", ["", ', "genstackToken": null', ', "genstackToken": 5'])
def test_a_shutdown_names_a_stream(token: str) -> None:
    body = f'{{"streamId": "abc"{token}}}'.encode()
    assert BLOCKING.decode_shutdown(body) == "abc"


@pytest.mark.parametrize("body", [b"{}", b'{"streamId": null}', b'{"streamId": ""}', b'{"streamId": 5}'])
def test_a_shutdown_without_an_id_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="streamId") as caught:
        BLOCKING.decode_shutdown(body)
    assert caught.value.param == "streamId"


def test_the_bodies_of_health_and_shutdown() -> None:
    assert json.loads(render_health("production", "https://completion.genstack.app/ui")) == {
        "status": "healthy",
        "env": "production",
        "ui": "https://completion.genstack.app/ui",
    }
    assert json.loads(SHUTDOWN_DONE) == {"success": True}
