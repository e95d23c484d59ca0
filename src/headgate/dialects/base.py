"""What every dialect is, and the checks they share.

A dialect decodes a body into its wire type, turns that into a CompletionRequest, and renders answers, streams
and errors. It knows nothing of accounts, providers or HTTP beyond status codes.
"""

import re
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec
from msgspec import Struct

from headgate.core.accounts import Principal
from headgate.core.completion import Answer, Chunk, CompletionRequest, StreamEnd
from headgate.core.errors import GatewayError, InvalidRequest
from headgate.dialects.sse import COMMENT_PING

MAX_DEPTH = 64
MAX_CONTAINERS = 100_000
"""Lists and objects in one body: decoding millions of them would hold up everybody else."""
HIGHEST_TOKEN_ID = 2**31 - 1
W = TypeVar("W")


class Caps(Struct, frozen=True, kw_only=True):
    """Hard bounds on what one request may ask for, checked before anything is expanded."""

    max_choices: int = 128
    max_models: int = 16
    max_stops: int = 4


class RequestContext(Struct, frozen=True, kw_only=True):
    """What the service knows about a request before it is parsed. See CompletionRequest for the ids."""

    principal: Principal
    request_id: str
    answer_id: str
    stream_id: str
    created: int


class ErrorResponse(Struct, frozen=True, kw_only=True):
    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Renderer(Protocol):
    """Renders one stream. Every method returns bytes ready to send, perhaps none."""

    def chunks(self, batch: Sequence[Chunk]) -> bytes: ...

    def end(self, end: StreamEnd) -> bytes:
        """The last events of a settled stream."""
        ...

    def error(self, error: GatewayError) -> bytes:
        """The event for a failure after the stream began; nothing follows it."""
        ...


class Dialect(Protocol[W]):
    name: str
    ping: bytes

    def decode(self, body: bytes) -> W:
        """The typed body. MalformedBody when it is not JSON at all, InvalidRequest when a field has a wrong type."""
        ...

    def credential(self, authorization: str | None, body: bytes) -> str | None:
        """The credential as sent, found even in a body whose other fields are wrong; None when missing."""
        ...

    def parse(self, wire: W, context: RequestContext) -> CompletionRequest:
        """Check every field and translate. InvalidRequest names the field and what it may be."""
        ...

    def stream_headers(self, request: CompletionRequest) -> tuple[tuple[str, str], ...]: ...

    def render(self, answer: Answer) -> bytes: ...

    def renderer(self, request: CompletionRequest, served: Sequence[str] | None = None) -> Renderer:
        """`served`: the name to show for each model, which may change until its first chunk (None: as requested)."""
        ...

    def render_error(self, error: GatewayError) -> ErrorResponse: ...


class BearerDialect:
    """The parts shared by dialects whose credential is an Authorization header."""

    ping: bytes = COMMENT_PING

    def credential(self, authorization: str | None, body: bytes) -> str | None:
        return bearer(authorization)

    def stream_headers(self, request: CompletionRequest) -> tuple[tuple[str, str], ...]:
        return ()


class MalformedBody(InvalidRequest):
    """The body is not a JSON object at all. This is said before the credential is looked at."""

    kind: ClassVar[str] = "invalid_request"


def bearer(authorization: str | None) -> str | None:
    """The token of an `Authorization: Bearer` header, None when there is none."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token else None


# Possessive, and taking an unterminated string to the end: no input makes it look at a byte twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


def structure_problem(body: bytes, max_depth: int = MAX_DEPTH) -> str | None:
    """What is wrong with the nesting of a JSON body, or None; the outermost value is the first level.

    Strings are cut out, only brackets kept, read as signed bytes +1 and -1 and summed, all at C speed.
    """
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return None
    steps = array("b", _STRING.sub(b"", body).translate(_STEPS, _NOT_BRACKETS))
    if len(steps) > 2 * MAX_CONTAINERS:
        return f"The JSON body has more than {MAX_CONTAINERS} lists and objects."
    if max(accumulate(steps), default=0) > max_depth:
        return f"The JSON body is nested deeper than {max_depth} levels."
    return None


@cache
def _decoder(wire: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(wire)


_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?:\.(?P<path>.+?))?`)?$", re.DOTALL)


def decode_body(body: bytes, wire: type[W], *, endpoint: str) -> W:
    """The body as `wire`. MalformedBody for what is not a JSON object, InvalidRequest for a wrong type.

    `endpoint` is named in field errors: `/v1/completion` and `/v1/completions` differ by a letter.
    """
    problem = structure_problem(body)
    if problem is not None:
        raise MalformedBody(problem)
    decoder: msgspec.json.Decoder[W] = _decoder(wire)  # type: ignore[arg-type]  # a type is hashable
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look inside values it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # Strict decoding stops at the first wrong field; whether the rest is JSON at all is said before that.
        raise _syntax_error(body) or _field_error(str(error), endpoint) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None


def _syntax_error(body: bytes) -> MalformedBody | None:
    try:
        msgspec.json.decode(body)
    except msgspec.ValidationError:
        return None  # a number that Python cannot hold
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _malformed(error)
    return None


def _malformed(error: Exception) -> MalformedBody:
    return MalformedBody(f"The body is not valid JSON: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not valid UTF-8"
    return str(error).splitlines()[0][:200]


def _field_error(text: str, endpoint: str) -> InvalidRequest:
    match = _PATH.match(text)
    what, path = (match["what"], match["path"]) if match else (text, None)
    if path is None and what.startswith("Expected `object`"):
        return MalformedBody("The body must be a JSON object.")
    if path is None and what.startswith("Object missing required field"):
        path = what.split("`")[1]
        return InvalidRequest(f"{path} is required (POST {endpoint}).", param=path)
    name = path or "body"
    if not what.startswith("Expected "):
        return InvalidRequest(f"{name}: {what[:1].lower()}{what[1:]} (POST {endpoint}).", param=path)
    expected, _, got = what.removeprefix("Expected ").replace("`", "").partition(", got ")
    if got == "null":  # null means "not given", and what may be left out takes it
        return InvalidRequest(f"{name} is required (POST {endpoint}).", param=path)
    allowed = _allowed_types(expected)
    found = f", not {_TYPES.get(got, got)}" if got else ""
    return InvalidRequest(f"{name} must be {allowed}{found} (POST {endpoint}).", param=path, allowed=allowed)


_TYPES = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "object": "an object",
    "str": "a string",
}


def _allowed_types(expected: str) -> str:
    """msgspec's type names in words."""
    names = [name for name in expected.split(" | ") if name != "null"]
    if {"int", "float"} <= set(names):
        names.remove("int")
    return " or ".join(_TYPES.get(name, name) for name in names)


def integer(value: float | None, name: str, low: int, high: int | None = None) -> int | None:
    """An integer in [low, high], or None when not given; integral floats pass."""
    if value is None:
        return None
    if value % 1 != 0 or value < low or (high is not None and value > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise InvalidRequest(f"{name} must be {allowed}{_not(value)}.", param=name, allowed=allowed)
    return int(value)


def number(value: float | None, name: str, low: float, high: float) -> float | None:
    """A number in [low, high], or None when not given."""
    if value is None:
        return None
    if not low <= value <= high:
        allowed = f"a number from {low:g} to {high:g}"
        raise InvalidRequest(f"{name} must be {allowed}{_not(value)}.", param=name, allowed=allowed)
    return float(value)


def _not(value: float) -> str:
    # JSON integers have any length: the longest can neither become floats nor be printed.
    return f", not {value}" if -1e15 < value < 1e15 else ""


def token_limit(
    max_tokens: float | None, aliased: float | None, *, alias: str, low: int
) -> tuple[int | None, str]:
    """The output limit in tokens, which has two names, and the name it was given under."""
    limit = integer(max_tokens, "max_tokens", low)
    other = integer(aliased, alias, low)
    if other is None:
        return limit, "max_tokens"
    if limit is not None and limit != other:
        raise InvalidRequest(
            f"max_tokens and {alias} mean the same; give one of them, or both with one value.", param=alias
        )
    return other, alias


def stops(value: str | Sequence[str] | None, name: str, most: int) -> tuple[str, ...]:
    """Stop sequences: none, one string, or up to `most` non-empty strings."""
    if value is None:
        return ()
    sequences = (value,) if isinstance(value, str) else tuple(value)
    allowed = f"up to {most} non-empty strings"
    if len(sequences) > most or not all(sequences):
        raise InvalidRequest(f"{name} must be {allowed}.", param=name, allowed=allowed)
    return sequences


def token_ids(ids: Sequence[float], name: str) -> tuple[int, ...]:
    """Token ids; integral floats pass. Whether a model has such tokens is for its provider to say."""
    if ids and (min(ids) < 0 or max(ids) > HIGHEST_TOKEN_ID or any(token % 1 for token in ids)):
        allowed = f"token ids from 0 to {HIGHEST_TOKEN_ID}"
        raise InvalidRequest(f"{name} must hold {allowed}.", param=name, allowed=allowed)
    return tuple(map(int, ids))


def unsupported(name: str, why: str) -> InvalidRequest:
    """A documented parameter that this request cannot have honoured."""
    return InvalidRequest(f"{name} is not supported {why}.", param=name, code="unsupported_parameter")
