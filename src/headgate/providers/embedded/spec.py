"""The catalogue entry of an embedded model: limits from its GGUF file, prices from its row or the defaults."""

from os import PathLike, fspath

from headgate.config import ModelSettings
from headgate.core import money
from headgate.core.models import Mode, ModelSpec
from headgate.core.money import FemtoUSD
from headgate.providers.embedded.gguf import BrokenModel, read_gguf

DEFAULT_INPUT_PRICE = "0.10"
DEFAULT_OUTPUT_PRICE = "0.40"
"""USD per million tokens, where the row gives no price of its own."""


def spec_for(row: ModelSettings, path: str | PathLike[str]) -> ModelSpec:
    """The ModelSpec of an embedded row whose GGUF lies at `path`; a file that cannot work gives `broken`.

    A row may only lower what the file allows: the context, and an output of at most half of it.
    """
    broken = None
    context = 0
    mode: Mode = "completion"
    try:
        model = read_gguf(path)
    except BrokenModel as error:
        broken = error.reason
    else:
        context = min(model.context_length, row.context_window or model.context_length)
        if model.has_chat_template:
            mode = "both"
    half = max(1, context // 2) if context else 0
    input_rate = _rate(row.input_price or DEFAULT_INPUT_PRICE)
    return ModelSpec(
        name=row.name,
        provider=row.provider,
        upstream_name=row.upstream_name or row.name,
        mode=row.mode or mode,
        context_window=context,
        max_input_tokens=min(context, row.max_input_tokens or context),
        max_output_tokens=min(half, row.max_output_tokens or half),
        temperature=row.temperature,
        input_rate=input_rate,
        cached_rate=input_rate if row.cached_input_price is None else _rate(row.cached_input_price),
        output_rate=_rate(row.output_price or DEFAULT_OUTPUT_PRICE),
        aliases=row.aliases,
        fallbacks=row.fallbacks,
        margin=None
        if row.gross_margin_percent is None
        else money.margin_ppm(money.decimal(row.gross_margin_percent)),
        takes_n=False,
        bills_prompt_per_call=False,
        logprobs=True,
        constrains=True,
        file=fspath(path),
        broken=broken,
    )


def _rate(usd_per_million: str) -> FemtoUSD:
    return money.rate(money.decimal(usd_per_million))
