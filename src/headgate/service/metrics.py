"""What an operator watches, as Prometheus metrics. Labels are bounded: dialects, catalogue models, kinds."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headgate.core.completion import Answer
from headgate.core.errors import GatewayError
from headgate.service.planning import Plan
from headgate.service.streams import Running

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry per gateway, so that nothing is shared between two in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("dialect", "model")
        self._responses = Counter(
            "headgate_requests",
            "Requests by dialect and HTTP status.",
            ("dialect", "status"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "headgate_request_seconds",
            "Seconds from plan to settled.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            "headgate_time_to_first_token_seconds",
            "Seconds from plan to the first output.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "headgate_tokens", "Tokens charged.", (*labels, "direction"), registry=self.registry
        )
        self._charges = Counter(
            "headgate_charged_nano_usd", "Nano-USD charged.", labels, registry=self.registry
        )
        self._excess = Counter(
            "headgate_excess_nano_usd",
            "Nano-USD above a request's hold: used, but not charged.",
            labels,
            registry=self.registry,
        )
        self._failures = Counter(
            "headgate_failed_requests",
            "Requests that took a hold and failed.",
            ("dialect", "kind"),
            registry=self.registry,
        )
        self.open_holds = Gauge(
            "headgate_open_holds", "Holds of requests under way in this process.", registry=self.registry
        )
        self.running = Gauge(
            "headgate_running_requests", "Requests under way in this process.", registry=self.registry
        )

    def response(self, dialect: str, status: int) -> None:
        self._responses.labels(dialect, status).inc()

    def request(self, answer: Answer, plan: Plan, running: Running, failure: GatewayError | None) -> None:
        """Count one settled request."""
        dialect = plan.request.dialect
        if failure is not None:
            self._failures.labels(dialect, failure.kind).inc()
        for model in answer.models:
            name, charge = model.spec.name, model.charge
            self._latency.labels(dialect, name).observe(answer.elapsed_s)
            if running.first_output_at is not None:
                self._first.labels(dialect, name).observe(running.first_output_at - running.started_at)
            self._tokens.labels(dialect, name, "input").inc(charge.usage.prompt_tokens)
            self._tokens.labels(dialect, name, "output").inc(charge.usage.completion_tokens)
            self._charges.labels(dialect, name).inc(charge.price)
            self._excess.labels(dialect, name).inc(charge.excess)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
