"""dialects/dify_app.py: what an app takes, how its prompt is filled, and the form it shows."""

import json
from typing import Any

import pytest

from headgate.core.accounts import App, Variable
from headgate.core.errors import InvalidRequest
from headgate.dialects.dify_app import PromptTemplate, render_app, render_parameters

TOPIC = Variable(name="topic", label="Topic", required=True, max_length=8)
TEXT = Variable(name="topic", type="paragraph")
STYLE = Variable(name="topic", type="select", options=("dry", "it's odd"), default="dry")
NEEDED_STYLE = Variable(name="topic", type="select", options=("dry", "loud"), required=True)
COUNT = Variable(name="topic", type="number", default=3)
NEEDED_COUNT = Variable(name="topic", type="number", required=True)
FLAG = Variable(name="topic", type="checkbox", default=False)
NEEDED_FLAG = Variable(name="topic", type="checkbox", required=True)


def app(prompt: str, *variables: Variable) -> App:
    return App(name="story", model="demo", prompt=prompt, variables=variables, description="Tells a story.")


def filled(prompt: str, inputs: dict[str, object], *variables: Variable) -> str:
    return PromptTemplate(app(prompt, *variables)).fill(inputs)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Write about {{topic}}.", "Write about bees."),
        ("{{topic}}", "bees"),
        ("{{ topic }} and {{topic}}", "bees and bees"),
        ("{{{topic}}}", "{bees}"),
        ("{{{{topic}}}}", "{{bees}}"),
        ("{{7*7}}", "{{7*7}}"),
        ("{{topic.__class__}}", "{{topic.__class__}}"),
        ("{{unknown}} {{Topic}} {{topicx}} {{xtopic}}", "{{unknown}} {{Topic}} {{topicx}} {{xtopic}}"),
        ("{topic} {{topic} {%raw%} $topic %s", "{topic} {{topic} {%raw%} $topic %s"),
        ("", ""),
        ("no variables at all", "no variables at all"),
    ],
)
def test_only_declared_placeholders_are_replaced(prompt: str, expected: str) -> None:
    assert filled(prompt, {"topic": "bees"}, TEXT) == expected


def test_substituted_values_are_not_looked_at_again() -> None:
    first, second = Variable(name="first"), Variable(name="second")
    prompt = filled("{{first}}|{{second}}", {"first": "{{second}}", "second": r"\1{{first}}"}, first, second)
    assert prompt == r"{{second}}|\1{{first}}"


def test_names_that_look_like_patterns_are_plain_names() -> None:
    odd = Variable(name="a.b(c|d")
    assert filled("{{a.b(c|d}} {{axb(c}}", {"a.b(c|d": "x"}, odd) == "x {{axb(c}}"


def test_variables_that_are_not_declared_are_ignored() -> None:
    assert filled("{{topic}} {{other}}", {"topic": "a", "other": {"x": [1]}}, TEXT) == "a {{other}}"


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (TEXT, "", ""),
        (TEXT, None, ""),
        (TEXT, "a\n\tb ż", "a\n\tb ż"),
        (TOPIC, "12345678", "12345678"),
        (TOPIC, "żółwżółw", "żółwżółw"),
        (Variable(name="topic", default="d"), None, "d"),
        (Variable(name="topic", default="d"), "", ""),
        (STYLE, "it's odd", "it's odd"),
        (STYLE, None, "dry"),
        (STYLE, "", "dry"),
        (COUNT, 7, "7"),
        (COUNT, -2.5, "-2.5"),
        (COUNT, " 42 ", "42"),
        (COUNT, "-.5e3", "-.5e3"),
        (COUNT, None, "3"),
        (COUNT, "", "3"),
        (NEEDED_COUNT, 0, "0"),
        (FLAG, True, "true"),
        (FLAG, "Yes", "true"),
        (FLAG, 0, "false"),
        (FLAG, None, "false"),
        (NEEDED_FLAG, False, "false"),
    ],
)
def test_a_value_becomes_text(variable: Variable, value: object, text: str) -> None:
    assert filled("{{topic}}", {"topic": value}, variable) == text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (TOPIC, None, "topic is required in input form"),
        (TOPIC, "", "topic is required in input form"),
        (NEEDED_STYLE, "", "topic is required in input form"),
        (NEEDED_COUNT, "", "topic is required in input form"),
        (NEEDED_FLAG, None, "topic is required in input form"),
        (Variable(name="topic", required=True, default="d"), None, "topic is required in input form"),
        (TOPIC, 5, "topic in input form must be a string"),
        (TEXT, True, "topic in input form must be a string"),
        (TEXT, ["a"], "topic in input form must be a string"),
        (STYLE, 1, "topic in input form must be a string"),
        (STYLE, "DRY", """topic in input form must be one of the following: ['dry', "it's odd"]"""),
        (TOPIC, "123456789", "topic in input form must be less than 8 characters"),
        (COUNT, "seven", "topic in input form must be a valid number"),
        (COUNT, "nan", "topic in input form must be a valid number"),
        (COUNT, "1_000", "topic in input form must be a valid number"),
        (COUNT, "0x10", "topic in input form must be a valid number"),
        (COUNT, "٣", "topic in input form must be a valid number"),
        (COUNT, "   ", "topic in input form must be a valid number"),
        (COUNT, True, "topic in input form must be a valid number"),
        (COUNT, [1], "topic in input form must be a valid number"),
        (FLAG, "maybe", "topic in input form must be true or false"),
        (FLAG, 2, "topic in input form must be true or false"),
        (FLAG, {}, "topic in input form must be true or false"),
    ],
)
def test_a_wrong_value_is_refused_in_difys_words(variable: Variable, value: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        filled("{{topic}}", {"topic": value}, variable)
    assert caught.value.message == message
    assert caught.value.param == "inputs.topic"


def test_a_variable_is_checked_even_where_the_prompt_does_not_use_it() -> None:
    with pytest.raises(InvalidRequest, match="topic is required in input form"):
        filled("constant", {"else": "x"}, TOPIC)


def test_parameters_show_the_form_in_difys_shape() -> None:
    shown: dict[str, Any] = json.loads(
        render_parameters(
            app(
                "{{topic}}",
                TOPIC,
                Variable(name="style", type="select", options=("dry", "loud"), default="dry"),
                Variable(name="count", type="number", default=0),
            ),
            vision=False,
            max_file_bytes=10 * 2**20,
        )
    )
    assert shown["user_input_form"] == [
        {
            "text-input": {
                "label": "Topic",
                "variable": "topic",
                "required": True,
                "default": "",
                "max_length": 8,
            }
        },
        {
            "select": {
                "label": "style",
                "variable": "style",
                "required": False,
                "default": "dry",
                "options": ["dry", "loud"],
            }
        },
        {"number": {"label": "count", "variable": "count", "required": False, "default": 0}},
    ]
    assert shown["opening_statement"] == ""
    assert shown["suggested_questions"] == []
    assert shown["file_upload"]["image"]["enabled"] is False
    for feature in (
        "suggested_questions_after_answer",
        "speech_to_text",
        "text_to_speech",
        "retriever_resource",
        "annotation_reply",
        "more_like_this",
        "sensitive_word_avoidance",
    ):
        assert shown[feature]["enabled"] is False
    assert all(isinstance(limit, int) for limit in shown["system_parameters"].values())


def test_parameters_offer_images_only_where_the_model_sees_them() -> None:
    image = {
        "number_limits": 10,
        "detail": "high",
        "transfer_methods": ["remote_url", "local_file"],
    }
    for vision in (False, True):
        shown = json.loads(render_parameters(app("x"), vision=vision, max_file_bytes=2**20))
        assert shown["file_upload"] == {"image": image | {"enabled": vision}}


@pytest.mark.parametrize(
    ("max_bytes", "shown"), [(10 * 2**20, 10), (10 * 2**20 - 1, 9), (2**20, 1), (1000, 1)]
)
def test_parameters_show_the_size_limit_of_images_in_whole_megabytes(max_bytes: int, shown: int) -> None:
    parameters = json.loads(render_parameters(app("x"), vision=True, max_file_bytes=max_bytes))
    assert parameters["system_parameters"]["image_file_size_limit"] == shown


def test_info_names_the_app() -> None:
    assert json.loads(render_app(app("{{topic}}", TOPIC))) == {
        "name": "story",
        "description": "Tells a story.",
        "tags": [],
        "mode": "completion",
        "author_name": "Headgate",
    }
