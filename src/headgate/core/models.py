"""What clients can name: models, their limits and prices, and the catalogue that resolves a name."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal

from msgspec import Struct

from headgate.core.errors import AmbiguousModel, UnknownModel
from headgate.core.money import FemtoUSD, MarginPPM

Mode = Literal["completion", "chat", "both"]


class ModelSpec(Struct, frozen=True, kw_only=True):
    """One row of the catalogue.

    Limits are in tokens; `input_rate`, `cached_rate` and `output_rate` in femto-USD per token. `takes_n`: one
    upstream call answers n choices. `bills_prompt_per_call`: each further call bills its prompt again.
    `logprobs`: it can give log probabilities. `constrains`: it can hold any output to a JSON schema, not only a chat's.
    `file` is the GGUF of an embedded model. `broken` says why the row cannot work (a broken file).
    """

    name: str
    provider: str
    upstream_name: str
    mode: Mode
    context_window: int
    max_input_tokens: int
    max_output_tokens: int
    temperature: tuple[float, float] = (0.0, 2.0)
    input_rate: FemtoUSD
    cached_rate: FemtoUSD
    output_rate: FemtoUSD
    vision: bool = False
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    margin: MarginPPM | None = None
    takes_n: bool = True
    bills_prompt_per_call: bool = True
    logprobs: bool = True
    constrains: bool = False
    file: str | None = None
    broken: str | None = None

    @property
    def qualified_name(self) -> str:
        return f"{self.provider}/{self.name}"

    @property
    def chats(self) -> bool:
        return self.mode != "completion"

    @property
    def completes(self) -> bool:
        return self.mode != "chat"


class TokenizerInfo(Struct, frozen=True, kw_only=True):
    """What a model's tokenizer says of itself. Tokens as text; None where the model has no such token."""

    vocabulary_size: int
    context_window: int
    start_token: str | None
    start_token_id: int | None
    end_token: str | None
    end_token_id: int | None
    adds_start_token: bool


class Catalog:
    """Resolves model names. A name is a row's own, `provider/name`, or an alias (also `provider/alias`)."""

    def __init__(self, models: Iterable[ModelSpec]) -> None:
        self.models: tuple[ModelSpec, ...] = tuple(models)
        exact: dict[str, ModelSpec] = {}
        short: dict[str, list[ModelSpec]] = {}
        for model in self.models:
            for name in (model.name, *model.aliases):
                exact[f"{model.provider}/{name}"] = model
                bearers = short.setdefault(name, [])
                if model not in bearers:
                    bearers.append(model)
        self._exact: Mapping[str, ModelSpec] = exact
        self._short: Mapping[str, list[ModelSpec]] = short

    def resolve(self, name: str, *, param: str = "model") -> ModelSpec:
        """The row that `name` means. UnknownModel, or AmbiguousModel naming the candidates."""
        bearers = self._short.get(name)
        if bearers is not None:
            if len(bearers) == 1:
                return bearers[0]
            candidates = ", ".join(sorted(f"{model.provider}/{name}" for model in bearers))
            raise AmbiguousModel(
                f"The model name {name!r} is ambiguous; use one of: {candidates}.",
                param=param,
                allowed=candidates,
            )
        model = self._exact.get(name)
        if model is None:
            raise UnknownModel(
                f"The model {name[:100]!r} does not exist; GET /v1/models lists the models you can use.",
                param=param,
            )
        return model

    def short_name_is_unique(self, model: ModelSpec) -> bool:
        return len(self._short[model.name]) == 1


def usd_per_million(rate: FemtoUSD) -> Decimal:
    """USD per million tokens from femto-USD per token."""
    return Decimal(rate).scaleb(-9)
