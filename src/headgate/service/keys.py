"""API keys and token ids: how they look, and what is kept of them."""

import hashlib

KEY_PREFIX = "hg-"
MAX_JTI = 255
"""Characters of a token's id."""


def digest(key: str) -> bytes:
    """SHA-256: all that is kept of a key. Its 256 random bits need no slow hash."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
