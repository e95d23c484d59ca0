"""What an operator does: accounts, keys, tokens, and a look at usage and the books.

Ids, secrets and times are made here; the stores keep what they are given.
"""

import secrets
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from headgate.config import ACCOUNT_NAME
from headgate.core.accounts import (
    FUNDING_ACCOUNT,
    PLATFORM_ACCOUNT,
    Balance,
    KeyRecord,
    LedgerReport,
    UsageRecord,
)
from headgate.core.errors import InvalidCredentials, InvalidRequest, NotFound
from headgate.core.money import NanoUSD
from headgate.core.ports import Clock
from headgate.service.keys import KEY_PREFIX, MAX_JTI, digest

if TYPE_CHECKING:  # cryptography is slow to import, and most commands sign nothing
    from headgate.service.tokens import IssuedToken, Tokens

SHOWN_CHARACTERS = 7
"""Of a key, in lists: enough to tell keys apart, far from enough to guess one."""

RESERVED = frozenset({PLATFORM_ACCOUNT, FUNDING_ACCOUNT})


class Accounts(Protocol):
    """Clients' accounts. NotFound for an unknown one, InvalidRequest for one that exists already.

    `balance` shows the ledger's own accounts too; the others know clients only.
    """

    def create(self, name: str, credit: NanoUSD | None, created_ms: int) -> Balance: ...

    def credit(self, name: str, amount: NanoUSD, created_ms: int) -> Balance: ...

    def balance(self, name: str) -> Balance: ...

    def require_client(self, name: str) -> None: ...


class Credentials(Protocol):
    """Stored keys and revoked tokens. NotFound for an unknown account or key."""

    def add_key(self, record: KeyRecord) -> None: ...

    def keys(self) -> tuple[KeyRecord, ...]: ...

    def revoke_key(self, key_id: str, digest: bytes, revoked_ms: int) -> str: ...

    def revoke_token(
        self, jti: str, account: str | None, expires_ms: int | None, revoked_ms: int
    ) -> None: ...


RecentUsage = Callable[[str | None, int | None], tuple[UsageRecord, ...]]
"""(account, limit) -> usage rows, newest first."""


class MintedKey(Struct, frozen=True, kw_only=True):
    """A new API key. `key` exists here and nowhere else: it is shown once and only its digest is kept."""

    key: str
    record: KeyRecord


class Administration:
    """An operator's door. Raises LedgerUnavailable when the database cannot be used."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        credentials: Credentials,
        usage: RecentUsage,
        audit: Callable[[], LedgerReport],
        tokens: "Callable[[], Tokens]",
        apps: Collection[str],
        clock: Clock,
    ) -> None:
        self._accounts = accounts
        self._credentials = credentials
        self._usage = usage
        self._audit = audit
        self._tokens = tokens
        self._apps = apps
        self._clock = clock

    def create_account(self, name: str, credit: NanoUSD | None = None) -> Balance:
        """A new account, with its first credit. InvalidRequest for a bad, reserved or taken name."""
        if ACCOUNT_NAME.fullmatch(name) is None:
            raise InvalidRequest("An account's name is 1 to 64 letters, digits and . _ -", param="name")
        if name in RESERVED:
            raise InvalidRequest(f"The name {name!r} belongs to the ledger itself.", param="name")
        return self._accounts.create(name, credit, self._now_ms())

    def credit(self, name: str, amount: NanoUSD) -> Balance:
        """Add money. NotFound."""
        return self._accounts.credit(name, amount, self._now_ms())

    def balance(self, name: str) -> Balance:
        """NotFound."""
        return self._accounts.balance(name)

    def create_key(self, account: str, *, app: str | None = None, admin: bool = False) -> MintedKey:
        """Mint an API key; an app key answers for one configured app only. NotFound names what is unknown."""
        if app is not None and app not in self._apps:
            known = ", ".join(sorted(self._apps))
            raise NotFound(f"There is no app {app!r} in the configuration; there is: {known}.")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(
            id=f"key_{secrets.token_hex(8)}",
            digest=digest(key),
            prefix=key[:SHOWN_CHARACTERS],
            account=account,
            app=app,
            admin=admin,
            created_ms=self._now_ms(),
        )
        self._credentials.add_key(record)
        return MintedKey(key=key, record=record)

    def keys(self) -> tuple[KeyRecord, ...]:
        """All keys, revoked ones too, oldest first."""
        return self._credentials.keys()

    def revoke_key(self, id_or_key: str) -> str:
        """Revoke by id or by the key itself; returns the id. NotFound."""
        return self._credentials.revoke_key(id_or_key, digest(id_or_key), self._now_ms())

    def create_token(self, account: str, ttl_s: int) -> "IssuedToken":
        """A JWT for an existing account. NotFound; InvalidRequest where tokens are signed elsewhere."""
        self._accounts.require_client(account)
        return self._tokens().create(account, ttl_s, self._clock.time())

    def revoke_token(self, token_or_jti: str) -> str:
        """Revoke by the token or by its id; returns the id.

        InvalidRequest for a token that is not valid here (any more), or that bears no id.
        """
        if not _looks_like_token(token_or_jti):
            if not (0 < len(token_or_jti) <= MAX_JTI and token_or_jti.isprintable()):
                raise InvalidRequest("A token's id is 1 to 255 printable characters.", param="jti")
            self._credentials.revoke_token(token_or_jti, None, None, self._now_ms())
            return token_or_jti
        try:
            claims = self._tokens().verify(token_or_jti, self._clock.time())
        except InvalidCredentials:
            raise InvalidRequest(
                "This token is not valid here: it has expired already, or another installation signed it."
            ) from None
        if claims.jti is None:
            raise InvalidRequest("This token has no id (jti), so it cannot be revoked before it expires.")
        self._credentials.revoke_token(claims.jti, claims.sub, claims.exp * 1000, self._now_ms())
        return claims.jti

    def usage(self, account: str | None = None, limit: int | None = None) -> tuple[UsageRecord, ...]:
        """Usage rows, newest first. NotFound when an account is named and there is none."""
        if account is not None:
            self._accounts.balance(account)
        return self._usage(account, limit)

    def audit(self) -> LedgerReport:
        """Check the whole ledger."""
        return self._audit()

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)


def _looks_like_token(text: str) -> bool:
    """Three dot-separated parts, the first of them base64 of a JSON object."""
    return text.count(".") == 2 and text.startswith("ey")
