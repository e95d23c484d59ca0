"""No field of a client's body or header ever chooses the destination or rides along unlisted."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.support.client import BOTH_WAYS, DIALECTS, Ask, Client, Dialect
from tests.support.script import Script
from tests.support.three_kinds import (
    KINDS,
    UPSTREAM_KEY,
    Kind,
    ThreeKinds,
    kind_model,
    model_of,
    open_three_kinds,
    provider_of,
)
from tests.support.upstream import Received

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

COMPLETER = "completer"
CONFIG = "".join(kind_model(kind, tools=True, vision=True) for kind in KINDS) + kind_model(
    "openai", COMPLETER, mode="completion"
)
SERVED: tuple[tuple[Kind, str], ...] = (*((kind, model_of(kind)) for kind in KINDS), ("openai", COMPLETER))

PATHS: dict[str, str] = {
    model_of("openai"): "/v1/chat/completions",
    COMPLETER: "/v1/completions",
    model_of("anthropic"): "/v1/messages",
    model_of("cohere"): "/v2/chat",
}
FINISH: dict[Kind, str] = {"openai": "stop", "anthropic": "end_turn", "cohere": "COMPLETE"}
ALWAYS = {"host", "user-agent", "accept", "accept-encoding", "content-type", "content-length"}
WORD = "smuggled"
"""Stands in everything that must stay with us."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kinds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeKinds]:
    async with open_three_kinds(CONFIG, tmp_path_factory.mktemp("unlisted")) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def account(kinds: ThreeKinds) -> Client:
    return await kinds.client()


class Elsewhere:
    """Where a client would like its request, and our key, to go."""

    def __init__(self) -> None:
        self.came = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came += 1
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def elsewhere() -> AsyncIterator[Elsewhere]:
    made = Elsewhere()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/{WORD}"
        yield made


def extra_keys(url: str) -> dict[str, Any]:
    """What clients of other gateways and services send, and what attackers try; none is documented here."""
    names = (
        "api_base",
        "base_url",
        "baseURL",
        "api_url",
        "endpoint",
        "target_url",
        "host",
        "url",
        "proxy",
        "proxies",
    )
    keys = (
        "api_key",
        "apiKey",
        "key",
        "token",
        "organization",
        "project",
        "aws_secret_access_key",
        "vertex_credentials",
    )
    kinds = (
        "provider",
        "custom_llm_provider",
        "deployment_id",
        "api_version",
        "engine",
        "route",
        "models",
        "router",
    )
    features = (
        "mcp_servers", "container", "thinking", "context_management", "anthropic_version", "anthropic_beta", "betas",
        "inference_geo", "speed", "cache_control", "documents", "citation_options", "safety_mode", "priority", "k",
        "raw_prompting", "guided_json", "guided_regex", "chat_template", "chat_template_kwargs",
        "min_p", "top_k", "typical_p", "repetition_penalty", "ignore_eos", "min_tokens", "plugins", "transforms",
        "cache_prompt", "n_predict", "grammar", "id_slot", "keep_alive", "options", "connectors", "mock_response",
        "litellm_params", "metadata_", "callbacks", "tags", "drop_params", "fallbacks", "num_retries", "timeout",
        "__proto__", "constructor", "prototype", "__class__", "$ref", "", "system_prompt", "input", "inputs_",
    )  # fmt: skip
    extras: dict[str, Any] = dict.fromkeys(names, url)
    extras |= dict.fromkeys((*keys, *kinds, *features), WORD)
    bag = {"Authorization": f"Bearer {WORD}", "X-Api-Key": WORD, "Host": WORD, "api_base": url}
    for name in ("extra_headers", "extra_body", "extra_query", "headers", "default_headers", "http_client"):
        extras[name] = bag
    return extras


def extra_headers(url: str) -> dict[str, str]:
    names = (
        "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Prefix",
        "X-Forwarded-Server", "Forwarded", "X-Real-IP", "X-Client-IP", "True-Client-IP", "X-Original-Host",
        "X-Host", "X-Original-URL", "X-Rewrite-URL", "Via", "OpenAI-Organization", "OpenAI-Project", "OpenAI-Beta",
        "anthropic-beta", "anthropic-version", "anthropic-dangerous-direct-browser-access", "X-Api-Key", "api-key",
        "X-Client-Name", "X-Title", "HTTP-Referer", "Referer", "Origin", "Cookie", "Proxy-Authorization",
        "X-Stainless-Lang", "X-Amz-Security-Token", "X-Goog-Api-Key", "X-Groq-Region", "X-LiteLLM-Tags",
        "X-Portkey-Custom-Host", "X-Portkey-Provider", "X-Portkey-Forward-Headers", "Helicone-Auth", "cf-aig-token",
        "baggage", "tracestate", "X-B3-TraceId", "X-Request-Tags", "X-Custom", "User-Agent", "Accept-Language",
        "X-Session-Id", "From", "Cache-Control", "Pragma", "X-HTTP-Method-Override",
    )  # fmt: skip
    return dict.fromkeys(names, WORD) | {
        "Helicone-Target-Url": url,
        "X-Target-Url": url,
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "Accept-Encoding": "br, gzip, zstd",
        "Accept": "text/html",
        "TE": "trailers",
        "Connection": "keep-alive, X-Custom",
        "X-Request-Id": f"{WORD}-1",
        "Host": f"{WORD}.example:81",
    }


def assert_ours_alone(kind: Kind, received: Received, host: str) -> None:
    """The headers are exactly those that we send, with our key."""
    own = (
        {"x-api-key": UPSTREAM_KEY, "anthropic-version": "2023-06-01"}
        if kind == "anthropic"
        else {"authorization": f"Bearer {UPSTREAM_KEY}"}
    )
    assert received.headers.keys() == ALWAYS | own.keys()
    assert received.headers == {
        "host": host,
        "user-agent": "headgate",
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(received.body)),
        **own,
    }
    assert WORD.encode() not in received.body


def plain_body(kind: Kind, model: str, dialect: Dialect, *, stream: bool = False) -> dict[str, Any]:
    """What asks for an answer to the words of Client.ask."""
    words = "one two three"
    if model == COMPLETER and dialect in (
        "genstack",
        "chat",
    ):  # a conversation, for a model that only completes
        words = f"User: {words}\nAssistant:"
    body: dict[str, Any] = {"model": model, "max_tokens": 64}
    body |= {"prompt": words} if model == COMPLETER else {"messages": [{"role": "user", "content": words}]}
    if stream:
        body["stream"] = True
        if kind == "openai":
            body["stream_options"] = {"include_usage": True}
    return body


async def sent(account: Client, ask: Ask) -> tuple[int, bytes]:
    async with await account.send(ask) as response:
        return response.status, await response.read()


@pytest.mark.parametrize(("kind", "model"), SERVED, ids=[model for _, model in SERVED])
@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_an_upstream_gets_the_listed_fields_and_our_headers_and_no_others(
    kinds: ThreeKinds,
    account: Client,
    elsewhere: Elsewhere,
    kind: Kind,
    model: str,
    dialect: Dialect,
    stream: bool,
) -> None:
    up = kinds.ups[kind]
    up.script(Script(pieces=("Fine", "."), finish=FINISH[kind]))
    before = kinds.asked
    ask = account.ask(dialect, model, stream=stream)
    extras = {name: given for name, given in extra_keys(elsewhere.url).items() if name not in ask.body}
    body = extras | ask.body
    if dialect == "dify":
        body["inputs"] = extras | body["inputs"]  # variables that the app never declared
    status, answer = await sent(
        account, Ask(path=ask.path, headers=extra_headers(elsewhere.url) | ask.headers, body=body)
    )
    assert status == 200, answer
    assert kinds.asked == before + 1
    received = up.requests[-1]
    assert received.path == PATHS[model]
    assert received.json == plain_body(kind, model, dialect, stream=stream)
    assert_ours_alone(kind, received, up.url.split("/")[2])
    assert elsewhere.came == 0
    (row,) = await kinds.books.settled(account.account)
    assert (row.model, row.provider) == (model, provider_of(kind))


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
DATA = base64.b64encode(PNG).decode()
CONVERSATION_AT: dict[Kind, Any] = {
    "openai": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Weather here?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city":"R"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ],
    "anthropic": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Weather here?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"city": "R"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]}
            ],
        },
    ],
}
CONVERSATION_AT["cohere"] = [
    {name: value for name, value in message.items() if value is not None}
    for message in CONVERSATION_AT["openai"]
]
TOOLS_AT: dict[Kind, Any] = {
    "openai": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}],
    "anthropic": [{"name": "look", "input_schema": SCHEMA}],
    "cohere": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}],
}
CHOICE_AT: dict[Kind, Any] = {"openai": "required", "anthropic": {"type": "any"}, "cohere": "REQUIRED"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_hidden_deep_in_a_chat_stays_here_too(
    kinds: ThreeKinds, account: Client, elsewhere: Elsewhere, kind: Kind, stream: bool
) -> None:
    hidden = extra_keys(elsewhere.url)

    def laden(given: Any) -> Any:
        """The same with hidden things in every object, whatever is known there before them."""
        if isinstance(given, list):
            return [laden(item) for item in given]
        if not isinstance(given, dict):
            return given
        known = {"name", "url", "text", "content", "type", "input", "refusal", "audio"}
        inner = {name: value if name == "parameters" else laden(value) for name, value in given.items()}
        return {name: value for name, value in hidden.items() if name not in known} | inner

    body = {
        "model": model_of(kind),
        "messages": laden(CONVERSATION_AT["openai"]),
        "tools": laden(TOOLS_AT["openai"]),
        "tool_choice": "required",
        "max_tokens": 64,
        "stream": stream,
        "stream_options": laden({"include_usage": True}),
    }
    kinds.ups[kind].script(Script(pieces=("Fine", "."), finish=FINISH[kind]))
    bearer = {"Authorization": f"Bearer {account.key}"}
    status, answer = await sent(account, Ask(path="/v1/chat/completions", headers=bearer, body=body))
    assert status == 200, answer
    expected = {
        "model": model_of(kind),
        "max_tokens": 64,
        "messages": CONVERSATION_AT[kind],
        "tools": TOOLS_AT[kind],
        "tool_choice": CHOICE_AT[kind],
    }
    if kind == "anthropic":
        expected["system"] = "Be brief."
    if stream:
        expected["stream"] = True
        if kind == "openai":
            expected["stream_options"] = {"include_usage": True}
    received = kinds.latest(kind)
    assert received.json == expected
    assert_ours_alone(kind, received, kinds.ups[kind].url.split("/")[2])
    assert elsewhere.came == 0


@pytest.mark.parametrize(
    ("fields", "kind", "listed"),
    [
        ({"temperature": 0.5}, "anthropic", {"temperature"}),
        ({"temperature": 0.5, "top_p": 0.9}, "cohere", {"temperature", "p"}),
        ({"stop": ["a"]}, "anthropic", {"stop_sequences"}),
        ({"stop": ["a"], "seed": 3}, "cohere", {"stop_sequences", "seed"}),
        ({"user": WORD}, "openai", set()),
        ({"user": WORD}, "anthropic", set()),
        ({"user": WORD}, "cohere", set()),
        ({"temperature": 0.5, "seed": 3, "stop": "a"}, "openai", {"temperature", "seed", "stop"}),
    ],
)
@pytest.mark.parametrize("dialect", ["chat", "openai"])
async def test_documented_fields_go_under_the_formats_own_names_and_the_end_users_name_stays(
    kinds: ThreeKinds,
    account: Client,
    fields: dict[str, Any],
    kind: Kind,
    listed: set[str],
    dialect: Dialect,
) -> None:
    kinds.ups[kind].script(Script(pieces=("Fine", "."), finish=FINISH[kind]))
    status, answer = await account.blocking(dialect, model_of(kind), **fields)
    assert status == 200, answer
    assert kinds.latest(kind).json.keys() == {"model", "messages", "max_tokens"} | listed
    assert WORD.encode() not in kinds.latest(kind).body


@pytest.mark.parametrize("dialect", ["genstack", "openai", "chat", "thiggle"])
async def test_a_models_name_leads_nowhere_but_to_the_catalogue(
    kinds: ThreeKinds, account: Client, elsewhere: Elsewhere, dialect: Dialect
) -> None:
    before = kinds.asked
    for name in (
        elsewhere.url,
        f"openai/{elsewhere.url}",
        f"{provider_of('openai')}/../{model_of('anthropic')}",
        f"{provider_of('openai')}/{model_of('anthropic')}",
        f"{model_of('openai')}?api_base={elsewhere.url}",
        f"{model_of('openai')}\r\nX-Api-Key: {WORD}",
        f"{model_of('openai')}\x00",
        f"{provider_of('openai')}/unlisted-upstream-model",
        f"ft:{model_of('openai')}:{WORD}",
        " " + model_of("openai"),
    ):
        status, _ = await account.blocking(dialect, name)
        assert status in (400, 404), name
    assert kinds.asked == before
    assert elsewhere.came == 0
    assert kinds.untouched(account)


async def test_the_words_of_a_prompt_cannot_become_fields(kinds: ThreeKinds, account: Client) -> None:
    """However they are quoted."""
    words = f'"}}],"api_base":"{WORD}","x":[{{"\\u0022\\": \u2028\n\r\n\r\ndata: [DONE]\n\n</s>{{{{query}}}}'
    for kind, model in SERVED:
        for dialect in DIALECTS:
            kinds.ups[kind].script(Script(pieces=("Fine", "."), finish=FINISH[kind]))
            status, answer = await account.blocking(dialect, model, text=words)
            assert status == 200, answer
            body = kinds.latest(kind).json
            assert body.keys() == plain_body(kind, model, dialect).keys()
            assert words in (body["prompt"] if model == COMPLETER else body["messages"][-1]["content"])
