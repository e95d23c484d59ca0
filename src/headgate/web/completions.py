"""One handler for every dialect: decode, authenticate, parse, run, render."""

import asyncio
from hashlib import sha256
from typing import Any

import structlog
from msgspec.structs import replace

from headgate.core import money
from headgate.core.accounts import Principal
from headgate.core.completion import Answer, CompletionRequest, IdempotencyKey
from headgate.core.errors import GatewayError, InternalError, InvalidRequest, Overloaded, RateLimited
from headgate.dialects.base import Dialect, MalformedBody, RequestContext
from headgate.service.gateway import Gateway
from headgate.service.identity import authorize
from headgate.service.streams import Running, RunningStream
from headgate.web.disconnect import DisconnectWatch
from headgate.web.streaming import StreamTimes, replay_headers, send_stream
from headgate.web.wire import (
    ClientGone,
    Receive,
    Scope,
    Send,
    check_content_type,
    header,
    read_body,
    request_id,
    respond,
)

log = structlog.get_logger("headgate.request")

SCORES_RENDERED_HERE = 10_000
"""Answers with more log probabilities are rendered in a thread, beside the event loop."""

MAX_KEY = 255
"""Characters of an Idempotency-Key."""

CLIENT_CLOSED = 499
"""What logs and metrics call a request whose client left before the answer."""


class CompletionEndpoint:
    """An ASGI application for one dialect's completion route."""

    def __init__(
        self,
        dialect: Dialect[Any],
        gateway: Gateway,
        times: StreamTimes,
        *,
        max_body_bytes: int,
        tokens_only: bool = False,
    ) -> None:
        self._dialect = dialect
        self._gateway = gateway
        self._times = times
        self._max_body_bytes = max_body_bytes
        self._tokens_only = tokens_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = self._gateway.clock.monotonic()
        given_id = request_id(scope, self._gateway.ids.hex)
        running: Running | None = None
        try:
            request, principal = await self._accept(scope, receive)
            running = _running(request, principal)
            if isinstance(running, RunningStream):
                self._gateway.completions.stream(request, principal, running)
                status = await send_stream(self._dialect, request, running, self._times, scope, receive, send)
            else:
                answer = await self._complete(request, principal, running, scope, receive)
                body = await self._rendered(answer)
                await respond(send, 200, body, self._headers(request, running, answer))
                status = 200
        except ClientGone:
            status = CLIENT_CLOSED
        except Exception as error:
            status = await self._refuse(error, given_id, running, send)
        self._gateway.metrics.response(self._dialect.name, status)
        log.info(
            "request",
            request_id=given_id,
            dialect=self._dialect.name,
            status=status,
            ms=round((self._gateway.clock.monotonic() - began) * 1000, 1),
        )

    async def _accept(self, scope: Scope, receive: Receive) -> tuple[CompletionRequest, Principal]:
        """Everything up to a checked request, in the contract's order of checks."""
        dialect, gateway = self._dialect, self._gateway
        check_content_type(scope)
        body = await read_body(scope, receive, self._max_body_bytes)
        problem: InvalidRequest | None = None
        try:
            wire = dialect.decode(body)
        except MalformedBody:
            raise
        except InvalidRequest as error:
            problem = error  # 401 comes before field errors
        authorization = header(scope, b"authorization")
        credential = dialect.credential(authorization.decode("latin-1") if authorization else None, body)
        principal = await gateway.identity.authenticate(credential, tokens_only=self._tokens_only)
        # Nothing waits from here until the request counts as running, so the drain sees it or it is refused.
        if gateway.draining:
            raise Overloaded("The gateway is shutting down.", retry_after=5)
        authorize(principal, dialect.name)
        key = _idempotency_key(scope)
        if problem is not None:
            raise problem
        context = RequestContext(
            principal=principal,
            request_id=request_id(scope),
            answer_id=gateway.ids.uuid(),
            stream_id=gateway.ids.hex(),
            created=int(gateway.clock.time()),
        )
        request = dialect.parse(wire, context)
        if key is not None:
            # The app comes with the key that asks, so it is part of what is asked.
            asked = f"{scope['path']}\0{principal.app or ''}\0".encode() + body
            digest = sha256(asked).digest()
            keyed = IdempotencyKey(account=principal.account, key=key, digest=digest)
            request = replace(request, idempotency=keyed)
        return request, principal

    async def _complete(
        self,
        request: CompletionRequest,
        principal: Principal,
        running: Running,
        scope: Scope,
        receive: Receive,
    ) -> Answer:
        """The answer; stops the work and raises ClientGone when the client leaves first."""
        watch = DisconnectWatch(scope, receive, running)
        try:
            return await self._gateway.completions.complete(request, principal, running)
        except GatewayError:
            if running.stop_reason == "disconnected":
                raise ClientGone from None
            raise
        finally:
            watch.end()

    async def _rendered(self, answer: Answer) -> bytes:
        if answer.request.logprobs is not None and _scores(answer) > SCORES_RENDERED_HERE:
            return await asyncio.to_thread(self._dialect.render, answer)
        return self._dialect.render(answer)

    def _headers(
        self, request: CompletionRequest, running: Running, answer: Answer
    ) -> tuple[tuple[str, str], ...]:
        return (
            ("x-request-id", request.request_id),
            ("x-headgate-provider", answer.providers),
            ("x-headgate-price", money.usd_text(answer.price)),
            *running.limit_headers,
            *replay_headers(running),
        )

    async def _refuse(self, error: Exception, given_id: str, running: Running | None, send: Send) -> int:
        """Answer with the error in the dialect's form; returns its status."""
        if not isinstance(error, GatewayError):
            log.exception("request failed", request_id=given_id)
            error = InternalError()
        response = self._dialect.render_error(error)
        limits = error.headers if isinstance(error, RateLimited) else running.limit_headers if running else ()
        headers = (("x-request-id", given_id), *response.headers, *limits)
        await respond(send, response.status, response.body, headers)
        return response.status


def _idempotency_key(scope: Scope) -> str | None:
    """The header's value, None where there is none. InvalidRequest for one that is no key."""
    given = header(scope, b"idempotency-key")
    if given is None:
        return None
    key = given.decode("latin-1").strip()
    if not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        allowed = f"1 to {MAX_KEY} printable ASCII characters"
        raise InvalidRequest(
            f"The Idempotency-Key header must be {allowed}.", param="Idempotency-Key", allowed=allowed
        )
    return key


def _running(request: CompletionRequest, principal: Principal) -> Running:
    kind = RunningStream if request.stream else Running
    return kind(
        dialect=request.dialect,
        stream_id=request.stream_id,
        account=principal.account,
        app=request.app,
        user=request.user,
    )


def _scores(answer: Answer) -> int:
    alternatives = 1 + (answer.request.logprobs or 0)
    return alternatives * sum(len(choice.logprobs or ()) for choice in answer.choices)
