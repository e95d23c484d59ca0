"""Conversation templates for models that only complete: the rows of data/templates.toml, by name."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec

from headgate.config.rows import DATA, read_rows
from headgate.config.settings import TemplateSettings
from headgate.core.models import Template


def read_templates(path: Path) -> Mapping[str, TemplateSettings]:
    """The rows of a file. ConfigError for what is not one."""
    return read_rows(path, TemplateSettings)


@cache
def load_templates() -> Mapping[str, TemplateSettings]:
    """The rows by name, read once."""
    return read_templates(DATA / "templates.toml")


def template_names() -> tuple[str, ...]:
    return tuple(load_templates())


def template_of(written: str | TemplateSettings | None) -> Template | None:
    """What a model's row says, by name or in full; a name has been checked."""
    if written is None:
        return None
    row = load_templates()[written] if isinstance(written, str) else written
    return Template(**msgspec.structs.asdict(row))
