"""A probe finds one number that is off, wherever it is, and says which and by how much."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.manifest import Manifest, step_inputs, step_outputs
from model.spec import PolicySpec
from service.engine.probe import Probe
from service.errors import Invalid
from tests.loaded_step import allocated
from tests.service.fakes import SummingRuntime

ROWS, STEPS = 33, 4
LARGEST_BATCH = 5
"""Its probe is run in batches of so many rows, of which the last is not full."""
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def few(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"max_batch_size": LARGEST_BATCH})


def probe_of(spec: PolicySpec) -> tuple[Arrays, Arrays]:
    """What goes in and comes out where all rows step in one batch."""
    rng = np.random.default_rng(2)
    inputs, outputs = allocated(step_inputs(spec), ROWS), allocated(step_outputs(spec), ROWS)
    run = SummingRuntime(spec).bind(inputs, outputs)
    states = {state.input: state.output for state in spec.states}
    for name in states:
        inputs[name][:] = rng.normal(size=inputs[name].shape)
    given = {name: inputs[name].copy() for name in states}
    steps: list[Arrays] = []
    for _ in range(STEPS):
        for name in ("observation", "noise"):
            inputs[name][:] = rng.normal(size=inputs[name].shape)
        inputs["action_mask"][:] = True
        run()
        steps.append({name: array.copy() for name, array in (inputs | outputs).items()})
        for into, out in states.items():
            inputs[into][:] = outputs[out]
    stacked = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    return {n: stacked[n] for n in inputs} | given, {n: stacked[n] for n in outputs}


def test_what_the_same_step_does_has_no_error_in_whatever_batches(
    spec: PolicySpec, manifest: Manifest, few: Manifest
) -> None:
    probe = Probe(*probe_of(spec))
    for of in (manifest, few):
        assert probe.error(SummingRuntime(spec), of, unit=1.0) == 0.0


@settings(max_examples=60)
@given(data=st.data())
def test_a_number_that_is_off_is_found_and_named(
    spec: PolicySpec, few: Manifest, data: st.DataObject
) -> None:
    inputs, outputs = probe_of(spec)
    name = data.draw(st.sampled_from([*outputs]))
    where = tuple(data.draw(st.integers(0, size - 1)) for size in outputs[name].shape)
    got = outputs[name][where]
    wrong = got + 1 if name == "action" else got + np.float32(0.01)
    outputs[name][where] = wrong
    at = "".join(f"[{index}]" for index in where)
    numbers = f"is {outputs[name][where]:.9g}, and with these parameters the step gives {got:.9g}"
    with pytest.raises(Invalid, match="^" + re.escape(f"`probe.{name}{at}` {numbers}: they are")):
        Probe(inputs, outputs).error(SummingRuntime(spec), few, unit=1.0)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_within_the_tolerance(
    spec: PolicySpec, few: Manifest, number: float
) -> None:
    inputs, outputs = probe_of(spec)
    outputs["value"][3, 32] = number
    with pytest.raises(Invalid, match=r"^`probe\.value\[3\]\[32\]` is "):
        Probe(inputs, outputs).error(SummingRuntime(spec), few, unit=1.0)
    loaded = SummingRuntime(spec)
    loaded.spoil = lambda decided: decided["value"].fill(number)
    with pytest.raises(Invalid, match=r"the step gives -?(nan|inf): they are not"):
        Probe(*probe_of(spec)).error(loaded, few, unit=1.0)


@pytest.mark.parametrize(("name", "is_in_returns"), [("value", True), ("log_prob", False)])
def test_the_error_is_weighed_by_what_is_allowed_and_returns_are_in_their_unit(
    spec: PolicySpec, few: Manifest, name: str, is_in_returns: bool
) -> None:
    atol, rtol = few.parity.atol, few.parity.rtol
    inputs, outputs = probe_of(spec)
    outputs[name].flat[-1] += np.float32(3 * atol + 3 * rtol * abs(outputs[name].flat[-1]))
    off = abs(float(outputs[name].flat[-1]) - float(probe_of(spec)[1][name].flat[-1]))
    probe = Probe(inputs, outputs)
    with pytest.raises(Invalid):
        probe.error(SummingRuntime(spec), few, unit=1.0)
    if not is_in_returns:
        with pytest.raises(Invalid):
            probe.error(SummingRuntime(spec), few, unit=10.0)
        return
    allowed = 10 * atol + rtol * abs(float(outputs[name].flat[-1]))
    expected = off * atol / allowed
    got = probe.error(SummingRuntime(spec), few, unit=10.0)
    assert got == pytest.approx(expected, rel=0.05)


def test_a_value_that_is_worth_nothing_has_no_error_and_no_warning(
    spec: PolicySpec, manifest: Manifest
) -> None:
    inputs, outputs = probe_of(spec)
    outputs["value"][:] = 0.0
    runtime = SummingRuntime(spec).with_parameters({"scale": np.zeros(1, dtype=np.float32)})
    assert Probe(inputs, outputs).error(runtime, manifest, unit=0.0) == 0.0


@pytest.mark.parametrize("share", [-0.5, 0.5])
def test_the_error_of_a_large_number_is_what_it_would_be_of_a_small_one(
    spec: PolicySpec, few: Manifest, share: float
) -> None:
    """`Parity` has it so: by how much of what is allowed it is off, times the absolute part."""
    atol, rtol, scale = few.parity.atol, few.parity.rtol, np.float32(10_000)
    step = SummingRuntime(spec).with_parameters({"scale": np.array([scale])})
    inputs, outputs = probe_of(spec)
    outputs["value"] *= scale
    largest = np.abs(outputs["value"]).argmax()
    got = float(outputs["value"].flat[largest])
    outputs["value"].flat[largest] += np.float32(share * (atol + rtol * abs(got)))
    expected = float(outputs["value"].flat[largest])
    assert rtol * abs(expected) > 100 * atol
    error = abs(got - expected) * atol / (atol + rtol * abs(expected))
    assert Probe(inputs, outputs).error(step, few, unit=1.0) == pytest.approx(error, rel=1e-5)
