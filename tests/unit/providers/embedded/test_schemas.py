"""JSON schemas become grammars that the engine follows, or are refused, in processes that leave nothing behind."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.support.engines import engine
from tests.support.until import until

from headgate.core.errors import InvalidRequest, UpstreamFailed
from headgate.providers.embedded import client
from headgate.providers.embedded.schemas import MOST_SCHEMA_BYTES, Schemas
from headgate.providers.embedded.supervisor import Supervisor

Schema = dict[str, Any]


def encode(schema: object) -> bytes:
    return msgspec.json.encode(schema)


def checks() -> list[psutil.Process]:
    """The schema processes that run now, dead ones that nobody has waited for included."""
    found = []
    for process in psutil.Process().children():
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            if zombie or "headgate.providers.embedded.schema_check" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    yield
    assert checks() == []


def optional(names: Iterable[str]) -> Schema:
    """An object of these properties, none of them required, and no others."""
    properties = {name: {"type": "string"} for name in names}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def numbered(count: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def within(schema: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"a": schema},
        "required": ["a"],
        "additionalProperties": False,
    }


def all_of(patterns: int) -> Schema:
    """Text that contains each of so many numbers: to find out whether there is such a text takes very long."""
    return {"allOf": [{"type": "string", "pattern": f".*{number:02d}.*"} for number in range(patterns)]}


ENDLESS = all_of(18)


async def generate(supervisor: Supervisor, grammar: str, seed: int = 7, tokens: int = 300) -> str:
    body = {"prompt": "{", "n_predict": tokens, "grammar": grammar, "seed": seed, "temperature": 1.5}
    said = await client.post(supervisor.address(), "/completion", encode(body), 1 << 20)
    return str(json.loads(said)["content"])


SCHEMAS: tuple[Schema, ...] = (
    {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]},
    {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
    {"$defs": {"pair": {"anyOf": [{"const": 1}, {"const": None}]}}, "$ref": "#/$defs/pair"},
    {"type": "object", "properties": {"maxLength": {"type": "null"}}, "required": ["maxLength"]},
)


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_a_schemas_grammar_makes_the_model_follow_it(schema: Schema) -> None:
    grammar = await Schemas().grammar(encode(schema))
    async with engine() as supervisor:
        answer = json.loads(await generate(supervisor, grammar))
    match schema:
        case {"required": ["age"]}:
            assert isinstance(answer["age"], int) and answer["age"] <= 99
        case {"type": "array"}:
            assert 2 <= len(answer) <= 3 and set(answer) <= {"red", "green"}
        case {"$ref": _}:
            assert answer in (1, None)
        case _:
            assert answer["maxLength"] is None


async def test_large_schemas_that_are_accepted_are_followed() -> None:
    """The engine answers as if there were no grammar where it cannot follow one."""
    schemas = Schemas()
    many = await schemas.grammar(encode(optional(numbered(500))))
    forced = await schemas.grammar(encode(within({"type": "string", "pattern": "^(a{100}){100}$"})))
    patterns = [{"type": "string", "pattern": f"^[a-z]{{{number + 1}}}[0-9]*$"} for number in range(150)]
    mixed = dict(zip(numbered(150), patterns, strict=True))
    mixed_grammar = await schemas.grammar(
        encode({"type": "object", "properties": mixed, "additionalProperties": False})
    )
    async with engine() as supervisor:
        for seed in range(3):
            assert (await generate(supervisor, many, seed, 12)).lstrip("{ \n").startswith(('"p', "}"))
            assert (
                (await generate(supervisor, mixed_grammar, seed, 12)).lstrip("{ \n").startswith(('"p', "}"))
            )
        text = "".join((await generate(supervisor, forced, 7, 20)).split())
        assert text.startswith('{"a":"aa') and set(text[6:]) == {"a"}


TOO_MUCH = (
    optional(numbered(501)),
    within(within(optional(numbered(1000)))),
    {"anyOf": [optional(numbered(300, "a")), optional(numbered(300, "b"))]},
    within({"anyOf": [optional(numbered(300, "a")), optional(numbered(300, "b"))]}),
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
    within({"type": "string", "pattern": r"^(?:[\]a]{1000}\){1,1000}){1000,}$"}),
    {"type": "object", "patternProperties": {"^(a{1000}){1000}$": {}}, "additionalProperties": False},
    {"type": "string", "pattern": "(.*[a-m].{0,60}[n-z]){8}"},
)


@pytest.mark.parametrize("schema", TOO_MUCH)
async def test_schemas_that_the_engine_would_ignore_are_refused(schema: Schema) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Schemas().grammar(encode(schema))
    assert caught.value.param == "response_format"


BAD_SCHEMAS: tuple[tuple[object, str], ...] = (
    (None, "must be an object"),
    ("string", "must be an object"),
    ([{"type": "string"}], "must be an object"),
    ({"type": "text"}, "Invalid type: text"),
    ({"$ref": "#/$defs/missing"}, "does not exist"),
    ({"$ref": "http://127.0.0.1/schema.json"}, "not"),
    ({"type": "string", "pattern": "((("}, "unclosed group"),
    ({"type": "string", "pattern": "["}, "unclosed"),
    ({"not": {"type": "string"}}, "not"),
    ({"minimum": 5, "maximum": 3, "type": "integer"}, "greater than maximum"),
    ({"type": "string", "maxLength": 2001}, "maxLength may be at most 2000"),
    ({"items": {"anyOf": [{"type": "array", "minItems": 10**12}]}}, "minItems may be at most 2000"),
    (optional(numbered(501)), "500 properties that are not required; one has 501"),
    ({"enum": ["x" * MOST_SCHEMA_BYTES]}, "bytes"),
    (within({"const": "x" * 20_000}), "more than 16384 characters in one piece"),
)


@pytest.mark.parametrize(("schema", "reason"), BAD_SCHEMAS)
async def test_schemas_without_a_grammar_are_refused_with_the_reason(schema: object, reason: str) -> None:
    with pytest.raises(InvalidRequest, match="The JSON schema cannot be used: ") as caught:
        await Schemas().grammar(encode(schema))
    assert reason in str(caught.value) and len(str(caught.value)) < 400
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("schema", [b"{", b'{"a":"\xff"}', b'{"items":' * 5000 + b"{}" + b"}" * 5000])
async def test_what_cannot_be_read_is_refused_without_a_process(
    schema: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(InvalidRequest):
        await Schemas().grammar(schema)


async def test_deep_schemas_are_refused_or_followed_but_break_nothing() -> None:
    schema: object = {"type": "string"}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest):
        await Schemas().grammar(encode(schema))


@pytest.mark.parametrize("combined", ["anyOf", "oneOf", "allOf"])
async def test_alternatives_that_multiply_are_answered_soon(combined: str) -> None:
    """Each definition stands for the next one twice: a million millions in all.

    They are one and the same in the end: what is said of them is the library's business, but it must be said.
    """
    definitions: Schema = {
        f"d{at}": {combined: [{"$ref": f"#/$defs/d{at + 1}"}, {"$ref": f"#/$defs/d{at + 1}"}]}
        for at in range(40)
    }
    definitions["d40"] = {"type": "string"}
    asked = Schemas().grammar(encode({"$defs": definitions, "$ref": "#/$defs/d0"}))
    (said,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(said, str | InvalidRequest)


async def test_a_schema_that_takes_too_long_is_refused_and_its_process_ended() -> None:
    with pytest.raises(InvalidRequest, match="too complicated") as caught:
        await Schemas().grammar(encode(ENDLESS))
    assert caught.value.param == "response_format"


async def test_a_process_that_says_nothing_is_ended() -> None:
    asked = asyncio.create_task(Schemas().grammar(encode(ENDLESS)))
    await until(lambda: len(checks()) == 1)
    checks()[0].suspend()
    with pytest.raises(InvalidRequest, match="too complicated"):
        await asked


async def test_who_leaves_takes_the_process_along() -> None:
    asked = asyncio.create_task(Schemas().grammar(encode(ENDLESS)))
    await until(lambda: len(checks()) == 1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert checks() == []


async def test_two_schemas_are_looked_at_at_once_and_those_who_wait_may_leave() -> None:
    schemas = Schemas()
    asked = [
        asyncio.create_task(schemas.grammar(encode({**ENDLESS, "title": str(number)}))) for number in range(5)
    ]
    last = asyncio.create_task(schemas.grammar(encode({"type": "boolean"})))
    await until(lambda: len(checks()) == 2)
    for process in checks():
        process.suspend()
    for task in asked[2:]:
        task.cancel()
    assert all(
        isinstance(left, asyncio.CancelledError)
        for left in await asyncio.gather(*asked[2:], return_exceptions=True)
    )
    assert len(checks()) == 2 and not last.done()
    asked[0].cancel()
    assert "boolean" in await last
    asked[1].cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_a_schema_is_looked_at_once_however_it_is_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    schemas = Schemas()
    grammar = await schemas.grammar(b'{"type":"object","title":"t"}')
    with pytest.raises(InvalidRequest, match="Invalid type") as first:
        await schemas.grammar(b'{"type":"text"}')
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    blanks = b" \n" * MOST_SCHEMA_BYTES
    assert await schemas.grammar(b'{"type":' + blanks + b'"object",   "title": "t"}') == grammar
    with pytest.raises(InvalidRequest, match="Invalid type") as second:
        await schemas.grammar(b' {"type": "text"} ')
    assert str(first.value) == str(second.value)
    with pytest.raises(UpstreamFailed, match="no process could be started"):
        await schemas.grammar(b'{"type":"array"}')


async def test_one_schema_asked_for_many_times_at_once_is_answered_alike() -> None:
    schemas = Schemas()
    answers = await asyncio.gather(*(schemas.grammar(encode(SCHEMAS[0])) for _ in range(20)))
    assert len(set(answers)) == 1


async def test_the_order_of_properties_is_the_clients() -> None:
    schemas = Schemas()
    forwards = await schemas.grammar(encode(optional(["first", "second"])))
    backwards = await schemas.grammar(encode(optional(["second", "first"])))
    assert forwards.index("first") < forwards.index("second")
    assert backwards.index("second") < backwards.index("first")


async def test_where_the_engine_cannot_be_asked_the_schema_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ctypes.py").write_text("raise ImportError('not built')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    with pytest.raises(UpstreamFailed, match="on this machine"):
        await Schemas().grammar(b'{"type":"object"}')
