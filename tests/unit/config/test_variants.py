"""The services' rows: every one can be read, and a row that is wrong is not."""

from pathlib import Path

import pytest

from headgate.config import ConfigError, ProviderSettings
from headgate.config.rows import DATA
from headgate.config.variants import (
    PLAIN,
    Variant,
    load_variants,
    read_variants,
    variant_names,
    variant_of,
)


def settings(variant: str) -> ProviderSettings:
    return ProviderSettings(kind="openai", base_url="http://127.0.0.1:9/v1", variant=variant)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "rows.toml"


def test_the_services_that_differ_have_rows() -> None:
    expected = {
        "openai",
        "azure",
        "azure-deployments",
        "vllm",
        "together",
        "fireworks",
        "groq",
        "openrouter",
        "ollama",
    }
    assert set(variant_names()) == expected
    assert load_variants() is load_variants()


def test_no_variant_is_the_plain_one_which_takes_everything() -> None:
    assert variant_of(settings("")) is PLAIN == Variant()
    assert PLAIN.refused_in("chat") == PLAIN.refused_in("completion") == frozenset()


def test_a_name_gives_its_row() -> None:
    groq = variant_of(settings("groq"))
    assert not groq.takes_n
    assert {"logprobs", "logit_bias"} <= groq.refused_in("chat")
    assert variant_of(settings("azure-deployments")).query == {"api-version": "2024-10-21"}


def test_what_is_refused_in_one_shape_is_taken_in_the_other() -> None:
    vllm = variant_of(settings("vllm"))
    assert "best_of" in vllm.refused_in("completion")
    assert "best_of" not in vllm.refused_in("chat")


def test_an_unknown_name_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'grok' is not one of .*groq.*ollama"):
        variant_of(settings("grok"))


def test_an_unknown_key_is_refused(written: Path) -> None:
    text = (DATA / "variants.toml").read_text().replace("[groq]", "[groq]\ntakes_everything = true")
    written.write_text(text)
    with pytest.raises(ConfigError, match=r"takes_everything.*\$"):
        read_variants(written)


@pytest.mark.parametrize(
    "row",
    [
        'refuses = ["logprob"]',
        'chat_limit = "max_new_tokens"',
        'paths = { messages = "/messages" }',
        'takes_n = "no"',
        "query = { api-version = 1 }",
        "refuses = [",
    ],
)
def test_what_no_row_can_say_is_refused(written: Path, row: str) -> None:
    written.write_text(f"[some]\n{row}\n")
    with pytest.raises(ConfigError, match=r"rows\.toml"):
        read_variants(written)
