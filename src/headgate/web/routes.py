"""The route table: every method of every path in one place, so that tests can walk it."""

from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import Struct

from headgate.config import Settings
from headgate.core.money import Credits
from headgate.dialects.base import Caps
from headgate.dialects.chat import OpenAIChat
from headgate.dialects.dify import Dify
from headgate.dialects.genstack import Genstack
from headgate.dialects.openai import OpenAICompletions
from headgate.dialects.thiggle import Thiggle
from headgate.service.gateway import Gateway
from headgate.web.account import AccountEndpoints
from headgate.web.completions import CompletionEndpoint
from headgate.web.dify import DifyEndpoints
from headgate.web.genstack import GenstackEndpoints
from headgate.web.health import HealthEndpoints
from headgate.web.json_endpoints import JsonEndpoint
from headgate.web.streaming import StreamTimes
from headgate.web.tokenizer import TokenizerEndpoints
from headgate.web.uploads import UploadEndpoint, UploadLimits
from headgate.web.wire import Receive, Scope, Send

AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class RouteRow(Struct, frozen=True, kw_only=True):
    """One method of one path. `calls_model`: it can cost money, so it takes a hold."""

    method: str
    path: str
    app: AsgiApp
    dialect: str
    calls_model: bool = False


def route_table(settings: Settings, gateway: Gateway, public_url: Callable[[], str]) -> tuple[RouteRow, ...]:
    """Every route but the static files of the page."""
    server = settings.server
    caps = Caps(max_choices=server.max_choices, max_models=server.max_models, max_stops=server.max_stops)
    credits = Credits(settings.credit_usd)
    openai, chat = OpenAICompletions(caps), OpenAIChat(caps)
    thiggle, dify = Thiggle(caps), Dify(settings.apps)
    genstack, genstack_stream = Genstack(credits, streams=False), Genstack(credits, streams=True)
    endpoint = partial(
        CompletionEndpoint,
        gateway=gateway,
        times=StreamTimes(
            first_chunk_wait=server.first_chunk_wait_s,
            ping_interval=server.ping_interval_s,
            write_timeout=server.write_timeout_s,
        ),
        max_body_bytes=server.max_body_bytes,
    )
    completes = partial(RouteRow, method="POST", calls_model=True)
    account, health = AccountEndpoints(gateway), HealthEndpoints(gateway)
    gen = GenstackEndpoints(gateway, genstack, server.env, public_url, server.max_body_bytes)
    files = settings.files
    siblings = DifyEndpoints(gateway, dify, server.max_body_bytes, files.max_bytes)
    uploads = UploadEndpoint(gateway, dify, UploadLimits(max_bytes=files.max_bytes, keep_s=files.keep_s))
    tokenizer = TokenizerEndpoints(gateway, server.max_body_bytes, open_to_all=server.open_tokenizer)
    return (
        completes(path="/", app=endpoint(genstack, tokens_only=True), dialect="genstack"),
        completes(path="/stream", app=endpoint(genstack_stream, tokens_only=True), dialect="genstack"),
        *both("/completion-messages", completes, app=endpoint(dify), dialect="dify"),
        *both("/completions", completes, app=endpoint(openai), dialect="openai"),
        *both("/chat/completions", completes, app=endpoint(chat), dialect="chat"),
        completes(path="/v1/completion", app=endpoint(thiggle), dialect="thiggle"),
        _get("/", JsonEndpoint(genstack, gen.health), "genstack"),
        _post("/stream/shutdown", JsonEndpoint(genstack, gen.shutdown), "genstack"),
        *both("/completion-messages/{task_id}/stop", _post, JsonEndpoint(dify, siblings.stop), "dify"),
        *both("/files/upload", _post, JsonEndpoint(dify, uploads.upload), "dify"),
        *both("/parameters", _get, JsonEndpoint(dify, siblings.parameters), "dify"),
        *both("/info", _get, JsonEndpoint(dify, siblings.info), "dify"),
        *both("/models", _get, JsonEndpoint(openai, account.models), "openai"),
        *both("/models/{id:path}", _get, JsonEndpoint(openai, account.model), "openai"),
        *both("/balance", _get, JsonEndpoint(openai, account.balance), "openai"),
        *both("/tokenize", _post, JsonEndpoint(openai, tokenizer.tokenize), "openai"),
        *both("/detokenize", _post, JsonEndpoint(openai, tokenizer.detokenize), "openai"),
        *both("/tokenizer_info", _get, JsonEndpoint(openai, tokenizer.info), "openai"),
        _get("/livez", JsonEndpoint(openai, health.livez), "operations"),
        _get("/readyz", JsonEndpoint(openai, health.readyz), "operations"),
        _get("/metrics", JsonEndpoint(openai, health.metrics), "operations"),
    )


def both(
    path: str, row: Callable[..., RouteRow], *args: object, **fields: object
) -> tuple[RouteRow, RouteRow]:
    """The path without and with /v1: clients of both habits exist."""
    if args:
        return row(path, *args), row(f"/v1{path}", *args)
    return row(path=path, **fields), row(path=f"/v1{path}", **fields)


def _get(path: str, app: AsgiApp, dialect: str) -> RouteRow:
    return RouteRow(method="GET", path=path, app=app, dialect=dialect)


def _post(path: str, app: AsgiApp, dialect: str) -> RouteRow:
    return RouteRow(method="POST", path=path, app=app, dialect=dialect)
