"""How a `[[models]]` row and its GGUF file become a catalogue entry."""

from decimal import Decimal
from pathlib import Path

from headgate.config import ModelSettings, demo_model_path
from headgate.core.models import usd_per_million
from headgate.providers.embedded.spec import spec_for


def test_the_demo_model_has_the_documented_prices_and_limits() -> None:
    spec = spec_for(ModelSettings(name="demo", provider="embedded"), demo_model_path())
    assert spec.qualified_name == "embedded/demo"
    assert usd_per_million(spec.input_rate) == Decimal("0.10")
    assert usd_per_million(spec.cached_rate) == Decimal("0.10")
    assert usd_per_million(spec.output_rate) == Decimal("0.40")
    assert spec.temperature == (0.0, 2.0)
    assert spec.max_input_tokens == spec.context_window >= 512
    assert spec.max_output_tokens == spec.context_window // 2
    assert (spec.mode, spec.takes_n, spec.bills_prompt_per_call) == ("both", False, False)
    assert (spec.logprobs, spec.constrains) == (True, True)
    assert spec.file == str(demo_model_path())
    assert spec.broken is None


def test_a_row_lowers_limits_and_sets_prices() -> None:
    row = ModelSettings(
        name="mine",
        provider="embedded",
        mode="completion",
        context_window=128,
        max_output_tokens=32,
        input_price="1.5",
        cached_input_price="0.5",
        output_price="2",
        aliases=("mine-latest",),
        gross_margin_percent="20",
    )
    spec = spec_for(row, demo_model_path())
    assert (spec.context_window, spec.max_input_tokens, spec.max_output_tokens) == (128, 128, 32)
    assert [usd_per_million(rate) for rate in (spec.input_rate, spec.cached_rate, spec.output_rate)] == [
        Decimal("1.5"),
        Decimal("0.5"),
        Decimal(2),
    ]
    assert (spec.mode, spec.aliases, spec.margin) == ("completion", ("mine-latest",), 200_000)


def test_a_row_cannot_raise_what_the_file_allows() -> None:
    row = ModelSettings(name="m", provider="embedded", context_window=10**6, max_output_tokens=10**6)
    spec = spec_for(row, demo_model_path())
    free = spec_for(ModelSettings(name="m", provider="embedded"), demo_model_path())
    assert spec.context_window == free.context_window
    assert spec.max_output_tokens == free.context_window // 2


def test_a_broken_file_gives_a_broken_entry_with_the_reason(tmp_path: Path) -> None:
    spec = spec_for(ModelSettings(name="gone", provider="embedded"), tmp_path / "gone.gguf")
    assert spec.broken == "the model file does not exist"
    assert spec.context_window == 0
