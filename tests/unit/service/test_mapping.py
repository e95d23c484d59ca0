"""What a model cannot honour is refused by name, and what it can is let through."""

from typing import Any

import pytest
from tests.support.workbench import request, said, spec

from headgate.core.completion import ResponseFormat
from headgate.core.errors import InvalidRequest
from headgate.service.mapping import check_mapping

JSON = ResponseFormat(kind="json_object")


@pytest.mark.parametrize(
    ("mode", "fields", "param"),
    [
        ("chat", {"suffix": "."}, "suffix"),
        ("chat", {"echo": True, "logprobs": 0}, "echo"),
        ("chat", {"echo": True, "best_of": 2}, "best_of"),
        ("chat", {"prompts": ("a", (1, 2))}, "prompt"),
        ("completion", {"messages": said("hi"), "prompts": None, "response_format": JSON}, "response_format"),
    ],
)
def test_what_cannot_be_mapped_is_named(mode: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param} is not supported with the model fast") as refusal:
        check_mapping(request(**fields), spec(mode=mode))
    assert (refusal.value.param, refusal.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(("fields", "param"), [({"logprobs": 0}, "logprobs"), ({"best_of": 2}, "best_of")])
@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_a_model_without_log_probabilities_is_not_asked_for_any(
    mode: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_mapping(request(**fields), spec(mode=mode, logprobs=False))
    assert refusal.value.param == param
    check_mapping(request(**fields), spec(mode=mode))


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("chat", {"echo": True}),
        ("chat", {"logprobs": 5}),
        ("chat", {"messages": said("hi"), "prompts": None, "response_format": JSON}),
        ("both", {"echo": True, "logprobs": 5, "suffix": "."}),
        ("both", {"prompts": ((1, 2),)}),
        ("completion", {"prompts": ((1, 2),), "best_of": 3}),
    ],
)
def test_the_rest_passes(mode: str, fields: dict[str, Any]) -> None:
    check_mapping(request(**fields), spec(mode=mode))


def test_an_engine_that_holds_any_output_to_a_schema_does_so_in_completions_too() -> None:
    asked = request(messages=said("hi"), prompts=None, response_format=JSON)
    check_mapping(asked, spec(mode="completion", constrains=True))
