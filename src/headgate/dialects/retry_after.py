"""The Retry-After header: always with 429, and with a 503 that may pass."""

from headgate.core.errors import GatewayError

LONGEST_WAIT_S = 120
"""Clients such as the OpenAI SDK ignore a longer wait."""


def retry_after(error: GatewayError, status: int) -> tuple[tuple[str, str], ...]:
    """The header, in whole seconds from 1 to 120, or nothing."""
    if status == 429 or (
        status == 503 and (error.retry_after is not None or error.kind == "upstream_unavailable")
    ):
        wait = min(max(error.retry_after or 1, 1), LONGEST_WAIT_S)
        return (("Retry-After", str(wait)),)
    return ()
