"""The binding to llguidance recognises the library it was written for, and follows grammars as the engine does."""

import _ctypes
import ctypes

import pytest
import xllamacpp.xllamacpp

from headgate.providers.embedded import llguidance
from headgate.providers.embedded.llguidance import Parser, Unfit
from headgate.providers.embedded.native import NativeUnavailable


def parser_of(schema: str) -> Parser:
    parser = Parser(llguidance.library())
    parser.start(f"%llguidance {{}}\nstart: %json {schema}".encode())
    return parser


def follow(parser: Parser, text: bytes) -> list[int]:
    for byte in text:
        assert byte in parser.allowed()
        parser.consume(byte)
    return parser.allowed()


def test_only_what_the_grammar_allows_may_come_next() -> None:
    parser = parser_of('{"enum": ["red", "rose"]}')
    assert follow(parser, b'"r') == sorted(b"eo")
    assert follow(parser, b'ed"') == []
    parser.restart()
    assert follow(parser, b'"ro') == [ord("s")]


def test_what_the_grammar_leaves_no_choice_about_is_looked_at_as_a_whole() -> None:
    parser = parser_of('{"const": "%s"}' % ("x" * 300))
    follow(parser, b'"x')
    assert 290 < parser.forced <= 302


def test_a_grammar_that_becomes_too_much_on_the_way_is_unfit() -> None:
    parser = parser_of('{"type": "string", "pattern": "^(a{1000}){1000}$"}')
    with pytest.raises(Unfit, match="too many expressions"):
        follow(parser, b'"aaaa')


def test_a_text_that_is_no_grammar_is_unfit() -> None:
    with pytest.raises(Unfit):
        parser_of('{"type": "text"}')


def test_a_byte_that_is_not_allowed_is_unfit() -> None:
    with pytest.raises(Unfit):
        parser_of('{"const": 1}').consume(ord("2"))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (_ctypes.__file__, "the installed xllamacpp does not offer llg_new_tokenizer"),
        ("/nowhere/library.so", "the installed xllamacpp cannot be loaded"),
    ],
)
def test_a_library_without_the_functions_is_unavailable_with_a_reason(
    file: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xllamacpp.xllamacpp, "__file__", file)
    with pytest.raises(NativeUnavailable) as caught:
        llguidance.library()
    assert str(caught.value) == reason


def test_limits_with_another_layout_are_unavailable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        """The same fields behind one more than the library has."""

        _fields_ = (("added", ctypes.c_uint64), *llguidance.ConstraintInit._fields_)

    monkeypatch.setattr(llguidance, "ConstraintInit", Shifted)
    library = llguidance.library()
    library.llg_constraint_init_set_defaults.argtypes = (ctypes.POINTER(Shifted), ctypes.c_void_p)
    with pytest.raises(NativeUnavailable, match="limits in an unknown way"):
        Parser(library)
