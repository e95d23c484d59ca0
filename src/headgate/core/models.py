"""What clients can name: models, their limits and prices, and the catalogue that resolves a name."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal

from msgspec import Struct

from headgate.core.errors import AmbiguousModel, UnknownModel
from headgate.core.money import FemtoUSD, MarginPPM

Mode = Literal["completion", "chat", "both"]
ImageURLs = Literal["fetch", "pass"]


class Template(Struct, frozen=True, kw_only=True):
    """How a conversation is written for a model that only completes: what stands before and after the text of each
    role, what all begins with, and what the answer is asked for with. Substitution only."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    start: str = ""
    answer: str = ""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """One row of the catalogue.

    Limits are in tokens; `input_rate`, `cached_rate` and `output_rate` in femto-USD per token. `takes_n`: one
    upstream call answers n choices, `takes_prompts`: and several prompts. `bills_prompt_per_call`: each further call
    bills its prompt again. `logprobs`: it can give log probabilities. `constrains`: it can hold any output to a JSON
    schema, not only a chat's.
    `file` is the GGUF of an embedded model. `broken` says why the row cannot work (a broken file).
    `tools`: it can ask for functions. `vision`: it takes images, each of at most `image_tokens` tokens, `image_urls`
    says who fetches them. `refuses`: parameters its upstream has no ear for. `template`: how a conversation is written
    for it where it only completes (None: `System: …`, `User: …`). `deployments`: where else it is served, this row
    first, each chosen as often as its `weight` says; empty where it is served here alone.
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
    takes_prompts: bool = False
    bills_prompt_per_call: bool = True
    logprobs: bool = True
    constrains: bool = False
    tools: bool = False
    image_tokens: int = 0
    image_urls: ImageURLs = "fetch"
    refuses: tuple[str, ...] = ()
    template: Template | None = None
    weight: int = 1
    deployments: tuple["ModelSpec", ...] = ()
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


class Retired(Struct, frozen=True, kw_only=True):
    """Names of a model that is gone, and the name of the catalogue's entry that answers in its place."""

    name: str
    provider: str
    successor: str
    aliases: tuple[str, ...] = ()


class Catalog:
    """Resolves model names. A name is a row's own, `provider/name`, or an alias (also `provider/alias`).

    The names of retired models mean their successors. ValueError where a successor or fallback does not exist.
    """

    def __init__(self, models: Iterable[ModelSpec], retired: Iterable[Retired] = ()) -> None:
        self.models: tuple[ModelSpec, ...] = tuple(models)
        self.retired: tuple[Retired, ...] = tuple(retired)
        exact: dict[str, ModelSpec] = {}
        short: dict[str, list[ModelSpec]] = {}
        for model in self.models:
            for name in (model.name, *model.aliases):
                exact[f"{model.provider}/{name}"] = model
                bearers = short.setdefault(name, [])
                if model not in bearers:
                    bearers.append(model)
        replaced: dict[str, ModelSpec] = {}
        for row in self.retired:
            successor = exact.get(row.successor) or _only(short.get(row.successor))
            if successor is None:
                raise ValueError(
                    f"{row.name}: its successor {row.successor!r} is not one model of the catalogue"
                )
            for name in (row.name, *row.aliases):
                replaced[f"{row.provider}/{name}"] = replaced[name] = successor
        self._exact: Mapping[str, ModelSpec] = exact
        self._short: Mapping[str, list[ModelSpec]] = short
        self._replaced: Mapping[str, ModelSpec] = replaced
        for model in self.models:
            for name in model.fallbacks:
                if exact.get(name) is None and _only(short.get(name)) is None and name not in replaced:
                    raise ValueError(f"{model.name}: its fallback {name!r} is not one model of the catalogue")

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
        model = self._exact.get(name) or self._replaced.get(name)
        if model is None:
            raise UnknownModel(
                f"The model {name[:100]!r} does not exist; GET /v1/models lists the models you can use.",
                param=param,
            )
        return model

    def shown_name(self, requested: str, model: ModelSpec) -> str:
        """What an answer calls the model: as it was requested, or its own name where it stands in for another."""
        names = (model.name, *model.aliases)
        is_its_own = requested in names or requested.removeprefix(f"{model.provider}/") in names
        return requested if is_its_own else model.name

    def means(self, name: str, model: ModelSpec) -> bool:
        """Whether the short name alone leads to the model."""
        bearers = self._short.get(name)
        return self._replaced.get(name) is model if bearers is None else bearers == [model]

    def short_name_is_unique(self, model: ModelSpec) -> bool:
        return len(self._short[model.name]) == 1


def _only(models: list[ModelSpec] | None) -> ModelSpec | None:
    return models[0] if models is not None and len(models) == 1 else None


def usd_per_million(rate: FemtoUSD) -> Decimal:
    """USD per million tokens from femto-USD per token."""
    return Decimal(rate).scaleb(-9)
