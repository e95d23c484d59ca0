"""POST /tokenize and /detokenize, GET /tokenizer_info: a model's tokenizer by itself.

The form is the one of vLLM's routes, which evaluation harnesses ask for; fields that llama.cpp's server calls
otherwise go under both names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from headgate.core.errors import InvalidRequest
from headgate.core.models import TokenizerInfo
from headgate.dialects.base import decode_body, token_ids, unsupported
from headgate.dialects.openai_errors import at_endpoint

TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class Tokenize(Struct, frozen=True, kw_only=True):
    """A text to cut into tokens; `model` None: the default one. The rest as in the Tokenizer port."""

    model: str | None
    text: str
    add_special: bool
    parse_special: bool


class Detokenize(Struct, frozen=True, kw_only=True):
    model: str | None
    ids: tuple[int, ...]


class TokenizeBody(Struct, frozen=True, kw_only=True):
    """The body of `POST /tokenize`. `content` and `text` are other names for `prompt`, `add_special` for
    `add_special_tokens`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    text: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Struct, frozen=True, kw_only=True):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int | float] | None = None


class TokensObject(Struct, frozen=True, kw_only=True):
    tokens: Sequence[int]
    count: int
    max_model_len: int
    model: str


class TextObject(Struct, frozen=True, kw_only=True):
    """One text under the name each kind of client reads."""

    prompt: str
    content: str


class TokenizerObject(Struct, frozen=True, kw_only=True):
    model: str
    tokenizer_class: str = "headgate"
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    add_bos_token: bool
    unk_token: None = None
    pad_token: None = None


def parse_tokenize(body: bytes) -> Tokenize:
    """MalformedBody when the body is not JSON at all, InvalidRequest naming the field that is wrong."""
    wire = decode_body(body, TokenizeBody, endpoint=TOKENIZE)
    try:
        return _tokenize(wire)
    except InvalidRequest as error:
        raise at_endpoint(error, TOKENIZE) from None


def parse_detokenize(body: bytes) -> Detokenize:
    """MalformedBody when the body is not JSON at all, InvalidRequest naming the field that is wrong."""
    wire = decode_body(body, DetokenizeBody, endpoint=DETOKENIZE)
    try:
        if wire.tokens is None:
            raise InvalidRequest("tokens is required.", param="tokens", allowed="a list of token ids")
        return Detokenize(model=wire.model or None, ids=token_ids(wire.tokens, "tokens"))
    except InvalidRequest as error:
        raise at_endpoint(error, DETOKENIZE) from None


def _tokenize(wire: TokenizeBody) -> Tokenize:
    if wire.messages is not None:
        raise unsupported("messages", "by this version; send text as prompt")
    text = _one_of({"prompt": wire.prompt, "content": wire.content, "text": wire.text})
    if text is None:
        raise InvalidRequest("prompt is required.", param="prompt", allowed="a string")
    add_special = _one_of({"add_special_tokens": wire.add_special_tokens, "add_special": wire.add_special})
    for name, asked in (("return_token_strs", wire.return_token_strs), ("with_pieces", wire.with_pieces)):
        if asked:
            raise unsupported(name, "by this version; ask /detokenize for the text of ids")
    return Tokenize(
        model=wire.model or None,
        text=text,
        add_special=add_special is not False,
        parse_special=wire.parse_special is not False,
    )


def _one_of(named: Mapping[str, T | None]) -> T | None:
    """The value of a field that goes under several names; None when none of them is given."""
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        return None
    first, *others = given
    for other in others:
        if given[other] != given[first]:
            raise InvalidRequest(
                f"{first} and {other} mean the same; give one of them, or both with one value.", param=other
            )
    return given[first]


def render_tokens(ids: Sequence[int], *, context_window: int, model: str) -> bytes:
    return _encode(TokensObject(tokens=ids, count=len(ids), max_model_len=context_window, model=model))


def render_text(text: str) -> bytes:
    return _encode(TextObject(prompt=text, content=text))


def render_info(info: TokenizerInfo, *, model: str) -> bytes:
    return _encode(
        TokenizerObject(
            model=model,
            vocab_size=info.vocabulary_size,
            model_max_length=info.context_window,
            bos_token=info.start_token,
            bos_token_id=info.start_token_id,
            eos_token=info.end_token,
            eos_token_id=info.end_token_id,
            add_bos_token=info.adds_start_token,
        )
    )
