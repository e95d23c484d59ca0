"""How services that speak OpenAI's formats differ from each other: one row of data/variants.toml each."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from msgspec import Struct

from headgate.config.rows import DATA, read_rows
from headgate.config.settings import ConfigError, ProviderSettings
from headgate.core.completion import Shape

Parameter = Literal[
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "logprobs",
    "best_of",
    "echo",
    "suffix",
    "prompt",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "detail",
]
"""What a service may refuse. `prompt`: one of token ids; `detail`: of an image."""


class Paths(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where each shape is asked for, after the base URL. `{model}` stands for the upstream's name of the model."""

    completion: str = "/completions"
    chat: str = "/chat/completions"


class Variant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One service. Without a word, it is as most of them are.

    `auth`: the key goes as a bearer token, or alone in the header of this name. `query` goes with every request.
    `chat_limit`: what a chat calls the limit on tokens. `chat_logprobs`: a chat asks with true and `top_logprobs`, or
    with their number as completions do. `stream_usage`: it has an ear for `stream_options.include_usage`. `takes_n`:
    one call answers n choices; `takes_prompts`: a completion answers a list of prompts. `refuses`: parameters that are
    an error there, or would silently do nothing; `refuses_completion` and `refuses_chat`: in this shape only.
    """

    auth: str = "bearer"
    query: dict[str, str] = {}
    paths: Paths = Paths()
    chat_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    chat_logprobs: Literal["flag", "count"] = "flag"
    stream_usage: bool = True
    takes_n: bool = True
    takes_prompts: bool = False
    refuses: tuple[Parameter, ...] = ()
    refuses_completion: tuple[Parameter, ...] = ()
    refuses_chat: tuple[Parameter, ...] = ()

    def refused_in(self, shape: Shape) -> frozenset[Parameter]:
        return frozenset(self.refuses + (self.refuses_chat if shape == "chat" else self.refuses_completion))


PLAIN = Variant()
"""What is said of a service that has no row: it takes everything."""


def read_variants(path: Path) -> Mapping[str, Variant]:
    """The rows of a file. ConfigError for what is not one."""
    return read_rows(path, Variant)


@cache
def load_variants() -> Mapping[str, Variant]:
    """The rows by name, read once."""
    return read_variants(DATA / "variants.toml")


def variant_names() -> tuple[str, ...]:
    """What `provider.variant` may be, besides ""."""
    return tuple(load_variants())


def variant_of(settings: ProviderSettings) -> Variant:
    """The service's row, the plain one for "". ConfigError for a name that has none."""
    if not settings.variant:
        return PLAIN
    try:
        return load_variants()[settings.variant]
    except KeyError:
        known = ", ".join(variant_names())
        raise ConfigError(f"variant: {settings.variant!r} is not one of {known}") from None
