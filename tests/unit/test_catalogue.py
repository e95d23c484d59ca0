"""The built-in catalogue: every model name the public documents promise, with its limits and a price."""

from pathlib import Path

import pytest

from headgate import config
from headgate.core.models import Catalog

GENSTACK = ("llama-3.3", "gpt-4-mini", "claude-3.5-sonnet")
TOKENHUB = ("gpt-3.5-turbo-instruct", "openai/gpt-3.5-turbo-instruct")
THIGGLE = (
    "llama-2-70b-chat",
    "llama-2-70b",
    "llama-2-13b-chat",
    "llama-2-7b",
    "llama-2-7b-chat",
    "gpt-4",
    "gpt-4-0613",
    "gpt-4-0314",
    "gpt-4-32k",
    "gpt-4-32k-0613",
    "gpt-4-32k-0314",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-0613",
    "gpt-3.5-turbo-0301",
    "gpt-3.5-turbo-16k",
    "gpt-3.5-turbo-16k-0613",
    "cohere-command",
    "cohere-command-light",
    "cohere-command-nightly",
    "text-davinci-001",
    "text-davinci-002",
    "text-davinci-003",
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    monkeypatch.chdir(tmp_path)  # no headgate.toml of the surroundings
    return config.load(environ={})


@pytest.fixture
def catalog(settings: config.Settings) -> Catalog:
    return Catalog(
        config.model_spec(row, settings.providers[row.provider].kind)
        for row in settings.models
        if row.provider != "embedded"
    )


@pytest.mark.parametrize("name", [*GENSTACK, *TOKENHUB, *THIGGLE])
def test_every_promised_name_means_one_model(catalog: Catalog, name: str) -> None:
    assert catalog.resolve(name).name == name.removeprefix("openai/")


@pytest.mark.parametrize(
    ("name", "temperature", "output", "given"),
    [
        ("llama-3.3", (0.0, 5.0), 2048, 128_000),
        ("gpt-4-mini", (0.0, 2.0), 16_384, 128_000),
        ("claude-3.5-sonnet", (0.0, 1.0), 8192, 200_000),
    ],
)
def test_the_limits_of_the_genstack_models_are_exact(
    catalog: Catalog, name: str, temperature: tuple[float, float], output: int, given: int
) -> None:
    model = catalog.resolve(name)
    assert model.temperature == temperature
    assert (model.max_output_tokens, model.max_input_tokens) == (output, given)
    assert model.context_window >= given


def test_every_upstream_model_has_prices_and_limits_that_make_sense(catalog: Catalog) -> None:
    for model in catalog.models:
        assert 0 < model.cached_rate <= model.input_rate <= model.output_rate, model.name
        assert 0 < model.max_output_tokens < model.context_window, model.name
        assert 0 < model.max_input_tokens <= model.context_window, model.name


def test_every_provider_needs_a_key_and_an_encrypted_connection(settings: config.Settings) -> None:
    keys = {name: provider.api_key_env for name, provider in settings.providers.items()}
    assert keys == {
        "anthropic": "ANTHROPIC_API_KEY",
        "cohere": "COHERE_API_KEY",
        "openai": "OPENAI_API_KEY",
        "together": "TOGETHER_API_KEY",
    }
    assert all(provider.base_url.startswith("https://") for provider in settings.providers.values())


def test_the_rows_would_pass_as_an_operators_own(settings: config.Settings, tmp_path: Path) -> None:
    """The checks of headgate.toml, which the built-in file does not go through, hold for it as well."""
    text = config.catalogue_path().read_text()
    copy = tmp_path / "own.toml"
    copy.write_text(text)
    loaded = config.load(copy, environ={})
    assert [row.name for row in loaded.models] == [row.name for row in settings.models]


def test_the_demo_model_is_embedded(settings: config.Settings) -> None:
    assert ("embedded", "demo") in {(row.provider, row.name) for row in settings.models}
