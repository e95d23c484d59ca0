"""data/templates.toml: every template writes a conversation from which its parts can be told apart."""

from pathlib import Path

import pytest

from headgate.config import ConfigError, template_of
from headgate.config.templates import read_templates, template_names

NAMES = template_names()


@pytest.mark.parametrize("name", NAMES)
def test_each_role_is_marked_by_itself_and_an_answer_is_asked_for(name: str) -> None:
    template = template_of(name)
    assert template is not None
    assert template.user[0] and template.assistant[0] and template.user[0] != template.assistant[0]
    assert template.assistant[0].startswith(template.answer.rstrip()) and template.answer
    assert all(after for _, after in (template.system, template.user, template.assistant))


def test_a_row_without_one_has_none() -> None:
    assert template_of(None) is None


@pytest.mark.parametrize("text", ["[a]\nuser = ['', '']\n", "[a]\nsystem = ['']\n", "[a\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "templates.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"templates\.toml: "):
        read_templates(file)
