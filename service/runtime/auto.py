"""Which of an artifact's formats `--runtime auto` serves here: measured at start, not assumed.

Each candidate runs in a process of its own, `python -m service.runtime.auto`: so the server does
not import torch to find out that it does not need it, and machine code that this CPU cannot run
takes nobody down. It is told which manifest, by SHA-256, and measures no other.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from export.artifact import Artifact, open_artifact
from export.loaders.load import FORMAT_OF
from export.loaders.protocol import LoadedStep
from export.manifest import Device, Manifest, bucket_sizes, step_inputs, step_outputs
from model.spec import PolicySpec
from service.runtime.arrays import allocate, first
from service.runtime.load import load_runtime, runs_on

logger = logging.getLogger(__name__)

CANDIDATES = ("onnx", "torchscript", "aoti")
"""`eager` is slower than each of these, and `compile` takes a compiler and a minute."""
SECONDS_PER_BATCH_SIZE = 0.05
TIMEOUT_S = 120.0


class Measurement(NamedTuple):
    """The shortest step in seconds by batch size; do rows come out alike at each, bit for bit?"""

    seconds: dict[int, float]
    rows_are_alike: bool


def choose_runtime(
    artifact: Artifact, *, device: Device, num_threads: int, max_batch_size: int
) -> str:
    """The runtime that serves the artifact best on this machine; the log says why.

    One whose rows are the same whatever batch they ride in comes before any other, then the
    fastest over all batch sizes. It is one for all of them: two would answer differently.
    """
    names = _candidates(artifact.manifest, device)
    if len(names) == 1:
        return names[0]
    measured: dict[str, Measurement] = {}
    for name in names:
        command = [sys.executable, "-m", __name__, str(artifact.directory), artifact.sha256]
        command += [name, device, str(num_threads), str(max_batch_size)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
            )
            seconds, rows_are_alike = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            logger.warning("auto: %s does not run here: %s", name, reason.strip().split("\n")[-1])
            continue
        measured[name] = Measurement({int(k): s for k, s in seconds.items()}, rows_are_alike)
    if not measured:
        return names[0]  # loading it says what is wrong
    chosen = best(measured)
    for batch_size in bucket_sizes(max_batch_size):
        times = (
            f"{name} {measurement.seconds[batch_size] * 1e6:.0f} us"
            for name, measurement in measured.items()
        )
        logger.info("auto: batch of %d: %s; %s", batch_size, ", ".join(times), chosen)
    alike = measured[chosen].rows_are_alike
    logger.info(
        "auto: %s; a row's answer %s on its batch here",
        chosen,
        "does not depend" if alike else "depends in its last bits",
    )
    return chosen


def best(measured: Mapping[str, Measurement]) -> str:
    """Of those with rows alike, or of all where there is none, the fastest in geometric mean."""
    alike = [name for name, measurement in measured.items() if measurement.rows_are_alike]
    return min(
        alike or measured,
        key=lambda name: sum(math.log(s) for s in measured[name].seconds.values()),
    )


def measure(runtime: LoadedStep, spec: PolicySpec, batch_sizes: Sequence[int]) -> Measurement:
    """Times the runtime at each batch size, and compares the rows of each with the largest's."""
    largest = max(batch_sizes)
    inputs = allocate(step_inputs(spec), largest)
    rng = np.random.default_rng(0)
    for name in ("observation", "noise", "state_c_in"):
        inputs[name][:] = rng.normal(size=inputs[name].shape)
    inputs["state_h_in"][:] = rng.uniform(-0.9, 0.9, size=inputs["state_h_in"].shape)
    seconds = {}
    by_size = {}
    for batch_size in batch_sizes:
        by_size[batch_size] = allocate(step_outputs(spec), batch_size)
        step = runtime.bind(first(inputs, batch_size), by_size[batch_size])
        for _ in range(3):
            step()
        times: list[float] = []
        end_s = time.perf_counter() + SECONDS_PER_BATCH_SIZE
        while not times or time.perf_counter() < end_s:
            started_s = time.perf_counter()
            step()
            times.append(time.perf_counter() - started_s)
        seconds[batch_size] = min(times)
    rows_are_alike = all(
        np.array_equal(array, by_size[largest][name][:batch_size])
        for batch_size, outputs in by_size.items()
        for name, array in outputs.items()
    )
    return Measurement(seconds, rows_are_alike)


def _candidates(manifest: Manifest, device: Device) -> list[str]:
    """Runtimes that can run here; where none can, one that says why when it is loaded."""
    names = [name for name in CANDIDATES if runs_on(name, manifest, device)]
    return names or [name for name, of in FORMAT_OF.items() if of in manifest.formats][:1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures one runtime for auto, as JSON.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("manifest_sha256")
    parser.add_argument("name", choices=CANDIDATES)
    parser.add_argument("device", choices=get_args(Device))
    parser.add_argument("num_threads", type=int)
    parser.add_argument("max_batch_size", type=int)
    given = parser.parse_args()
    manifest = open_artifact(given.directory, sha256=given.manifest_sha256).manifest
    runtime = load_runtime(
        given.directory,
        manifest,
        name=given.name,
        device=given.device,
        num_threads=given.num_threads,
    )
    measured = measure(runtime, manifest.spec, bucket_sizes(given.max_batch_size))
    sys.stdout.write(json.dumps(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
