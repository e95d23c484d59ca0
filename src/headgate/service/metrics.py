"""What an operator watches, as Prometheus metrics. Labels are bounded: dialects, catalogue models, kinds."""

from collections.abc import Iterable

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headgate.core.completion import Answer
from headgate.core.errors import GatewayError
from headgate.core.models import ModelSpec
from headgate.service.circuits import CircuitStatus
from headgate.service.plan import Plan
from headgate.service.streams import Running

_STATES = {"closed": 0, "half_open": 1, "open": 2}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MODEL_LABELS = ("dialect", "model")


class Metrics:
    """One registry per gateway, so that nothing is shared between two in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = self._counter(
            "headgate_requests", "Requests by dialect and HTTP status.", ("dialect", "status")
        )
        self._failures = self._counter(
            "headgate_failed_requests", "Requests that took a hold and failed.", ("dialect", "kind")
        )
        self._latency = self._histogram("headgate_request_seconds", "Seconds from plan to settled.")
        self._first_token = self._histogram(
            "headgate_time_to_first_token_seconds", "Seconds from plan to the first output."
        )
        self._tokens = self._counter("headgate_tokens", "Tokens charged.", (*MODEL_LABELS, "direction"))
        self._charges = self._counter("headgate_charged_nano_usd", "Nano-USD charged.", MODEL_LABELS)
        self._excess = self._counter(
            "headgate_excess_nano_usd", "Nano-USD above the hold, recorded and not charged.", MODEL_LABELS
        )
        self.open_holds = Gauge(
            "headgate_open_holds", "Holds of requests under way in this process.", registry=self.registry
        )
        self.running = Gauge(
            "headgate_running_requests", "Requests under way in this process.", registry=self.registry
        )
        self._attempts = self._counter(
            "headgate_failed_attempts", "Calls to upstreams that failed.", ("provider", "model", "kind")
        )
        self._fallbacks = self._counter(
            "headgate_fallbacks", "Models that another deployment or model stood in for.", ("model", "served")
        )
        self._circuits = Gauge(
            "headgate_circuit_state",
            "Whether a deployment is asked: 0 yes (closed), 1 one call may try (half open), 2 no (open).",
            ("provider", "model"),
            registry=self.registry,
        )
        # Finding a labelled series costs more than counting in it, so they are kept once found.
        self._by_status: dict[tuple[str, int], Counter] = {}
        self._by_model: dict[tuple[str, str], _ModelSeries] = {}

    def response(self, dialect: str, status: int) -> None:
        series = self._by_status.get((dialect, status))
        if series is None:
            series = self._by_status[dialect, status] = self._responses.labels(dialect, status)
        series.inc()

    def request(self, answer: Answer, plan: Plan, running: Running, failure: GatewayError | None) -> None:
        """Count one settled request."""
        dialect = plan.request.dialect
        if failure is not None:
            self._failures.labels(dialect, failure.kind).inc()
        for model in answer.models:
            key, charge = (dialect, model.spec.name), model.charge
            series = self._by_model.get(key)
            if series is None:
                series = self._by_model[key] = self._series(*key)
            series.latency.observe(answer.elapsed_s)
            if running.first_output_at is not None:
                series.first_token.observe(running.first_output_at - running.started_at)
            series.input.inc(charge.usage.prompt_tokens)
            series.output.inc(charge.usage.completion_tokens)
            series.charged.inc(charge.price)
            if charge.excess:
                series.excess.inc(charge.excess)

    def failed_attempt(self, spec: ModelSpec, error: GatewayError) -> None:
        self._attempts.labels(spec.provider, spec.upstream_name, error.kind).inc()

    def fallback(self, model: ModelSpec, served: ModelSpec) -> None:
        self._fallbacks.labels(model.qualified_name, served.qualified_name).inc()

    def circuits(self, statuses: Iterable[CircuitStatus]) -> None:
        for status in statuses:
            self._circuits.labels(status.provider, status.model).set(_STATES[status.state])

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _series(self, dialect: str, model: str) -> "_ModelSeries":
        return _ModelSeries(
            latency=self._latency.labels(dialect, model),
            first_token=self._first_token.labels(dialect, model),
            input=self._tokens.labels(dialect, model, "input"),
            output=self._tokens.labels(dialect, model, "output"),
            charged=self._charges.labels(dialect, model),
            excess=self._excess.labels(dialect, model),
        )

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, MODEL_LABELS, buckets=SECONDS, registry=self.registry)


class _ModelSeries(Struct, frozen=True, kw_only=True):
    """The series of one dialect and model."""

    latency: Histogram
    first_token: Histogram
    input: Counter
    output: Counter
    charged: Counter
    excess: Counter
