"""What clients get wrong: refused in their own dialect, naming the field and what it may be, before anything is
held or asked of an upstream. And what only looks wrong, which is served.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from msgspec import Struct
from tests.support.doors import BLOCKING, BY_NAME, DOORS, JSON, Caller, Door, Problem, Reply, problem_of
from tests.support.stage import Stage

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

MAX_BODY = 10 * 1024 * 1024
HUGE = 10**400

every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
each_dialect = pytest.mark.parametrize("door", BLOCKING, ids=lambda door: door.name)
bearer_doors = pytest.mark.parametrize(
    "door", [BY_NAME["openai"], BY_NAME["chat"], BY_NAME["thiggle"]], ids=lambda door: door.name
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with Stage(tmp_path_factory.mktemp("bad-input")) as running:
        yield running


@pytest.fixture(scope="module")
def alice(stage: Stage) -> Caller:
    """Asks only what is refused."""
    return stage.caller("alice", apps=("cold", "demo"))


@pytest.fixture(scope="module")
def bob(stage: Stage) -> Caller:
    """Asks what is served."""
    return stage.caller("bob", apps=("cold", "demo"))


def encoded(body: dict[str, Any], old: str = "", new: bytes = b"") -> bytes:
    """The body as JSON, with bytes put in the place of a marker that no encoder would write."""
    raw = json.dumps(body).encode()
    return raw.replace(old.encode(), new) if old else raw


async def assert_invalid(
    stage: Stage, door: Door, caller: Caller, body: bytes | dict[str, Any], *, status: int = 400
) -> Problem:
    """Refused in the dialect's form, without an upstream call, a hold, a charge or a usage row."""
    headers, _ = door.question(caller)
    calls, request_id = len(stage.upstream.requests), stage.new_id()
    reply = await stage.send("POST", door.path, body, headers | {"X-Request-Id": request_id})
    problem = reply.problem(door.dialect)
    kinds = {"genstack": "InvalidRequest", "dify": "invalid_param"}
    assert (reply.status, problem.kind) == (status, kinds.get(door.dialect, "invalid_request_error")), reply
    assert len(stage.upstream.requests) == calls
    assert stage.rows(request_id) == []
    stage.assert_untouched(caller)
    return problem


async def assert_served(stage: Stage, door: Door, caller: Caller, body: bytes | dict[str, Any]) -> Reply:
    reply = await stage.send("POST", door.path, body, door.question(caller)[0])
    assert reply.status == 200, reply.body
    if door.streams:
        assert door.complete(reply)
    return reply


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "a list": b"[]",
    "null": b"null",
    "a string": b'"prompt"',
    "a number": b"7",
    "two objects": b"{} {}",
    "wrong fields and cut off": b'{"model": [], "inputs": 7, "messages": 7, "prompt": "say',
    "unterminated": b'{"prompt": "say',
    "single quotes": b"{'prompt': 'say'}",
    "a trailing comma": b'{"prompt": "say",}',
    "a form": b"prompt=say+hello",
    "a control character": b'{"prompt": "a\x01b"}',
    "a byte order mark and more": b"\xef\xbb\xbf\xff{}",
    "UTF-16": '{"prompt": "say"}'.encode("utf-16"),
    "nulls": b"\x00" * 64,
}


@every_door
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_body_that_is_not_a_json_object(stage: Stage, alice: Caller, door: Door, body: bytes) -> None:
    await assert_invalid(stage, door, alice, body)


@every_door
@pytest.mark.parametrize(
    "bytes_",
    [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\\ud800", b"\\udc00x", b"\\ud800\\u0041"],
)
async def test_bad_utf_8_and_lone_surrogates_in_the_prompt(
    stage: Stage, alice: Caller, door: Door, bytes_: bytes
) -> None:
    _, body = door.question(alice, "say @@ hello")
    await assert_invalid(stage, door, alice, encoded(body, "@@", bytes_))


@every_door
@pytest.mark.parametrize(
    "where", [{"unknown": "@@"}, {"un@@known": 1}, {"unknown": {"deep": ["@@"]}}], ids=str
)
async def test_bad_utf_8_in_what_is_otherwise_ignored(
    stage: Stage, alice: Caller, door: Door, where: dict[str, Any]
) -> None:
    _, body = door.question(alice, **where)
    await assert_invalid(stage, door, alice, encoded(body, "@@", b"\xff\xfe"))


@every_door
async def test_sixty_four_levels_are_deep_enough(
    stage: Stage, alice: Caller, bob: Caller, door: Door
) -> None:
    _, body = door.question(bob, unknown="@@")
    await assert_served(stage, door, bob, encoded(body, '"@@"', nested(63)))
    _, body = door.question(alice, unknown="@@")
    problem = await assert_invalid(stage, door, alice, encoded(body, '"@@"', nested(64)))
    assert "64" in problem.message


@every_door
@pytest.mark.parametrize("opened", [b"[", b'{"a":', b'[{"a":'])
async def test_endless_nesting_is_refused_at_once(
    stage: Stage, alice: Caller, door: Door, opened: bytes
) -> None:
    began = time.monotonic()
    _, body = door.question(alice, unknown="@@")
    await assert_invalid(stage, door, alice, encoded(body, '"@@"', opened * 100_000))
    await assert_invalid(stage, door, alice, opened * 100_000)
    assert time.monotonic() - began < 10


@every_door
async def test_brackets_inside_strings_nest_nothing(stage: Stage, bob: Caller, door: Door) -> None:
    _, body = door.question(bob, "[" * 200 + '\\"{' * 20)
    await assert_served(stage, door, bob, body)


class Wrong(Struct, frozen=True, kw_only=True):
    """A field, values it must not have, and what the refusal says that it may be (in parts)."""

    field: str
    values: tuple[Any, ...]
    allowed: tuple[str, ...] = ()


NOT_NUMBERS: tuple[Any, ...] = ("1", True, [], {})
NOT_STRINGS: tuple[Any, ...] = (7, True, {}, [])
NOT_BOOLEANS: tuple[Any, ...] = ("true", 1, [])
LONG_STOPS = ["a", "b", "c", "d", "e"]


def integer(field: str, low: int, high: int | None = None) -> tuple[Wrong, ...]:
    """What an integer from `low` to `high` must not be: of another type, or out of its range, which is told."""
    above = () if high is None else (high + 1, float(high + 1), 10**9, HUGE)
    below = (low - 1, float(low - 1), -(10**9), -HUGE)
    told = (str(low),) if high is None else (str(low), str(high))
    return (
        Wrong(field=field, values=NOT_NUMBERS),
        Wrong(field=field, values=(*below, low + 0.5, *above), allowed=told),
    )


def number(field: str, low: float, high: float) -> tuple[Wrong, ...]:
    outside = (low - 0.01, high + 0.01, 10**9, -(10**9), HUGE, -HUGE)
    return (
        Wrong(field=field, values=NOT_NUMBERS),
        Wrong(field=field, values=outside, allowed=(f"{low:g}", f"{high:g}")),
    )


OPENAI = (
    Wrong(field="model", values=(7, True, [], {}, "", None)),
    Wrong(field="prompt", values=(7, True, {}, [], [None], [True], [1.5], [{}], ["a", 1], ["a", [1]])),
    Wrong(field="prompt", values=([-1], [2**31], [HUGE], [[1], [-1]], [[1], 1], [[True]], [[1.5]], [["a"]])),
    Wrong(field="prompt", values=(None,)),
    *integer("best_of", 0, 20),
    Wrong(field="echo", values=NOT_BOOLEANS),
    *number("frequency_penalty", -2, 2),
    *number("presence_penalty", -2, 2),
    Wrong(field="logit_bias", values=([], "x", 7, {"5": "x"}, {"5": None}, {"5": 101}, {"5": -HUGE})),
    Wrong(field="logit_bias", values=({"a": 1}, {"-1": 1}, {"5.0": 1}, {"": 1}, {str(2**31): 1})),
    *integer("logprobs", 0, 5),
    *integer("max_tokens", 0),
    Wrong(field="max_tokens", values=(4097, 10**9, 2**63, HUGE), allowed=("4096",)),
    *integer("max_completion_tokens", 0),
    *integer("n", 1, 128),
    Wrong(field="seed", values=(*NOT_NUMBERS, 0.5, 2**63, HUGE, -HUGE)),
    Wrong(field="stop", values=(7, True, {}, [7], [None])),
    Wrong(field="stop", values=(["a", ""], "", LONG_STOPS, ["x"] * 5000), allowed=("4",)),
    Wrong(field="stream", values=NOT_BOOLEANS),
    Wrong(field="stream_options", values=(7, "x", [], True)),
    Wrong(field="stream_options", values=({"include_usage": "yes"}, {"include_usage": 1})),
    Wrong(field="suffix", values=NOT_STRINGS),
    *number("temperature", 0, 2),
    *number("top_p", 0, 1),
    Wrong(field="user", values=NOT_STRINGS),
)
THIGGLE = (
    Wrong(field="prompt", values=(7, True, {}, [], ["a"], None)),
    Wrong(field="model", values=(7, True, {}, [], [7], [None], [["large"]], "", ["large", ""], None)),
    Wrong(field="model", values=(["large"] * 17, ["large"] * 5000), allowed=("16",)),
    *integer("max_tokens", 1),
    Wrong(field="max_tokens", values=(4097, 10**9, HUGE), allowed=("4096",)),
    *integer("max_new_tokens", 1),
    *number("temperature", 0, 1),
    *number("top_p", 0, 1),
    Wrong(field="stop", values=(7, True, {}, [7])),
    Wrong(field="stop", values=(["a", ""], LONG_STOPS), allowed=("4",)),
    *number("presence_penalty", -2, 2),
    *number("frequency_penalty", -2, 2),
    Wrong(field="stream", values=NOT_BOOLEANS),
)
SAID = {"role": "user", "content": "hi"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
CHAT = (
    Wrong(field="model", values=(7, True, [], {}, "", None)),
    Wrong(field="messages", values=(7, "hi", {}, [], ["hi"], [7], [None], [SAID, {}], None)),
    Wrong(field="messages", values=([{"content": "hi"}], [SAID | {"content": 7}], [SAID | {"role": 7}])),
    Wrong(
        field="messages", values=([SAID | {"role": "User"}], [SAID | {"role": ""}], [SAID | {"content": [7]}])
    ),
    Wrong(field="logprobs", values=(1, "true", [])),
    Wrong(field="top_logprobs", values=(1,)),
    *integer("max_completion_tokens", 1),
    *integer("max_tokens", 1),
    Wrong(field="max_tokens", values=(4097, 10**9, HUGE), allowed=("4096",)),
    *integer("n", 1, 128),
    *number("frequency_penalty", -2, 2),
    *number("presence_penalty", -2, 2),
    Wrong(field="logit_bias", values=([], "x", 7, {"5": "x"}, {"5": None}, {"5": 101}, {"a": 1})),
    Wrong(field="response_format", values=(7, "json", [], {}, {"type": "xml"}, {"type": "json_schema"})),
    Wrong(field="response_format", values=(SCHEMA | {"json_schema": {"name": "x", "schema": 7}},)),
    Wrong(field="seed", values=(*NOT_NUMBERS, 0.5, 2**63, HUGE, -HUGE)),
    Wrong(field="stop", values=(7, True, {}, [7], [None])),
    Wrong(field="stop", values=(["a", ""], "", LONG_STOPS), allowed=("4",)),
    Wrong(field="stream", values=NOT_BOOLEANS),
    Wrong(field="stream_options", values=(7, "x", [], True, {"include_usage": "yes"})),
    *number("temperature", 0, 2),
    *number("top_p", 0, 1),
    Wrong(field="user", values=NOT_STRINGS),
)
GENSTACK = (
    Wrong(field="messages", values=(7, "hi", {}, [], ["hi"], [7], [None], [SAID, {}], None)),
    Wrong(field="messages", values=([{"role": "user"}], [{"content": "hi"}], [SAID | {"content": 7}])),
    Wrong(field="messages", values=([SAID | {"content": None}], [SAID | {"content": [{"text": "hi"}]}])),
    Wrong(
        field="messages",
        values=([SAID | {"role": "tool"}], [SAID, SAID | {"role": ""}], [SAID | {"role": "User"}]),
        allowed=("system", "user", "assistant"),
    ),
    Wrong(field="messages", values=([SAID | {"role": 7}], [SAID | {"role": None}])),
    Wrong(field="model", values=(7, True, {}, ["large"], "", None)),
    Wrong(field="developerId", values=(*NOT_STRINGS, "nobody")),
    Wrong(field="applicationId", values=(*NOT_STRINGS, "com.example.app")),
    Wrong(field="temperature", values=NOT_NUMBERS),
    Wrong(field="temperature", values=(-0.01, -HUGE), allowed=("0",)),
    Wrong(field="temperature", values=(2.01, 10**9, HUGE), allowed=("0", "2")),
    *integer("maxOutputTokens", 1),
    Wrong(field="maxOutputTokens", values=(4097, 10**9, HUGE), allowed=("4096",)),
    Wrong(
        field="overrideGrossMarginPercent",
        values=("50", True, [], {}, -1, -0.0001, 99.0001, 100, 10**9, HUGE, 1.00001),
        allowed=("0", "99"),
    ),
)
DIFY = (
    Wrong(field="inputs", values=(7, "hi", [], [1], True, None)),
    Wrong(field="inputs", values=({},)),
    Wrong(field="response_mode", values=("chatty", "", "Streaming"), allowed=("streaming", "blocking")),
    Wrong(field="response_mode", values=(7, True, [])),
    Wrong(field="user", values=NOT_STRINGS),
    Wrong(field="files", values=(7, "x", {}, [7], ["x"], [{}], [{"type": "image"}])),
    Wrong(field="files", values=([{"type": "video", "transfer_method": "remote_url", "url": "x"}],)),
    Wrong(field="files", values=([{"type": "image", "transfer_method": "pigeon", "url": "x"}],)),
    Wrong(field="files", values=([{"type": "image", "transfer_method": "remote_url"}],)),
    Wrong(
        field="files", values=([{"type": "image", "transfer_method": "remote_url", "url": "http://x/y.png"}],)
    ),
)
FIELDS = {"openai": OPENAI, "chat": CHAT, "thiggle": THIGGLE, "genstack": GENSTACK, "dify": DIFY}


def cases() -> list[Any]:
    return [
        pytest.param(door, wrong, value, id=f"{door.name}-{wrong.field}-{str(value)[:40]}")
        for door in BLOCKING
        for wrong in FIELDS[door.dialect]
        for value in wrong.values
    ]


@pytest.mark.parametrize(("door", "wrong", "value"), cases())
async def test_a_wrong_value_is_refused_by_the_fields_name(
    stage: Stage, alice: Caller, door: Door, wrong: Wrong, value: Any
) -> None:
    _, body = door.question(alice, **{wrong.field: value})
    if wrong.field.startswith("max_") and wrong.field != "max_tokens":
        del body["max_tokens"]
    problem = await assert_invalid(stage, door, alice, body)
    assert wrong.field in problem.message
    for part in wrong.allowed:
        assert part in problem.message
    if door.dialect != "dify":
        assert problem.field is not None
        assert problem.field.startswith(wrong.field)
    if door.dialect in ("openai", "chat", "thiggle"):
        assert f"POST {door.path})" in problem.message or "for the model" in problem.message


@pytest.mark.parametrize(
    "literal", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e999", b"0x10", b"01", b"1."]
)
@each_dialect
async def test_numbers_that_json_or_a_float_cannot_hold(
    stage: Stage, alice: Caller, door: Door, literal: bytes
) -> None:
    field = {"genstack": "temperature", "dify": "user"}.get(door.dialect, "temperature")
    _, body = door.question(alice, **{field: "@@"})
    await assert_invalid(stage, door, alice, encoded(body, '"@@"', literal))


MISSING = {
    "genstack": ("messages", "model"),
    "dify": ("inputs",),
    "openai": ("model", "prompt"),
    "chat": ("model", "messages"),
    "thiggle": ("model", "prompt"),
}


@pytest.mark.parametrize(
    ("door", "field"), [(door, field) for door in BLOCKING for field in MISSING[door.dialect]], ids=str
)
async def test_a_required_field_that_is_missing_is_named(
    stage: Stage, alice: Caller, door: Door, field: str
) -> None:
    _, body = door.question(alice)
    del body[field]
    problem = await assert_invalid(stage, door, alice, body)
    assert field in problem.message
    assert "required" in problem.message or "must" in problem.message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"other": "x"}, "query is required in input form"),
        ({"query": ""}, "query is required in input form"),
        ({"query": None}, "query is required in input form"),
        ({"query": 7}, "query in input form must be a string"),
        ({"query": ["x"]}, "query in input form must be a string"),
    ],
)
async def test_a_wrong_input_of_an_app_is_said_in_difys_words(
    stage: Stage, alice: Caller, inputs: dict[str, Any], message: str
) -> None:
    door = BY_NAME["dify"]
    _, body = door.question(alice, inputs=inputs)
    assert (await assert_invalid(stage, door, alice, body)).message == message


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
REFUSED_BY_NAME = {
    "tools": [TOOL],
    "functions": [{"name": "now"}],
    "tool_choice": "required",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "store": True,
    "service_tier": "flex",
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "metadata": {"a": "b"},
}


@pytest.mark.parametrize("field", REFUSED_BY_NAME)
async def test_a_documented_parameter_that_cannot_be_honoured_is_refused_by_name(
    stage: Stage, alice: Caller, field: str
) -> None:
    door = BY_NAME["chat"]
    _, body = door.question(alice, **{field: REFUSED_BY_NAME[field]})
    problem = await assert_invalid(stage, door, alice, body)
    assert (problem.field, problem.code) == (field, "unsupported_parameter")


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.mark.parametrize(
    "message",
    [
        SAID | {"content": [{"type": "text", "text": "what is this?"}, IMAGE]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "type": "function"}]},
    ],
    ids=["image", "tool", "tool calls"],
)
async def test_messages_of_kinds_that_cannot_be_sent_are_refused_by_place(
    stage: Stage, alice: Caller, message: dict[str, Any]
) -> None:
    door = BY_NAME["chat"]
    _, body = door.question(alice, messages=[SAID, message])
    problem = await assert_invalid(stage, door, alice, body)
    assert (problem.field or "").startswith("messages[1]")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True, "suffix": ".", "logprobs": 1}, "suffix"),
    ],
    ids=str,
)
async def test_parameters_that_contradict_each_other_are_refused(
    stage: Stage, alice: Caller, fields: dict[str, Any], field: str
) -> None:
    door = BY_NAME["openai"]
    problem = await assert_invalid(stage, door, alice, door.question(alice, **fields)[1])
    assert field in problem.message


@pytest.mark.parametrize(
    ("fields", "field", "numbers"),
    [
        ({"prompt": [1, 1024]}, "prompt", ("1024",)),
        ({"prompt": [[1], [99_999]]}, "prompt", ("99999", "1024")),
        ({"logit_bias": {"1024": 1}}, "logit_bias", ("1024",)),
        ({"prompt": [5] * 300, "max_tokens": 256}, "max_tokens", ("300", "256", "512")),
        ({"prompt": " dog" * 300, "max_tokens": 256}, "max_tokens", ("256", "512")),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_what_the_embedded_model_cannot_take_is_refused_with_the_numbers(
    stage: Stage, alice: Caller, fields: dict[str, Any], field: str, numbers: tuple[str, ...]
) -> None:
    door = BY_NAME["openai"]
    problem = await assert_invalid(stage, door, alice, door.question(alice, model="demo", **fields)[1])
    assert problem.field == field
    for number in numbers:
        assert number in problem.message


async def test_a_schema_that_no_grammar_can_hold_is_refused_before_anything_is_held(
    stage: Stage, alice: Caller
) -> None:
    door = BY_NAME["chat"]
    schema = {"type": "object", "properties": {"x": {"type": "string", "minLength": 10**9}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    problem = await assert_invalid(
        stage, door, alice, door.question(alice, model="demo", response_format=format_)[1]
    )
    assert (problem.field or "").startswith("response_format")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 129},
        {"n": 10**9},
        {"best_of": 10**9},
        {"prompt": ["x"] * 129},
        {"prompt": ["x"] * 43, "n": 3},
        {"prompt": ["x"] * 7, "best_of": 20},
        {"prompt": [[1]] * 129},
        {"prompt": ["x"] * 300_000},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_too_many_choices_are_refused_before_anything_is_multiplied(
    stage: Stage, alice: Caller, fields: dict[str, Any]
) -> None:
    door = BY_NAME["openai"]
    _, body = door.question(alice, **fields)
    began = time.monotonic()
    await assert_invalid(stage, door, alice, body)
    assert time.monotonic() - began < 5


async def test_as_many_choices_as_allowed_are_served(stage: Stage, bob: Caller) -> None:
    door = BY_NAME["openai"]
    for fields in ({"n": 128}, {"prompt": ["x"] * 64, "n": 2}, {"prompt": ["x"] * 128}):
        reply = await assert_served(stage, door, bob, door.question(bob, **fields)[1])
        assert [choice["index"] for choice in reply.json["choices"]] == list(range(128))


@every_door
async def test_a_body_announced_too_large_is_refused_before_it_is_sent(stage: Stage, door: Door) -> None:
    for length in (MAX_BODY + 1, 10**15, 10**18):
        head = f"POST {door.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
        reply = await stage.raw(head)
        assert reply.status == 413
        assert str(MAX_BODY) in reply.problem(door.dialect).message


@every_door
async def test_a_chunked_body_is_refused_once_it_is_too_large(stage: Stage, door: Door) -> None:
    head = f"POST {door.path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    reply = await stage.raw(head, *[chunk] * 11)
    problem_of(door.dialect, reply.status, reply.json)
    assert reply.status == 413


@every_door
async def test_the_largest_body_is_read(stage: Stage, bob: Caller, door: Door) -> None:
    _, body = door.question(bob, padding="")
    body["padding"] = "x" * (MAX_BODY - len(encoded(body)))
    assert len(encoded(body)) == MAX_BODY
    await assert_served(stage, door, bob, body)


async def chunks_of(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), 7):
        yield body[begin : begin + 7]


@every_door
async def test_a_chunked_body_is_read(stage: Stage, bob: Caller, door: Door) -> None:
    headers, body = door.question(bob)
    reply = await stage.send("POST", door.path, chunks_of(encoded(body)), headers)
    assert reply.status == 200


@every_door
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonl",
        "json",
    ],
)
async def test_another_content_type_is_refused(
    stage: Stage, alice: Caller, door: Door, content_type: str
) -> None:
    headers, body = door.question(alice)
    reply = await stage.send("POST", door.path, encoded(body), headers | {"Content-Type": content_type})
    assert reply.status == 415
    assert content_type in reply.problem(door.dialect).message


@every_door
@pytest.mark.parametrize("content_type", [None, "application/json; charset=utf-8", "Application/JSON"])
async def test_json_by_any_of_its_names_is_read(
    stage: Stage, bob: Caller, door: Door, content_type: str | None
) -> None:
    headers, body = door.question(bob)
    del headers["Content-Type"]
    if content_type is not None:
        headers["Content-Type"] = content_type
    reply = await stage.send("POST", door.path, encoded(body), headers)
    assert reply.status == 200, reply.body


LONG = "word " * 5000


@each_dialect
async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    stage: Stage, alice: Caller, door: Door
) -> None:
    for model, window in (("cold", "256"), ("demo", "512")):
        question = door.question(alice, LONG, model=model)
        calls = len(stage.upstream.requests)
        reply = await stage.send("POST", door.path, question[1], question[0])
        problem = reply.problem(door.dialect)
        assert reply.status == 400
        assert window in problem.message
        numbers = [int(word) for word in problem.message.replace(",", " ").split() if word.isdigit()]
        assert any(number > int(window) for number in numbers), problem.message
        assert len(stage.upstream.requests) == calls
        stage.assert_untouched(alice)


@pytest.mark.parametrize(
    "door", [door for door in BLOCKING if door.dialect != "dify"], ids=lambda door: door.name
)
async def test_a_prompt_and_limit_beyond_the_context_are_refused_with_both_numbers(
    stage: Stage, alice: Caller, bob: Caller, door: Door
) -> None:
    limit = "maxOutputTokens" if door.dialect == "genstack" else "max_tokens"
    text = "word " * 300
    problem = await assert_invalid(
        stage, door, alice, door.question(alice, text, model="demo", **{limit: 256})[1]
    )
    assert "512" in problem.message
    assert "256" in problem.message
    await assert_served(stage, door, bob, door.question(bob, "word", model="demo", **{limit: 1})[1])


@pytest.mark.parametrize(
    "door", [door for door in BLOCKING if door.dialect != "dify"], ids=lambda door: door.name
)
async def test_a_models_own_limits_hold(stage: Stage, alice: Caller, bob: Caller, door: Door) -> None:
    limit = "maxOutputTokens" if door.dialect == "genstack" else "max_tokens"
    problem = await assert_invalid(stage, door, alice, door.question(alice, model="cold", **{limit: 65})[1])
    assert problem.field == limit
    assert "64" in problem.message
    problem = await assert_invalid(
        stage, door, alice, door.question(alice, model="cold", temperature=0.51)[1]
    )
    assert problem.field == "temperature"
    assert "0 to 0.5" in problem.message
    fitting = {"temperature": 0.5, limit: 64}
    await assert_served(stage, door, bob, door.question(bob, model="cold", **fitting)[1])


@pytest.mark.parametrize(
    ("model", "hottest", "cap"),
    [("llama-3.3", 5.0, 2048), ("gpt-4-mini", 2.0, 16384), ("claude-3.5-sonnet", 1.0, 8192)],
)
async def test_the_first_seeds_models_have_its_limits(
    stage: Stage, alice: Caller, model: str, hottest: float, cap: int
) -> None:
    door = BY_NAME["genstack"]

    def question(**fields: Any) -> dict[str, Any]:
        return door.question(alice, model=model, **fields)[1]

    problem = await assert_invalid(stage, door, alice, question(temperature=hottest + 0.01))
    assert problem.field == "temperature"
    assert problem.allowed == f"0 to {hottest:g}"
    problem = await assert_invalid(stage, door, alice, question(maxOutputTokens=cap + 1))
    assert problem.field == "maxOutputTokens"
    assert str(cap) in str(problem.allowed)
    # At its limits only the provider's key is missing.
    within = question(temperature=hottest, maxOutputTokens=cap)
    reply = await stage.send("POST", "/", within, JSON)
    assert (reply.status, reply.problem("genstack").kind) == (503, "GatewayError")


NEUTRAL: tuple[dict[str, Any], ...] = (
    {"echo": False, "best_of": 0, "suffix": "", "logprobs": None, "logit_bias": {}, "files": []},
    {"echo": None, "best_of": 1, "suffix": None, "logit_bias": None, "files": None, "n": None, "seed": None},
    {"temperature": None, "top_p": None, "stop": None, "presence_penalty": None, "frequency_penalty": None},
    {"max_tokens": None, "max_completion_tokens": None, "max_new_tokens": None, "maxOutputTokens": None},
    {"developerId": None, "applicationId": None, "overrideGrossMarginPercent": None, "user": None},
    {"stream_options": None},
    {"unknown": {"deep": [1, "two", None]}, "api_base": "http://127.0.0.1:1/", "api_key": "x", "": 0},
)


@every_door
@pytest.mark.parametrize("fields", NEUTRAL, ids=",".join)
async def test_neutral_values_and_unknown_keys_change_nothing(
    stage: Stage, bob: Caller, door: Door, fields: dict[str, Any]
) -> None:
    await assert_served(stage, door, bob, door.question(bob)[1])
    plain = stage.upstream.requests[-1]
    limits = {"max_tokens", "maxOutputTokens"}
    await assert_served(stage, door, bob, door.question(bob, **fields)[1])
    asked = stage.upstream.requests[-1]
    if not limits & fields.keys():
        assert asked.json == plain.json
    assert asked.headers == plain.headers | {"content-length": asked.headers["content-length"]}


@pytest.mark.parametrize(
    "door", [door for door in BLOCKING if door.dialect != "dify"], ids=lambda door: door.name
)
async def test_integral_floats_are_integers(stage: Stage, bob: Caller, door: Door) -> None:
    fields: dict[str, Any] = {"genstack": {"maxOutputTokens": 8.0}, "thiggle": {"max_tokens": 8.0}}.get(
        door.dialect, {"max_tokens": 8.0, "n": 1.0, "seed": 5.0, "best_of": 1.0}
    )
    await assert_served(stage, door, bob, door.question(bob, **fields)[1])
    sent = stage.upstream.requests[-1].json
    limit = sent["max_tokens"]
    assert limit == 8
    assert isinstance(limit, int)


@bearer_doors
async def test_both_names_of_a_limit_must_agree(stage: Stage, alice: Caller, bob: Caller, door: Door) -> None:
    other = "max_completion_tokens" if door.dialect in ("openai", "chat") else "max_new_tokens"
    problem = await assert_invalid(stage, door, alice, door.question(alice, **{other: 9})[1])
    assert other in problem.message
    await assert_served(stage, door, bob, door.question(bob, **{other: 8})[1])
