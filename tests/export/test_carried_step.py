"""How the gate runs a step: each row on its own state, arrays that no other step sees."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.carried_step import CarriedStep, StepFault
from export.comparison import ParityError
from export.episodes import EpisodeMaker, Moment
from export.loaders.protocol import LoadedStep
from export.loaders.torch_step import TorchStep
from export.manifest import step_inputs, step_outputs
from export.process import plain_process
from export.tamiyo_step import TamiyoStep
from export.weights import pack_weights, rebuild
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import small_v2, trained
from tests.gate import gate_of

Arrays = Mapping[str, NDArray[Any]]

SPEC = small_v2(extras=True)
ROWS = 256
LARGEST = 64


class HandWritten:
    """A step that is what `run` does to inputs and outputs, at each call."""

    name = "hand-written"
    device = "cpu"

    def __init__(self, run: Callable[[Arrays, Arrays], None]) -> None:
        self._run = run

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        return lambda: self._run(inputs, outputs)


def zeros(inputs: Arrays, outputs: Arrays) -> None:
    for array in outputs.values():
        array[...] = 0


def counting(inputs: Arrays, outputs: Arrays) -> None:
    """In c, how many steps were made; in h, the sum of the first features seen."""
    zeros(inputs, outputs)
    outputs["state_c_out"][...] = inputs["state_c_in"] + 1
    outputs["state_h_out"][...] = inputs["state_h_in"] + inputs["observation"][:, :1, None]


@pytest.fixture(scope="module")
def policy() -> FactoredRecurrentActorCritic:
    return trained(SPEC)


@pytest.fixture
def maker(policy: FactoredRecurrentActorCritic) -> EpisodeMaker:
    return maker_of(policy)


def maker_of(policy: FactoredRecurrentActorCritic) -> EpisodeMaker:
    rebuilt = rebuild(pack_weights(policy, None), SPEC, torch.device("cpu"))
    return EpisodeMaker(rebuilt, LARGEST)


def right(policy: FactoredRecurrentActorCritic) -> LoadedStep:
    return TorchStep(
        "right", TamiyoStep(policy, None).eval(), step_inputs(SPEC), step_outputs(SPEC)
    )


def carried(step: LoadedStep, spec: PolicySpec = SPEC) -> CarriedStep:
    return CarriedStep(step, spec, num_rows=ROWS, largest=ROWS)


def moments(maker: EpisodeMaker, number: int) -> list[Moment]:
    return list(islice(maker.moments(maker.episodes[0]), number))


def test_each_row_goes_on_from_its_own_state_whatever_batches_it_is_in(
    maker: EpisodeMaker,
) -> None:
    """Against sums over steps, made row by row without any batch."""
    step = carried(HandWritten(counting))
    shape = (ROWS, SPEC.num_layers, SPEC.hidden_dim)
    h, c = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for moment in moments(maker, 30):
        assert len({*moment.batch_size.tolist()}) > 1
        outputs = step.run(moment)
        for row in range(ROWS):
            if moment.begins[row]:
                h[row], c[row] = (part[row].numpy() for part in moment.begin_state)
            h[row] += moment.observation[row, 0].numpy()
            c[row] += 1
        np.testing.assert_array_equal(outputs["state_h_out"].numpy(), h)
        np.testing.assert_array_equal(outputs["state_c_out"].numpy(), c)


def test_step_sees_each_row_of_every_input_in_its_batch(maker: EpisodeMaker) -> None:
    seen: list[dict[str, NDArray[Any]]] = []

    def recording(inputs: Arrays, outputs: Arrays) -> None:
        seen.append({name: array.copy() for name, array in inputs.items()})
        zeros(inputs, outputs)

    moment = moments(maker, 1)[0]
    carried(HandWritten(recording)).run(moment)
    start = moment.restarted((torch.zeros(ROWS, 1, 32), torch.zeros(ROWS, 1, 32)))
    given = moment.inputs(SPEC, start)
    assert [array.name for array in step_inputs(SPEC)] == list(given)
    for batch, rows in zip(seen, moment.batches, strict=True):
        assert batch.keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_array_equal(batch[name], array[rows].numpy())


def test_what_is_not_written_shows(maker: EpisodeMaker) -> None:
    outputs = carried(HandWritten(lambda inputs, outputs: None)).run(moments(maker, 1)[0])
    for name, array in outputs.items():
        assert (array == -1).all() if name == "action" else array.isnan().all()


@pytest.mark.parametrize("name", [array.name for array in step_outputs(SPEC)])
def test_output_that_is_left_out_shows_though_a_call_before_wrote_it(
    name: str, maker: EpisodeMaker
) -> None:
    is_forgetful = False

    def forgetful(inputs: Arrays, outputs: Arrays) -> None:
        for other, array in outputs.items():
            if other != name or not is_forgetful:
                array[...] = 0

    step = carried(HandWritten(forgetful))
    first, second = moments(maker, 2)
    assert (step.run(first)[name] == 0).all()
    is_forgetful = True
    after = step.run(second)[name]
    assert (after == -1).all() if name == "action" else after.isnan().all()


@pytest.mark.parametrize("name", [array.name for array in step_outputs(SPEC)])
def test_gate_stops_a_step_that_leaves_out_an_output(
    name: str, policy: FactoredRecurrentActorCritic
) -> None:
    gate = gate_of(policy, max_batch_size=LARGEST)
    step = right(policy)

    class Omitting:
        name, device = "it", "cpu"

        def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
            elsewhere = {other: np.zeros_like(array) for other, array in outputs.items()}
            kept = {other: array for other, array in outputs.items() if other != omitted}
            return step.bind(inputs, elsewhere | kept)

    omitted = name
    with plain_process(), pytest.raises(ParityError, match=rf"it differs from the policy: {name}"):
        gate.check({"it": Omitting()})


@pytest.mark.parametrize("name", [array.name for array in step_inputs(SPEC)])
def test_step_that_writes_to_an_input_is_found(name: str, maker: EpisodeMaker) -> None:
    def writing(inputs: Arrays, outputs: Arrays) -> None:
        zeros(inputs, outputs)
        array = inputs[name]
        array[-1] = ~array[-1] if array.dtype == np.bool_ else array[-1] + 1

    with pytest.raises(StepFault, match=rf"the step writes to its input '{name}' \(batch size \d+"):
        carried(HandWritten(writing)).run(moments(maker, 1)[0])


@pytest.mark.parametrize("row", [0, -1])
def test_step_that_writes_to_any_row_of_a_larger_batch_is_found(
    row: int, maker: EpisodeMaker
) -> None:
    def writing(inputs: Arrays, outputs: Arrays) -> None:
        zeros(inputs, outputs)
        if len(inputs["observation"]) > 1:
            inputs["observation"][row, 0] += 1

    with pytest.raises(StepFault, match="the step writes to its input 'observation'"):
        carried(HandWritten(writing)).run(moments(maker, 1)[0])


def test_step_that_fails_is_told_of_with_its_batch_size(maker: EpisodeMaker) -> None:
    def failing(inputs: Arrays, outputs: Arrays) -> None:
        zeros(inputs, outputs)
        if len(inputs["observation"]) == 5:
            raise RuntimeError("no kernel for five\nat line 3")

    step = carried(HandWritten(failing))
    five = next(moment for moment in moments(maker, 50) if 5 in moment.batch_size)
    with pytest.raises(StepFault, match=r"^the step fails: no kernel for five \(batch size 5\)$"):
        step.run(five)


def spoil(inputs: Arrays) -> None:
    """Writes to all of them what no policy could make sense of."""
    for array in inputs.values():
        array[...] = True if array.dtype == np.bool_ else 3


def test_step_that_spoils_its_inputs_leaves_the_moment_and_the_next_step_alone(
    maker: EpisodeMaker, policy: FactoredRecurrentActorCritic
) -> None:
    def spoiling(inputs: Arrays, outputs: Arrays) -> None:
        zeros(inputs, outputs)
        spoil(inputs)

    moment = moments(maker, 1)[0]
    with plain_process():
        alone = {name: array.clone() for name, array in carried(right(policy)).run(moment).items()}
        with pytest.raises(StepFault):
            carried(HandWritten(spoiling)).run(moment)
        after = carried(right(policy)).run(moment)
    again = moments(maker_of(policy), 1)[0]
    for name, array in moment.inputs(SPEC, moment.begin_state).items():
        assert torch.equal(array, again.inputs(SPEC, again.begin_state)[name]), name
    assert all(torch.equal(after[name], array) for name, array in alone.items())


@pytest.mark.parametrize("is_first", [True, False])
def test_gate_blames_the_step_that_spoils_its_inputs_and_not_the_one_beside_it(
    is_first: bool, policy: FactoredRecurrentActorCritic
) -> None:
    step = right(policy)

    class Spoiling:
        name, device = "vandal", "cpu"

        def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
            call = step.bind(inputs, outputs)

            def run() -> None:
                call()
                spoil(inputs)

            return run

    steps = {"vandal": Spoiling(), "right": right(policy)}
    names = list(steps) if is_first else list(reversed(steps))
    gate = gate_of(policy, max_batch_size=LARGEST)
    with plain_process(), pytest.raises(ParityError) as error:
        gate.check({name: steps[name] for name in names})
    assert str(error.value).startswith("vandal differs from the policy: the step writes to its inp")


def test_steps_side_by_side_each_go_on_from_their_own_states(
    policy: FactoredRecurrentActorCritic,
) -> None:
    """One that drifts is blamed for it, and not the right one that runs before and after it."""
    step = TamiyoStep(policy, None).eval()

    def drifting(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        action, log_prob, value, h, c, *extra = step(*inputs)
        return action, log_prob, value, h, c + 4e-6, *extra

    arrays = step_inputs(SPEC), step_outputs(SPEC)
    steps = {
        "first": right(policy),
        "drifting": TorchStep("drifting", drifting, *arrays),
        "last": right(policy),
    }
    gate = gate_of(policy, max_batch_size=LARGEST)
    with plain_process():
        with pytest.raises(ParityError, match=r"^drifting differs .*step [1-9]"):
            gate.check(steps)
        runs = gate.check({"first": steps["first"], "last": steps["last"]}).runs
    assert runs["first"].max_error == runs["last"].max_error


def test_batch_larger_than_the_step_was_made_for_is_no_silent_truncation(
    maker: EpisodeMaker,
) -> None:
    moment = replace(moments(maker, 1)[0], batches=[torch.arange(ROWS)])
    small = CarriedStep(HandWritten(zeros), SPEC, num_rows=ROWS, largest=ROWS - 1)
    with pytest.raises(ValueError, match="output array does not match"):
        small.run(moment)
