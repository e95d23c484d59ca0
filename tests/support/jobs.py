"""Models and jobs for tests of providers."""

from typing import Any

from headgate.core.completion import Job, Sampling
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD


def model(upstream_name: str = "plain", **fields: Any) -> ModelSpec:
    """A model of the provider "acme"."""
    given: dict[str, Any] = {
        "name": "acme-large",
        "provider": "acme",
        "upstream_name": upstream_name,
        "mode": "both",
        "context_window": 8192,
        "max_input_tokens": 8192,
        "max_output_tokens": 4096,
        "input_rate": FemtoUSD(500_000_000),
        "cached_rate": FemtoUSD(250_000_000),
        "output_rate": FemtoUSD(1_500_000_000),
    }
    return ModelSpec(**given | fields)


def job(upstream_name: str = "plain", **fields: Any) -> Job:
    """One call: the prompt "say hello", raw, at most 64 tokens."""
    given: dict[str, Any] = {
        "request_id": "req-1",
        "model": model(upstream_name),
        "shape": "completion",
        "prompt": "say hello",
        "max_tokens": 64,
        "sampling": Sampling(),
    }
    if fields.get("messages") is not None:
        given |= {"shape": "chat", "prompt": None}
    return Job(**given | fields)
