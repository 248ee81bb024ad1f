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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from export.artifact import Artifact, open_artifact
from export.loaders.load import FORMAT_OF, first_line
from export.loaders.protocol import LoadedStep
from export.manifest import Device, Manifest, step_inputs, step_outputs, timed_sizes
from model.step_spec import StepSpec
from service.runtime.arrays import Arrays, allocate, decisions, first
from service.runtime.keeping_step import KeepingStep
from service.runtime.load import keeps_states_there, load_runtime, runs_on, with_states

logger = logging.getLogger(__name__)

CANDIDATES = ("onnx", "torchscript", "aoti")
"""`eager` is slower than each of these, and `compile` takes a compiler and a minute."""
SECONDS_PER_BATCH_SIZE = 0.05
ROWS_COMPARED = 256
"""At each batch size: or one batch's, where that is more."""
TIMEOUT_S = 120.0


class Measurement(NamedTuple):
    """The shortest step in seconds at the timed sizes; are rows alike at all, bit for bit?"""

    seconds: dict[int, float]
    rows_are_alike: bool


def choose_runtime(
    artifact: Artifact,
    *,
    device: Device,
    num_threads: int,
    batch_sizes: Sequence[int],
    tf32: bool = False,
) -> str:
    """The runtime that serves the artifact best on this machine; the log says why.

    One whose rows are the same whatever batch they ride in comes before any other, then the
    fastest over the timed sizes. It is one for all sizes: two would answer differently.
    """
    names = _candidates(artifact.manifest, device)
    if len(names) == 1:
        return names[0]
    measured: dict[str, Measurement] = {}
    for name in names:
        command = [sys.executable, "-m", __name__, str(artifact.directory), artifact.sha256]
        command += [name, device, str(num_threads), *map(str, batch_sizes)]
        command += ["--tf32"] * tf32
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
            )
            seconds, rows_are_alike = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            logger.warning("auto: %s does not run here: %s", name, _reason(error))
            continue
        measured[name] = Measurement({int(k): s for k, s in seconds.items()}, rows_are_alike)
    if not measured:
        return names[0]  # loading it says what is wrong
    chosen = best(measured)
    for batch_size in _timed(batch_sizes):
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


def _reason(error: Exception) -> str:
    """Why there is no measurement, in a line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"to measure it takes longer than {error.timeout:g} s"
    if isinstance(error, subprocess.CalledProcessError) and error.returncode > 0:
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else str(error)
    return str(error)  # of a signal, as a rule


def best(measured: Mapping[str, Measurement]) -> str:
    """Of those with rows alike, or of all where there is none, the fastest in geometric mean."""
    alike = [name for name, measurement in measured.items() if measurement.rows_are_alike]
    return min(
        alike or measured,
        key=lambda name: sum(math.log(s) for s in measured[name].seconds.values()),
    )


def measure(runtime: LoadedStep, spec: StepSpec, batch_sizes: Sequence[int]) -> Measurement:
    """Compares rows at every batch size the service uses, then times the runtime at some.

    What keeps its states is timed without those being brought and taken away.
    """
    is_alike = rows_are_alike(runtime, spec, batch_sizes)
    given, outputs_of = _some_rows(spec, batch_sizes[-1]), step_outputs(spec)
    if isinstance(runtime, KeepingStep):
        given = {name: array for name, array in given.items() if name in runtime.inputs}
        outputs_of = decisions(spec)
    seconds = {}
    for batch_size in _timed(batch_sizes):
        outputs = allocate(outputs_of, batch_size)
        seconds[batch_size] = _shortest_s(runtime.bind(first(given, batch_size), outputs))
    return Measurement(seconds, is_alike)


def rows_are_alike(runtime: LoadedStep, spec: StepSpec, batch_sizes: Sequence[int]) -> bool:
    """Does each row come out the same, bit for bit, anywhere in a batch of any of these sizes?

    They ascend from 1, or are a single one. Rows are compared with what they are alone, or in other
    places of a batch where there is but one size. At each size every place of a batch is taken, and
    every row is in some batch: of as many rows as the largest batch has, but 256 of them where it
    has more.
    """
    smallest, largest = batch_sizes[0], batch_sizes[-1]
    given = _some_rows(spec, largest)
    apart = _answers(runtime, spec, given, np.arange(largest), batch_size=smallest)
    rng = np.random.default_rng(1)
    for batch_size in batch_sizes:
        num_batches = -(-min(largest, ROWS_COMPARED) // batch_size)
        rows = np.resize(_in_other_places(rng.permutation(largest)), num_batches * batch_size)
        together = _answers(runtime, spec, given, rows, batch_size=batch_size)
        for name, array in together.items():
            if array.tobytes() != apart[name][rows].tobytes():
                return False
    return True


def _in_other_places(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows, each in the place of the one before it in that order.

    Wherever places part into some that are alike and others, a row goes from these to those.
    """
    rows = np.empty_like(order)
    rows[order] = np.roll(order, 1)
    return rows


def _timed(batch_sizes: Sequence[int]) -> list[int]:
    """Those of them that are timed."""
    return [size for size in timed_sizes(batch_sizes[-1]) if size in batch_sizes]


def _some_rows(spec: StepSpec, num_rows: int) -> Arrays:
    rng = np.random.default_rng(0)
    rows = allocate(step_inputs(spec), num_rows)
    rows["observation"][:] = rng.normal(size=rows["observation"].shape)
    rows["noise"][:] = rng.gumbel(size=rows["noise"].shape)
    for state in spec.states:
        rows[state.input][:] = rng.uniform(-0.9, 0.9, size=rows[state.input].shape)
    return rows


def _answers(
    runtime: LoadedStep,
    spec: StepSpec,
    given: Arrays,
    rows: NDArray[np.int64],
    *,
    batch_size: int,
) -> Arrays:
    """What the runtime gives these of the given rows, by name, in batches of that size."""
    inputs = allocate(step_inputs(spec), batch_size)
    outputs = allocate(step_outputs(spec), batch_size)
    step = runtime.bind(inputs, outputs)
    batches: dict[str, list[NDArray[Any]]] = {name: [] for name in outputs}
    for batch in rows.reshape(-1, batch_size):
        for name, array in given.items():
            inputs[name][:] = array[batch]
        step()
        for name, array in outputs.items():
            batches[name].append(array.copy())
    return {name: np.concatenate(arrays) for name, arrays in batches.items()}


def _shortest_s(step: Callable[[], None]) -> float:
    for _ in range(3):
        step()
    times_s: list[float] = []
    end_s = time.perf_counter() + SECONDS_PER_BATCH_SIZE
    while not times_s or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


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
    parser.add_argument("batch_sizes", type=int, nargs="+")
    parser.add_argument("--tf32", action="store_true")
    given = parser.parse_args()
    try:
        measured = _measured(given)
    except Exception as error:  # told in a line: of CUDA's errors the last ones say nothing
        sys.stderr.write(f"\n{first_line(error)}\n")
        return 1
    sys.stdout.write(json.dumps(measured))
    return 0


def _measured(given: argparse.Namespace) -> Measurement:
    """As it would serve: on a device with its states there, and captured."""
    manifest = open_artifact(given.directory, sha256=given.manifest_sha256).manifest
    runtime: LoadedStep = load_runtime(
        given.directory,
        manifest,
        name=given.name,
        device=given.device,
        num_threads=given.num_threads,
    )
    if keeps_states_there(runtime):
        sizes = given.batch_sizes
        there = with_states(
            runtime, manifest, num_rows=2 * sizes[-1], batch_sizes=sizes, tf32=given.tf32
        )
        there.warm_up()
        runtime = KeepingStep(there, manifest.spec)
    return measure(runtime, manifest.spec, given.batch_sizes)


if __name__ == "__main__":
    raise SystemExit(main())
