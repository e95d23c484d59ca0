"""The dify dialect (seed 2): a text-generation app fills its prompt from `inputs` and answers as one message.

The app comes with the key, so a request names no model. Streams are bare `data:` events that say in `event` what
they are; only the keep-alive is an `event:` line, which Dify's clients expect.
"""

import uuid
from collections.abc import Mapping, Sequence

import msgspec

from headgate.core.accounts import App, Principal
from headgate.core.completion import Answer, Chunk, CompletionRequest, Message, Sampling, StreamEnd
from headgate.core.errors import GatewayError, InvalidRequest, UnknownModel
from headgate.dialects.base import (
    BearerDialect,
    ErrorResponse,
    RequestContext,
    decode_body,
)
from headgate.dialects.dify_app import PromptTemplate
from headgate.dialects.dify_errors import render_error, status_and_code
from headgate.dialects.dify_files import images_of
from headgate.dialects.dify_usage import usage_of
from headgate.dialects.dify_wire import (
    ErrorEvent,
    MessageEndEvent,
    MessageEvent,
    MessageResponse,
    Metadata,
    StopRequest,
    WireRequest,
)
from headgate.dialects.sse import event

DEFAULT_APP = "default"
"""The app of a key that names none."""

ENDPOINT = "/completion-messages"
STOP_ENDPOINT = "/completion-messages/{task_id}/stop"
STOP_DONE = b'{"result":"success"}'

_encoder = msgspec.json.Encoder()


class Dify(BearerDialect):
    """`POST /completion-messages` for all apps. One request is one choice."""

    name = "dify"
    ping = b"event: ping\n\n"

    def __init__(self, apps: Mapping[str, App]) -> None:
        self._apps = apps
        self._templates = {name: PromptTemplate(app) for name, app in apps.items()}

    def app_of(self, principal: Principal) -> App:
        """The app this caller speaks to. UnknownModel (`app_unavailable`) when it is no longer configured."""
        name = principal.app or DEFAULT_APP
        app = self._apps.get(name)
        if app is None:
            raise UnknownModel(f"The app {name!r} of this key is not configured any more.")
        return app

    def decode(self, body: bytes) -> WireRequest:
        return decode_body(body, WireRequest, endpoint=ENDPOINT)

    def decode_stop(self, body: bytes) -> str | None:
        """The `user` of a stop request; None when not given, as in a request without a body."""
        return (decode_body(body, StopRequest, endpoint=STOP_ENDPOINT).user or None) if body else None

    def parse(self, wire: WireRequest, context: RequestContext) -> CompletionRequest:
        if not wire.inputs:
            raise InvalidRequest(
                "inputs must hold at least one key/value pair.",
                param="inputs",
                allowed="an object with at least one key/value pair",
            )
        streams = _streams(wire.response_mode)
        images = images_of(wire.files) if wire.files else ()
        app = self.app_of(context.principal)
        prompt = self._templates[app.name].fill(wire.inputs)
        message = None
        if images:
            message = Message(role="user", content=prompt, parts=(prompt, *images) if prompt else images)
        return CompletionRequest(
            request_id=context.request_id,
            answer_id=context.answer_id,
            stream_id=context.stream_id,
            created=context.created,
            dialect=self.name,
            models=(app.model,),
            prompts=(prompt,) if message is None else None,
            messages=None if message is None else (message,),
            looks=message is not None,
            plain=True,
            chat_first=True,
            max_tokens=app.max_tokens,
            sampling=Sampling(temperature=app.temperature, top_p=app.top_p, stop=app.stop),
            stream=streams,
            user=wire.user or None,
            app=app.name,
        )

    def render(self, answer: Answer) -> bytes:
        request = answer.request
        return _encoder.encode(
            MessageResponse(
                task_id=task_id_of(request),
                id=request.answer_id,
                message_id=request.answer_id,
                answer=answer.choices[0].text if answer.choices else "",
                metadata=Metadata(usage=usage_of(answer)),
                created_at=request.created,
            )
        )

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> "DifyRenderer":
        return DifyRenderer(request)

    def render_error(self, error: GatewayError) -> ErrorResponse:
        return render_error(error)


_EMPTY = _encoder.encode("")
_LINE_BREAKS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


class DifyRenderer:
    """`message` events, then exactly one `message_end` or `error`."""

    def __init__(self, request: CompletionRequest) -> None:
        self._task_id = task_id_of(request)
        self._message_id = request.answer_id
        self._created = request.created
        # All but the text is the same in every message event; `answer` comes last, so it is cut off at the end.
        blank = MessageEvent(
            task_id=self._task_id,
            message_id=self._message_id,
            id=self._message_id,
            created_at=self._created,
            answer="",
        )
        self._before = b"data: " + _encoder.encode(blank).removesuffix(_EMPTY + b"}")

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        before = self._before
        return b"".join([before + _json_text(chunk.text) + b"}\n\n" for chunk in batch if chunk.text])

    def end(self, end: StreamEnd) -> bytes:
        if end.error is not None:
            return self.error(end.error)
        return event(
            _encoder.encode(
                MessageEndEvent(
                    task_id=self._task_id,
                    message_id=self._message_id,
                    id=self._message_id,
                    created_at=self._created,
                    metadata=Metadata(usage=usage_of(end.answer)),
                )
            )
        )

    def error(self, error: GatewayError) -> bytes:
        status, code = status_and_code(error)
        return event(
            _encoder.encode(
                ErrorEvent(
                    task_id=self._task_id,
                    message_id=self._message_id,
                    created_at=self._created,
                    code=code,
                    message=error.message,
                    status=status,
                )
            )
        )


def task_id_of(request: CompletionRequest) -> str:
    """The task id clients see: the stream id in the form of a UUID."""
    return str(uuid.UUID(hex=request.stream_id))


def stream_id_of(task_id: str) -> str | None:
    """The stream id behind a task id, or None for what cannot be one."""
    try:
        return uuid.UUID(task_id).hex
    except ValueError:
        return None


def _json_text(text: str) -> bytes:
    encoded = _encoder.encode(text)
    if not text.isascii():
        # Dify's own Python example reads lines of decoded text, and str.splitlines breaks at these too.
        for raw, escaped in _LINE_BREAKS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def _streams(mode: str | None) -> bool:
    if mode not in (None, "blocking", "streaming"):
        raise InvalidRequest(
            "response_mode must be streaming or blocking.",
            param="response_mode",
            allowed="streaming or blocking",
        )
    return mode == "streaming"
