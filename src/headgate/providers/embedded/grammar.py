"""From a JSON schema to the grammar that makes a model follow it, refused before it costs anything.

xllamacpp only wraps the schema up: what is wrong with it shows when a generation begins. So the library that will
compile it there looks at it here, with a vocabulary of single bytes in place of the model's. Compiling takes time
that grows with the product of alternatives that hold at once; schemas are measured before.
"""

import ctypes
import json
from ctypes import CDLL

from headgate.providers.embedded import native
from headgate.providers.embedded.side import Failed, Refused

MOST_SCHEMA_BYTES = 64 * 1024
MOST_REPETITIONS = 2000
MOST_ALTERNATIVES = 1000
MOST_REASON = 300

_REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_VALUES = frozenset({"const", "default", "enum", "examples"})
_BYTES = 256


def grammar_of(library: CDLL, schema: object) -> str:
    """The engine's grammar for a JSON schema. Refused with the reason where there is none."""
    if not isinstance(schema, dict):
        raise Refused("schema must be an object")
    try:
        text = json.dumps(schema)
        if len(text) > MOST_SCHEMA_BYTES:
            raise Refused(f"schema may have {MOST_SCHEMA_BYTES} bytes")
        _measure(schema, schema)
    except RecursionError as error:
        raise Refused("schema is nested too deeply") from error
    import xllamacpp  # late: as in the engine

    try:
        grammar = str(xllamacpp.json_schema_to_grammar(text))
    except (RuntimeError, TypeError, ValueError) as error:
        raise Refused(_short(str(error))) from error
    _validate(library, text)
    return grammar


def _measure(node: object, root: dict[str, object]) -> None:
    """Refuse numbers of repetitions and of alternatives that only serve to keep the engine busy."""
    if isinstance(node, list):
        for item in node:
            _measure(item, root)
    elif isinstance(node, dict):
        for name in _REPETITIONS:
            value = node.get(name)
            if isinstance(value, int | float) and value > MOST_REPETITIONS:
                raise Refused(f"{name} may be {MOST_REPETITIONS}")
        if _alternatives(node, root, ()) > MOST_ALTERNATIVES:
            raise Refused(f"schema combines more than {MOST_ALTERNATIVES} alternatives in one place")
        for name, value in node.items():
            if name not in _VALUES:
                _measure(value, root)


def _alternatives(node: object, root: dict[str, object], way: tuple[str, ...]) -> int:
    """How many plain schemas this one stands for: alternatives add up, what holds at once multiplies."""
    if not isinstance(node, dict):
        return 1
    product = 1
    for name in ("anyOf", "oneOf"):
        if isinstance(branches := node.get(name), list) and branches:
            product *= sum(_alternatives(branch, root, way) for branch in branches)
    if isinstance(parts := node.get("allOf"), list):
        for part in parts:
            product *= _alternatives(part, root, way)
            if product > MOST_ALTERNATIVES:
                return product
    reference = node.get("$ref")
    if isinstance(reference, str) and reference not in way:
        product *= _alternatives(_target(reference, root), root, (*way, reference))
    return product


def _target(reference: str, root: dict[str, object]) -> object:
    node: object = root
    for name in reference.removeprefix("#").split("/")[1:]:
        node = node.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    return node


def _validate(library: CDLL, schema: str) -> None:
    said = ctypes.create_string_buffer(4096)
    end = b"<end>"
    vocabulary = native.SchemaTokenizer(
        vocab_size=_BYTES + 1,
        tok_eos=_BYTES,
        token_lens=(ctypes.c_uint32 * (_BYTES + 1))(*[1] * _BYTES, len(end)),
        token_bytes=bytes(range(_BYTES)) + end,
        use_approximate_greedy_tokenize_fn=True,
    )
    tokenizer = library.llg_new_tokenizer(vocabulary, said, len(said))
    if not tokenizer:
        raise Failed("schemas cannot be checked")
    try:
        limits = (ctypes.c_uint64 * 64)()
        library.llg_constraint_init_set_defaults(limits, tokenizer)
        limits[1] = 0  # both of its log levels
        if library.llg_validate_grammar(limits, b"json", schema.encode(), said, len(said)) < 0:
            raise Refused(_short(said.value.decode("utf-8", "replace")))
    finally:
        library.llg_free_tokenizer(tokenizer)


def _short(reason: str) -> str:
    return " ".join(reason.split())[:MOST_REASON]
