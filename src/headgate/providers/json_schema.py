"""JSON schemas as clients write them, made ready for upstreams that take no schema by other words.

They stay JSON text throughout: only their outermost fields are looked at.
"""

import msgspec

from headgate.core.completion import ResponseFormat

_NOTHING = msgspec.Raw(b'{"type":"object","properties":{}}')
_STRICTLY_NOTHING = msgspec.Raw(b'{"type":"object","properties":{},"additionalProperties":false}')
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def arguments_schema(parameters: bytes | None, *, strict: bool = False) -> msgspec.Raw:
    """The schema of a function's arguments: always an object's, an empty one where it takes none.

    `strict`: it says that there is nothing else in the object, as Anthropic wants it of those it holds calls to.
    """
    if parameters is None:
        return _STRICTLY_NOTHING if strict else _NOTHING
    fields = _fields(parameters)
    if "type" in fields:
        return msgspec.Raw(parameters)
    return msgspec.Raw(_encode({"type": msgspec.Raw(b'"object"'), **fields}))


def answer_schema(asked: ResponseFormat) -> msgspec.Raw | None:
    """The schema of an answer, if there is one.

    The description stands in it, unless it has its own: what it says is for the model to read, wherever it stands.
    """
    if asked.schema is None or asked.description is None:
        return None if asked.schema is None else msgspec.Raw(asked.schema)
    fields = _fields(asked.schema)
    if "description" in fields:
        return msgspec.Raw(asked.schema)
    return msgspec.Raw(_encode({"description": asked.description, **fields}))
