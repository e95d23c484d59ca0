"""/tokenize, /detokenize and /tokenizer_info: a model's tokenizer by itself, as evaluation harnesses ask for it."""

from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from headgate.dialects.tokenizer_view import (
    parse_detokenize,
    parse_tokenize,
    render_info,
    render_text,
    render_tokens,
)
from headgate.service.gateway import Gateway
from headgate.web.json_endpoints import caller, json_response, parsed_body

T = TypeVar("T")


class TokenizerEndpoints:
    """`open_to_all`: nobody is asked for a credential (harnesses send none to these routes)."""

    def __init__(self, gateway: Gateway, max_body_bytes: int, *, open_to_all: bool) -> None:
        self._gateway = gateway
        self._max_body_bytes = max_body_bytes
        self._open = open_to_all

    async def tokenize(self, request: Request) -> Response:
        asked = await self._parsed(request, parse_tokenize)
        tokenizer, spec = self._gateway.tokenizing.of(asked.model)
        ids = await tokenizer.tokenize(
            spec, asked.text, add_special=asked.add_special, parse_special=asked.parse_special
        )
        return json_response(
            render_tokens(ids, context_window=spec.context_window, model=asked.model or spec.name)
        )

    async def detokenize(self, request: Request) -> Response:
        asked = await self._parsed(request, parse_detokenize)
        tokenizer, spec = self._gateway.tokenizing.of(asked.model)
        return json_response(render_text(await tokenizer.detokenize(spec, asked.ids)))

    async def info(self, request: Request) -> Response:
        await self._admit(request)
        name = request.query_params.get("model") or None
        tokenizer, spec = self._gateway.tokenizing.of(name)
        info = await tokenizer.describe_tokenizer(spec)
        return json_response(render_info(info, model=name or spec.name))

    async def _parsed(self, request: Request, parse: Callable[[bytes], T]) -> T:
        parsed, _ = await parsed_body(request, self._max_body_bytes, parse, lambda: self._admit(request))
        return parsed

    async def _admit(self, request: Request) -> None:
        if not self._open:
            await caller(request, self._gateway, "openai")
