"""dialects/openai.py, openai_errors.py and models_view.py: the legacy Completions API and its error form."""

import json
from collections.abc import Iterator, Mapping

import pytest
from openai.types import Completion as SDKCompletion
from openai.types import Model as SDKModel
from tests.support.rendering import SPEC, answered, context, events

from headgate.core import errors
from headgate.core.accounts import Balance, Principal
from headgate.core.completion import (
    Choice,
    Chunk,
    CompletionRequest,
    FinishReason,
    Sampling,
    StreamEnd,
    TokenLogprob,
    Usage,
)
from headgate.dialects.base import Caps, Dialect, RequestContext
from headgate.dialects.models_view import ModelRow, render_balance, render_model, render_models
from headgate.dialects.openai import MOST_BIASES, OpenAICompletions
from headgate.dialects.openai_errors import STATUSES
from headgate.dialects.openai_wire import CompletionsBody

CONTEXT = context()
DIALECT: Dialect[CompletionsBody] = OpenAICompletions(Caps())


def parse_by(dialect: Dialect[CompletionsBody], fields: Mapping[str, object]) -> CompletionRequest:
    body = {"model": "acme-large", "prompt": "Once", **fields}
    return dialect.parse(dialect.decode(json.dumps(body).encode()), CONTEXT)


def parse(**fields: object) -> CompletionRequest:
    return parse_by(DIALECT, fields)


def refused_by(dialect: Dialect[CompletionsBody], fields: Mapping[str, object]) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_by(dialect, fields)
    return caught.value


def refused(fields: Mapping[str, object]) -> errors.InvalidRequest:
    return refused_by(DIALECT, fields)


def tree(kind: type[errors.GatewayError] = errors.GatewayError) -> Iterator[type[errors.GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


# --- parsing


def test_every_supported_field_arrives() -> None:
    request = parse(
        model="acme/acme-large",
        prompt=["a", "b"],
        n=2,
        max_tokens=64,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=-1,
        frequency_penalty=1.5,
        seed=-7,
        stop=["x", "y"],
        logit_bias={"50256": -100, "0": 1.5},
        logprobs=3,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
        user="u1",
    )
    assert request == CompletionRequest(
        request_id="req-1",
        answer_id=CONTEXT.answer_id,
        stream_id=CONTEXT.stream_id,
        created=CONTEXT.created,
        dialect="openai",
        models=("acme/acme-large",),
        prompts=("a", "b"),
        n=2,
        logprobs=3,
        echo=True,
        max_tokens=64,
        default_max_tokens=16,
        sampling=Sampling(
            temperature=0.5,
            top_p=0.9,
            presence_penalty=-1.0,
            frequency_penalty=1.5,
            seed=-7,
            stop=("x", "y"),
            logit_bias=((50256, -100.0), (0, 1.5)),
        ),
        stream=True,
        include_usage=True,
        user="u1",
    )


def test_what_is_not_given_stays_not_given() -> None:
    request = parse()
    assert request.prompts == ("Once",)
    assert (request.max_tokens, request.default_max_tokens, request.n) == (None, 16, 1)
    assert request.sampling == Sampling()
    assert not request.stream


def test_null_means_not_given_for_every_optional_field() -> None:
    optional = [field for field in CompletionsBody.__struct_fields__ if field not in ("model", "prompt")]
    assert parse(**dict.fromkeys(optional)) == parse()


NEUTRAL: list[dict[str, object]] = [
    {"echo": False},
    {"best_of": 0},
    {"best_of": 1},
    {"best_of": 1, "stream": True},
    {"best_of": 1, "n": 3},
    {"suffix": ""},
    {"logit_bias": {}},
    {"stream_options": {}},
    {"stream_options": {"include_usage": True}},
    {"stop": []},
    {"unknown": {"nested": [1]}},
    {"tools": []},
    {"functions": "x"},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_neutral_values_and_unknown_keys_change_nothing(fields: dict[str, object]) -> None:
    kept = {key: value for key, value in fields.items() if key in ("n", "stream")}
    assert parse(**fields) == parse(**kept)


def test_integral_floats_pass_as_integers() -> None:
    request = parse(max_tokens=500.0, n=2.0, seed=3.0)
    assert (request.max_tokens, request.n, request.sampling.seed) == (500, 2, 3)


@pytest.mark.parametrize("limit", [0, 1, 16])
def test_a_max_tokens_of_zero_and_more_is_taken(limit: int) -> None:
    assert parse(max_tokens=limit).max_tokens == limit


def test_max_completion_tokens_is_another_name_for_max_tokens() -> None:
    request = parse(max_completion_tokens=9)
    assert (request.max_tokens, request.max_tokens_param) == (9, "max_completion_tokens")
    assert parse(max_completion_tokens=9, max_tokens=9).max_tokens == 9
    assert refused({"max_completion_tokens": 9, "max_tokens": 8}).param == "max_completion_tokens"


def test_the_app_of_the_key_is_kept() -> None:
    context = RequestContext(
        principal=Principal(account="acme", key_id="k1", app="story"),
        request_id="req-1",
        answer_id=CONTEXT.answer_id,
        stream_id=CONTEXT.stream_id,
        created=1,
    )
    wire = DIALECT.decode(b'{"model":"m","prompt":"p"}')
    assert DIALECT.parse(wire, context).app == "story"


OUT_OF_RANGE: list[tuple[dict[str, object], str, str]] = [
    ({"model": None}, "model", "required"),
    ({"model": ""}, "model", "required"),
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": []}, "prompt", "non-empty list"),
    ({"prompt": ["a", 1]}, "prompt", "list of strings"),
    ({"prompt": ["a", [1]]}, "prompt", "list of strings"),
    ({"prompt": [1, [1]]}, "prompt", "list of strings"),
    ({"prompt": [1, -1]}, "prompt", "0 to 2147483647"),
    ({"prompt": [2**31]}, "prompt", "0 to 2147483647"),
    ({"prompt": [[1], [10**30]]}, "prompt", "0 to 2147483647"),
    ({"n": 0}, "n", "1 to 128"),
    ({"n": 129}, "n", "1 to 128"),
    ({"n": 1.5}, "n", "1 to 128"),
    ({"n": 10**30}, "n", "1 to 128"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 0"),
    ({"temperature": 2.01}, "temperature", "0 to 2"),
    ({"temperature": -0.01}, "temperature", "0 to 2"),
    ({"top_p": 1.01}, "top_p", "0 to 1"),
    ({"top_p": -1}, "top_p", "0 to 1"),
    ({"presence_penalty": 2.01}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": -2.01}, "frequency_penalty", "-2 to 2"),
    ({"seed": 2**63}, "seed", "integer"),
    ({"seed": 0.5}, "seed", "integer"),
    ({"stop": list("abcde")}, "stop", "up to 4"),
    ({"stop": [""]}, "stop", "up to 4"),
    ({"best_of": 21}, "best_of", "0 to 20"),
    ({"best_of": -1}, "best_of", "0 to 20"),
    ({"best_of": 2, "n": 3}, "best_of", "at least n (3)"),
    ({"best_of": 2, "stream": True}, "best_of", "streamed"),
    ({"logprobs": 6}, "logprobs", "0 to 5"),
    ({"logprobs": -1}, "logprobs", "0 to 5"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"5": -(10**400)}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {"٥": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {"": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {str(2**31): 1}}, "logit_bias", "0 to 2147483647"),
    ({"logit_bias": {str(id): 1 for id in range(MOST_BIASES + 1)}}, "logit_bias", "at most 1024"),
    ({"prompt": ["a", "b"], "n": 65}, "prompt", "at most 128"),
    ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
    ({"prompt": ["a"] * 7, "best_of": 20}, "prompt", "at most 128"),
    ({"prompt": [[1]] * 129}, "prompt", "at most 128"),
    ({"prompt": [[-1]] * 129}, "prompt", "at most 128"),
    ({"best_of": 2, "n": 2, "stream": True}, "best_of", "streamed"),
    ({"echo": True, "suffix": "x", "logprobs": 0}, "logprobs", "both echo and suffix"),
    ({"echo": True, "logprobs": 6}, "logprobs", "0 to 5"),
    ({"suffix": "x", "temperature": 3}, "temperature", "0 to 2"),
]


@pytest.mark.parametrize(("fields", "param", "words"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_a_field_out_of_range_is_refused_with_its_name_range_and_endpoint(
    fields: dict[str, object], param: str, words: str
) -> None:
    error = refused(fields)
    assert error.param == param
    assert error.code is None
    assert words in error.message
    assert error.message.endswith("(POST /v1/completions).")


WRONG_TYPES: list[tuple[str, object]] = [
    ("model", 1),
    ("prompt", 5),
    ("prompt", {"a": 1}),
    ("prompt", [None]),
    ("prompt", [1.5]),
    ("prompt", [5.5]),
    ("prompt", [True]),
    ("prompt", [[1, False]]),
    ("prompt", [["a"]]),
    ("logprobs", True),
    ("logprobs", False),
    ("logprobs", "3"),
    ("logit_bias", {"5": "1"}),
    ("suffix", 1),
    ("n", "2"),
    ("n", True),
    ("max_tokens", [1]),
    ("temperature", "hot"),
    ("stream", 1),
    ("stream", "true"),
    ("stop", 3),
    ("stop", [3]),
    ("echo", "no"),
    ("user", 4),
    ("logit_bias", [1]),
    ("stream_options", True),
    ("stream_options", {"include_usage": 1}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_a_field_of_a_wrong_type_is_refused_by_name(field: str, value: object) -> None:
    error = refused({field: value})
    assert error.param is not None
    assert error.param.startswith(field)
    assert "POST /v1/completions" in error.message


PROMPTS: list[tuple[object, tuple[object, ...]]] = [
    ("", ("",)),
    ("a", ("a",)),
    (["a"], ("a",)),
    (["a", ""], ("a", "")),
    ([1, 2, 2**31 - 1], ((1, 2, 2**31 - 1),)),
    ([1] * 200, ((1,) * 200,)),
    ([[1, 2], [3]], ((1, 2), (3,))),
    ([[]], ((),)),
    ([[], [0]], ((), (0,))),
]


@pytest.mark.parametrize(("prompt", "prompts"), PROMPTS, ids=lambda value: str(value)[:30])
def test_a_prompt_is_text_or_token_ids_one_or_many(prompt: object, prompts: tuple[object, ...]) -> None:
    assert parse(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("most", [0, 1, 5, 2.0])
def test_log_probabilities_are_asked_for_with_their_number_of_alternatives(most: float) -> None:
    assert parse(logprobs=most).logprobs == int(most)


def test_best_of_is_kept_where_it_asks_for_an_order() -> None:
    request = parse(n=2, best_of=5)
    assert (request.n, request.best_of) == (2, 5)
    assert parse(n=5, best_of=5).best_of == 5
    assert parse(n=5, best_of=1).best_of is None


def test_integral_floats_pass_as_token_ids() -> None:
    assert parse(prompt=[5.0, 6]).prompts == ((5, 6),)
    assert parse(prompt=[[5.0], [6]]).prompts == ((5,), (6,))


def test_a_suffix_is_kept_with_echo_or_with_logprobs() -> None:
    assert parse(suffix=" end").suffix == " end"
    echoed = parse(suffix=" end", echo=True)
    assert (echoed.suffix, echoed.echo, echoed.logprobs) == (" end", True, None)
    assert parse(suffix=" end", logprobs=2).logprobs == 2


def test_as_many_biases_as_the_cap_are_taken() -> None:
    request = parse(logit_bias={str(token): 1 for token in range(MOST_BIASES)})
    assert len(request.sampling.logit_bias) == MOST_BIASES


@pytest.mark.parametrize(
    "fields", [{"n": 128}, {"prompt": ["a"] * 128}, {"prompt": ["a"] * 64, "n": 2}], ids=lambda f: str(f)[:30]
)
def test_as_many_choices_as_the_cap_are_taken(fields: dict[str, object]) -> None:
    request = parse(**fields)
    assert request.prompts is not None
    assert len(request.prompts) * request.n == 128


def test_the_caps_come_from_the_configuration() -> None:
    small = OpenAICompletions(Caps(max_choices=2, max_stops=1))
    assert refused_by(small, {"n": 3}).param == "n"
    assert refused_by(small, {"best_of": 3}).param == "best_of"
    assert refused_by(small, {"stop": ["a", "b"]}).param == "stop"


def test_the_credential_is_the_bearer_token() -> None:
    assert DIALECT.credential("Bearer hg-1", b"{}") == "hg-1"
    assert DIALECT.credential(None, b"{}") is None


# --- answers


def test_a_blocking_answer_is_the_sdks_completion() -> None:
    request = parse(prompt=["a", "b"])
    choices = (
        Choice(index=0, text='one "é"\n', finish_reason="stop"),
        Choice(index=1, text="two", finish_reason="length"),
    )
    body = DIALECT.render(answered(request, choices))
    assert json.loads(body) == {
        "id": "cmpl-7d4448409dc011d1b2455ffdce74fad2",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "acme-large",
        "choices": [
            {"index": 0, "text": 'one "é"\n', "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "two", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    parsed = SDKCompletion.model_validate_json(body, strict=True)
    assert parsed.choices[1].text == "two"


def test_cached_tokens_are_shown_where_there_are_some() -> None:
    body = DIALECT.render(answered(parse(), (Choice(index=0, text="x", finish_reason="stop"),), cached=2))
    assert json.loads(body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    usage = SDKCompletion.model_validate_json(body, strict=True).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_each_chunk_is_one_event_of_the_blocking_shape() -> None:
    renderer = DIALECT.renderer(parse(prompt=["a", "b"], stream=True))
    batch = (
        Chunk(0, 'Hé"llo\n\u2028'),
        Chunk(1, "", "length"),
        Chunk(-1, usage=Usage(prompt_tokens=1, completion_tokens=1)),
        Chunk(0, "!", "stop"),
    )
    rendered = events(renderer.chunks(batch))
    assert [event["choices"] for event in rendered] == [
        [{"index": 0, "text": 'Hé"llo\n\u2028', "logprobs": None, "finish_reason": None}],
        [{"index": 1, "text": "", "logprobs": None, "finish_reason": "length"}],
        [{"index": 0, "text": "!", "logprobs": None, "finish_reason": "stop"}],
    ]
    for event in rendered:
        choices = event.pop("choices")
        assert event == {
            "id": "cmpl-7d4448409dc011d1b2455ffdce74fad2",
            "object": "text_completion",
            "created": 1_700_000_000,
            "model": "acme-large",
        }
        # Chunks before the last have a null reason, as OpenAI sends them; the SDK's type knows only the last.
        finished = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in choices]
        SDKCompletion.model_validate({**event, "choices": finished}, strict=True)


def test_a_chunk_that_carries_nothing_is_not_sent() -> None:
    for fields in ({}, {"logprobs": 1}):
        renderer = DIALECT.renderer(parse(stream=True, **fields))
        assert renderer.chunks((Chunk(0), Chunk(0, "", logprobs=()))) == b""
        assert renderer.chunks((Chunk(0, "", "stop"),)) != b""


SCORED = (
    TokenLogprob(b"Hi", None, None),
    TokenLogprob(b" \xf0\x9f", -0.5, ((b" \xf0\x9f", -0.5), (b" x", -1.0))),
    TokenLogprob(b"\x98\x80", -2.5, ((b"!", -0.1),)),
    TokenLogprob(b"", -0.25, ((b"", -0.25),), end=True),
)
LEGACY = {
    "tokens": ["Hi", "bytes:\\x20\\xf0\\x9f", "bytes:\\x98\\x80", ""],
    "token_logprobs": [None, -0.5, -2.5, -0.25],
    "top_logprobs": [
        None,
        {"bytes:\\x20\\xf0\\x9f": -0.5},
        {"!": -0.1, "bytes:\\x98\\x80": -2.5},
        {"": -0.25},
    ],
    "text_offset": [0, 2, 3, 4],
}


def test_log_probabilities_come_with_each_choice_in_the_legacy_form() -> None:
    request = parse(prompt=["Hi", "Ho"], echo=True, logprobs=1)
    choices = (
        Choice(index=0, text="Hi 😀", finish_reason="stop", logprobs=SCORED),
        Choice(index=1, text="Ho", finish_reason="length", logprobs=()),
    )
    first, second = json.loads(DIALECT.render(answered(request, choices)))["choices"]
    assert first["logprobs"] == LEGACY
    empty: list[object] = []
    assert second["logprobs"] == dict.fromkeys(LEGACY, empty)


def test_log_probabilities_nobody_asked_for_are_not_shown() -> None:
    choice = Choice(index=0, text="Hi 😀", finish_reason="stop", logprobs=SCORED)
    assert json.loads(DIALECT.render(answered(parse(), (choice,))))["choices"][0]["logprobs"] is None
    (event,) = events(DIALECT.renderer(parse(stream=True)).chunks((Chunk(0, "Hi", logprobs=SCORED[:1]),)))
    assert event["choices"][0]["logprobs"] is None


def test_an_answer_with_log_probabilities_is_the_sdks_completion() -> None:
    request = parse(logprobs=1)
    choice = Choice(index=0, text=" 😀", finish_reason="stop", logprobs=SCORED[1:])
    parsed = SDKCompletion.model_validate_json(DIALECT.render(answered(request, (choice,))), strict=True)
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.5, -2.5, -0.25]
    assert logprobs.text_offset == [0, 1, 2]


def test_an_answer_differs_by_its_log_probabilities_alone_where_they_are_asked_for() -> None:
    choices = tuple(
        Choice(index=index, text=text, finish_reason="stop", logprobs=SCORED)
        for index, text in enumerate(("Hi 😀", 'Hi "\n', ""))
    )
    for given in ((), choices[:1], choices):
        scored = json.loads(DIALECT.render(answered(parse(n=3, logprobs=1), given, cached=2)))
        for choice in scored["choices"]:
            assert choice["logprobs"]["tokens"] == LEGACY["tokens"]
            choice["logprobs"] = None
        plain = DIALECT.render(answered(parse(n=3), given, cached=2))
        assert json.dumps(scored) == json.dumps(json.loads(plain))  # the order of the keys too


def test_streamed_log_probabilities_joined_are_the_blocking_ones_choice_by_choice() -> None:
    renderer = DIALECT.renderer(parse(n=2, echo=True, logprobs=1, stream=True))
    batch = (
        Chunk(0, "Hi", logprobs=SCORED[:1], echoed=True),
        Chunk(1, "Hi", logprobs=SCORED[:1], echoed=True),
        Chunk(0, " ", logprobs=SCORED[1:2]),
        Chunk(1, " 😀", logprobs=SCORED[1:3]),
        Chunk(0, "😀", logprobs=SCORED[2:3]),
        Chunk(1, "", "stop", logprobs=SCORED[3:]),
        Chunk(0, "", None, logprobs=SCORED[3:]),
        Chunk(0, "", "stop"),
    )
    rendered = events(renderer.chunks(batch))
    assert len(rendered) == len(batch)
    for index in (0, 1):
        pieces = [choice for event in rendered for choice in event["choices"] if choice["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == "Hi 😀"
        assert pieces[-1]["finish_reason"] == "stop"
        assert {
            name: [entry for piece in pieces for entry in piece["logprobs"][name]] for name in LEGACY
        } == LEGACY


def test_offsets_of_tokens_that_a_stop_sequence_cut_away_stay_within_the_text() -> None:
    scored = (TokenLogprob(b"ab", -1.0), TokenLogprob(b"END", -1.0), TokenLogprob(b"ING", -1.0))
    request = parse(logprobs=0)
    choice = Choice(index=0, text="ab", finish_reason="stop", logprobs=scored)
    body = json.loads(DIALECT.render(answered(request, (choice,))))
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 2, 2]
    renderer = DIALECT.renderer(parse(logprobs=0, stream=True))
    (event,) = events(renderer.chunks((Chunk(0, "ab", "stop", logprobs=scored),)))
    assert event["choices"][0]["logprobs"]["text_offset"] == [0, 2, 2]


@pytest.mark.parametrize("reason", [None, "stop", "length", "content_filter", "error", "timeout"])
def test_every_finish_reason_can_be_streamed(reason: FinishReason | None) -> None:
    (event,) = events(DIALECT.renderer(parse(stream=True)).chunks((Chunk(0, "x", reason),)))
    assert event["choices"][0]["finish_reason"] == reason


def test_a_chunk_of_usage_alone_is_not_sent() -> None:
    renderer = DIALECT.renderer(parse(stream=True))
    assert renderer.chunks((Chunk(-1, usage=Usage(prompt_tokens=1, completion_tokens=1)),)) == b""


def test_a_completed_stream_ends_with_done() -> None:
    request = parse(stream=True)
    end = StreamEnd(kind="completed", answer=answered(request))
    assert DIALECT.renderer(request).end(end) == b"data: [DONE]\n\n"


def test_with_include_usage_every_chunk_has_null_usage_and_a_last_one_has_the_figures() -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    renderer = DIALECT.renderer(request)
    chunks = events(renderer.chunks((Chunk(0, "a"), Chunk(0, "", "stop"))))
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    last, done = events(renderer.end(StreamEnd(kind="completed", answer=answered(request))))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert last["id"] == chunks[0]["id"]
    SDKCompletion.model_validate(last, strict=True)
    assert done == "[DONE]"


def test_include_usage_means_nothing_without_stream() -> None:
    assert not parse(stream_options={"include_usage": True}).include_usage


@pytest.mark.parametrize(
    ("cause", "code", "type_"),
    [
        (None, "stream_aborted", "server_error"),
        (errors.Overloaded("Draining."), "overloaded", "server_error"),
    ],
)
def test_an_aborted_stream_ends_with_an_error_and_without_done(
    cause: errors.GatewayError | None, code: str, type_: str
) -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    end = StreamEnd(kind="aborted", answer=answered(request), error=cause)
    (event,) = events(DIALECT.renderer(request).end(end))
    assert (event["error"]["code"], event["error"]["type"]) == (code, type_)


def test_a_stream_that_fails_ends_with_the_error_form() -> None:
    (event,) = events(DIALECT.renderer(parse(stream=True)).error(errors.UpstreamTimeout("Too slow.")))
    assert event == {
        "error": {"message": "Too slow.", "type": "timeout_error", "param": None, "code": "upstream_timeout"}
    }


# --- errors


def test_every_kind_of_error_has_a_status() -> None:
    assert {error.kind for error in tree()} == set(STATUSES)


ERRORS: list[tuple[errors.GatewayError, int, str, str | None]] = [
    (errors.InvalidRequest("m", param="n"), 400, "invalid_request_error", None),
    (errors.InvalidCredentials(), 401, "invalid_request_error", "invalid_api_key"),
    (errors.InsufficientFunds(2, 1), 402, "insufficient_funds", "insufficient_funds"),
    (errors.PermissionDenied("m"), 403, "permission_denied_error", "permission_denied"),
    (errors.UnknownModel("m", param="model"), 404, "not_found_error", "model_not_found"),
    (errors.AmbiguousModel("m", param="model"), 400, "invalid_request_error", None),
    (errors.NotFound("m"), 404, "invalid_request_error", "not_found"),
    (errors.StreamNotFound("m"), 404, "not_found_error", "not_found"),
    (errors.MethodNotAllowed("m"), 405, "invalid_request_error", "method_not_allowed"),
    (errors.IdempotencyConflict("m"), 409, "conflict_error", "idempotency_conflict"),
    (errors.BodyTooLarge("m"), 413, "invalid_request_error", "body_too_large"),
    (errors.UnsupportedContentType("m"), 415, "invalid_request_error", "unsupported_content_type"),
    (errors.IdempotencyMismatch("m"), 422, "invalid_request_error", "idempotency_mismatch"),
    (errors.RateLimited("m"), 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.InternalError(), 500, "server_error", "internal_error"),
    (errors.UpstreamFailed("m"), 500, "server_error", "upstream_error"),
    (errors.UpstreamAuth("m"), 500, "server_error", "upstream_auth"),
    (errors.ModelUnavailable("m"), 503, "server_error", "model_unavailable"),
    (errors.Overloaded("m"), 503, "server_error", "overloaded"),
    (errors.LedgerUnavailable("m"), 503, "server_error", "ledger_unavailable"),
    (errors.UpstreamUnavailable("m"), 503, "server_error", "upstream_unavailable"),
    (errors.UpstreamTimeout("m"), 504, "timeout_error", "upstream_timeout"),
    (errors.UpstreamRateLimited("m"), 429, "rate_limit_error", "upstream_rate_limited"),
    (errors.UpstreamRejected("m", status=400), 400, "invalid_request_error", "upstream_rejected"),
    (errors.UpstreamRejected("m", status=413), 400, "invalid_request_error", "upstream_rejected"),
    (errors.UpstreamRejected("m", status=422), 422, "invalid_request_error", "upstream_rejected"),
]


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"), ERRORS, ids=lambda value: getattr(value, "kind", "")
)
def test_each_error_has_its_status_and_all_four_fields(
    error: errors.GatewayError, status: int, type_: str, code: str | None
) -> None:
    response = DIALECT.render_error(error)
    assert response.status == status
    assert json.loads(response.body) == {
        "error": {"message": error.message, "type": type_, "param": error.param, "code": code}
    }


HEADERS: list[tuple[errors.GatewayError, dict[str, str]]] = [
    (errors.InvalidRequest("m"), {}),
    (errors.InvalidCredentials(), {"WWW-Authenticate": "Bearer"}),
    (errors.InsufficientFunds(2, 1), {"x-should-retry": "false"}),
    (errors.UpstreamAuth("m"), {"x-should-retry": "false"}),
    (errors.RateLimited("m"), {"Retry-After": "1"}),
    (errors.RateLimited("m", retry_after=0), {"Retry-After": "1"}),
    (errors.RateLimited("m", retry_after=7), {"Retry-After": "7"}),
    (errors.UpstreamRateLimited("m", retry_after=3600), {"Retry-After": "120"}),
    (errors.Overloaded("m", retry_after=5), {"Retry-After": "5"}),
    (errors.ModelUnavailable("m"), {}),
    (errors.UpstreamFailed("m", retry_after=5), {}),
]


@pytest.mark.parametrize(("error", "headers"), HEADERS, ids=lambda value: getattr(value, "kind", ""))
def test_errors_carry_the_headers_their_clients_act_on(
    error: errors.GatewayError, headers: dict[str, str]
) -> None:
    assert dict(DIALECT.render_error(error).headers) == headers


# --- models and balance


def test_the_model_list_shows_limits_and_prices_of_what_can_be_called() -> None:
    rows = (
        ModelRow(spec=SPEC, name="acme-large"),
        ModelRow(spec=SPEC, name="acme/other", reason="Set ACME_KEY."),
    )
    listed = json.loads(render_models(rows, created=5))
    assert listed == {
        "object": "list",
        "data": [
            {
                "id": "acme-large",
                "object": "model",
                "created": 5,
                "owned_by": "acme",
                "context_window": 8192,
                "max_input_tokens": 8000,
                "max_output_tokens": 4096,
                "temperature": [0.0, 2.0],
                "capabilities": {
                    "chat": False,
                    "completions": True,
                    "vision": False,
                    "logprobs": True,
                    "tools": False,
                },
                "pricing": {"input": "0.5", "output": "1.5"},
            }
        ],
    }
    SDKModel.model_validate(listed["data"][0], strict=True)


def test_the_full_list_says_what_is_missing_and_why() -> None:
    rows = (
        ModelRow(spec=SPEC, name="acme-large"),
        ModelRow(spec=SPEC, name="acme/other", reason="Set ACME_KEY."),
    )
    first, second = json.loads(render_models(rows, created=5, everything=True))["data"]
    assert (first["available"], "reason" in first) == (True, False)
    assert (second["available"], second["reason"]) == (False, "Set ACME_KEY.")


def test_only_the_full_list_shows_a_retired_name_and_who_answers_for_it() -> None:
    rows = (ModelRow(spec=SPEC, name="acme-old", successor="acme-large"),)
    assert json.loads(render_models(rows, created=5))["data"] == []
    (shown,) = json.loads(render_models(rows, created=5, everything=True))["data"]
    assert (shown["id"], shown["successor"], shown["available"]) == ("acme-old", "acme-large", True)
    assert shown["pricing"] == {"input": "0.5", "output": "1.5"}


def test_one_model_is_shown_as_in_the_list() -> None:
    row = ModelRow(spec=SPEC, name="acme-large")
    (listed,) = json.loads(render_models((row,), created=5))["data"]
    assert json.loads(render_model(row, created=5)) == listed


def test_one_model_that_cannot_be_called_says_why() -> None:
    shown = json.loads(render_model(ModelRow(spec=SPEC, name="acme-large", reason="No key."), created=5))
    assert (shown["available"], shown["reason"]) == (False, "No key.")


def test_the_balance_is_in_exact_dollars() -> None:
    body = render_balance(Balance(account="acme", balance=10_000_000_001, held=1, open_holds=1))
    assert json.loads(body) == {
        "account": "acme",
        "balance": "10.000000001",
        "held": "0.000000001",
        "available": "10",
    }
