"""A headgate.toml whose models are the scripted upstream's: each by its script's own name, each with an app."""

from collections.abc import Iterable
from typing import Any

from tests.support.house import model_row

INPUT, CACHED, OUTPUT = 500, 250, 1500
"""Nano-USD per token, where a test does not set other prices."""


def provider(name: str, url: str, extra: str = "") -> str:
    """A `[providers]` table; `extra` is further lines of it."""
    return f'\n[providers.{name}]\nkind = "openai"\nbase_url = "{url}"\n{extra}\n'


def model(name: str, *, app: str = "", **fields: Any) -> str:
    """A model, and an app of the same name that asks it what it is asked; `app` is further lines of the app."""
    return f"""{model_row(name, **fields)}
[apps.{name}]
model = "{name}"
prompt = "{{{{query}}}}"
max_tokens = 64
variables = [{{ name = "query", type = "paragraph", required = true }}]
{app}
"""


def catalogue(url: str, names: Iterable[str]) -> str:
    """The provider "acme" at this address, and a model for each script's name."""
    return provider("acme", url) + "".join(model(name) for name in names)
