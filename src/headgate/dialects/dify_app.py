"""Dify apps: which inputs they take, how their prompt is filled, and the form they show.

A template is substitution only. It is cut into pieces once, so a value that itself contains `{{name}}` is never
looked at again, and nothing in a template can run.
The rules and messages for inputs are those of Dify's own apps, which its clients already handle.
"""

import re
from collections.abc import Mapping

import msgspec

from headgate.core.accounts import App, Variable
from headgate.core.errors import InvalidRequest
from headgate.dialects.dify_files import FILE_SOURCES, MAX_FILES

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_DISABLED: Mapping[str, bool] = {"enabled": False}


class PromptTemplate:
    """An app's prompt, cut at the placeholders of its declared variables; all else is literal text."""

    def __init__(self, app: App) -> None:
        self._variables = app.variables
        names = "|".join(re.escape(variable.name) for variable in app.variables)
        # With one group, split() alternates literal text and names.
        self._pieces = re.split(rf"\{{\{{ *({names}) *\}}\}}", app.prompt) if names else [app.prompt]

    def fill(self, inputs: Mapping[str, object]) -> str:
        """The prompt for these inputs. InvalidRequest for a variable that is missing or wrong."""
        values = {variable.name: value_of(variable, inputs) for variable in self._variables}
        return "".join(values[piece] if index % 2 else piece for index, piece in enumerate(self._pieces))


def value_of(variable: Variable, inputs: Mapping[str, object]) -> str:
    """The text that stands for the variable: what was sent, else its default, else nothing."""
    value = inputs.get(variable.name)
    # An empty string cannot be a choice or a number: forms send it for a field left alone.
    if value is None or (value == "" and (variable.required or variable.type in _BLANK_IS_UNSET)):
        if variable.required:
            raise _wrong(variable, "is required in input form")
        value = variable.default
        if value is None:
            return ""
    return _CHECKS[variable.type](variable, value)


def _text(variable: Variable, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(variable, "in input form must be a string", "a string")
    limit = variable.max_length
    if limit is not None and len(value) > limit:
        raise _wrong(
            variable,
            f"in input form must be less than {limit} characters",
            f"a string of at most {limit} characters",
        )
    return value


def _select(variable: Variable, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(variable, "in input form must be a string", "a string")
    if value not in variable.options:
        options = list(variable.options)
        raise _wrong(variable, f"in input form must be one of the following: {options}", ", ".join(options))
    return value


def _number(variable: Variable, value: object) -> str:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _wrong(variable, "in input form must be a valid number", "a number, or a string that holds one")


def _checkbox(variable: Variable, value: object) -> str:
    word = str(value).strip().lower() if isinstance(value, str | int) else ""
    if word in _TRUE:
        return "true"
    if word in _FALSE:
        return "false"
    raise _wrong(variable, "in input form must be true or false", "true or false")


_CHECKS = {
    "text-input": _text,
    "paragraph": _text,
    "select": _select,
    "number": _number,
    "checkbox": _checkbox,
}
_BLANK_IS_UNSET = frozenset({"select", "number", "checkbox"})


def _wrong(variable: Variable, what: str, allowed: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{variable.name} {what}", param=f"inputs.{variable.name}", allowed=allowed)


def render_parameters(app: App, *, vision: bool, max_file_bytes: int) -> bytes:
    """The body of `GET /parameters`: Dify's whole shape, with every feature we do not have switched off.

    `vision`: the app's model takes images, each of at most `max_file_bytes`.
    """
    return msgspec.json.encode(
        {
            "opening_statement": "",
            "suggested_questions": [],
            "suggested_questions_after_answer": _DISABLED,
            "speech_to_text": _DISABLED,
            "text_to_speech": _DISABLED,
            "retriever_resource": _DISABLED,
            "annotation_reply": _DISABLED,
            "more_like_this": _DISABLED,
            "user_input_form": [{variable.type: _form_field(variable)} for variable in app.variables],
            "sensitive_word_avoidance": {"enabled": False, "type": "", "configs": []},
            "file_upload": {
                "image": {
                    "enabled": vision,
                    "number_limits": MAX_FILES,
                    "detail": "high",
                    "transfer_methods": list(FILE_SOURCES),
                }
            },
            # In whole MB. All but the images' is what a fresh Dify says; clients read them even where uploads are off.
            "system_parameters": {
                "file_size_limit": 15,
                "image_file_size_limit": max(1, max_file_bytes // 2**20),
                "audio_file_size_limit": 50,
                "video_file_size_limit": 100,
                "workflow_file_upload_limit": 10,
            },
        }
    )


def _form_field(variable: Variable) -> dict[str, object]:
    shown: dict[str, object] = {
        "label": variable.label or variable.name,
        "variable": variable.name,
        "required": variable.required,
        "default": "" if variable.default is None else variable.default,
    }
    if variable.max_length is not None:
        shown["max_length"] = variable.max_length
    if variable.options:
        shown["options"] = variable.options
    return shown


def render_app(app: App) -> bytes:
    """The body of `GET /info`."""
    return msgspec.json.encode(
        {
            "name": app.name,
            "description": app.description,
            "tags": [],
            "mode": "completion",
            "author_name": "Headgate",
        }
    )
