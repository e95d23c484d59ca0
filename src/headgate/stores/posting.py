"""Usage rows -> what is charged and who gets it. Pure arithmetic; the entries it yields sum to zero."""

from collections.abc import Sequence

from msgspec import Struct, structs

from headgate.core.accounts import PLATFORM_ACCOUNT, UsageRow

PROVIDER_PREFIX = "provider:"
"""Accounts of providers bear a colon, which no client's account can."""


class Credit(Struct, frozen=True):
    """What one account receives; only the platform's may be negative (a price below the cost)."""

    account: str
    kind: str
    amount: int


class Posting(Struct, frozen=True, kw_only=True):
    """A settle: the payer pays `charge`, the credits sum to it. `rows` carry what was charged in the end."""

    charge: int
    rows: tuple[UsageRow, ...]
    credits: tuple[Credit, ...]


def post(rows: Sequence[UsageRow], limit: int) -> Posting:
    """Divide the rows' prices among provider, developer and platform, charging at most `limit`.

    What is above the limit moves from a row's `price` to its `excess`. The provider is owed its cost whatever
    was charged; the developer's share shrinks before the platform has to add money.
    """
    charged = _cap(rows, limit) if sum(row.price for row in rows) > limit else tuple(rows)
    charge = sum(row.price for row in charged)
    shared = tuple(_bound_share(row) for row in charged)
    if charge == 0:
        return Posting(charge=0, rows=shared, credits=())
    amounts: dict[tuple[str, str], int] = {}
    platform = charge
    for row in shared:
        provider = (PROVIDER_PREFIX + row.provider, "provider")
        amounts[provider] = amounts.get(provider, 0) + row.cost
        platform -= row.cost
        if row.developer_share and row.developer is not None:
            developer = (row.developer, "user")
            amounts[developer] = amounts.get(developer, 0) + row.developer_share
            platform -= row.developer_share
    credits = [Credit(account, kind, amount) for (account, kind), amount in amounts.items() if amount]
    if platform:
        credits.append(Credit(PLATFORM_ACCOUNT, "internal", platform))
    return Posting(charge=charge, rows=shared, credits=tuple(credits))


def _cap(rows: Sequence[UsageRow], limit: int) -> tuple[UsageRow, ...]:
    """Fill the limit in the order of the rows."""
    left = limit
    capped: list[UsageRow] = []
    for row in rows:
        price = min(row.price, left)
        left -= price
        excess = row.excess + row.price - price
        capped.append(row if price == row.price else structs.replace(row, price=price, excess=excess))
    return tuple(capped)


def _bound_share(row: UsageRow) -> UsageRow:
    """A developer earns at most what the charged price leaves above the cost."""
    if not row.developer_share:
        return row
    share = 0 if row.developer is None else max(0, min(row.developer_share, row.price - row.cost))
    return row if share == row.developer_share else structs.replace(row, developer_share=share)
