"""How long calls take: medians and quartiles, in turn, on a machine that is named.

The calls take turns in short bursts, so that a machine that slows down is slow for all of them,
and the first call of a burst is not counted: it pays for the caches the others used.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from export.report import Latency, Machine

Call = Callable[[], object]

BURST = 5
MIN_SAMPLES = 9
MAX_SAMPLES = 60


def latencies(
    calls: Mapping[str, Call], *, batch_size: int, seconds: float, device: torch.device
) -> dict[str, Latency]:
    """Times all calls for about `seconds` together: 9 to 60 samples of 5 calls, of each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    for count in range(MAX_SAMPLES):
        if count >= MIN_SAMPLES and time.perf_counter() > end:
            break
        for name, call in calls.items():
            samples[name].append(_microseconds(call, device))
    return {name: _latency(taken, batch_size) for name, taken in samples.items()}


def this_machine(device: torch.device) -> Machine:
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        vector_isa=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _microseconds(call: Call, device: torch.device) -> float:
    call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(BURST):
        call()
    _wait(device)
    return (time.perf_counter() - start) / BURST * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _latency(samples: list[float], batch_size: int) -> Latency:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Latency(batch_size=batch_size, median_us=median, lower_us=lower, upper_us=upper)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
