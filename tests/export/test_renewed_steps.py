"""A loaded step with other parameters is, to the bit, what an export of those would load."""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from export.formats import FORMATS, StepSource
from export.loaders.load import RUNTIME_OF
from export.loaders.machine import machine_capability
from export.loaders.protocol import RenewableStep
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import ArtifactError, Precision, step_inputs, step_outputs
from export.tamiyo_step import TamiyoStep
from export.weights import pack, pack_weights
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import fresh, small_v1, small_v2, statistics
from tests.loaded_step import allocated, load
from tests.machine import needs_bf16
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    random_state,
)

NUM_STEPS = 4
NUM_ROWS = (1, 16)
STATES = {"state_h_in": "state_h_out", "state_c_in": "state_c_out"}
Arrays = dict[str, NDArray[Any]]


class Case(NamedTuple):
    """A policy's form: two policies of it differ in every weight, and in their statistics."""

    spec: PolicySpec
    has_normalizer: bool = False
    precision: Precision = "fp32"


CASES = {
    "v1": Case(small_v1()),
    "v1 of 2 layers, normaliser": Case(small_v1(num_layers=2), True),
    "v2 with value scale 1": Case(small_v2(extras=True)),
    "v2 of 2 layers, floors, extras, normaliser": Case(
        small_v2(extras=True, floors=True, num_layers=2, value_scale=3.0), True
    ),
    "v1 in bf16": Case(small_v1(), True, "bf16"),
    "v2 in bf16": Case(small_v2(extras=True, value_scale=3.0), False, "bf16"),
}
FP32 = [name for name, case in CASES.items() if case.precision == "fp32"]
V2 = "v2 of 2 layers, floors, extras, normaliser"
HAVING = [
    *[("onnx", name) for name in FP32[1:]],
    *[("torchscript", name) for name in CASES],
    *[("pt2", name) for name in ("v1", V2, "v1 in bf16")],
    ("aoti", V2),
]


def by_format_and_case(having: Sequence[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("format_name", "name"),
        [
            pytest.param(*of, id=", ".join(of), marks=needs_bf16 if "bf16" in of[1] else ())
            for of in having
        ],
    )


@cache
def policy_of(name: str, seed: int) -> FactoredRecurrentActorCritic:
    """Seed 0 is one before training: what is zero, one or equal in it is so in no other."""
    spec = CASES[name].spec
    return random_policy(spec, seed) if seed else fresh(spec)


def normalizer_of(name: str, seed: int) -> ObservationNormalizer | None:
    if not CASES[name].has_normalizer:
        return None
    one = statistics(CASES[name].spec.observation_dim)
    return ObservationNormalizer(one.mean + seed, one.var * (1 + seed))


@cache
def written(format_name: str, name: str, seed: int) -> bytes:
    step = TamiyoStep(policy_of(name, seed), normalizer_of(name, seed), CASES[name].precision)
    return FORMATS[format_name].write(StepSource(step, max(NUM_ROWS)))


def exported(format_name: str, name: str, seed: int) -> RenewableStep:
    requires = machine_capability("cpu") if FORMATS[format_name].is_native else None
    content = written(format_name, name, seed)
    return load(content, RUNTIME_OF[format_name], CASES[name].spec, requires=requires)


def parameters_of(name: str, seed: int) -> Arrays:
    case = CASES[name]
    weights = pack_weights(policy_of(name, seed), normalizer_of(name, seed))
    return pack(weights, case.spec, case.precision)


class Stepping:
    """A step bound to arrays, and some steps of its rows from one state."""

    def __init__(self, step: RenewableStep, spec: PolicySpec, num_rows: int) -> None:
        self._spec = spec
        self._num_rows = num_rows
        self._inputs = allocated(step_inputs(spec), num_rows)
        self._outputs = allocated(step_outputs(spec), num_rows)
        self._step = step.bind(self._inputs, self._outputs)

    def run(self) -> list[Arrays]:
        rng = np.random.default_rng(self._num_rows)
        h, c = random_state(self._spec, rng, self._num_rows)
        self._inputs["state_h_in"][:], self._inputs["state_c_in"][:] = h, c
        steps = []
        for _ in range(NUM_STEPS):
            masks = random_masks(self._spec, rng, self._num_rows)
            given: Arrays = {
                "observation": random_observations(self._spec, rng, self._num_rows),
                "action_mask": packed(self._spec, masks),
                "noise": gumbel_noise(self._spec, rng, self._num_rows),
            }
            if self._spec.has_slot_by_op:
                given["slot_by_op_mask"] = random_slots_by_op(self._spec, rng, masks["op"])
                given["blueprint_index"] = random_blueprints(self._spec, rng, self._num_rows)
            for name, array in given.items():
                self._inputs[name][:] = array
            self._step()
            steps.append({name: array.copy() for name, array in self._outputs.items()})
            for into, out in STATES.items():
                self._inputs[into][:] = self._outputs[out]
        return steps


def run(step: RenewableStep, spec: PolicySpec, num_rows: int) -> list[Arrays]:
    return Stepping(step, spec, num_rows).run()


def check_equal(got: list[Arrays], expected: list[Arrays]) -> None:
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, array in other.items():
            np.testing.assert_array_equal(one[name], array, f"step {at}: {name}")


@by_format_and_case(HAVING)
def test_a_step_with_other_parameters_is_what_an_export_of_those_would_load(
    format_name: str, name: str
) -> None:
    spec = CASES[name].spec
    first = exported(format_name, name, 0)
    bound = [Stepping(first, spec, num_rows) for num_rows in NUM_ROWS]
    before = [each.run() for each in bound]
    renewed = first.with_parameters(parameters_of(name, 1))
    expected = [run(exported(format_name, name, 1), spec, num_rows) for num_rows in NUM_ROWS]
    again = renewed.with_parameters(parameters_of(name, 0))
    for at, num_rows in enumerate(NUM_ROWS):
        check_equal(run(renewed, spec, num_rows), expected[at])
        check_equal(bound[at].run(), before[at])  # it goes on as it was, and what is bound to it
        check_equal(run(first, spec, num_rows), before[at])
        check_equal(run(again, spec, num_rows), before[at])
        for array in ("log_prob", "value", "state_h_out", *spec.extra_outputs):
            assert not np.array_equal(expected[at][0][array], before[at][0][array]), array
    assert (renewed.name, renewed.device) == (first.name, first.device)


@by_format_and_case(HAVING[:-1])  # machine code has pt2's graph, and takes long to load
def test_no_parameter_is_there_for_nothing(format_name: str, name: str) -> None:
    """With any one of them another, the step does something else."""
    spec, own = CASES[name].spec, parameters_of(name, 1)
    step = exported(format_name, name, 1)
    expected = run(step, spec, 16)
    rng = np.random.default_rng(1)
    for parameter, array in own.items():
        other = array.copy()
        if array.dtype == np.uint16:  # of bfloat16: an exponent of two more, or less
            other ^= np.uint16(0x0100)
        else:
            other += rng.uniform(0.5, 1, array.shape).astype(np.float32)
        got = run(step.with_parameters(own | {parameter: other}), spec, 16)
        differs = [
            output
            for one, two in zip(got, expected, strict=True)
            for output, values in two.items()
            if not np.array_equal(one[output], values)
        ]
        assert differs, parameter


@pytest.mark.parametrize("name", FP32[1:])
def test_onnx_names_every_parameter_and_reads_it_whatever_it_is(name: str) -> None:
    """Biases of zeros, LayerNorms of ones, equal arrays and a value scale of 1 among them."""
    graph = onnx.load_from_string(written("onnx", name, 0)).graph
    own = parameters_of(name, 0)
    assert any(not array.any() for array in own.values())
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    read = {given for node in graph.node for given in node.input}
    assert own.keys() <= held.keys() & read
    for parameter, array in own.items():
        assert held[parameter].dtype == array.dtype
        np.testing.assert_array_equal(held[parameter], array, parameter)


def test_the_runtime_that_compiles_takes_no_parameters_and_says_so() -> None:
    step = load(written("pt2", "v1", 0), "compile", CASES["v1"].spec)
    with pytest.raises(ArtifactError, match=r"^compile takes no new parameters: it would compile"):
        step.with_parameters(parameters_of("v1", 1))


@needs_bf16
def test_machine_code_with_bf16_products_takes_no_parameters_and_says_so() -> None:
    step = exported("aoti", "v1 in bf16", 1)
    before = run(step, CASES["v1"].spec, 1)
    with pytest.raises(ArtifactError, match=r"its parameters cannot be replaced: .* bf16 products"):
        step.with_parameters(parameters_of("v1 in bf16", 2))
    check_equal(run(step, CASES["v1"].spec, 1), before)


@pytest.mark.parametrize("format_name", ["torchscript", "pt2"])
def test_a_parameter_that_a_file_has_not_is_named(format_name: str) -> None:
    step = exported(format_name, "v1", 0)
    other = parameters_of("v1", 1) | {"features.mean": np.zeros(21, dtype=np.float32)}
    with pytest.raises(ArtifactError, match=r"it has none called 'features\.mean'"):
        step.with_parameters(other)


def test_a_file_frozen_by_an_earlier_release_runs_and_takes_no_parameters() -> None:
    """Its TorchScript had become one graph of constants before it was written."""
    case = CASES["v1"]
    step = TamiyoStep(policy_of("v1", 1), None).eval()
    content = io.BytesIO()
    with torch.no_grad(), torch_speaks_of_itself():
        traced = torch.jit.trace(step, step.example(batch_size=2))  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), content)
    frozen = load(content.getvalue(), "torchscript", case.spec)
    for num_rows in NUM_ROWS:
        expected = run(exported("torchscript", "v1", 1), case.spec, num_rows)
        check_equal(run(frozen, case.spec, num_rows), expected)
    with pytest.raises(ArtifactError, match="its parameters cannot be replaced: it has none"):
        frozen.with_parameters(parameters_of("v1", 2))
