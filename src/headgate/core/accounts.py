"""Who asks and who pays: principals, apps, holds and what settles them."""

from decimal import Decimal
from typing import Literal

from msgspec import Struct

from headgate.core.completion import UsageSource
from headgate.core.money import NanoUSD

PLATFORM_ACCOUNT = "platform"
"""Internal account that takes the platform's margin."""

FUNDING_ACCOUNT = "funding"
"""Internal account that credits come from; its balance is minus all money ever paid in."""

VariableType = Literal["text-input", "paragraph", "select", "number", "checkbox"]


class Principal(Struct, frozen=True, kw_only=True):
    """An authenticated caller. `key_id` is the API key's id or the token's jti; limits are kept by it."""

    account: str
    key_id: str
    app: str | None = None
    admin: bool = False
    token: bool = False


class Variable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One declared input of an app. `max_length` is in characters, `options` belong to `select`."""

    name: str
    label: str = ""
    type: VariableType = "text-input"
    required: bool = False
    default: str | int | float | bool | None = None
    max_length: int | None = None
    options: tuple[str, ...] = ()


class App(Struct, frozen=True, kw_only=True):
    """A Dify text-generation app: a model, a `{{variable}}` template and the variables it declares."""

    name: str
    model: str
    prompt: str
    variables: tuple[Variable, ...]
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    description: str = ""
    margin_percent: Decimal | None = None


class Developer(Struct, frozen=True, kw_only=True):
    """A `developerId`: the account that earns its margin, and the applications it may name."""

    id: str
    account: str
    applications: tuple[str, ...] = ()


class UsageRow(Struct, frozen=True, kw_only=True):
    """What one model of one request used and cost (nano-USD).

    `excess` is the part of the price above the hold, recorded but not charged. `developer` is the account
    that earns `developer_share`; the rest of price - cost is the platform's. `error` names the failure's kind.
    `attempts`: how often providers were asked; `failed_cost` is what they reported for attempts that failed, which
    nobody was charged.
    """

    request_id: str
    dialect: str
    model: str
    provider: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    source: UsageSource = "estimate"
    cost: int = 0
    price: int = 0
    excess: int = 0
    developer: str | None = None
    developer_share: int = 0
    key_id: str | None = None
    app: str | None = None
    user: str | None = None
    stream: bool = False
    error: str | None = None
    attempts: int = 0
    failed_cost: int = 0


class UsageRecord(Struct, frozen=True, kw_only=True):
    """A stored usage row: who paid for it and when it was settled. Its `price` was charged, its `excess` not."""

    account: str
    created_ms: int
    row: UsageRow


class Hold(Struct, frozen=True, kw_only=True):
    """Money set aside for one request: its greatest possible price.

    `rows` is what recovery settles if the process dies: at first the price-0 rows of the request's models
    (error "interrupted"), later the last checkpoint.
    """

    id: str
    account: str
    amount: NanoUSD
    created_ms: int
    rows: tuple[UsageRow, ...]


class Kept(Struct, frozen=True, kw_only=True):
    """What is remembered of a keyed request: its outcome as it was encoded (None: too large to be kept, or lost in a
    crash), and the settlement that goes with it."""

    outcome: bytes | None
    settlement: "Settlement"


class Settlement(Struct, frozen=True, kw_only=True):
    """The balances around a settled hold, read in the settling transaction: before = after + price."""

    price: NanoUSD
    balance_before: NanoUSD
    balance_after: NanoUSD


class Balance(Struct, frozen=True, kw_only=True):
    account: str
    balance: int
    held: int
    open_holds: int = 0

    @property
    def available(self) -> int:
        return self.balance - self.held


class KeyRecord(Struct, frozen=True, kw_only=True):
    """A stored API key: never the key itself, only its SHA-256 and first characters."""

    id: str
    digest: bytes
    prefix: str
    account: str
    app: str | None = None
    admin: bool = False
    created_ms: int = 0
    revoked_ms: int | None = None


class LedgerReport(Struct, frozen=True, kw_only=True):
    """What checking the whole ledger found. `problems` name each broken rule and where."""

    transfers: int
    open_holds: int
    held: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems
