"""The built-in catalogue: every model name the public documents promise, its limits, and prices that are kept."""

from pathlib import Path
from typing import get_args

import pytest
from anthropic.types import Model as AnthropicModel
from openai.types import ChatModel
from tools.catalogue.comparison import differences, unused_reasons

from headgate import config
from headgate.bootstrap.gateway import model_specs
from headgate.core.models import Catalog

GENSTACK = ("llama-3.3", "gpt-4-mini", "claude-3.5-sonnet")
TOKENHUB = ("gpt-3.5-turbo-instruct", "openai/gpt-3.5-turbo-instruct")
THIGGLE = {
    "llama-2-70b-chat": "llama-3.3-70b",
    "llama-2-70b": "llama-3.3-70b-raw",
    "llama-2-13b-chat": "llama-3.3-70b",
    "llama-2-7b": "llama-3.3-70b-raw",
    "llama-2-7b-chat": "llama-3.3-70b",
    "gpt-4": "gpt-4.1",
    "gpt-4-0613": "gpt-4.1",
    "gpt-4-0314": "gpt-4.1",
    "gpt-4-32k": "gpt-4.1",
    "gpt-4-32k-0613": "gpt-4.1",
    "gpt-4-32k-0314": "gpt-4.1",
    "gpt-3.5-turbo": "gpt-4o-mini",
    "gpt-3.5-turbo-0613": "gpt-4o-mini",
    "gpt-3.5-turbo-0301": "gpt-4o-mini",
    "gpt-3.5-turbo-16k": "gpt-4o-mini",
    "gpt-3.5-turbo-16k-0613": "gpt-4o-mini",
    "cohere-command": "command-a-03-2025",
    "cohere-command-light": "command-r7b-12-2024",
    "cohere-command-nightly": "command-a-03-2025",
    "text-davinci-001": "gpt-4o-mini",
    "text-davinci-002": "gpt-4o-mini",
    "text-davinci-003": "gpt-4o-mini",
}
CLASSIC = {"temperature", "top_p", "stop", "presence_penalty", "frequency_penalty"}
"""What callers of the retired models send."""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    monkeypatch.chdir(tmp_path)  # no headgate.toml of the surroundings
    return config.load(environ={})


@pytest.fixture
def catalog(settings: config.Settings) -> Catalog:
    specs = (spec for spec in model_specs(settings) if spec.provider != "embedded")
    return Catalog(specs, config.retired_rows(settings))


@pytest.mark.parametrize("name", [*GENSTACK, *TOKENHUB])
def test_every_promised_name_means_one_model(catalog: Catalog, name: str) -> None:
    assert catalog.resolve(name).name == name.removeprefix("openai/")


@pytest.mark.parametrize(("name", "successor"), THIGGLE.items())
def test_a_retired_name_means_a_model_that_takes_what_its_callers_send(
    catalog: Catalog, name: str, successor: str
) -> None:
    model = catalog.resolve(name)
    assert (model.name, catalog.shown_name(name, model)) == (successor, successor)
    assert not CLASSIC & set(model.refuses)


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
        assert model.vision == (model.image_tokens > 0), model.name
        assert model.completes or model.template is None, model.name


def test_prices_and_limits_are_those_of_genai_prices_or_have_a_reason() -> None:
    assert [str(difference) for difference in differences() if difference.why is None] == []


def test_no_reason_outlives_its_difference() -> None:
    assert unused_reasons() == set()


@pytest.mark.parametrize(("provider", "names"), [("openai", ChatModel), ("anthropic", AnthropicModel)])
def test_upstream_names_are_names_that_the_providers_own_sdk_knows(
    catalog: Catalog, provider: str, names: object
) -> None:
    known = {name for one in (names, *get_args(names)) for name in get_args(one)}
    used = {model.upstream_name for model in catalog.models if model.provider == provider}
    assert used and used <= known


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
    assert loaded.models == settings.models


def test_the_demo_model_is_embedded(settings: config.Settings) -> None:
    assert ("embedded", "demo") in {(row.provider, row.name) for row in settings.models}
