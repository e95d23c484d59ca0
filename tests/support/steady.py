"""Configurations in which a failure stays what it was: no retries, and no circuits that open meanwhile."""

STEADY = "\n[routing]\nretries = 0\nbreaker_failures = 0\n"


def steady(toml: str) -> str:
    """The configuration with STEADY, unless it says itself what is done when upstreams fail."""
    return toml if "[routing]" in toml or "[providers" not in toml else toml + STEADY
