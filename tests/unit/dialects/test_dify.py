"""dialects/dify.py: seed 2, sentence by sentence."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from dify_client import CompletionClient

from headgate.config import DEFAULT_APP
from headgate.core.accounts import App, Principal, Variable
from headgate.core.completion import (
    Answer,
    Charge,
    Choice,
    Chunk,
    CompletionRequest,
    ModelAnswer,
    StreamEnd,
    Usage,
)
from headgate.core.errors import (
    GatewayError,
    InsufficientFunds,
    InvalidCredentials,
    InvalidRequest,
    Overloaded,
    RateLimited,
    UnknownModel,
    UpstreamFailed,
)
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD
from headgate.dialects.base import MalformedBody, RequestContext
from headgate.dialects.dify import STOP_DONE, Dify, stream_id_of, task_id_of
from headgate.dialects.dify_errors import ERRORS

STORY = App(
    name="story",
    model="acme-large",
    prompt="Write a story about {{topic}}.",
    variables=(Variable(name="topic", required=True, max_length=48),),
    temperature=0.7,
    top_p=0.9,
    max_tokens=64,
    stop=("END",),
)
DIFY = Dify({app.name: app for app in (DEFAULT_APP, STORY)})
MESSAGE_ID = "9da23599-e713-473b-982c-4328d4f5c78a"
TASK_ID = "900bbd43-dc0b-4383-a372-aa6e6c414227"
CREATED = 1_705_407_629
SEED_BODY = {"inputs": {"query": "Hello, world!"}, "response_mode": "streaming", "user": "abc-123"}


def context(app: str | None = None) -> RequestContext:
    return RequestContext(
        principal=Principal(account="ada", key_id="k1", app=app),
        request_id="req-1",
        answer_id=MESSAGE_ID,
        stream_id=uuid.UUID(TASK_ID).hex,
        created=CREATED,
    )


def parsed(body: object, app: str | None = None) -> CompletionRequest:
    return DIFY.parse(DIFY.decode(json.dumps(body).encode()), context(app))


def refused(body: object, app: str | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parsed(body, app)
    response = DIFY.render_error(caught.value)
    assert response.status == 400
    assert json.loads(response.body) == {
        "code": "invalid_param",
        "message": caught.value.message,
        "status": 400,
    }
    return caught.value


def answer(text: str = "Hello World!...", *, choices: int = 1) -> Answer:
    spec = ModelSpec(
        name="acme-large",
        provider="acme",
        upstream_name="hidden",
        mode="chat",
        context_window=8192,
        max_input_tokens=8192,
        max_output_tokens=4096,
        input_rate=FemtoUSD(10**9),
        cached_rate=FemtoUSD(10**9),
        output_rate=FemtoUSD(2 * 10**9),
    )
    charge = Charge(
        model="acme-large",
        provider="acme",
        usage=Usage(prompt_tokens=1033, completion_tokens=128),
        exact_input=FemtoUSD(1033 * 10**9),
        exact_output=FemtoUSD(256 * 10**9),
        cost=NanoUSD(1_289_000),
        price=NanoUSD(1_289_000),
        margin=MarginPPM(0),
    )
    return Answer(
        request=parsed(SEED_BODY),
        models=(
            ModelAnswer(
                requested="acme-large",
                model="acme-large",
                provider="acme",
                spec=spec,
                choices=(Choice(index=0, text=text, finish_reason="stop"),) * choices,
                charge=charge,
                elapsed_s=0.5,
                created=CREATED,
            ),
        ),
        price=NanoUSD(1_289_000),
        balance_before=NanoUSD(10**9),
        balance_after=NanoUSD(10**9 - 1_289_000),
        elapsed_s=0.7682376249867957,
    )


SEED_METADATA = {
    "usage": {
        "prompt_tokens": 1033,
        "prompt_unit_price": "0.001",
        "prompt_price_unit": "0.001",
        "prompt_price": "0.0010330",
        "completion_tokens": 128,
        "completion_unit_price": "0.002",
        "completion_price_unit": "0.001",
        "completion_price": "0.0002560",
        "total_tokens": 1161,
        "total_price": "0.0012890",
        "currency": "USD",
        "latency": 0.7682376249867957,
    },
    "retriever_resources": [],
}


def events(stream: bytes) -> list[Any]:
    blocks = stream.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and len(block.splitlines()) == 1 for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_the_seeds_request_fills_the_built_in_app() -> None:
    request = parsed(SEED_BODY)
    assert request.prompts == ("Hello, world!",)
    assert request.messages is None
    assert request.models == ("demo",)
    assert request.stream
    assert request.user == "abc-123"
    assert request.app == "default"
    assert request.plain
    assert request.chat_first
    assert (request.request_id, request.answer_id, request.created) == ("req-1", MESSAGE_ID, CREATED)
    assert request.dialect == "dify"


def test_an_app_key_brings_its_apps_model_prompt_and_sampling() -> None:
    request = parsed({"inputs": {"topic": "bees"}}, "story")
    assert request.prompts == ("Write a story about bees.",)
    assert request.models == ("acme-large",)
    assert request.app == "story"
    assert request.max_tokens == 64
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.stop) == (
        0.7,
        0.9,
        ("END",),
    )


def test_an_app_that_is_no_longer_configured_is_unavailable() -> None:
    with pytest.raises(UnknownModel) as caught:
        parsed(SEED_BODY, "gone")
    response = DIFY.render_error(caught.value)
    assert response.status == 400
    assert json.loads(response.body)["code"] == "app_unavailable"


def test_inputs_are_checked_in_difys_words() -> None:
    assert refused({"inputs": {"query": ""}}).message == "query is required in input form"
    assert refused({"inputs": {"other": "x"}}).message == "query is required in input form"
    assert refused({"inputs": {"topic": 5}}, "story").message == "topic in input form must be a string"


@pytest.mark.parametrize(
    ("fields", "streams"),
    [
        ({}, False),
        ({"response_mode": None}, False),
        ({"response_mode": "blocking"}, False),
        ({"response_mode": "streaming"}, True),
    ],
)
def test_blocking_is_the_response_mode_unless_asked_otherwise(fields: dict[str, Any], streams: bool) -> None:
    assert parsed({"inputs": {"query": "x"}} | fields).stream is streams


@pytest.mark.parametrize(
    ("user", "kept"), [({}, None), ({"user": None}, None), ({"user": ""}, None), ({"user": "u"}, "u")]
)
def test_the_user_is_optional(user: dict[str, Any], kept: str | None) -> None:
    assert parsed({"inputs": {"query": "x"}} | user).user == kept


@pytest.mark.parametrize(
    "extras",
    [{"files": None}, {"files": []}, {"query": ""}, {"conversation_id": "", "trace_id": {"deep": [1]}}],
)
def test_neutral_values_and_unknown_keys_are_accepted(extras: dict[str, Any]) -> None:
    assert parsed({"inputs": {"query": "x"}} | extras).prompts == ("x",)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": "query"}, "inputs"),
        ({"inputs": {"query": "x"}, "response_mode": "stream"}, "response_mode"),
        ({"inputs": {"query": "x"}, "response_mode": ""}, "response_mode"),
        ({"inputs": {"query": "x"}, "response_mode": True}, "response_mode"),
        ({"inputs": {"query": "x"}, "user": 5}, "user"),
        ({"inputs": {"query": "x"}, "files": {}}, "files"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    error = refused(body)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"inputs": {"query": "\xff"}}'])
def test_what_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        DIFY.decode(body)


class RecordingClient(CompletionClient):  # type: ignore[misc]  # it ships no types
    """The real client up to the point where it would send."""

    sent: bytes

    def _send_request(
        self, method: str, endpoint: str, json_: object = None, *args: object, **kwargs: object
    ) -> None:
        assert (method, endpoint) == ("POST", "/completion-messages")
        self.sent = json.dumps(json_).encode()


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
def test_what_dify_client_sends_is_understood(mode: str) -> None:
    client = RecordingClient("app-key")
    client.create_completion_message(inputs={"query": "What's the weather?"}, response_mode=mode, user="u1")
    request = DIFY.parse(DIFY.decode(client.sent), context())
    assert request.prompts == ("What's the weather?",)
    assert request.stream is (mode == "streaming")
    assert request.user == "u1"


def test_the_credential_is_a_bearer_key() -> None:
    assert DIFY.credential("Bearer app-key", b"{}") == "app-key"
    assert DIFY.credential(None, b'{"genstackToken": "x"}') is None


def test_the_blocking_answer_is_the_seeds() -> None:
    assert json.loads(DIFY.render(answer())) == {
        "event": "message",
        "task_id": TASK_ID,
        "id": MESSAGE_ID,
        "message_id": MESSAGE_ID,
        "mode": "completion",
        "answer": "Hello World!...",
        "metadata": SEED_METADATA,
        "created_at": CREATED,
    }


def test_pieces_of_the_answer_are_message_events() -> None:
    renderer = DIFY.renderer(parsed(SEED_BODY))
    batch = [Chunk(0, ' "I"\n'), Chunk(0, ""), Chunk(0, "żółw 🐢"), Chunk(-1)]
    common = {
        "event": "message",
        "task_id": TASK_ID,
        "message_id": MESSAGE_ID,
        "id": MESSAGE_ID,
        "created_at": CREATED,
    }
    assert events(renderer.chunks(batch)) == [common | {"answer": ' "I"\n'}, common | {"answer": "żółw 🐢"}]
    assert renderer.chunks([Chunk(0, finish_reason="stop")]) == b""


def test_no_character_breaks_an_event_for_clients_that_split_decoded_lines() -> None:
    renderer = DIFY.renderer(parsed(SEED_BODY))
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf\r\ng à Å"
    (piece,) = events(renderer.chunks([Chunk(0, text)]))
    assert piece["answer"] == text


@pytest.mark.parametrize("kind", ["completed", "aborted"])
def test_a_finished_or_stopped_stream_ends_with_message_end(kind: Any) -> None:
    renderer = DIFY.renderer(parsed(SEED_BODY))
    assert events(renderer.end(StreamEnd(kind=kind, answer=answer()))) == [
        {
            "event": "message_end",
            "task_id": TASK_ID,
            "message_id": MESSAGE_ID,
            "id": MESSAGE_ID,
            "created_at": CREATED,
            "metadata": SEED_METADATA,
        }
    ]


def test_a_stream_that_we_stopped_or_that_failed_ends_with_an_error_event() -> None:
    renderer = DIFY.renderer(parsed(SEED_BODY))
    common = {"event": "error", "task_id": TASK_ID, "message_id": MESSAGE_ID, "created_at": CREATED}
    draining = StreamEnd(kind="aborted", answer=answer(), error=Overloaded("The server is shutting down."))
    assert events(renderer.end(draining)) == [
        common
        | {
            "code": "completion_request_error",
            "message": "The server is shutting down.",
            "status": 503,
        }
    ]
    assert events(renderer.error(UpstreamFailed("The upstream broke off."))) == [
        common | {"code": "completion_request_error", "message": "The upstream broke off.", "status": 400}
    ]


def test_an_answer_stopped_before_its_first_word_is_empty() -> None:
    assert json.loads(DIFY.render(answer(choices=0)))["answer"] == ""


def test_the_keep_alive_is_difys_own() -> None:
    assert DIFY.ping == b"event: ping\n\n"


def test_a_task_id_leads_back_to_its_stream() -> None:
    request = parsed(SEED_BODY)
    assert task_id_of(request) == TASK_ID
    assert stream_id_of(TASK_ID) == request.stream_id
    assert stream_id_of("not-a-task") is None


@pytest.mark.parametrize(
    ("body", "user"),
    [
        (b'{"user": "abc-123"}', "abc-123"),
        (b'{"user": null}', None),
        (b'{"user": ""}', None),
        (b"{}", None),
        (b"", None),
    ],
)
def test_a_stop_may_name_its_user(body: bytes, user: str | None) -> None:
    assert DIFY.decode_stop(body) == user


def test_a_stop_with_a_wrong_user_is_refused_and_success_is_success() -> None:
    with pytest.raises(InvalidRequest, match="user"):
        DIFY.decode_stop(b'{"user": 5}')
    assert json.loads(STOP_DONE) == {"result": "success"}


def kinds(error: type[GatewayError] = GatewayError) -> Iterator[str]:
    yield error.kind
    for child in error.__subclasses__():
        yield from kinds(child)


def test_every_kind_of_error_has_a_status_and_a_code() -> None:
    assert set(kinds()) == set(ERRORS)


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (InvalidCredentials(), 401, "unauthorized", (("WWW-Authenticate", 'Bearer realm="api"'),)),
        (InsufficientFunds(2, 1), 400, "provider_quota_exceeded", ()),
        (
            RateLimited("Slow down.", retry_after=9),
            429,
            "too_many_requests",
            (("Retry-After", "9"),),
        ),
        (
            Overloaded("The queue is full.", retry_after=2),
            503,
            "completion_request_error",
            (("Retry-After", "2"),),
        ),
    ],
)
def test_errors_have_a_code_a_message_and_a_status(
    error: GatewayError, status: int, code: str, headers: tuple[tuple[str, str], ...]
) -> None:
    response = DIFY.render_error(error)
    assert response.status == status
    assert response.headers == headers
    assert json.loads(response.body) == {"code": code, "message": error.message, "status": status}
