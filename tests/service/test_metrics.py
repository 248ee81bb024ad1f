"""What is counted here says what prometheus_client's own would."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 1.0)
Sample = tuple[str, frozenset[tuple[str, str]], float]

sizes = st.one_of(st.sampled_from(SIZES), st.integers(1, 600))
seconds = st.one_of(st.sampled_from(SECONDS), st.floats(0.0, 3.0))


def samples(text: str) -> set[Sample]:
    return {
        (sample.name, frozenset(sample.labels.items()), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(("tamiyo_act", "tamiyo_batch", "tamiyo_step"))
    }


def rendered(metrics: Metrics) -> str:
    async def on_a_loop() -> bytes:  # whose tasks are counted too
        return metrics.render()

    return asyncio.run(on_a_loop()).decode()


@given(
    st.lists(st.tuples(sizes, seconds), max_size=20),
    st.lists(st.sampled_from(["ok", "replayed", "invalid"]), max_size=20),
)
def test_batches_and_results_are_counted_as_prometheus_counts(
    batches: list[tuple[int, float]], results: list[str]
) -> None:
    metrics, registry = Metrics(), CollectorRegistry()
    of_sizes = Histogram("tamiyo_batch_size", "rows", buckets=SIZES, registry=registry)
    of_seconds = Histogram("tamiyo_step_seconds", "s", buckets=SECONDS, registry=registry)
    requests = Counter("tamiyo_act_requests_total", "n", ["result"], registry=registry)
    for num_rows, step_s in batches:
        metrics.observe_batch(num_rows, step_s)
        of_sizes.observe(num_rows)
        of_seconds.observe(step_s)
    requests.labels("internal")
    for result in results:
        metrics.count(result)
        requests.labels(result).inc()
    assert samples(rendered(metrics)) == samples(generate_latest(registry).decode())


def test_what_an_alarm_counts_is_there_before_its_first_event() -> None:
    """`increase` does not see the first one otherwise."""
    text = rendered(Metrics())
    assert 'tamiyo_act_requests_total{result="internal"} 0.0' in text
    for result in (
        *("ok", "internal", "malformed", "invalid"),
        *("push_conflict", "no_previous_version", "version_mismatch"),
    ):
        assert f'tamiyo_weights_changes_total{{result="{result}"}} 0.0' in text


class Written:
    """Snapshots of which one was written."""

    def __init__(self, every_s: float | None) -> None:
        self.by_result = {"written": 1, "failed": 0}
        self.last_s: float | None = 0.5
        self.every_s = every_s

    def age_s(self) -> float:
        return 7.0


@pytest.mark.parametrize("every_s", [30.0, None])
def test_a_snapshot_s_age_is_told_where_one_is_written_every_so_often(
    every_s: float | None,
) -> None:
    metrics = Metrics()
    metrics.watch_snapshots(Written(every_s))
    lines = rendered(metrics).splitlines()
    assert ("tamiyo_snapshot_age_seconds 7.0" in lines) == (every_s is not None)
    assert ("tamiyo_snapshot_every_seconds 30.0" in lines) == (every_s is not None)
    assert "tamiyo_snapshot_seconds 0.5" in lines


def test_weights_are_told_by_the_policy_s_name_and_their_version() -> None:
    metrics = Metrics()
    metrics.watch_version('lab "1"', lambda: "sha256:ab12")
    (family,) = [
        of for of in text_string_to_metric_families(rendered(metrics)) if "info" in of.name
    ]
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"name": 'lab "1"', "policy_version": "sha256:ab12"}, 1.0)
    ]
