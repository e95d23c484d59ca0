"""Where the keys for JWTs come from: the environment, a file the operator names, or a secret made on first need."""

import os
import secrets
import tempfile
from pathlib import Path

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from headgate.config import Algorithm, ConfigError, Settings
from headgate.service.tokens import MIN_SECRET_BYTES, Key, PublicKey, Tokens

SECRET_NAME = "jwt.secret"


def load_tokens(settings: Settings) -> Tokens:
    """The keys the settings name; for HS256 without one, a secret kept in the data folder. ConfigError."""
    configured = settings.tokens
    if configured.algorithm == "HS256" and configured.secret_env:
        key, where = "secret_env", configured.secret_env
    elif configured.algorithm == "HS256":
        key, where = "algorithm", str(settings.data_dir / SECRET_NAME)
    elif configured.jwks_file:
        key, where = "jwks_file", configured.jwks_file
    else:
        key, where = "public_key_file", configured.public_key_file
    try:
        if key == "secret_env":
            keys = [Key((settings.key(where) or "").encode())]
        elif key == "algorithm":
            keys = [Key(stored_secret(Path(where)))]
        elif key == "jwks_file":
            keys = _jwks(Path(where).read_text(encoding="utf-8"), configured.algorithm)
        else:
            keys = [Key(_public(load_pem_public_key(Path(where).read_bytes())))]
        return Tokens(configured.algorithm, keys)
    except (OSError, ValueError, UnsupportedAlgorithm, jwt.PyJWTError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{settings.source}: tokens.{key}: {where}: {reason}") from error


def _public(key: object) -> PublicKey:
    if not isinstance(key, RSAPublicKey | EllipticCurvePublicKey):
        raise ValueError("not a public RSA or EC key")
    return key


def _jwks(text: str, algorithm: Algorithm) -> list[Key]:
    """The set's keys that verify this algorithm; keys for other purposes are passed over."""
    return [
        Key(_public(key.key), key.key_id)
        for key in jwt.PyJWKSet.from_json(text).keys
        if key.algorithm_name == algorithm and key.public_key_use in (None, "sig")
    ]


def stored_secret(path: Path) -> bytes:
    """The generated HS256 secret, made 0600 on first need. Of two processes at once both get the same one."""
    try:
        return path.read_bytes().strip()
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(MIN_SECRET_BYTES).encode())
            file.flush()
            os.fsync(file.fileno())
        # A link, not a rename: it appears complete, and it never replaces the one that another process made.
        os.link(temporary, path)
    except FileExistsError:
        pass  # the other's secret counts
    finally:
        Path(temporary).unlink()
    return path.read_bytes().strip()
