"""dialects/tokenizer_view.py: a model's tokenizer by itself."""

import json
from collections.abc import Callable

import pytest

from headgate.core.errors import InvalidRequest
from headgate.core.models import TokenizerInfo
from headgate.dialects.base import MalformedBody
from headgate.dialects.tokenizer_view import (
    Detokenize,
    Tokenize,
    parse_detokenize,
    parse_tokenize,
    render_info,
    render_text,
    render_tokens,
)


def tokenize(**fields: object) -> Tokenize:
    return parse_tokenize(json.dumps(fields).encode())


def detokenize(**fields: object) -> Detokenize:
    return parse_detokenize(json.dumps(fields).encode())


def refused(parse: Callable[..., object], fields: dict[str, object]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def test_what_is_not_given_has_its_documented_default() -> None:
    assert tokenize(prompt="Hi") == Tokenize(model=None, text="Hi", add_special=True, parse_special=True)


def test_every_field_arrives() -> None:
    asked = tokenize(
        model="demo", prompt="<s>", add_special_tokens=False, parse_special=False, return_token_strs=False
    )
    assert asked == Tokenize(model="demo", text="<s>", add_special=False, parse_special=False)


@pytest.mark.parametrize("name", ["prompt", "content", "text"])
def test_the_text_goes_under_three_names(name: str) -> None:
    assert tokenize(**{name: ""}).text == ""
    assert tokenize(**{name: "Hi", "prompt": "Hi"}).text == "Hi"


def test_adding_special_tokens_goes_under_two_names() -> None:
    assert not tokenize(prompt="", add_special=False).add_special
    assert tokenize(prompt="", add_special=True).add_special


def test_null_and_an_empty_model_mean_not_given() -> None:
    fields = ("model", "content", "text", "add_special_tokens", "add_special", "parse_special")
    assert tokenize(prompt="Hi", **dict.fromkeys(fields)) == tokenize(prompt="Hi")
    assert tokenize(prompt="Hi", model="") == tokenize(prompt="Hi")
    assert detokenize(tokens=[], model="").model is None


def test_ids_arrive_in_order() -> None:
    assert detokenize(tokens=[2**31 - 1, 0, 5], model="demo") == Detokenize(
        model="demo", ids=(2**31 - 1, 0, 5)
    )
    assert detokenize(tokens=[]).ids == ()


REFUSED: list[tuple[Callable[..., object], dict[str, object], str, str]] = [
    (tokenize, {}, "prompt", "required"),
    (tokenize, {"prompt": None}, "prompt", "required"),
    (tokenize, {"prompt": 5}, "prompt", "a string"),
    (tokenize, {"prompt": ["Hi"]}, "prompt", "a string"),
    (tokenize, {"prompt": "a", "content": "b"}, "content", "mean the same"),
    (
        tokenize,
        {"prompt": "a", "add_special_tokens": True, "add_special": False},
        "add_special",
        "mean the same",
    ),
    (tokenize, {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens", "true or false"),
    (tokenize, {"prompt": "a", "parse_special": 1}, "parse_special", "true or false"),
    (tokenize, {"prompt": "a", "model": 1}, "model", "a string"),
    (detokenize, {}, "tokens", "required"),
    (detokenize, {"tokens": None}, "tokens", "required"),
    (detokenize, {"tokens": "1"}, "tokens", "a list"),
    (detokenize, {"tokens": [1, "2"]}, "tokens", "a number"),
    (detokenize, {"tokens": [1.5]}, "tokens", "token ids from 0"),
    (detokenize, {"tokens": [True]}, "tokens", "a number"),
    (detokenize, {"tokens": [0, -1]}, "tokens", "0 to 2147483647"),
    (detokenize, {"tokens": [2**31]}, "tokens", "0 to 2147483647"),
    (detokenize, {"tokens": [10**40]}, "tokens", "0 to 2147483647"),
]


@pytest.mark.parametrize(("parse", "fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_refused_by_name_with_what_it_may_be(
    parse: Callable[..., object], fields: dict[str, object], param: str, words: str
) -> None:
    error = refused(parse, fields)
    assert (error.param or "").split("[")[0] == param
    assert words in error.message
    assert error.message.endswith("tokenize).")


@pytest.mark.parametrize("name", ["return_token_strs", "with_pieces"])
def test_texts_beside_the_ids_are_refused_by_name(name: str) -> None:
    error = refused(tokenize, {"prompt": "a", name: True})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message.endswith("(POST /tokenize).")


@pytest.mark.parametrize("parse", [parse_tokenize, parse_detokenize])
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"a"', b'{"prompt":"\xff"}'])
def test_what_is_not_a_json_object_is_malformed(parse: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse(body)


def test_tokens_come_with_their_count_and_the_context() -> None:
    assert json.loads(render_tokens((1, 5, 7), context_window=2048, model="demo")) == {
        "tokens": [1, 5, 7],
        "count": 3,
        "max_model_len": 2048,
        "model": "demo",
    }


def test_a_text_comes_under_both_names() -> None:
    assert json.loads(render_text("é\ufffd")) == {"prompt": "é\ufffd", "content": "é\ufffd"}


def test_a_tokenizer_says_what_it_is() -> None:
    info = TokenizerInfo(
        vocabulary_size=512,
        context_window=2048,
        start_token="<s>",
        start_token_id=1,
        end_token="</s>",
        end_token_id=2,
        adds_start_token=True,
    )
    assert json.loads(render_info(info, model="demo")) == {
        "model": "demo",
        "tokenizer_class": "headgate",
        "vocab_size": 512,
        "model_max_length": 2048,
        "bos_token": "<s>",
        "bos_token_id": 1,
        "eos_token": "</s>",
        "eos_token_id": 2,
        "add_bos_token": True,
        "unk_token": None,
        "pad_token": None,
    }


def test_a_tokenizer_without_special_tokens_says_so() -> None:
    info = TokenizerInfo(
        vocabulary_size=1,
        context_window=2,
        start_token=None,
        start_token_id=None,
        end_token=None,
        end_token_id=None,
        adds_start_token=False,
    )
    shown = json.loads(render_info(info, model="demo"))
    assert [shown[name] for name in ("bos_token", "bos_token_id", "eos_token", "eos_token_id")] == [None] * 4
    assert shown["add_bos_token"] is False
