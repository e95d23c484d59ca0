"""dialects/chat.py, chat_wire.py, chat_format.py and chat_stream.py: chat completions without tools and images."""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as SDKCompletion
from openai.types.chat import ChatCompletionChunk as SDKChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from tests.support.rendering import answered, context, events

from headgate.core import errors
from headgate.core.completion import (
    Choice,
    Chunk,
    CompletionRequest,
    Message,
    ResponseFormat,
    Sampling,
    StreamEnd,
    TokenLogprob,
    Usage,
)
from headgate.dialects.base import Caps, Dialect, MalformedBody
from headgate.dialects.chat import OpenAIChat
from headgate.dialects.chat_messages import MOST_MESSAGES
from headgate.dialects.chat_wire import ChatBody
from headgate.dialects.openai import MOST_BIASES

CONTEXT = context(app="story")
DIALECT: Dialect[ChatBody] = OpenAIChat(Caps())
ID = "chatcmpl-7d4448409dc011d1b2455ffdce74fad2"
HELLO = {"role": "user", "content": "Hello"}


def parse_body(body: bytes, dialect: Dialect[ChatBody] = DIALECT) -> CompletionRequest:
    return dialect.parse(dialect.decode(body), CONTEXT)


def parse(**fields: object) -> CompletionRequest:
    return parse_body(json.dumps({"model": "demo", "messages": [HELLO], **fields}).encode())


def refused(fields: Mapping[str, object]) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def stream(request: CompletionRequest, *batch: Chunk) -> list[Any]:
    return events(DIALECT.renderer(request).chunks(batch))


# --- parsing


def test_every_supported_field_arrives() -> None:
    request = parse(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "In French."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
            {"role": "assistant", "content": None},
            {"role": "assistant"},
            {"role": "user", "content": ""},
        ],
        n=2,
        max_completion_tokens=64,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=-1,
        frequency_penalty=1.5,
        seed=-7,
        stop=["x", "y"],
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=20,
        response_format={"type": "json_object"},
        stream=True,
        stream_options={"include_usage": True},
        user="u1",
    )
    assert request == CompletionRequest(
        request_id="req-1",
        answer_id=CONTEXT.answer_id,
        stream_id=CONTEXT.stream_id,
        created=CONTEXT.created,
        dialect="chat",
        models=("demo",),
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="system", content="In French."),
            Message(role="user", content="Hello"),
            Message(role="assistant", content=""),
            Message(role="assistant", content=""),
            Message(role="user", content=""),
        ),
        n=2,
        logprobs=20,
        response_format=ResponseFormat(kind="json_object"),
        max_tokens=64,
        max_tokens_param="max_completion_tokens",
        sampling=Sampling(
            temperature=0.5,
            top_p=0.9,
            presence_penalty=-1.0,
            frequency_penalty=1.5,
            seed=-7,
            stop=("x", "y"),
            logit_bias=((5, -100.0),),
        ),
        stream=True,
        include_usage=True,
        user="u1",
        app="story",
    )


def test_what_is_not_given_stays_not_given() -> None:
    request = parse()
    assert request.prompts is None
    assert (request.max_tokens, request.default_max_tokens, request.max_tokens_param) == (
        None,
        None,
        "max_tokens",
    )
    assert (request.n, request.logprobs, request.response_format) == (1, None, None)
    assert request.sampling == Sampling()
    assert not request.stream


def test_null_means_not_given_for_every_optional_field() -> None:
    optional = [field for field in ChatBody.__struct_fields__ if field not in ("model", "messages")]
    assert parse(**dict.fromkeys(optional)) == parse()


NEUTRAL: list[dict[str, object]] = [
    {"tools": []},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": []},
    {"function_call": "none"},
    {"function_call": "auto"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"modalities": ["text"]},
    {"store": False},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"verbosity": "medium"},
    {"metadata": {}},
    {"prompt_cache_key": "end-user-7"},
    {"safety_identifier": "end-user-7"},
    {"prompt_cache_options": {}},
    {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
    {"prompt_cache_retention": None},
    {"logprobs": False},
    {"logprobs": False, "top_logprobs": 0},
    {"logit_bias": {}},
    {"stop": []},
    {"response_format": {"type": "text"}},
    {"stream_options": {"include_usage": True}},
    {"unknown": {"nested": [1]}},
    {"messages": [{**HELLO, "tool_calls": [], "name": None, "refusal": None, "annotations": []}]},
    {"messages": [{**HELLO, "content": [{"type": "text", "text": "Hello", "cache_control": {}}]}]},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_neutral_values_and_unknown_keys_change_nothing(fields: dict[str, object]) -> None:
    assert parse(**fields) == parse()


def test_integral_floats_pass_as_integers() -> None:
    request = parse(max_tokens=500.0, n=2.0, logprobs=True, top_logprobs=3.0)
    assert (request.max_tokens, request.n, request.logprobs) == (500, 2, 3)


def test_log_probabilities_without_alternatives_are_asked_for_by_true_alone() -> None:
    assert parse(logprobs=True).logprobs == 0


def test_the_output_limit_has_two_names() -> None:
    assert (parse(max_tokens=9).max_tokens, parse(max_tokens=9).max_tokens_param) == (9, "max_tokens")
    both = parse(max_tokens=9, max_completion_tokens=9)
    assert (both.max_tokens, both.max_tokens_param) == (9, "max_completion_tokens")


SCHEMA = '{"type": "object", "properties": {"é": {"type": "string"}}}'


def test_a_json_schema_is_kept_as_it_was_sent() -> None:
    body = (
        '{"model": "demo", "messages": [{"role": "user", "content": "?"}], "response_format": {"type": '
        '"json_schema", "json_schema": {"name": "an_answer-1", "description": "d", "strict": true, "schema": '
        + SCHEMA
        + "}}}"
    )
    assert parse_body(body.encode()).response_format == ResponseFormat(
        kind="json_schema", schema=SCHEMA.encode(), name="an_answer-1", description="d", strict=True
    )


def schema_format(**fields: object) -> dict[str, object]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object"}, **fields},
        }
    }


def one_message(**fields: object) -> dict[str, object]:
    return {"messages": [HELLO, {"role": "user", "content": "x", **fields}]}


FORMAT = "response_format"
WRONG: list[tuple[dict[str, object], str, str]] = [
    ({"model": None}, "model", "required"),
    ({"model": ""}, "model", "required"),
    ({"messages": None}, "messages", "required"),
    ({"messages": []}, "messages", "1 to 2048"),
    ({"messages": [HELLO] * (MOST_MESSAGES + 1)}, "messages", "1 to 2048"),
    (one_message(role="boss"), "messages[1].role", "system, developer, user, assistant or tool"),
    (one_message(role=None), "messages[1].role", "system, developer, user, assistant or tool"),
    (one_message(content=None), "messages[1].content", "list of text and image_url parts"),
    (one_message(content=[]), "messages[1].content", "list of text and image_url parts"),
    (one_message(role="system", content=None), "messages[1].content", "list of text parts"),
    (one_message(role="assistant", content=[]), "messages[1].content", "list of text parts"),
    (one_message(content=[{"text": "a"}]), "messages[1].content[0].type", "must be text"),
    (one_message(content=[{"type": "smell"}]), "messages[1].content[0].type", "must be text"),
    (one_message(content=[{"type": "text"}]), "messages[1].content[0].text", "required"),
    ({"n": 0}, "n", "1 to 128"),
    ({"n": 129}, "n", "1 to 128"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"max_tokens": 8, "max_completion_tokens": 9}, "max_completion_tokens", "mean the same"),
    ({"temperature": 2.01}, "temperature", "0 to 2"),
    ({"top_p": 1.01}, "top_p", "0 to 1"),
    ({"presence_penalty": -2.01}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": 2.01}, "frequency_penalty", "-2 to 2"),
    ({"seed": 0.5}, "seed", "integer"),
    ({"stop": list("abcde")}, "stop", "up to 4"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "decimal digits"),
    ({"logit_bias": {"1": -101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {str(id): 1 for id in range(MOST_BIASES + 1)}}, "logit_bias", "at most 1024"),
    ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
    ({"logprobs": False, "top_logprobs": 5}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "0 to 20"),
    ({FORMAT: {}}, "response_format.type", "text, json_object or json_schema"),
    ({FORMAT: {"type": "xml"}}, "response_format.type", "text, json_object or json_schema"),
    ({FORMAT: {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({FORMAT: {"type": "text", "json_schema": {}}}, "response_format.json_schema", "json_schema only"),
    (schema_format(name=None), "response_format.json_schema.name", "1 to 64"),
    (schema_format(name="a b"), "response_format.json_schema.name", "1 to 64"),
    (schema_format(name="a" * 65), "response_format.json_schema.name", "1 to 64"),
    (schema_format(schema=None), "response_format.json_schema.schema", "an object"),
    (schema_format(schema=[]), "response_format.json_schema.schema", "an object"),
    (schema_format(schema="{}"), "response_format.json_schema.schema", "an object"),
    (schema_format(schema=True), "response_format.json_schema.schema", "an object"),
    (
        {FORMAT: {"type": "json_schema", "json_schema": {"name": "a"}}},
        f"{FORMAT}.json_schema.schema",
        "object",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_refused_with_its_name_range_and_endpoint(
    fields: dict[str, object], param: str, words: str
) -> None:
    error = refused(fields)
    assert error.param == param
    assert error.code is None
    assert words in error.message
    assert error.message.endswith("(POST /v1/chat/completions).")


WRONG_TYPES: list[tuple[str, object]] = [
    ("model", 1),
    ("messages", "Hello"),
    ("messages", ["Hello"]),
    ("messages", [{"role": 1, "content": "x"}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": ["x"]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 1}]}]),
    ("n", True),
    ("logprobs", 1),
    ("top_logprobs", "1"),
    ("stream", 1),
    ("store", 0),
    ("prompt_cache_key", 7),
    ("safety_identifier", ["end-user-7"]),
    ("parallel_tool_calls", 1),
    ("response_format", "json"),
    ("response_format", {"type": 1}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "strict": "yes"}}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_a_field_of_a_wrong_type_is_refused_by_name(field: str, value: object) -> None:
    error = refused({field: value})
    assert error.param is not None
    assert error.param.startswith(field)
    assert "POST /v1/chat/completions" in error.message


UNSUPPORTED: list[tuple[dict[str, object], str]] = [
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"prompt_cache_retention": "in_memory"}, "prompt_cache_retention"),
    (
        one_message(content=[{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]),
        "messages[1].content[0].prompt_cache_breakpoint",
    ),
    ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
    (one_message(role="function", name="f"), "messages[1].role"),
    (one_message(name="Ann"), "messages[1].name"),
    (one_message(role="assistant", function_call={"name": "f"}), "messages[1].function_call"),
    (one_message(role="assistant", refusal="No."), "messages[1].refusal"),
    (one_message(role="assistant", audio={"id": "a"}), "messages[1].audio"),
    (one_message(content=[{"type": "input_audio", "input_audio": {}}]), "messages[1].content[0]"),
    (one_message(content=[{"type": "file", "file": {}}]), "messages[1].content[0]"),
    (
        one_message(role="assistant", content=[{"type": "refusal", "refusal": "No."}]),
        "messages[1].content[0]",
    ),
]


def test_every_parameter_that_the_sdk_knows_is_known_here() -> None:
    known = {field.encode_name for field in msgspec.structs.fields(ChatBody)}
    for params in (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming):
        assert set(get_type_hints(params)) <= known


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED, ids=lambda value: str(value)[:50])
def test_what_this_version_cannot_honour_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    error = refused(fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert error.message.startswith(f"{param} is not supported ")
    assert error.message.endswith("(POST /v1/chat/completions).")


@pytest.mark.parametrize(
    ("field", "value"), [("functions", [{"name": "f"}]), ("function_call", {"name": "f"})]
)
def test_a_request_with_functions_is_told_to_send_tools(field: str, value: object) -> None:
    message = refused({field: value}).message
    assert message.startswith(f"{field} is not supported by this version; ")
    assert "tools" in message


def test_a_schema_whose_numbers_cannot_be_held_is_refused_by_name() -> None:
    body = json.dumps({"model": "demo", "messages": [HELLO], **schema_format(schema={"maximum": "M"})})
    with pytest.raises(errors.InvalidRequest, match="out of range") as caught:
        parse_body(body.replace('"M"', "1e999").encode())
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("schema", [b"{]", b'{"a":"\\ud800"}', b'{"a":"\xff"}', b'{"a":1,}'])
def test_what_is_not_json_is_malformed_even_inside_a_schema(schema: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_body(b'{"response_format":{"type":"json_schema","json_schema":{"schema":%b}}}' % schema)


def test_the_caps_come_from_the_configuration() -> None:
    small = OpenAIChat(Caps(max_choices=2, max_stops=1))
    for fields, param in (({"n": 3}, "n"), ({"stop": ["a", "b"]}, "stop")):
        body = json.dumps({"model": "demo", "messages": [HELLO], **fields}).encode()
        with pytest.raises(errors.InvalidRequest) as caught:
            parse_body(body, small)
        assert caught.value.param == param


def test_the_credential_is_the_bearer_token_and_errors_have_the_openai_form() -> None:
    assert DIALECT.credential("Bearer hg-1", b"{}") == "hg-1"
    response = DIALECT.render_error(refused({"n": 0}))
    assert response.status == 400
    error = json.loads(response.body)["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "n", None)


# --- answers

SCORED = (
    TokenLogprob(b"Hi", -0.5, ((b"Hi", -0.5), (b"Ho", -1.5))),
    TokenLogprob(b" \xf0\x9f", -1.0, ((b" \xf0\x9f", -1.0), (b"!", -2.0))),
    TokenLogprob(b"\x98\x80", -2.5, ((b"!", -0.25), (b"?", -1.0))),
    TokenLogprob(b"", -0.25, ((b"", -0.25), (b"!", -3.0)), end=True),
)


def test_a_blocking_answer_is_the_sdks_completion() -> None:
    choices = (
        Choice(index=0, text='one "é"\n', finish_reason="stop"),
        Choice(index=1, text="", finish_reason="length"),
    )
    body = DIALECT.render(answered(parse(n=2), tuple(choices)))
    assert json.loads(body) == {
        "id": ID,
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": 'one "é"\n', "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    assert SDKCompletion.model_validate_json(body, strict=True).choices[0].message.content == 'one "é"\n'


def test_log_probabilities_come_with_each_choice_where_they_are_asked_for() -> None:
    choice = Choice(index=0, text="Hi 😀", finish_reason="stop", logprobs=SCORED)
    body = DIALECT.render(answered(parse(logprobs=True, top_logprobs=1), (choice,)))
    logprobs = SDKCompletion.model_validate_json(body, strict=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.refusal is None
    assert logprobs.content is not None
    assert b"".join(bytes(token.bytes or ()) for token in logprobs.content).decode() == "Hi 😀"
    assert [token.logprob for token in logprobs.content] == [-0.5, -1.0, -2.5]
    assert [len(token.top_logprobs) for token in logprobs.content] == [1, 1, 1]
    assert json.loads(DIALECT.render(answered(parse(), (choice,))))["choices"][0]["logprobs"] is None


def test_an_answer_differs_by_its_log_probabilities_alone_where_they_are_asked_for() -> None:
    choices = [
        Choice(index=index, text=text, finish_reason="stop", logprobs=SCORED)
        for index, text in enumerate(("Hi 😀", 'Hi "\n', ""))
    ]
    for some in ([], choices[:1], choices):
        scored = json.loads(DIALECT.render(answered(parse(n=3, logprobs=True), tuple(some))))
        for choice in scored["choices"]:
            assert [token["logprob"] for token in choice["logprobs"]["content"]] == [-0.5, -1.0, -2.5]
            choice["logprobs"] = None
        plain = DIALECT.render(answered(parse(n=3), tuple(some)))
        assert json.dumps(scored) == json.dumps(json.loads(plain))  # the order of the keys too


def test_a_streamed_choice_is_its_role_its_content_and_its_finish_reason() -> None:
    rendered = stream(
        parse(n=2, stream=True),
        Chunk(1, 'H"é\n\u2028'),
        Chunk(0, "a"),
        Chunk(1, "!", "stop"),
        Chunk(-1, usage=Usage(prompt_tokens=1, completion_tokens=1)),
        Chunk(0),
        Chunk(0, "", "length"),
    )

    def choice(index: int, reason: str | None = None, **delta: str) -> list[dict[str, object]]:
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]

    assert [event["choices"] for event in rendered] == [
        choice(1, role="assistant", content=""),
        choice(1, content='H"é\n\u2028'),
        choice(0, role="assistant", content=""),
        choice(0, content="a"),
        choice(1, content="!"),
        choice(1, "stop"),
        choice(0, "length"),
    ]
    for event in rendered:
        SDKChunk.model_validate(event, strict=True)
        del event["choices"]
        assert event == {
            "id": ID,
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "demo",
        }


def test_a_choice_that_ends_at_once_still_has_its_role() -> None:
    rendered = stream(parse(stream=True), Chunk(0, "", "stop"))
    assert [event["choices"][0]["delta"] for event in rendered] == [{"role": "assistant", "content": ""}, {}]
    assert rendered[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_chunk_that_carries_nothing_sends_no_more_than_the_role() -> None:
    renderer = DIALECT.renderer(parse(stream=True, logprobs=True))
    assert len(events(renderer.chunks((Chunk(0),)))) == 1
    assert renderer.chunks((Chunk(0), Chunk(0, "", logprobs=()), Chunk(0, "", logprobs=SCORED[3:]))) == b""


@given(places=st.lists(st.integers(0, 4), max_size=4), most=st.integers(0, 2))
def test_streamed_log_probabilities_joined_are_the_blocking_ones(places: list[int], most: int) -> None:
    fields: dict[str, object] = {"logprobs": True, "top_logprobs": most}
    bounds = sorted({0, 4, *places})
    pieces = [SCORED[start:end] for start, end in pairwise(bounds)]
    texts = dict(zip(SCORED, ("Hi", " ", "😀", ""), strict=True))
    chunks = [Chunk(0, "".join(texts[entry] for entry in piece), logprobs=piece) for piece in pieces]
    rendered = stream(parse(stream=True, **fields), *chunks, Chunk(0, "", "stop"))
    for event in rendered:
        SDKChunk.model_validate(event, strict=True)
    deltas = [event["choices"][0] for event in rendered]
    choice = Choice(index=0, text="Hi 😀", finish_reason="stop", logprobs=SCORED)
    (whole,) = json.loads(DIALECT.render(answered(parse(**fields), (choice,))))["choices"]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole["message"]["content"]
    assert [
        token for delta in deltas if delta["logprobs"] is not None for token in delta["logprobs"]["content"]
    ] == whole["logprobs"]["content"]


def test_log_probabilities_nobody_asked_for_are_not_streamed() -> None:
    rendered = stream(parse(stream=True), Chunk(0, "Hi", logprobs=SCORED[:1]))
    assert [event["choices"][0]["logprobs"] for event in rendered] == [None, None]


def test_a_completed_stream_ends_with_done() -> None:
    request = parse(stream=True)
    end = StreamEnd(kind="completed", answer=answered(request))
    assert DIALECT.renderer(request).end(end) == b"data: [DONE]\n\n"


def test_with_include_usage_every_chunk_has_null_usage_and_a_last_one_has_the_figures() -> None:
    request = parse(stream=True, logprobs=True, stream_options={"include_usage": True})
    chunks = stream(request, Chunk(0, "a"), Chunk(0, "Hi", "stop", logprobs=SCORED[:1]))
    assert [chunk["usage"] for chunk in chunks] == [None] * 4
    end = StreamEnd(kind="completed", answer=answered(request))
    last, done = events(DIALECT.renderer(request).end(end))
    assert last == {
        "id": ID,
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    SDKChunk.model_validate(last, strict=True)
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("cause", "code"), [(None, "stream_aborted"), (errors.Overloaded("Draining."), "overloaded")]
)
def test_an_aborted_stream_ends_with_an_error_and_without_done(
    cause: errors.GatewayError | None, code: str
) -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    end = StreamEnd(kind="aborted", answer=answered(request), error=cause)
    (event,) = events(DIALECT.renderer(request).end(end))
    assert event["error"]["code"] == code


def test_a_stream_that_fails_ends_with_the_error_form() -> None:
    (event,) = events(DIALECT.renderer(parse(stream=True)).error(errors.UpstreamTimeout("Too slow.")))
    assert event == {
        "error": {"message": "Too slow.", "type": "timeout_error", "param": None, "code": "upstream_timeout"}
    }
