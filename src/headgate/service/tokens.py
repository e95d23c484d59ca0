"""JWTs: issued (HS256 only) and verified against the one algorithm and the keys the operator configured."""

import math
import secrets
from collections.abc import Sequence
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from msgspec import Struct

from headgate.config import ACCOUNT_NAME, Algorithm
from headgate.core.errors import InvalidCredentials, InvalidRequest
from headgate.service.keys import MAX_JTI

MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048
MAX_TOKEN = 8192
LAST_SECOND = 253_402_300_799
"""The end of the year 9999; a later `exp` is nonsense and would not fit the database's milliseconds."""

PublicKey = RSAPublicKey | EllipticCurvePublicKey

_OPTIONS: Any = {
    # Times are checked here, against the caller's clock.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "require": ["sub", "exp"],
}


class Claims(Struct, frozen=True, kw_only=True):
    """What a valid token says: the account, the token's id if it has one, and its end in Unix seconds."""

    sub: str
    jti: str | None
    exp: int


class IssuedToken(Struct, frozen=True, kw_only=True):
    """A new token; `expires_at` in Unix seconds."""

    token: str
    jti: str
    expires_at: int


class Key(Struct, frozen=True):
    """A key to verify with. `id` is matched with the token's `kid`, where both have one."""

    material: bytes | PublicKey
    id: str | None = None


class Tokens:
    """The algorithm is bound to the keys: what a token's own header asks for never decides."""

    def __init__(self, algorithm: Algorithm, keys: Sequence[Key]) -> None:
        """ValueError when there is no key, or one is too weak or not the algorithm's."""
        if not keys:
            raise ValueError(f"there is no key for {algorithm}")
        for key in keys:
            _check(algorithm, key.material)
        self.algorithm = algorithm
        self._keys = tuple(keys)
        self._jwt = jwt.PyJWT(options={"enforce_minimum_key_length": True})

    def create(self, account: str, ttl_s: int, now: float) -> IssuedToken:
        """A token for the account, valid from now for `ttl_s` seconds. InvalidRequest unless HS256."""
        secret = self._keys[0].material
        if not isinstance(secret, bytes):
            raise InvalidRequest(
                f"Tokens are signed elsewhere: with {self.algorithm} this installation has only public keys."
            )
        jti = secrets.token_hex(16)
        expires_at = int(now) + ttl_s
        claims = {"sub": account, "jti": jti, "iat": int(now), "exp": expires_at}
        return IssuedToken(
            token=self._jwt.encode(claims, secret, algorithm=self.algorithm), jti=jti, expires_at=expires_at
        )

    def verify(self, token: str, now: float) -> Claims:
        """The claims of a token valid at `now` (Unix seconds); InvalidCredentials for every reason why not."""
        if len(token) > MAX_TOKEN:
            raise InvalidCredentials
        try:
            claims = self._claims(self._decode(token), now)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise InvalidCredentials from error
        if claims is None:
            raise InvalidCredentials
        return claims

    def _decode(self, token: str) -> dict[str, Any]:
        """The payload of a well-signed token."""
        keys = self._keys
        if len(keys) > 1:
            kid = jwt.get_unverified_header(token).get("kid")
            keys = tuple(key for key in keys if kid is None or key.id is None or key.id == kid)
        for key in keys:
            try:
                decoded = self._jwt.decode_complete(
                    token, key.material, algorithms=[self.algorithm], options=_OPTIONS
                )
            except jwt.InvalidSignatureError:
                continue
            if "crit" in decoded["header"]:
                raise jwt.InvalidTokenError("critical extensions are not understood")
            payload: dict[str, Any] = decoded["payload"]
            return payload
        raise jwt.InvalidSignatureError("no key matches")

    def _claims(self, payload: dict[str, Any], now: float) -> Claims | None:
        sub, jti, exp = payload["sub"], payload.get("jti"), _seconds(payload["exp"])
        not_before = _seconds(payload.get("nbf", 0))
        if exp is None or not_before is None or not not_before <= now < exp:
            return None
        if not isinstance(sub, str) or ACCOUNT_NAME.fullmatch(sub) is None:
            return None
        if jti is not None and not (isinstance(jti, str) and 0 < len(jti) <= MAX_JTI and jti.isprintable()):
            return None
        return Claims(sub=sub, jti=jti, exp=int(exp))


def _seconds(value: object) -> float | None:
    """A NumericDate, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value <= LAST_SECOND and math.isfinite(value) else None


def _check(algorithm: Algorithm, material: bytes | PublicKey) -> None:
    if algorithm == "HS256":
        if not isinstance(material, bytes) or len(material) < MIN_SECRET_BYTES:
            raise ValueError(f"HS256 needs a secret of at least {MIN_SECRET_BYTES} bytes")
    elif algorithm == "RS256":
        if not isinstance(material, RSAPublicKey) or material.key_size < MIN_RSA_BITS:
            raise ValueError(f"RS256 needs a public RSA key of at least {MIN_RSA_BITS} bits")
    elif not isinstance(material, EllipticCurvePublicKey) or not isinstance(material.curve, SECP256R1):
        raise ValueError("ES256 needs a public key on the curve P-256")
