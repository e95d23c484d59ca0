"""Answers of the embedded model that must be JSON, or follow a schema."""

import sys
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from headgate.config import EmbeddedSettings
from headgate.core.completion import Job, Message, ResponseFormat
from headgate.core.errors import InvalidRequest, Overloaded
from headgate.core.models import ModelSpec
from headgate.providers.embedded.provider import EmbeddedProvider

BuildJob = Callable[..., Job]
StartProvider = Callable[..., Awaitable[EmbeddedProvider]]

ASK = (Message(role="user", content="What is the capital of France?"),)


def ignore() -> None:
    """For calls whose moment of sending does not matter."""


def schema(value: object) -> ResponseFormat:
    return ResponseFormat(kind="json_schema", schema=msgspec.json.encode(value), name="answer")


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_an_answer_follows_its_schema(
    start_provider: StartProvider, build_job: BuildJob, logprobs: int | None
) -> None:
    provider = await start_provider()
    wanted = schema(
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "東京"]}, "sure": {"type": "boolean"}},
            "required": ["city", "sure"],
            "additionalProperties": False,
        }
    )
    for seed in range(3):
        job = build_job(messages=ASK, seed=seed, max_tokens=120, response_format=wanted, logprobs=logprobs)
        await provider.count_prompt(job)
        (choice,) = (await provider.complete(job, ignore)).choices
        answer = msgspec.json.decode(choice.text)
        assert choice.finish_reason == "stop"
        assert answer["city"] in ("Paris", "東京") and isinstance(answer["sure"], bool) and len(answer) == 2
        if logprobs is not None:
            assert b"".join(entry.data for entry in choice.logprobs or ()) == choice.text.encode()


async def test_any_json_object_is_an_object(start_provider: StartProvider, build_job: BuildJob) -> None:
    provider = await start_provider()
    finished = 0
    for seed in range(5):
        job = build_job(
            messages=ASK, seed=seed, max_tokens=200, response_format=ResponseFormat(kind="json_object")
        )
        await provider.count_prompt(job)
        (choice,) = (await provider.complete(job, ignore)).choices
        assert choice.text.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            finished += 1
            assert isinstance(msgspec.json.decode(choice.text), dict)
    assert finished


@pytest.mark.parametrize("bad", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, [1], "text"])
async def test_a_schema_that_cannot_be_used_is_refused_before_anything_is_done(
    start_provider: StartProvider, build_job: BuildJob, bad: object
) -> None:
    provider = await start_provider()
    job = build_job(messages=ASK, response_format=schema(bad))
    with pytest.raises(InvalidRequest) as caught:
        await provider.count_prompt(job)
    assert caught.value.param == "response_format"


async def test_schemas_need_no_engine(demo: ModelSpec, build_job: BuildJob) -> None:
    provider = EmbeddedProvider((demo,), EmbeddedSettings())
    with pytest.raises(InvalidRequest) as caught:
        await provider.count_prompt(build_job(messages=ASK, response_format=schema({"type": "nonsense"})))
    assert caught.value.param == "response_format"
    for wanted in (schema({"type": "object"}), ResponseFormat(kind="json_object")):
        with pytest.raises(Overloaded):
            await provider.count_prompt(build_job(messages=ASK, response_format=wanted))


async def test_what_any_object_needs_is_worked_out_once(
    start_provider: StartProvider, build_job: BuildJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = await start_provider()
    await provider.count_prompt(build_job(messages=ASK, response_format=ResponseFormat(kind="json_object")))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    later = build_job(messages=ASK, response_format=ResponseFormat(kind="json_object"), request_id="later")
    assert await provider.count_prompt(later)
