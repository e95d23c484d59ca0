"""Conversation templates for models that only complete: the rows of data/templates.toml, by name."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import msgspec

from headgate.config.settings import ConfigError, TemplateSettings
from headgate.core.models import Template


def templates_path() -> Path:
    return Path(__file__).parent.parent / "data" / "templates.toml"


def read_templates(path: Path) -> Mapping[str, TemplateSettings]:
    """The rows of a file. ConfigError for what is not one."""
    try:
        rows = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), dict[str, TemplateSettings])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return MappingProxyType(rows)


@cache
def load_templates() -> Mapping[str, TemplateSettings]:
    """The rows by name, read once."""
    return read_templates(templates_path())


def template_names() -> tuple[str, ...]:
    return tuple(load_templates())


def template_of(written: str | TemplateSettings | None) -> Template | None:
    """What a model's row says, by name or in full; a name has been checked."""
    if written is None:
        return None
    row = load_templates()[written] if isinstance(written, str) else written
    return Template(**msgspec.structs.asdict(row))
