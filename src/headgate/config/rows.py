"""Tables of rows in the package's data: a TOML file, a row by name."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec

from headgate.config.settings import ConfigError

T = TypeVar("T")
DATA = Path(__file__).parent.parent / "data"


def read_rows(path: Path, row: type[T]) -> Mapping[str, T]:
    """The rows of a file. ConfigError for what is not one."""
    try:
        rows = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), dict[str, row])  # type: ignore[valid-type]  # a type at run time
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return MappingProxyType(rows)
