"""Every recorded policy with choices for actions, in every format and over HTTP: the trainer's own
numbers, across the resets. And a guess about a file that is wrong shows.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.__main__ import main
from export.format_kinds import FORMAT_KINDS
from export.loaders.load import RUNTIME_OF
from export.manifest import Manifest, step_inputs, step_outputs
from model.sb3.checkpoint import SB3Checkpoint, load_sb3
from model.sb3.policy import SB3Policy
from model.sb3.spec import SB3Spec
from tests.loaded_step import allocated, load
from tests.running_server import running_server
from tests.sb3.recorded import SIZES, Step, needs_recorded, statistics_of, steps, zip_file

ATOL = 1e-5
LIFT = 1e6
"""Noise that takes one choice, whatever the others are: so each one's log-prob is seen."""

pytestmark = needs_recorded


class Answers(NamedTuple):
    """What one side makes of a step; states by name."""

    action: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    value: NDArray[np.float64]
    states: dict[str, NDArray[Any]]


Side = Callable[[Step, dict[str, NDArray[Any]]], Answers]
"""A step, and the states it starts from, to what is made of them."""


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def artifact(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user makes it, from the zip alone and the statistics where there are some."""
    output = tmp_path_factory.mktemp(name) / "artifact"
    statistics = statistics_of(name)
    assert (
        main(
            [
                *("--checkpoint", str(zip_file(name)), "--output", str(output)),
                *("--formats", "all", "--max-batch-size", "8"),
                *(() if statistics is None else ("--normaliser", str(statistics))),
            ]
        )
        == 0
    )
    return output


def distance(side: Side, recorded: list[Step], spec: SB3Spec) -> float:
    """How far a side is from the recording at most, carrying its own states; actions are exact."""
    rows = len(recorded[0].value)
    states = {of.name: np.zeros((rows, *of.shape), np.float32) for of in spec.states}
    largest = 0.0
    for step in recorded:
        for state in states.values():
            state[step.starts] = 0.0
        answers = side(step, states)
        states = {of: state.copy() for of, state in answers.states.items()}
        if not np.array_equal(answers.action[step.can_act], step.action[step.can_act]):
            return np.inf
        pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
            (answers.log_probs[step.mask], step.log_probs[step.mask])
        ]
        pairs += [(answers.value, step.value)]
        pairs += [(states[of.name], step.states[of.name]) for of in spec.states]
        largest = max(largest, *(float(np.abs(got - want).max()) for got, want in pairs))
    return largest


def of_file(artifact: Path, format_name: str) -> tuple[Side, SB3Spec]:
    """The exported file, run as the service runs it."""
    manifest = Manifest.read(artifact)
    spec = manifest.spec
    assert isinstance(spec, SB3Spec)
    file = manifest.formats[format_name]
    loaded = load(file.read(artifact), RUNTIME_OF[format_name], spec, requires=file.requires)

    def run(step: Step, states: dict[str, NDArray[Any]], choice: int | None) -> dict[str, Any]:
        rows = len(step.value)
        given, outputs = allocated(step_inputs(spec), rows), allocated(step_outputs(spec), rows)
        given["observation"][:], given["action_mask"][:] = step.observation, step.mask
        for of in spec.states:
            given[of.input][:] = states[of.name]
        if choice is not None:
            given["noise"][:, choice] = LIFT
        loaded.bind(given, outputs)()
        return outputs

    def side(step: Step, states: dict[str, NDArray[Any]]) -> Answers:
        outputs = run(step, states, None)
        log_probs = np.empty(step.mask.shape)
        heads = np.repeat(np.arange(len(spec.heads)), spec.head_sizes)
        for choice, head in enumerate(heads):
            log_probs[:, choice] = run(step, states, choice)["log_prob"][:, head]
        return Answers(
            outputs["action"],
            log_probs,
            outputs["value"],
            {of.name: outputs[of.output] for of in spec.states},
        )

    return side, spec


def of_checkpoint(checkpoint: SB3Checkpoint) -> Side:
    """The eager policy."""
    policy = SB3Policy(checkpoint.spec).eval()
    policy.load_state_dict(checkpoint.state_dict)
    sizes, names = policy.heads.sizes, policy.heads.names

    @torch.inference_mode()
    def side(step: Step, states: dict[str, NDArray[Any]]) -> Answers:
        observation = torch.from_numpy(step.observation)
        if checkpoint.normalizer is not None:
            observation = checkpoint.normalizer(observation)
        masks = dict(zip(names, torch.split(torch.from_numpy(step.mask), sizes, -1), strict=True))
        state = tuple(torch.from_numpy(states[of.name]) for of in checkpoint.spec.states)
        scores = policy.step_scores(observation, state, masks)
        log_probs = scores.choices.log_probs
        packed = [log_probs[:, head, :size] for head, size in enumerate(sizes)]
        after = zip(checkpoint.spec.states, scores.state, strict=True)
        return Answers(
            log_probs.argmax(-1).numpy(),
            torch.cat(packed, dim=-1).double().numpy(),
            scores.value.numpy(),
            {of.name: array.numpy() for of, array in after},
        )

    return side


def read(name: str) -> SB3Checkpoint:
    path = zip_file(name)
    return load_sb3(path, path.read_bytes(), normaliser=statistics_of(name))


def test_the_policy_is_the_trainer_s(name: str) -> None:
    checkpoint = read(name)
    assert distance(of_checkpoint(checkpoint), steps(name), checkpoint.spec) < ATOL


@pytest.mark.parametrize("format_name", FORMAT_KINDS)
def test_every_format_is_the_trainer_s(artifact: Path, name: str, format_name: str) -> None:
    assert distance(*_with(of_file(artifact, format_name), steps(name))) < ATOL


def test_the_crosscheck_with_the_trainer_itself_agrees(
    artifact: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is in the extra `heavy`")
    statistics = statistics_of(name)
    given = () if statistics is None else ("--normaliser", str(statistics))
    command = ["crosscheck", str(zip_file(name)), "--artifact", str(artifact), "--run-pickles"]
    assert main([*command, *given]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("export: running the pickles in ")
    _, *rows = (line.split() for line in printed.out.splitlines())
    for row, format_name in zip(rows, FORMAT_KINDS, strict=False):
        assert row[0] == format_name
        assert float(row[-2]) < ATOL


def _with(side: tuple[Side, SB3Spec], recorded: list[Step]) -> tuple[Side, list[Step], SB3Spec]:
    return side[0], recorded, side[1]


@pytest.fixture(scope="module")
def address(artifact: Path) -> Iterator[str]:
    with running_server(artifact) as server:
        yield server.address


def act(address: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(f"{address}/act", json={"deterministic": True, **body}, timeout=30)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def request_of(step: Step, spec: SB3Spec) -> dict[str, Any]:
    masks = np.split(step.mask, np.cumsum(spec.head_sizes)[:-1], axis=1)
    return {
        "observation": step.observation.tolist(),
        "action_mask": {
            head: mask.tolist() for head, mask in zip(spec.head_names, masks, strict=True)
        },
    }


def packed(answer: dict[str, Any], field: str, spec: SB3Spec) -> NDArray[Any]:
    return np.stack([answer[field][head] for head in spec.head_names], axis=1)


def assert_answers(answer: dict[str, Any], step: Step, spec: SB3Spec) -> None:
    """The recorded actions, where the recorded mask allows one, their log-probs and the values."""
    action = packed(answer, "action", spec)
    np.testing.assert_array_equal(action[step.can_act], step.action[step.can_act])
    first = np.cumsum((0, *spec.head_sizes[:-1]))
    expected = np.take_along_axis(step.log_probs, action + first, axis=1)
    np.testing.assert_allclose(packed(answer, "log_prob", spec), expected, atol=ATOL, rtol=0)
    np.testing.assert_allclose(answer["value"], step.value, atol=ATOL, rtol=0)


def test_a_session_answers_as_the_trainer_does(artifact: Path, address: str, name: str) -> None:
    spec = Manifest.read(artifact).spec
    assert isinstance(spec, SB3Spec)
    for number, step in enumerate(steps(name)):
        starts = step.starts if number else np.ones_like(step.starts)
        body = {"session_id": "recorded", "step": number, "episode_start": starts.tolist()}
        assert_answers(act(address, request_of(step, spec) | body), step, spec)


def test_a_client_that_carries_the_states_gets_the_trainer_s(
    artifact: Path, address: str, name: str
) -> None:
    spec = Manifest.read(artifact).spec
    assert isinstance(spec, SB3Spec)
    states: dict[str, NDArray[Any]] = {}
    for step in steps(name):
        body = request_of(step, spec)
        for state in states.values():
            state[step.starts] = 0.0
        if states:
            body["state"] = {of: state.tolist() for of, state in states.items()}
        answer = act(address, body)
        assert_answers(answer, step, spec)
        states = {of: np.array(state) for of, state in answer.get("state", {}).items()}
        assert list(states) == [of.name for of in spec.states]
        for of, state in states.items():
            np.testing.assert_allclose(state, step.states[of], atol=ATOL, rtol=0)


def test_what_the_recorded_mask_forbids_altogether_is_refused(
    artifact: Path, address: str, name: str
) -> None:
    """The trainer answers 0 with uniform probabilities; here it is an error, as always."""
    spec = Manifest.read(artifact).spec
    assert isinstance(spec, SB3Spec)
    (step, *_) = steps(name)
    body = request_of(step, spec)
    last = spec.head_names[-1]
    body["action_mask"][last][1] = [False] * spec.head_sizes[-1]
    reply = httpx.post(f"{address}/act", json=body, timeout=30)
    assert reply.status_code == 422
    assert reply.json()["error"] == f"`action_mask.{last}` allows nothing in row 1"


def guessed(checkpoint: SB3Checkpoint, **changed: Any) -> SB3Checkpoint:
    return checkpoint._replace(spec=SB3Spec.model_validate(checkpoint.spec.model_dump() | changed))


OBVIOUS = 0.1
"""What is wrong shows by far more than any tolerance."""
RECURRENT = [name for name in SIZES if name.startswith("rppo")]
WITHOUT_A_CRITIC_LSTM = {"rppo_multidiscrete_shared_2layer", "rppo_multidiscrete_nocriticlstm"}


def far_off(side: Side, name: str, spec: SB3Spec) -> bool:
    return distance(side, steps(name), spec) > OBVIOUS


@pytest.mark.parametrize("name", [name for name in SIZES if name != "rppo_nonet"])
def test_another_activation_shows(name: str) -> None:
    checkpoint = read(name)
    other = "ReLU" if checkpoint.spec.activation == "Tanh" else "Tanh"
    wrong = guessed(checkpoint, activation=other)
    assert far_off(of_checkpoint(wrong), name, wrong.spec)


@pytest.mark.parametrize("name", [name for name, sizes in SIZES.items() if sizes != sizes[::-1]])
def test_a_reversed_nvec_shows(name: str) -> None:
    checkpoint = read(name)
    heads = [head.model_dump() for head in reversed(checkpoint.spec.heads)]
    wrong = guessed(checkpoint, heads=heads)
    assert far_off(of_checkpoint(wrong), name, wrong.spec)


@pytest.mark.parametrize("name", RECURRENT)
def test_an_ignored_reset_shows(name: str) -> None:
    checkpoint = read(name)
    recorded = [
        Step(**{**vars(step), "starts": np.zeros_like(step.starts)}) for step in steps(name)
    ]
    assert distance(of_checkpoint(checkpoint), recorded, checkpoint.spec) > OBVIOUS


@pytest.mark.parametrize("name", [name for name in RECURRENT if name not in WITHOUT_A_CRITIC_LSTM])
def test_a_critic_s_state_that_is_not_carried_shows(name: str) -> None:
    checkpoint = read(name)
    assert len(checkpoint.spec.states) == 4
    side = of_checkpoint(checkpoint)

    def forgetful(step: Step, states: dict[str, NDArray[Any]]) -> Answers:
        forgotten = {of: 0 * state for of, state in states.items() if of.startswith("critic_")}
        return side(step, states | forgotten)

    assert far_off(forgetful, name, checkpoint.spec)


def test_forgotten_statistics_show() -> None:
    checkpoint = read("rppo_vecnorm")
    wrong = guessed(checkpoint._replace(normalizer=None), normalization=None)
    assert far_off(of_checkpoint(wrong), "rppo_vecnorm", wrong.spec)


def test_another_clip_shows() -> None:
    checkpoint = read("rppo_vecnorm")
    assert checkpoint.normalizer is not None
    far = torch.tensor([[1e6, -1e6, 0.0, 0.0, 0.0, 0.0]])
    assert checkpoint.normalizer(far)[0, :2].tolist() == [5.0, -5.0]
