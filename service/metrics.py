"""What `/metrics` says: counted per batch and per answer, or read off the sessions when asked."""

import asyncio
from collections.abc import Callable, Iterator
from math import inf
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Sessions(Protocol):
    """What is told of live sessions, and of what became of the others."""

    num_rows: int
    events: dict[str, int]

    def expire_idle(self) -> None: ...


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
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
            "Environments in one step of the policy.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self.step_seconds = Histogram(
            "tamiyo_step_seconds",
            "Time of one step: state, noise, model, state.",
            buckets=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0),
            registry=self._registry,
        )
        self._waiting = Gauge(
            "tamiyo_waiting", "Environments that wait for the policy.", registry=self._registry
        )
        tasks = Gauge("tamiyo_tasks", "Tasks on the event loop.", registry=self._registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        self._connections = Gauge(
            "tamiyo_connections", "Open connections.", registry=self._registry
        )
        self._connections_limit = Gauge(
            "tamiyo_connections_limit",
            "Connections there are file descriptors for; more are refused.",
            registry=self._registry,
        )
        self._unread = Counter(
            "tamiyo_unread_requests_total",
            "Requests refused before they could be read: no HTTP, too slow, headers too large.",
            ["result"],
            registry=self._registry,
        )
        self.connections_refused = Counter(
            "tamiyo_connections_refused_total",
            "Connections closed at once, for want of file descriptors.",
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def count(self, result: str) -> None:
        """One more answer with this result."""
        counter = self._by_result.get(result)
        if counter is None:
            counter = self._by_result[result] = self.requests.labels(result)
        counter.inc()

    def observe_batch(self, num_rows: int, seconds: float) -> None:
        """The policy has taken one more step."""
        self.batch_size.observe(num_rows)
        self.step_seconds.observe(seconds)

    def watch_engine(self, sessions: Sessions, num_waiting: Callable[[], int]) -> None:
        """Says what is kept, and how many rows wait."""
        self._registry.register(_SessionCollector(sessions))
        self._waiting.set_function(num_waiting)

    def count_unread(self, error_type: str) -> None:
        """One more request of which it is not known what it was."""
        self._unread.labels(error_type).inc()

    def watch_connections(self, num_open: Callable[[], int], limit: int | None) -> None:
        """Says how many connections are open, and how many may be."""
        self._connections.set_function(num_open)
        self._connections_limit.set(inf if limit is None else limit)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _SessionCollector(Collector):
    """How many rows are kept, and what became of sessions: live ones are started - all the rest."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        self._sessions.expire_idle()
        help_text = "Environments whose state is kept: the rows of all live sessions."
        yield GaugeMetricFamily("tamiyo_sessions", help_text, value=self._sessions.num_rows)
        events = CounterMetricFamily(
            "tamiyo_session_events",
            "Sessions started; ended by a client; expired for want of requests; evicted for room.",
            labels=["event"],
        )
        for event, count in self._sessions.events.items():
            events.add_metric([event], count)
        yield events
