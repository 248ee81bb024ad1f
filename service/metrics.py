"""What `/metrics` counts, recorded per batch and per answer."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self, num_sessions: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._by_result: dict[str, Counter] = {}
        self.requests = Counter(
            "tamiyo_act_requests_total",
            "Answers to POST /act by result: ok, replayed, disconnected, or the error's type.",
            ["result"],
            registry=self._registry,
        )
        self.batch_size = Histogram(
            "tamiyo_batch_size",
            "Requests in one step of the policy.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self.step_seconds = Histogram(
            "tamiyo_step_seconds",
            "Time of one step: state, noise, model, state.",
            buckets=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0),
            registry=self._registry,
        )
        sessions = Gauge("tamiyo_sessions", "Live sessions.", registry=self._registry)
        sessions.set_function(num_sessions)

    def count(self, result: str) -> None:
        """One more answer with this result."""
        counter = self._by_result.get(result)
        if counter is None:
            counter = self._by_result[result] = self.requests.labels(result)
        counter.inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)
