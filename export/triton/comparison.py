"""Both graphs for Triton, driven in onnxruntime beside the artifact's own step, to the bit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.loaders.load import load_step
from export.loaders.protocol import LoadedStep
from export.manifest import Array, Manifest
from export.triton.graph import START, carried

STEPS = 6
STARTING_SHARE = 0.3
ALLOWED_SHARE = 0.8

Arrays = dict[str, NDArray[Any]]


class GraphError(Exception):
    """The graph for the sequence batcher does not do what the step does; the message says where."""


def load_graph(content: bytes, inputs: Sequence[Array], manifest: Manifest) -> LoadedStep:
    """An ONNX graph of the artifact's outputs, on this machine's CPU.

    Raises ArtifactError where it cannot be loaded, or takes and gives other arrays.
    """
    return load_step(
        content,
        name="onnx",
        file=manifest.formats["onnx"],
        inputs=inputs,
        outputs=manifest.outputs,
        device="cpu",
        num_threads=1,
    )


def check_sequence_graph(step: LoadedStep, sequence_step: LoadedStep, manifest: Manifest) -> None:
    """Raises GraphError unless the second graph is the first one with rows that may start.

    Carried on for some steps at several batch sizes up to the largest. A row that starts has NaN
    where its state was, and has to equal the step from zeros; in all others START changes nothing.
    """
    rng = np.random.default_rng(0)
    largest = manifest.max_batch_size
    for num_rows in sorted({min(size, largest) for size in (1, 2, 7, largest)}):
        _compare(step, sequence_step, manifest, num_rows, rng)


def _compare(
    step: LoadedStep,
    sequence_step: LoadedStep,
    manifest: Manifest,
    num_rows: int,
    rng: np.random.Generator,
) -> None:
    told, given = (_allocated((*manifest.inputs, START), num_rows) for _ in range(2))
    expected, got = (_allocated(manifest.outputs, num_rows) for _ in range(2))
    run, run_sequence = step.bind(told, expected), sequence_step.bind(given, got)
    for at in range(STEPS):
        for name, array in _drawn(manifest, num_rows, rng).items():
            told[name][...] = given[name][...] = array
        starts = rng.random(num_rows) < STARTING_SHARE if at else np.ones(num_rows, dtype=np.bool_)
        given[START.name][:, 0] = starts
        for name, output in carried(manifest.spec).items():
            told[name][...] = given[name][...] = expected[output]
            told[name][starts], given[name][starts] = 0.0, np.nan
        run()
        run_sequence()
        for name, array in expected.items():
            if array.tobytes() != got[name].tobytes():
                raise GraphError(
                    f"with {START.name} the step gives another {name} (batch size {num_rows})"
                )


def _allocated(arrays: tuple[Array, ...], num_rows: int) -> Arrays:
    """Zeros, by name."""
    return {
        array.name: np.zeros((num_rows, *map(int, array.shape[1:])), dtype=array.dtype)
        for array in arrays
    }


def _drawn(manifest: Manifest, num_rows: int, rng: np.random.Generator) -> Arrays:
    """What a client sends."""
    drawn: Arrays = {}
    for array in manifest.inputs:
        shape = (num_rows, *map(int, array.shape[1:]))
        if array.dtype == "bool":
            drawn[array.name] = rng.random(shape) < ALLOWED_SHARE
        elif array.dtype == "int64":
            drawn[array.name] = rng.integers(-1, manifest.spec.num_blueprints, shape)
        elif array.name not in carried(manifest.spec):
            drawn[array.name] = rng.normal(size=shape)
    return drawn
