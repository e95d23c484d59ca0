"""llguidance's C interface, bound by ctypes to the library that xllamacpp carries: llama.cpp holds answers to grammars
with it. For the process that checks schemas alone.

As in native.py, nothing is called before its layout has been recognised.
"""

import ctypes as c
import itertools
from array import array
from typing import Any

from headgate.providers.embedded import native
from headgate.providers.embedded.native import NativeUnavailable, Pointer

KIND = b"lark"
"""The kind of grammar that llama.cpp takes a text for that begins with %llguidance."""

STEP_SHARE = 2
"""Of what a step may cost in the engine, a check allows one part in so many: the model's vocabulary is another one."""

_BYTES = 256
_END = b"<end>"
_LONG_RUNS = (4, 8, 16, 32)
_PUNCTUATION = tuple(bytes((byte,)) for byte in b'"{}[]:, \n')
_PRINTABLE = tuple(bytes((byte,)) for byte in (*range(32, 127), 10))
_KNOWN_LIMITS = (2000, 1_000_000, 200_000, 50_000, 250_000, 500_000)


class TokenizerInit(c.Structure):
    """LlgTokenizerInit."""

    _fields_ = (
        ("vocab_size", c.c_uint32),
        ("tok_eos", c.c_uint32),
        ("token_lens", c.POINTER(c.c_uint32)),
        ("token_bytes", c.c_char_p),
        ("tokenizer_json", c.c_char_p),
        ("tokenize_assumes_string", c.c_bool),
        ("tokenize_fn", Pointer),
        ("use_approximate_greedy_tokenize_fn", c.c_bool),
        ("tokenize_user_data", Pointer),
        ("slices", Pointer),
        ("_rest", c.c_uint64 * 16),
    )


class ConstraintInit(c.Structure):
    """LlgConstraintInit, its LlgParserLimits among the fields."""

    _fields_ = (
        ("tokenizer", Pointer),
        ("log_buffer_level", c.c_uint32),
        ("log_stderr_level", c.c_uint32),
        ("ff_tokens_ok", c.c_bool),
        ("backtrack_ok", c.c_bool),
        ("max_items_in_row", c.c_uint64),
        ("initial_lexer_fuel", c.c_uint64),
        ("step_lexer_fuel", c.c_uint64),
        ("step_max_items", c.c_uint64),
        ("max_lexer_states", c.c_uint64),
        ("max_grammar_size", c.c_uint64),
        ("_rest", c.c_uint64 * 32),
    )


Tokenize = c.CFUNCTYPE(c.c_size_t, Pointer, Pointer, c.c_size_t, Pointer, c.c_size_t)

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # name: result, arguments
    "llg_new_tokenizer": (Pointer, c.POINTER(TokenizerInit), c.c_char_p, c.c_size_t),
    "llg_constraint_init_set_defaults": (None, c.POINTER(ConstraintInit), Pointer),
    "llg_validate_grammar": (
        c.c_int32,
        c.POINTER(ConstraintInit),
        c.c_char_p,
        c.c_char_p,
        c.c_char_p,
        c.c_size_t,
    ),
    "llg_new_matcher": (Pointer, c.POINTER(ConstraintInit), c.c_char_p, c.c_char_p),
    "llg_matcher_get_error": (c.c_char_p, Pointer),
    "llg_matcher_compute_mask": (c.c_int32, Pointer),
    "llg_matcher_get_mask": (c.POINTER(c.c_uint32), Pointer),
    "llg_matcher_consume_token": (c.c_int32, Pointer, c.c_uint32),
    "llg_matcher_reset": (c.c_int32, Pointer),
}


class Unfit(Exception):
    """The grammar cannot be followed; the text says why."""


class Parser:
    """What the engine would hold an answer to a grammar with, but for the vocabulary.

    That is made up: single bytes, which a text is spelled in here, and such tokens as make large vocabularies costly.
    Like a model's it has a function that finds a text's tokens, or what a grammar leaves no choice about would cost
    nothing: `forced` is how many bytes of that kind came next when they were last asked for. Never freed: the process
    ends after the check.
    """

    def __init__(self, library: c.CDLL) -> None:
        self._library = library
        self._said = c.create_string_buffer(4096)
        self._matcher: int | None = None
        self.forced = 0
        tokens = (*_vocabulary(), _END)
        self._tokenize = Tokenize(self._spell)
        tokenizer = library.llg_new_tokenizer(
            TokenizerInit(
                vocab_size=len(tokens),
                tok_eos=len(tokens) - 1,
                token_lens=(c.c_uint32 * len(tokens))(*map(len, tokens)),
                token_bytes=b"".join(tokens),
                tokenize_assumes_string=True,
                tokenize_fn=c.cast(self._tokenize, Pointer),
            ),
            self._said,
            len(self._said),
        )
        if not tokenizer:
            raise NativeUnavailable("llguidance takes no vocabulary")
        self._init = ConstraintInit()
        library.llg_constraint_init_set_defaults(self._init, tokenizer)
        if _limits(self._init) != _KNOWN_LIMITS:
            raise NativeUnavailable("the installed xllamacpp lays out llguidance's limits in an unknown way")
        self._init.log_stderr_level = self._init.log_buffer_level = 0
        self._init.step_lexer_fuel //= STEP_SHARE
        self._init.step_max_items //= STEP_SHARE

    def validate(self, schema: bytes) -> None:
        """Unfit with the reason for a schema that is wrong in itself."""
        if self._library.llg_validate_grammar(self._init, b"json", schema, self._said, len(self._said)) < 0:
            raise Unfit(self._said.value.decode("utf-8", "replace"))

    def start(self, grammar: bytes) -> None:
        self._matcher = self._library.llg_new_matcher(self._init, KIND, grammar)
        if self._library.llg_matcher_get_error(self._matcher) is not None:
            raise self._unfit()

    def allowed(self) -> list[int]:
        """The bytes that may come next. None where only the end may."""
        self.forced = 0
        if self._library.llg_matcher_compute_mask(self._matcher):
            raise self._unfit()
        mask = self._library.llg_matcher_get_mask(self._matcher)
        return [byte for byte in range(_BYTES) if mask[byte // 32] >> byte % 32 & 1]

    def consume(self, byte: int) -> None:
        if self._library.llg_matcher_consume_token(self._matcher, byte):
            raise self._unfit()

    def restart(self) -> None:
        if self._library.llg_matcher_reset(self._matcher):
            raise self._unfit()

    def _spell(self, _: int, text: int, length: int, ids: int, room: int) -> int:
        self.forced = max(self.forced, length)
        spelled = array("I", list(c.string_at(text, min(length, room))))
        c.memmove(ids, spelled.buffer_info()[0], len(spelled) * spelled.itemsize)
        return length

    def _unfit(self) -> Unfit:
        said: bytes | None = self._library.llg_matcher_get_error(self._matcher)
        return Unfit((said or b"").decode("utf-8", "replace").split("\n", 1)[0])


def library() -> c.CDLL:
    """The library with llguidance's functions declared. NativeUnavailable where it cannot be used."""
    return native.bind(_FUNCTIONS)


def _vocabulary() -> list[bytes]:
    """All bytes, in their order; then pairs, runs, and what joins the parts of JSON."""
    single = [bytes((byte,)) for byte in range(_BYTES)]
    pairs = map(b"".join, itertools.product(_PRINTABLE, repeat=2))
    joints = map(b"".join, itertools.product((*_PUNCTUATION, b"a", b".", b"0"), _PUNCTUATION, _PUNCTUATION))
    runs = (byte * times for byte in _PRINTABLE for times in _LONG_RUNS)
    return [*single, *dict.fromkeys(itertools.chain(pairs, joints, runs))]


def _limits(init: ConstraintInit) -> tuple[int, ...]:
    return (
        init.max_items_in_row,
        init.initial_lexer_fuel,
        init.step_lexer_fuel,
        init.step_max_items,
        init.max_lexer_states,
        init.max_grammar_size,
    )
