"""What a chat answer must look like, as its request says it; JSON schemas, which tools have too, are kept as sent."""

import re

import msgspec

from headgate.core.completion import ResponseFormat
from headgate.core.errors import InvalidRequest
from headgate.dialects.chat_wire import FormatBody, SchemaFormat

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_IN_WORDS = "1 to 64 letters, digits, underscores or dashes"


def response_format(wire: FormatBody | None) -> ResponseFormat | None:
    if wire is None:
        return None
    if wire.json_schema is not None and wire.type != "json_schema":
        allowed = "null where response_format.type is not json_schema"
        raise InvalidRequest(
            "response_format.json_schema goes with response_format.type json_schema only.",
            param="response_format.json_schema",
            allowed=allowed,
        )
    if wire.type == "text":
        return None
    if wire.type == "json_object":
        return ResponseFormat(kind="json_object")
    if wire.type == "json_schema":
        return _schema_format(wire.json_schema)
    allowed = "text, json_object or json_schema"
    raise InvalidRequest(
        f"response_format.type must be {allowed}.", param="response_format.type", allowed=allowed
    )


def _schema_format(wire: SchemaFormat | None) -> ResponseFormat:
    where = "response_format.json_schema"
    if wire is None:
        raise InvalidRequest(f"{where} is required with type json_schema.", param=where)
    return ResponseFormat(
        kind="json_schema",
        name=identifier(wire.name, f"{where}.name"),
        schema=schema_text(wire.schema, f"{where}.schema"),
        description=wire.description,
        strict=wire.strict,
    )


def identifier(name: str | None, where: str) -> str:
    """What schemas and functions may be called."""
    if name is None or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where} must be {_NAME_IN_WORDS}.", param=where, allowed=_NAME_IN_WORDS)
    return name


def schema_text(raw: msgspec.Raw, where: str) -> bytes:
    """The schema as JSON text. Its values were skipped when the body was read, so they are looked at here."""
    try:
        schema = msgspec.json.decode(raw) if raw else None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{where} cannot be read: {error}.", param=where) from None
    if not isinstance(schema, dict):
        allowed = "an object (a JSON schema)"
        raise InvalidRequest(f"{where} must be {allowed}.", param=where, allowed=allowed)
    return bytes(raw)
