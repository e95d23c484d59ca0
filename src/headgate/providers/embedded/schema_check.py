"""The schema process: one JSON schema becomes the grammar that makes a model follow it, or is refused with a reason.

Started by exec as `python -m headgate.providers.embedded.schema_check`, and ended by its parent if need be: what a
schema costs cannot be told from its text, and the library that compiles it cannot be interrupted. The schema comes
on stdin; one JSON line leaves on stdout, {"grammar": ...} or {"error": ...}.

The engine does not say when it cannot follow a grammar: it answers as if there were none. So the grammar is started
here as it will be there, and followed along some of the texts it allows. No sample shows all of a schema; what is
known to be too much for the engine has limits of its own.
"""

import contextlib
import json
import os
import random
import re
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # late elsewhere
    from headgate.providers.embedded import llguidance

MOST_CPU_S = 1
MOST_MEMORY = 2 * 1024**3
"""Bytes of address space beyond what the loaded library has."""

MOST_REPETITIONS = 2000
MOST_OPTIONAL = 500
"""Properties of an object that may be left out: the engine keeps four items for each, and 2,000 at most."""

MOST_UNROLLED = 16_384
"""Characters of a pattern with its repetitions written out, and of a text that leaves the model no choice: the engine
goes through the rest of such a text again for each of its tokens."""

MOST_REASON = 300
WALKS = 24
WALK_STEPS = 300
MOST_STEPS = 2500
FORCED_STEP = 50
"""Characters without a choice that cost about as much as a step. Counted, not timed: an answer must not depend on how
busy the machine is."""

_TOO_COMPLICATED = "it is too complicated for the engine"
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Blanks as most JSON has them, and no more: free to, a small model fills its answer with nothing else."""

_QUOTE = ord('"')
_QUOTE_SHARE = 0.3
_REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_VALUES = frozenset({"const", "default", "enum", "examples"})
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class Refused(Exception):
    """The schema is at fault; the text says how."""


def main() -> NoReturn:
    # The answer must be alone on stdout, whatever the library prints.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_time()
    try:
        said = {"grammar": grammar_of(sys.stdin.buffer.read())}
    except Refused as refusal:
        said = {"error": " ".join(str(refusal).split())[:MOST_REASON]}
    except (MemoryError, RecursionError):
        said = {"error": _TOO_COMPLICATED}
    answer.write(json.dumps(said) + "\n")
    answer.close()
    # Not sys.exit: nothing here is worth taking apart.
    os._exit(0)


def grammar_of(schema: bytes) -> str:
    """The engine's grammar for a JSON schema. Refused with the reason where there is none."""
    node = json.loads(schema)
    if not isinstance(node, dict):
        raise Refused("it must be an object")
    _measure(node)
    schema = json.dumps(node | {"x-guidance": _STYLE}).encode()
    import xllamacpp  # late: many schemas are refused without it, and the limits hold for it

    from headgate.providers.embedded import llguidance

    parser = llguidance.Parser(llguidance.library())
    _limit_memory()
    try:
        parser.validate(schema)
    except llguidance.Unfit as unfit:
        raise Refused(str(unfit)) from unfit
    try:
        grammar = str(xllamacpp.json_schema_to_grammar(schema.decode()))
    except (RuntimeError, TypeError, ValueError) as error:
        raise Refused(str(error)) from error
    try:
        parser.start(grammar.encode())
        _follow(parser)
    except llguidance.Unfit as unfit:
        raise Refused(f"{_TOO_COMPLICATED} ({str(unfit).split(';')[0]})") from unfit
    return grammar


def _follow(parser: "llguidance.Parser") -> None:
    """Compute what may come next along texts that the grammar allows: always the same ones."""
    # Not for secrets: for variety.
    choice = random.Random(1)  # noqa: S311
    steps = 0
    for _ in range(WALKS):
        parser.restart()
        for _ in range(WALK_STEPS):
            allowed = parser.allowed()
            steps += 1 + parser.forced // FORCED_STEP
            if parser.forced > MOST_UNROLLED:
                raise Refused(f"it prescribes more than {MOST_UNROLLED} characters in one piece")
            if steps > MOST_STEPS:
                return
            if not allowed:
                break
            # Texts should end before the walk does; and blanks lead nowhere.
            if _QUOTE in allowed and choice.random() < _QUOTE_SHARE:
                byte = _QUOTE
            else:
                byte = choice.choice([byte for byte in allowed if byte > 32] or allowed)
            parser.consume(byte)


def _measure(node: object) -> None:
    """Refuse what has been seen to be too much for the engine, wherever in the schema it is."""
    if isinstance(node, list):
        for item in node:
            _measure(item)
    elif isinstance(node, dict):
        for name in _REPETITIONS:
            value = node.get(name)
            if isinstance(value, int | float) and value > MOST_REPETITIONS:
                raise Refused(f"{name} may be at most {MOST_REPETITIONS}")
        properties, required, patterns = (
            node.get("properties"),
            node.get("required"),
            node.get("patternProperties"),
        )
        if isinstance(properties, dict):
            names = required if isinstance(required, list) else []
            optional = len(properties.keys() - {name for name in names if isinstance(name, str)})
            if optional > MOST_OPTIONAL:
                raise Refused(
                    f"an object may have {MOST_OPTIONAL} properties that are not required; one has {optional}"
                )
        for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(pattern, str) and _unrolled(pattern) > MOST_UNROLLED:
                raise Refused(f"a pattern may repeat up to {MOST_UNROLLED} characters in all")
        for name, value in node.items():
            if name not in _VALUES:
                _measure(value)


def _unrolled(pattern: str) -> int:
    """How many characters the pattern has with its counted repetitions written out, roughly."""
    lengths, last, at = [0], 0, 0
    while at < len(pattern):
        counted = _COUNT.match(pattern, at)
        if counted:
            times = int(counted[2] or counted[1]) if len(counted[0]) <= 20 else MOST_UNROLLED
            lengths[-1] += last * max(times - 1, 0)
            last *= times
            at = counted.end()
            continue
        match pattern[at]:
            case "(":
                lengths.append(0)
            case ")" if len(lengths) > 1:
                last = lengths.pop()
                lengths[-1] += last
            case "\\":
                at += 1
                last = 1
                lengths[-1] += 1
            case "[":
                at = _class_end(pattern, at)
                last = 1
                lengths[-1] += 1
            case _:
                last = 1
                lengths[-1] += 1
        at += 1
    return sum(lengths)


def _class_end(pattern: str, at: int) -> int:
    """Where the set of characters that begins here ends."""
    at += 2 if pattern[at + 1 : at + 2] == "^" else 1
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _limit_time() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # late: not every system has it

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))


def _limit_memory() -> None:
    # Where it cannot be told how much there is already, the limit of time has to do.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", "rb") as pages:  # noqa: PTH123  # as in engine.py
            used = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))


if __name__ == "__main__":
    main()
