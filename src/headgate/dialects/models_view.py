"""GET /v1/models, /v1/models/{id} and /v1/balance in the OpenAI form, with limits and prices added."""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headgate.core import money
from headgate.core.accounts import Balance
from headgate.core.models import ModelSpec, usd_per_million


class ModelRow(Struct, frozen=True, kw_only=True):
    """One row to show: under which name, and why it cannot be called now (None: it can).

    `successor`: the name is a retired model's, and `spec`, shown under this name otherwise, answers in its place.
    """

    spec: ModelSpec
    name: str
    reason: str | None = None
    successor: str | None = None


class Capabilities(Struct, frozen=True, kw_only=True):
    chat: bool
    completions: bool
    vision: bool
    logprobs: bool
    tools: bool


class Pricing(Struct, frozen=True, kw_only=True):
    """USD per million tokens, exact decimal strings."""

    input: str
    output: str


class ModelObject(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    context_window: int
    max_input_tokens: int
    max_output_tokens: int
    temperature: tuple[float, float]
    capabilities: Capabilities
    pricing: Pricing
    available: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    successor: str | UnsetType = UNSET


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: tuple[ModelObject, ...]


class BalanceObject(Struct, frozen=True, kw_only=True):
    """Amounts in USD, exact decimal strings."""

    account: str
    balance: str
    held: str
    available: str


def render_models(rows: Iterable[ModelRow], *, created: int, everything: bool = False) -> bytes:
    """The list of callable models; with `everything` also the others and the retired ones, and each says whether it
    is available.

    `created` is when the catalogue was read, in Unix seconds: models have no birthday of their own here.
    """
    shown = (row for row in rows if everything or (row.reason is None and row.successor is None))
    return msgspec.json.encode(ModelList(data=tuple(_model(row, created, everything) for row in shown)))


def render_model(row: ModelRow, *, created: int) -> bytes:
    return msgspec.json.encode(_model(row, created, row.reason is not None))


def render_balance(balance: Balance) -> bytes:
    return msgspec.json.encode(
        BalanceObject(
            account=balance.account,
            balance=money.usd_text(balance.balance),
            held=money.usd_text(balance.held),
            available=money.usd_text(balance.available),
        )
    )


def _model(row: ModelRow, created: int, with_availability: bool) -> ModelObject:
    spec = row.spec
    return ModelObject(
        id=row.name,
        created=created,
        owned_by=spec.provider,
        context_window=spec.context_window,
        max_input_tokens=spec.max_input_tokens,
        max_output_tokens=spec.max_output_tokens,
        temperature=spec.temperature,
        capabilities=Capabilities(
            chat=spec.chats,
            completions=spec.completes,
            vision=spec.vision,
            logprobs=spec.logprobs,
            tools=spec.tools,
        ),
        pricing=Pricing(
            input=money.text(usd_per_million(spec.input_rate)),
            output=money.text(usd_per_million(spec.output_rate)),
        ),
        available=row.reason is None if with_availability else UNSET,
        reason=UNSET if row.reason is None else row.reason,
        successor=UNSET if row.successor is None else row.successor,
    )
