"""What `/metrics` says: counted per batch and per answer, or read off the sessions when asked."""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.errors import (
    Invalid,
    Malformed,
    NoPreviousVersion,
    PushConflict,
    ServiceError,
    VersionMismatch,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
OF_CHANGES = (PushConflict, Malformed, Invalid, NoPreviousVersion, VersionMismatch, ServiceError)
"""What refuses a push or a rollback that was begun. Each is counted from 0 on, as an alarm does not
see the first event of a series that appears with it."""
disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, which nobody reads


class Sessions(Protocol):
    """What is told of live sessions, and of what became of the others."""

    num_rows: int
    events: dict[str, int]

    def expire_idle(self) -> None: ...


class Snapshots(Protocol):
    """What is told of snapshots: how many, how often, the last one's time to write and age."""

    by_result: dict[str, int]
    last_s: float | None
    every_s: float | None

    def age_s(self) -> float: ...


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_result: defaultdict[str, int] = defaultdict(int, {ServiceError.error_type: 0})
        self._registry.register(_ResultCollector(self._by_result))
        self._batch_size = _Histogram(
            "tamiyo_batch_size",
            "Environments in one step of the policy.",
            (1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self._step_seconds = _Histogram(
            "tamiyo_step_seconds",
            "Time of one step: state, noise, model, state.",
            (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0),
        )
        self._swap_seconds = _Histogram(
            "tamiyo_weights_swap_seconds",
            "From the last byte of a push, or a rollback, until its weights served.",
            (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
        )
        for histogram in (self._batch_size, self._step_seconds, self._swap_seconds):
            self._registry.register(histogram)
        self._changes = Counter(
            "tamiyo_weights_changes_total",
            "Pushes and rollbacks by result: ok, or the error's type.",
            ["result"],
            registry=self._registry,
        )
        for result in ("ok", *(error.error_type for error in OF_CHANGES)):
            self._changes.labels(result)
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
        self._by_result[result] += 1

    def observe_batch(self, num_rows: int, seconds: float) -> None:
        """The policy has taken one more step."""
        self._batch_size.observe(num_rows)
        self._step_seconds.observe(seconds)

    def observe_change(self, result: str, seconds: float) -> None:
        """Other weights serve, or were refused."""
        self._changes.labels(result).inc()
        if result == "ok":
            self._swap_seconds.observe(seconds)

    def watch_version(self, name: str, version: Callable[[], str]) -> None:
        """Says which weights serve, of the policy of this name."""
        self._registry.register(_VersionCollector(name, version))

    def watch_engine(self, sessions: Sessions, num_waiting: Callable[[], int]) -> None:
        """Says what is kept, and how many rows wait."""
        self._registry.register(_SessionCollector(sessions))
        self._waiting.set_function(num_waiting)

    def watch_snapshots(self, snapshots: Snapshots) -> None:
        """Says how writing them goes."""
        self._registry.register(_SnapshotCollector(snapshots))

    def count_unread(self, error_type: str) -> None:
        """One more request of which it is not known what it was."""
        self._unread.labels(error_type).inc()

    def watch_connections(self, num_open: Callable[[], int], limit: int | None) -> None:
        """Says how many connections are open, and how many may be."""
        self._connections.set_function(num_open)
        self._connections_limit.set(inf if limit is None else limit)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Histogram(Collector):
    """prometheus_client's, without its lock, for the one thread that has all there is to observe.

    At one client that and the like of `_ResultCollector` are a hundredth of a request.
    """

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help_text = help_text
        self._bounds = (*bounds, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        up_to = zip(map(floatToGoString, self._bounds), accumulate(self._counts), strict=True)
        metric = HistogramMetricFamily(self._name, self._help_text)
        metric.add_metric([], list(up_to), self._sum)
        yield metric


class _ResultCollector(Collector):
    """How many answers had which result."""

    def __init__(self, by_result: Mapping[str, int]) -> None:
        self._by_result = by_result

    def collect(self) -> Iterator[Metric]:
        results = CounterMetricFamily(
            "tamiyo_act_requests",
            "Requests for a step by result: ok, replayed, disconnected, or the error's type.",
            labels=["result"],
        )
        for result, count in self._by_result.items():
            results.add_metric([result], count)
        yield results


class _VersionCollector(Collector):
    """Which weights serve: a gauge of 1, labelled."""

    def __init__(self, name: str, version: Callable[[], str]) -> None:
        self._name = name
        self._version = version

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "tamiyo_policy_info", "1, of the weights that serve.", labels=["name", "policy_version"]
        )
        info.add_metric([self._name, self._version()], 1)
        yield info


class _SessionCollector(Collector):
    """How many rows are kept, and what became of sessions.

    Live ones are those started and restored, less all the rest.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        self._sessions.expire_idle()
        help_text = "Environments whose state is kept: the rows of all live sessions."
        yield GaugeMetricFamily("tamiyo_sessions", help_text, value=self._sessions.num_rows)
        events = CounterMetricFamily(
            "tamiyo_session_events",
            "Sessions started, or restored from a snapshot; ended by a client; expired for want of "
            "requests; evicted for room; lost, as a client had gone on from what was restored; "
            "restarted by a push.",
            labels=["event"],
        )
        for event, count in self._sessions.events.items():
            events.add_metric([event], count)
        yield events


class _SnapshotCollector(Collector):
    """How writing snapshots goes; what is not known yet is absent.

    So is the age where they are written at the end only: it says nothing of whether that will work.
    """

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        written = CounterMetricFamily(
            "tamiyo_snapshots", "Snapshots written, and those that failed.", labels=["result"]
        )
        for result, count in self._snapshots.by_result.items():
            written.add_metric([result], count)
        yield written
        every_s = self._snapshots.every_s
        age_s = None if every_s is None else self._snapshots.age_s()
        for name, help_text, value in (
            ("tamiyo_snapshot_seconds", "Time of writing the last one.", self._snapshots.last_s),
            ("tamiyo_snapshot_every_seconds", "How often one is written.", every_s),
            ("tamiyo_snapshot_age_seconds", "Age of the one there is, or of the server.", age_s),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, help_text, value=value)
