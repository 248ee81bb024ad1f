"""Calls take turns, and every burst but its first call counts."""

from itertools import groupby

import torch

from export.timing import BURST, MAX_SAMPLES, MIN_SAMPLES, latencies, this_machine

CPU = torch.device("cpu")


def bursts(seconds: float) -> tuple[list[tuple[str, int]], dict[str, object]]:
    """Who was called, how often in a row, after the first call of each."""
    called: list[str] = []
    timed = latencies(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
        batch_size=7,
        seconds=seconds,
        device=CPU,
    )
    assert called[:2] == ["a", "b"]
    return [(name, len(list(run))) for name, run in groupby(called[2:])], dict(timed)


def test_calls_take_turns_in_short_bursts() -> None:
    runs, _ = bursts(seconds=60.0)
    assert runs == [("a", BURST + 1), ("b", BURST + 1)] * MAX_SAMPLES


def test_there_are_enough_samples_for_quartiles_however_little_time_there_is() -> None:
    runs, _ = bursts(seconds=0.0)
    assert runs == [("a", BURST + 1), ("b", BURST + 1)] * MIN_SAMPLES


def test_median_lies_between_the_quartiles() -> None:
    _, timed = bursts(seconds=60.0)
    assert timed.keys() == {"a", "b"}
    for latency in latencies({"a": lambda: None}, batch_size=7, seconds=0, device=CPU).values():
        assert latency.batch_size == 7
        assert 0 < latency.lower_us <= latency.median_us <= latency.upper_us


def test_machine_is_named_as_torch_sees_it() -> None:
    machine = this_machine(CPU)
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.gpu is None
    assert machine.vector_isa == torch.backends.cpu.get_cpu_capability()
    assert (machine.threads, machine.torch) == (torch.get_num_threads(), torch.__version__)
