"""Credential -> Principal. One resolver for every dialect, one generic refusal for every reason."""

import hmac

from headgate.core.accounts import Principal
from headgate.core.errors import InvalidCredentials, PermissionDenied
from headgate.core.ports import AccountStore, Clock
from headgate.service.keys import KEY_PREFIX, digest
from headgate.service.tokens import Tokens

MAX_CREDENTIAL = 8192
CACHE_ENTRIES = 10_000


class Identity:
    """Authenticates. What was looked up is believed for `ttl` seconds, so revocations take effect within that."""

    def __init__(self, accounts: AccountStore, tokens: Tokens, clock: Clock, ttl: float = 0.5) -> None:
        self._accounts = accounts
        self._tokens = tokens
        self._clock = clock
        self._ttl = ttl
        # Keyed by the SHA-256 of the whole credential: a prefix would let one token answer for another.
        self._known: dict[bytes, tuple[float, Principal]] = {}

    async def authenticate(self, credential: str | None, *, tokens_only: bool = False) -> Principal:
        """Who this is. InvalidCredentials, always the same, for every reason why not."""
        if not credential or len(credential) > MAX_CREDENTIAL:
            raise InvalidCredentials
        hashed = digest(credential)
        now = self._clock.monotonic()
        known = self._known.get(hashed)
        if known is not None and known[0] > now:
            principal = known[1]
        else:
            principal = await self._look_up(credential, hashed)
            if len(self._known) >= CACHE_ENTRIES:
                self._known.clear()
            self._known[hashed] = (now + self._ttl, principal)
        if tokens_only and not principal.token:
            raise InvalidCredentials
        return principal

    async def _look_up(self, credential: str, hashed: bytes) -> Principal:
        if credential.startswith(KEY_PREFIX):
            record = await self._accounts.key_by_digest(hashed)
            if record is None or not hmac.compare_digest(record.digest, hashed):
                raise InvalidCredentials
            return Principal(account=record.account, key_id=record.id, app=record.app, admin=record.admin)
        claims = self._tokens.verify(credential, self._clock.time())
        if not await self._accounts.token_state(claims.sub, claims.jti):
            raise InvalidCredentials
        return Principal(account=claims.sub, key_id=claims.jti or f"sub:{claims.sub}", token=True)


def authorize(principal: Principal, dialect: str) -> None:
    """An app key speaks for its app only: PermissionDenied everywhere but on Dify's routes."""
    if principal.app is not None and dialect != "dify":
        raise PermissionDenied("This key belongs to an app and works on the app's own routes only.")
