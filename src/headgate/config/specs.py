"""From the checked rows of [[models]] to the catalogue's entries."""

from collections.abc import Mapping

from msgspec.structs import replace

from headgate.config.settings import DeploymentSettings, ModelSettings, ProviderSettings, Settings
from headgate.config.templates import template_of
from headgate.config.variants import PLAIN, Variant, variant_of
from headgate.core import money
from headgate.core.models import Mode, ModelSpec, Retired

DEFAULT_IMAGE_TOKENS = 5000
"""How much an image counts at most, where the row does not say."""


def retired_rows(settings: Settings) -> tuple[Retired, ...]:
    """The names that are gone, for Catalog; `model_spec` is for the other rows."""
    return tuple(
        Retired(name=row.name, provider=row.provider, successor=row.successor, aliases=row.aliases)
        for row in settings.models
        if row.successor is not None
    )


def model_spec(row: ModelSettings, providers: Mapping[str, ProviderSettings]) -> ModelSpec:
    """The entry of an upstream model, with its deployments. Embedded rows get theirs from the GGUF."""
    own = _served_by(row, providers[row.provider])
    if not row.deployments:
        return own
    elsewhere = (_elsewhere(row, deployment) for deployment in row.deployments)
    others = tuple(_served_by(other, providers[other.provider]) for other in elsewhere)
    return replace(own, deployments=(own, *others))


def _elsewhere(row: ModelSettings, deployment: DeploymentSettings) -> ModelSettings:
    """The row as it would be written for another place. A new input price is the cached one's too, unless that has
    its own: a discount is not carried to a service that may give none."""
    cached = deployment.cached_input_price or deployment.input_price or row.cached_input_price
    return replace(
        row,
        provider=deployment.provider,
        upstream_name=deployment.upstream_name or row.upstream_name,
        weight=deployment.weight,
        input_price=deployment.input_price or row.input_price,
        cached_input_price=cached,
        output_price=deployment.output_price or row.output_price,
        fallbacks=(),
        deployments=(),
    )


def _served_by(row: ModelSettings, provider: ProviderSettings) -> ModelSpec:
    """What the row says, within what the service at this place can do."""
    is_openai = provider.kind == "openai"
    variant = variant_of(provider) if is_openai else PLAIN
    mode: Mode = row.mode or "chat"
    refuses = tuple(dict.fromkeys((*row.refuses, *_refused(variant, mode))))
    tools = not is_openai if row.tools is None else row.tools
    logprobs = is_openai if row.logprobs is None else row.logprobs
    input_rate = money.rate(money.decimal(row.input_price or "0"))
    cached = row.cached_input_price
    window = row.context_window or 0
    return ModelSpec(
        name=row.name,
        provider=row.provider,
        upstream_name=row.upstream_name or row.name,
        mode=mode,
        context_window=window,
        max_input_tokens=row.max_input_tokens or window,
        max_output_tokens=row.max_output_tokens or window,
        temperature=row.temperature,
        input_rate=input_rate,
        cached_rate=input_rate if cached is None else money.rate(money.decimal(cached)),
        output_rate=money.rate(money.decimal(row.output_price or "0")),
        vision=row.vision,
        image_tokens=(row.image_tokens or DEFAULT_IMAGE_TOKENS) if row.vision else 0,
        image_urls=provider.image_urls,
        tools=tools and "tools" not in refuses,
        logprobs=logprobs and "logprobs" not in refuses,
        refuses=refuses,
        template=template_of(row.template),
        aliases=row.aliases,
        fallbacks=row.fallbacks,
        weight=row.weight,
        margin=None
        if row.gross_margin_percent is None
        else money.margin_ppm(money.decimal(row.gross_margin_percent)),
        takes_n=is_openai and variant.takes_n,
        takes_prompts=is_openai and variant.takes_n and variant.takes_prompts,
        bills_prompt_per_call=True,
    )


def _refused(variant: Variant, mode: Mode) -> tuple[str, ...]:
    """What the service refuses in the only shape that the model has; in one of two shapes, its provider says so."""
    if mode == "both":
        return variant.refuses
    return variant.refuses + (variant.refuses_chat if mode == "chat" else variant.refuses_completion)
