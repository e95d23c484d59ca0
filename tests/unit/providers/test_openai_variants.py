"""Services that differ: what each is sent, and what is refused before it is asked."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.asking import KEY, nothing, provider_for, streamed
from tests.support.jobs import job, model
from tests.support.script import Script
from tests.support.upstream import Upstream

from headgate.core.completion import Image, Job, Message, Sampling, Tool, Tools
from headgate.core.errors import InvalidRequest, UpstreamFailed, UpstreamUnavailable
from headgate.providers.openai_compatible import OpenAICompatible

HELLO = (Message(role="user", content="Hi"),)
TOOLS = (Tool(name="look"),)
Make = Callable[..., OpenAICompatible]


@pytest.fixture
async def service(upstream: Upstream) -> AsyncIterator[Make]:
    """Makes the provider of a variant."""
    made: list[OpenAICompatible] = []

    def make(variant: str, base_url: str = "", **settings: Any) -> OpenAICompatible:
        made.append(provider_for(base_url or upstream.url, variant=variant, **settings))
        return made[-1]

    yield make
    for provider in made:
        await provider.aclose()


@pytest.mark.parametrize("variant", ["openai", "azure", "groq"])
async def test_new_chats_name_the_limit_anew_and_completions_do_not(
    upstream: Upstream, service: Make, variant: str
) -> None:
    provider = service(variant)
    await provider.complete(job(messages=HELLO, max_tokens=9), nothing)
    await streamed(provider, job(messages=HELLO, max_tokens=9))
    await provider.complete(job(max_tokens=9), nothing)
    for request in upstream.requests[:2]:
        assert request.json["max_completion_tokens"] == 9
        assert "max_tokens" not in request.json
    assert upstream.requests[2].json["max_tokens"] == 9
    assert "max_completion_tokens" not in upstream.requests[2].json


async def test_azure_gets_the_key_in_its_own_header(upstream: Upstream, service: Make) -> None:
    await service("azure").complete(job(messages=HELLO), nothing)
    [request] = upstream.requests
    assert request.headers["api-key"] == KEY
    assert "authorization" not in request.headers
    assert request.path == "/v1/chat/completions"


async def test_azures_dated_api_names_deployment_and_version_in_the_address(
    upstream: Upstream, service: Make
) -> None:
    base = upstream.url.replace("/v1", "/openai")
    spoken = job(messages=HELLO, model=model("my gpt/4?x"))
    await service("azure-deployments", base).complete(spoken, nothing)
    await streamed(service("azure-deployments", base, query={"api-version": "2030-01-01"}), job("small"))
    paths = [request.path for request in upstream.requests]
    assert paths == [
        "/openai/deployments/my%20gpt%2F4%3Fx/chat/completions?api-version=2024-10-21",
        "/openai/deployments/small/completions?api-version=2030-01-01",
    ]
    assert upstream.requests[0].json["max_tokens"] == 64


async def test_together_is_asked_for_log_probabilities_by_number(upstream: Upstream, service: Make) -> None:
    provider = service("together")
    body = {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Yes.", "tool_calls": []},
                "logprobs": {
                    "tokens": ["Yes", "."],
                    "token_logprobs": [-0.5, -0.25],
                    "top_logprobs": [{"Yes": -0.5, "No": -1.0}, {".": -0.25, "!": -2.0}],
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, "cached_tokens": 3},
    }
    upstream.script(Script(body=body))
    completion = await provider.complete(job(messages=HELLO, logprobs=2), nothing)
    assert upstream.requests[0].json["logprobs"] == 2
    assert "top_logprobs" not in upstream.requests[0].json
    scores = completion.choices[0].logprobs
    assert scores is not None
    assert [entry.logprob for entry in scores] == [-0.5, -0.25]
    assert completion.usage is not None
    assert completion.usage.cached_tokens == 3


def with_tools(**fields: Any) -> Job:
    return job(messages=HELLO, tools=Tools(tools=TOOLS, **fields))


def looking(detail: str | None) -> Job:
    image = Image(data=b"x", media_type="image/png", detail=detail)  # type: ignore[arg-type]
    return job(messages=(Message(role="user", content="", parts=(image,)),))


@pytest.mark.parametrize(
    ("variant", "asked", "param"),
    [
        ("groq", job(messages=HELLO, n=2), "n"),
        ("groq", job(messages=HELLO, logprobs=0), "logprobs"),
        ("groq", job(messages=HELLO, sampling=Sampling(logit_bias=((7, 1.0),))), "logit_bias"),
        ("groq", job(messages=HELLO, sampling=Sampling(presence_penalty=0.5)), "presence_penalty"),
        ("groq", job(messages=HELLO, sampling=Sampling(frequency_penalty=0.5)), "frequency_penalty"),
        ("openrouter", job(n=2), "n"),
        ("openrouter", job(echo=True), "echo"),
        ("vllm", job(best_of=3), "best_of"),
        ("vllm", job(suffix="."), "suffix"),
        ("vllm", looking("low"), "detail"),
        ("fireworks", job(best_of=3), "best_of"),
        ("together", job(prompt=(1, 2)), "prompt"),
        ("together", with_tools(parallel=False), "parallel_tool_calls"),
        ("ollama", job(logprobs=1), "logprobs"),
        ("ollama", with_tools(choice="required"), "tool_choice"),
        ("ollama", with_tools(choice="none"), "tool_choice"),
    ],
)
async def test_what_a_service_cannot_take_is_refused_by_name(
    upstream: Upstream, service: Make, variant: str, asked: Job, param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await service(variant).count_prompt(asked)
    assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")
    assert asked.model.name in raised.value.message
    assert await service("").count_prompt(asked) == (2 if param == "prompt" else None)
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("variant", "asked"),
    [
        ("groq", job(messages=HELLO, sampling=Sampling(presence_penalty=0, frequency_penalty=0))),
        ("groq", job(messages=HELLO, sampling=Sampling(temperature=0.5, top_p=0.5, seed=1, stop=("x",)))),
        ("vllm", job(echo=True, logprobs=1, n=2)),
        ("vllm", looking("auto")),
        ("vllm", looking(None)),
        ("together", with_tools(parallel=True)),
        ("ollama", with_tools(choice="auto")),
        ("ollama", job(suffix=".")),
    ],
)
async def test_what_a_service_takes_is_not_refused(service: Make, variant: str, asked: Job) -> None:
    assert await service(variant).count_prompt(asked) is None


async def test_openrouters_comments_are_passed_over_and_its_late_errors_are_errors(
    upstream: Upstream, service: Make
) -> None:
    provider = service("openrouter")
    wait = ": OPENROUTER PROCESSING\n\n"
    text = 'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    end = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    late = (
        'data: {"error":{"code":503,"message":"Provider disconnected"},'
        '"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
    )
    kind = {"Content-Type": "text/event-stream"}
    upstream.script(Script(body=wait + wait + text + wait + end, headers=kind))
    upstream.script(Script(body=wait + text + late, headers=kind))
    assert "".join(chunk.text for chunk in await streamed(provider, job(messages=HELLO))) == "a"
    with pytest.raises(UpstreamUnavailable):
        await streamed(provider, job(messages=HELLO))


@pytest.mark.parametrize("reason", ["error", "abort"])
async def test_an_answer_that_broke_off_is_no_stop_both_ways(
    upstream: Upstream, service: Make, reason: str
) -> None:
    upstream.on("plain", Script(pieces=("a", "b"), finish=reason))
    with pytest.raises(UpstreamFailed, match="broke its answer off") as raised:
        await service("").complete(job(), nothing)
    assert raised.value.usage is not None
    with pytest.raises(UpstreamFailed, match="broke its answer off"):
        await streamed(service(""), job())
