"""The hot statements: written once with SQLAlchemy Core, kept as SQL text for the driver's cursor.

SQLAlchemy's own execution costs several times the statement (docs/decisions/002-ledger-hot-statements.md).
"""

from typing import Any

from sqlalchemy import (
    BindParameter,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement

from headgate.core.accounts import UsageRow
from headgate.stores.schema import (
    accounts,
    api_keys,
    entries,
    holds,
    idempotency,
    revoked_tokens,
    transfers,
    usage,
)

USAGE_COLUMNS = (
    *("hold_id", "account", "hold_amount", "transfer_id", "created"),
    *UsageRow.__struct_fields__,
)


def sql(statement: ClauseElement, *parameters: str) -> str:
    """The statement as SQLite's SQL. `parameters`: its bound names, in the order of their question marks.

    Naming them here makes a statement that changed fail at import, not in the books.
    """
    dialect = sqlite.dialect(paramstyle="qmark")
    compiled: Any = statement.compile(dialect=dialect)
    if tuple(compiled.positiontup) != parameters:
        raise ValueError(f"the statement takes {compiled.positiontup}, not {parameters}")
    return str(compiled)


_name: BindParameter[str] = bindparam("name")
_amount: BindParameter[int] = bindparam("amount")
_charge: BindParameter[int] = bindparam("charge")
_hold: BindParameter[str] = bindparam("hold")
_is_user = accounts.c.kind == literal_column("'user'")

RESERVE = sql(
    update(accounts)
    .values(held=accounts.c.held + _amount)
    .where(accounts.c.name == _name, accounts.c.balance - accounts.c.held >= _amount),
    *("amount", "name", "amount"),
)
"""Set money aside. No row changes where the account is unknown or too little is available."""

AVAILABLE = sql(select(accounts.c.balance - accounts.c.held).where(accounts.c.name == _name), "name")

OPEN_HOLD = sql(insert(holds), "id", "account", "amount", "created", "rows")

TAKE_HOLD = sql(delete(holds).where(holds.c.id == _hold).returning(holds.c.account, holds.c.amount), "hold")
"""Resolve a hold: whoever deletes the row has it."""

CHECKPOINT = sql(
    update(holds).values(rows=bindparam("new_rows")).where(holds.c.id == _hold), "new_rows", "hold"
)

OPEN_HOLDS = sql(select(holds.c.id, holds.c.rows).order_by(holds.c.created))

PAY = sql(
    update(accounts)
    .values(balance=accounts.c.balance - _charge, held=accounts.c.held - _amount)
    .where(accounts.c.name == _name)
    .returning(accounts.c.balance),
    *("charge", "amount", "name"),
)
"""Take the charge from an account and free the whole hold."""

TRANSFER = sql(
    insert(transfers).values(
        kind=literal_column("'settle'"), hold_id=bindparam("hold_id"), created=bindparam("created")
    ),
    *("hold_id", "created"),
)

_received = sqlite.insert(accounts).values(
    name=_name,
    balance=_amount,
    held=literal_column("0"),
    kind=bindparam("kind"),
    created=bindparam("created"),
)
RECEIVE = sql(
    _received.on_conflict_do_update(
        index_elements=["name"], set_={"balance": accounts.c.balance + _received.excluded.balance}
    ),
    *("name", "amount", "kind", "created"),
)
"""Add to an account; the accounts of providers, developers and the platform are made on first need."""

ENTRY = sql(
    insert(entries).values(
        transfer_id=bindparam("transfer_id"), account=bindparam("account"), amount=bindparam("amount")
    ),
    *("transfer_id", "account", "amount"),
)

USAGE = sql(insert(usage).values({name: bindparam(name) for name in USAGE_COLUMNS}), *USAGE_COLUMNS)

BALANCE = sql(
    select(
        accounts.c.balance,
        accounts.c.held,
        select(func.count())
        .select_from(holds)
        .where(holds.c.account == accounts.c.name)
        .scalar_subquery()
        .label("open_holds"),
    ).where(accounts.c.name == _name),
    "name",
)

_key = (idempotency.c.account == _name, idempotency.c.key == bindparam("key"))
REMEMBERED = sql(
    select(idempotency.c.digest, idempotency.c.hold_id, idempotency.c.kept).where(
        *_key, idempotency.c.expires > bindparam("now")
    ),
    *("name", "key", "now"),
)
_remembered = sqlite.insert(idempotency).values(
    account=_name,
    key=bindparam("key"),
    digest=bindparam("digest"),
    hold_id=_hold,
    kept=literal_column("NULL"),
    expires=bindparam("expires"),
)
REMEMBER = sql(
    _remembered.on_conflict_do_update(
        index_elements=["account", "key"],
        set_={
            "digest": _remembered.excluded.digest,
            "hold_id": _remembered.excluded.hold_id,
            "kept": literal_column("NULL"),
            "expires": _remembered.excluded.expires,
        },
        where=idempotency.c.expires <= bindparam("now"),
    ),
    *("name", "key", "digest", "hold", "expires", "now"),
)
"""A keyed request is under way. No row changes where it is known and has not expired."""

KEEP = sql(
    update(idempotency)
    .values(kept=bindparam("kept"), hold_id=literal_column("NULL"))
    .where(idempotency.c.hold_id == _hold),
    *("kept", "hold"),
)
FORGET = sql(delete(idempotency).where(idempotency.c.hold_id == _hold), "hold")
FORGET_EXPIRED = sql(
    delete(idempotency).where(idempotency.c.expires <= bindparam("now"), idempotency.c.hold_id.is_(None)),
    "now",
)
FORGET_LOST = sql(
    delete(idempotency).where(
        idempotency.c.hold_id.is_not(None), ~exists().where(holds.c.id == idempotency.c.hold_id)
    )
)
"""Under way without a hold: of a process that is gone."""

PING = sql(select(exists().where(accounts.c.name == _name)), "name")

_any = accounts.alias()
PROBE = sql(
    update(accounts)
    .values(held=accounts.c.held + bindparam("change"))
    .where(accounts.c.name == select(func.min(_any.c.name)).scalar_subquery()),
    "change",
)
"""To be run with 1 and -1: a real write that changes nothing. (One that sets the same value writes nothing.)"""

KEY_BY_DIGEST = sql(
    select(
        api_keys.c.id,
        api_keys.c.digest,
        api_keys.c.prefix,
        api_keys.c.account,
        api_keys.c.app,
        api_keys.c.admin,
        api_keys.c.created,
    ).where(api_keys.c.digest == bindparam("digest"), api_keys.c.revoked.is_(None)),
    "digest",
)

TOKEN_STATE = sql(
    select(
        and_(
            true(),
            exists().where(accounts.c.name == _name, _is_user),
            ~exists().where(revoked_tokens.c.jti == bindparam("jti")),
        )
    ),
    *("name", "jti"),
)
"""1 when the account is a client's and the token is not revoked. A null jti is never found among the revoked."""
