"""dialects/thiggle.py: one prompt, several models."""

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from openai.types import Completion as SDKCompletion

from headgate.core import errors
from headgate.core.accounts import Principal
from headgate.core.completion import (
    Answer,
    Charge,
    Choice,
    Chunk,
    CompletionRequest,
    ModelAnswer,
    Sampling,
    StreamEnd,
    Usage,
)
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD, rate
from headgate.dialects.base import Caps, Dialect, RequestContext
from headgate.dialects.openai_errors import STATUSES
from headgate.dialects.thiggle import THIGGLE_STATUSES, Thiggle, ThiggleBody

CONTEXT = RequestContext(
    principal=Principal(account="acme", key_id="k1"),
    request_id="req-1",
    answer_id="7d444840-9dc0-11d1-b245-5ffdce74fad2",
    stream_id="5" * 32,
    created=1_700_000_000,
)
SPEC = ModelSpec(
    name="gpt-4",
    provider="openai",
    upstream_name="gpt-4",
    mode="chat",
    context_window=8192,
    max_input_tokens=8192,
    max_output_tokens=4096,
    input_rate=rate(Decimal(1)),
    cached_rate=rate(Decimal(1)),
    output_rate=rate(Decimal(1)),
)
DIALECT: Dialect[ThiggleBody] = Thiggle(Caps())
SEED = {
    "prompt": "Once upon a time",
    "model": ["gpt-4", "llama-2-70b"],
    "max_tokens": 50,
    "temperature": 0.7,
    "top_p": 0.8,
    "stop": ["."],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
}


def parse_by(dialect: Dialect[ThiggleBody], fields: Mapping[str, object]) -> CompletionRequest:
    body = {"model": "gpt-4", "prompt": "Once", **fields}
    return dialect.parse(dialect.decode(json.dumps(body).encode()), CONTEXT)


def parse(**fields: object) -> CompletionRequest:
    return parse_by(DIALECT, fields)


def refused_by(dialect: Dialect[ThiggleBody], fields: Mapping[str, object]) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_by(dialect, fields)
    return caught.value


def refused(fields: Mapping[str, object]) -> errors.InvalidRequest:
    return refused_by(DIALECT, fields)


def served(
    model: str, index: int, outcome: str | errors.GatewayError, usage: tuple[int, int] = (0, 0)
) -> ModelAnswer:
    error = outcome if isinstance(outcome, errors.GatewayError) else None
    return ModelAnswer(
        requested=model,
        model=model,
        provider="openai",
        spec=SPEC,
        choices=(Choice(index=index, text=outcome, finish_reason="stop"),)
        if isinstance(outcome, str)
        else (),
        charge=Charge(
            model=model,
            provider="openai",
            usage=Usage(prompt_tokens=usage[0], completion_tokens=usage[1]),
            exact_input=FemtoUSD(0),
            exact_output=FemtoUSD(0),
            cost=NanoUSD(0),
            price=NanoUSD(0),
            margin=MarginPPM(0),
        ),
        elapsed_s=0.25 * (index + 1),
        created=1_700_000_001 + index,
        error=error,
    )


def answer(request: CompletionRequest, *models: ModelAnswer) -> Answer:
    return Answer(
        request=request,
        models=models,
        price=NanoUSD(0),
        balance_before=NanoUSD(0),
        balance_after=NanoUSD(0),
        elapsed_s=1.2344,
    )


def events(stream: bytes) -> list[Any]:
    """The data of each event; a string where it is not JSON ([DONE])."""
    assert stream == b"" or stream.endswith(b"\n\n")
    parsed = []
    for block in stream.split(b"\n\n")[:-1]:
        assert block.startswith(b"data: ")
        payload = block.removeprefix(b"data: ")
        parsed.append(payload.decode() if payload == b"[DONE]" else json.loads(payload))
    return parsed


# --- parsing


def test_the_seeds_example_arrives_whole() -> None:
    assert parse(**SEED) == CompletionRequest(
        request_id="req-1",
        answer_id=CONTEXT.answer_id,
        stream_id=CONTEXT.stream_id,
        created=CONTEXT.created,
        dialect="thiggle",
        models=("gpt-4", "llama-2-70b"),
        prompts=("Once upon a time",),
        max_tokens=50,
        sampling=Sampling(
            temperature=0.7, top_p=0.8, presence_penalty=0.5, frequency_penalty=-0.5, stop=(".",)
        ),
        partial_failure=True,
    )


def test_the_output_limit_has_no_default_of_its_own() -> None:
    request = parse()
    assert (request.max_tokens, request.default_max_tokens) == (None, None)


@pytest.mark.parametrize(
    ("model", "models"),
    [("gpt-4", ("gpt-4",)), (["gpt-4"], ("gpt-4",)), (["a", "b", "a"], ("a", "b", "a"))],
)
def test_a_model_is_a_name_or_a_list_that_may_repeat_one(model: object, models: tuple[str, ...]) -> None:
    assert parse(model=model).models == models


def test_a_stop_may_be_a_string() -> None:
    assert parse(stop="END").sampling.stop == ("END",)


def test_max_new_tokens_is_another_name_for_max_tokens() -> None:
    request = parse(max_new_tokens=9)
    assert (request.max_tokens, request.max_tokens_param) == (9, "max_new_tokens")
    assert parse(max_new_tokens=9, max_tokens=9.0).max_tokens == 9
    assert refused({"max_new_tokens": 9, "max_tokens": 8}).param == "max_new_tokens"


def test_null_means_not_given_and_unknown_keys_are_ignored() -> None:
    optional = [field for field in ThiggleBody.__struct_fields__ if field not in ("model", "prompt")]
    assert parse(**dict.fromkeys(optional), n=7, echo=True, extra={"x": 1}) == parse()


REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": ["a"]}, "prompt", "must be a string"),
    ({"model": None}, "model", "required"),
    ({"model": ""}, "model", "list of 1 to 16"),
    ({"model": []}, "model", "list of 1 to 16"),
    ({"model": ["a", ""]}, "model", "list of 1 to 16"),
    ({"model": ["a"] * 17}, "model", "list of 1 to 16"),
    ({"model": 4}, "model", "must be"),
    ({"model": [4]}, "model", "must be"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 1.5}, "max_tokens", "at least 1"),
    ({"max_tokens": "50"}, "max_tokens", "must be a number"),
    ({"max_new_tokens": 0}, "max_new_tokens", "at least 1"),
    ({"temperature": 1.01}, "temperature", "0 to 1"),
    ({"temperature": -0.1}, "temperature", "0 to 1"),
    ({"top_p": 1.01}, "top_p", "0 to 1"),
    ({"presence_penalty": -2.1}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "-2 to 2"),
    ({"stop": list("abcde")}, "stop", "up to 4"),
    ({"stop": [""]}, "stop", "up to 4"),
    ({"stop": [1]}, "stop", "must be"),
    ({"stream": 1}, "stream", "must be true or false"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_refused_with_its_name_range_and_endpoint(
    fields: dict[str, object], param: str, words: str
) -> None:
    error = refused(fields)
    assert error.param is not None
    assert error.param.startswith(param)
    assert words in error.message
    assert error.message.endswith("(POST /v1/completion).")


def test_the_caps_come_from_the_configuration() -> None:
    small = Thiggle(Caps(max_models=2, max_stops=1))
    assert refused_by(small, {"model": ["a", "b", "c"]}).param == "model"
    assert refused_by(small, {"stop": ["a", "b"]}).param == "stop"


def test_the_credential_is_the_bearer_token() -> None:
    assert DIALECT.credential("Bearer hg-1", b"{}") == "hg-1"


# --- answers


def test_a_blocking_answer_has_one_choice_per_model_and_sums_the_tokens() -> None:
    request = parse(**SEED)
    body = json.loads(
        DIALECT.render(
            answer(request, served("gpt-4", 0, " in", (4, 6)), served("llama-2-70b", 1, " there", (5, 7)))
        )
    )
    assert body == {
        "id": "7d444840-9dc0-11d1-b245-5ffdce74fad2",
        "object": "text_completion",
        "created": "2023-11-14T22:13:20Z",
        "choices": [
            {
                "text": " in",
                "created": 1_700_000_001,
                "model": "gpt-4",
                "finish_reason": "stop",
                "usage": {
                    "prompt_tokens": 4,
                    "completion_tokens": 6,
                    "total_tokens": 10,
                    "prediction_time_ms": 250,
                },
            },
            {
                "text": " there",
                "created": 1_700_000_002,
                "model": "llama-2-70b",
                "finish_reason": "stop",
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 7,
                    "total_tokens": 12,
                    "prediction_time_ms": 500,
                },
            },
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 13,
            "total_tokens": 22,
            "prediction_time_ms": 1234,
        },
    }
    assert str(UUID(body["id"])) == body["id"]
    assert datetime.fromisoformat(body["created"]).timestamp() == request.created


FAILURES: list[tuple[errors.GatewayError, str, str]] = [
    (errors.UpstreamTimeout("Too slow."), "timeout", "timeout_error"),
    (errors.UpstreamFailed("Broken."), "error", "server_error"),
    (errors.ModelUnavailable("No key."), "error", "server_error"),
    (errors.UpstreamRateLimited("Too many."), "error", "rate_limit_error"),
]


@pytest.mark.parametrize(
    ("error", "reason", "type_"), FAILURES, ids=lambda value: getattr(value, "kind", str(value))
)
def test_a_failed_model_among_good_ones_is_a_choice_that_says_why(
    error: errors.GatewayError, reason: str, type_: str
) -> None:
    request = parse(**SEED)
    body = json.loads(
        DIALECT.render(answer(request, served("gpt-4", 0, error), served("llama-2-70b", 1, " good", (5, 7))))
    )
    failed, good = body["choices"]
    assert (failed["text"], failed["model"], failed["finish_reason"]) == ("", "gpt-4", reason)
    assert failed["error"] == {"type": type_, "message": error.message}
    assert failed["usage"]["total_tokens"] == 0
    assert good["text"] == " good"
    assert "error" not in good
    assert body["usage"]["total_tokens"] == 12


def test_chunks_of_several_models_say_whose_they_are() -> None:
    renderer = DIALECT.renderer(parse(model=["gpt-4", 'odd"name', "gpt-4"], stream=True))
    batch = (
        Chunk(1, 'a"é'),
        Chunk(0, "b"),
        Chunk(-1, usage=Usage(prompt_tokens=1, completion_tokens=1)),
        Chunk(2, "", "length"),
    )
    rendered = events(renderer.chunks(batch))
    tags = [
        (event["model"], event["choices"][0]["model"], event["choices"][0]["index"]) for event in rendered
    ]
    assert tags == [('odd"name', 'odd"name', 1), ("gpt-4", "gpt-4", 0), ("gpt-4", "gpt-4", 2)]
    assert [event["choices"][0]["text"] for event in rendered] == ['a"é', "b", ""]
    assert [event["choices"][0]["finish_reason"] for event in rendered] == [None, None, "length"]
    assert {event["id"] for event in rendered} == {CONTEXT.answer_id}
    SDKCompletion.model_validate(rendered[2], strict=True)


@pytest.mark.parametrize(
    ("error", "reason", "type_"), FAILURES, ids=lambda value: getattr(value, "kind", str(value))
)
def test_a_failed_models_chunk_is_empty_and_says_why(
    error: errors.GatewayError, reason: str, type_: str
) -> None:
    renderer = DIALECT.renderer(parse(**SEED, stream=True))
    (event,) = events(renderer.chunks((Chunk(1, "ignored", error=error),)))
    assert event == {
        "id": CONTEXT.answer_id,
        "object": "text_completion",
        "created": CONTEXT.created,
        "model": "llama-2-70b",
        "choices": [
            {
                "index": 1,
                "model": "llama-2-70b",
                "text": "",
                "logprobs": None,
                "finish_reason": reason,
                "error": {"type": type_, "message": error.message},
            }
        ],
    }


def test_a_completed_stream_ends_with_the_summed_usage_and_done() -> None:
    request = parse(**SEED, stream=True)
    models = (served("gpt-4", 0, "x", (4, 6)), served("llama-2-70b", 1, "y", (5, 7)))
    last, done = events(
        DIALECT.renderer(request).end(StreamEnd(kind="completed", answer=answer(request, *models)))
    )
    assert last["choices"] == []
    assert last["model"] == "gpt-4, llama-2-70b"
    assert last["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 13,
        "total_tokens": 22,
        "prediction_time_ms": 1234,
    }
    SDKCompletion.model_validate(last, strict=True)
    assert done == "[DONE]"


def test_a_stream_with_one_good_model_still_completes() -> None:
    request = parse(**SEED, stream=True)
    models = (served("gpt-4", 0, errors.UpstreamFailed("Broken.")), served("llama-2-70b", 1, "y", (5, 7)))
    last, done = events(
        DIALECT.renderer(request).end(StreamEnd(kind="completed", answer=answer(request, *models)))
    )
    assert (last["model"], last["usage"]["total_tokens"], done) == ("llama-2-70b", 12, "[DONE]")


def test_a_stream_in_which_every_model_failed_does_not_look_complete() -> None:
    request = parse(**SEED, stream=True)
    models = (
        served("gpt-4", 0, errors.UpstreamTimeout("Too slow.")),
        served("llama-2-70b", 1, errors.UpstreamFailed("Broken.")),
    )
    (event,) = events(
        DIALECT.renderer(request).end(StreamEnd(kind="completed", answer=answer(request, *models)))
    )
    assert event["error"]["code"] == "upstream_timeout"


def test_an_aborted_stream_ends_with_an_error_and_without_done() -> None:
    request = parse(stream=True)
    end = StreamEnd(kind="aborted", answer=answer(request, served("gpt-4", 0, "x")))
    (event,) = events(DIALECT.renderer(request).end(end))
    assert event["error"]["code"] == "stream_aborted"


def test_a_stream_that_fails_ends_with_the_error_form() -> None:
    (event,) = events(DIALECT.renderer(parse(stream=True)).error(errors.UpstreamFailed("Broken.")))
    assert event["error"] == {
        "message": "Broken.",
        "type": "server_error",
        "param": None,
        "code": "upstream_error",
    }


# --- errors


STATUS: list[tuple[errors.GatewayError, int, str]] = [
    (errors.UnknownModel("m", param="model"), 400, "invalid_request_error"),
    (errors.UpstreamFailed("m"), 502, "server_error"),
    (errors.UpstreamAuth("m"), 502, "server_error"),
    (errors.UpstreamTimeout("m"), 504, "timeout_error"),
    (errors.UpstreamUnavailable("m"), 503, "server_error"),
    (errors.ModelUnavailable("m"), 503, "server_error"),
    (errors.InvalidRequest("m", param="prompt"), 400, "invalid_request_error"),
    (errors.InvalidCredentials(), 401, "invalid_request_error"),
    (errors.InsufficientFunds(2, 1), 402, "insufficient_funds"),
    (errors.RateLimited("m"), 429, "rate_limit_error"),
    (errors.InternalError(), 500, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "type_"), STATUS, ids=lambda value: getattr(value, "kind", ""))
def test_statuses_are_openais_but_where_its_own_table_differs(
    error: errors.GatewayError, status: int, type_: str
) -> None:
    response = DIALECT.render_error(error)
    assert response.status == status
    assert json.loads(response.body)["error"] == {
        "message": error.message,
        "type": type_,
        "param": error.param,
        "code": error.code,
    }


def test_only_three_kinds_differ_from_the_openai_form() -> None:
    assert THIGGLE_STATUSES.keys() == STATUSES.keys()
    different = {kind for kind, row in THIGGLE_STATUSES.items() if STATUSES[kind] != row}
    assert different == {"unknown_model", "upstream_failed", "upstream_auth"}


def test_our_own_refused_key_is_not_worth_a_retry() -> None:
    assert ("x-should-retry", "false") in DIALECT.render_error(errors.UpstreamAuth("m")).headers
