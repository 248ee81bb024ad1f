"""A learner of Stable-Baselines3's pushes weights to a service of its policy."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from export import export_policy, push_policy
from export.__main__ import main
from export.manifest import Precision, step_inputs, step_outputs
from export.parity import TOLERANCES
from export.push import copied, push_body
from export.sb3_step import SB3Step
from model.sb3.policy import SB3Policy
from model.sb3.spec import Activation
from tests.model.sb3.saved_models import PATH, model
from tests.random_inputs import random_policy
from tests.running_server import RunningServer, running_server
from tests.sb3.policies import WIRINGS, random_sb3, spec_of
from tests.specs import TINY_V1

OBSERVATION = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.fixture(scope="module", params=["lstm", "none"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, SB3Policy]]:
    policy = random_sb3(spec_of(recurrence=WIRINGS[request.param]))
    output = tmp_path_factory.mktemp("pushes") / "artifact"
    export_policy(policy, None, output, name="old", formats=["onnx"], max_batch_size=8)
    with running_server(output) as server:
        yield server, policy


def values(server: RunningServer) -> Tensor:
    body = {"observation": OBSERVATION.tolist(), "deterministic": True}
    reply = httpx.post(f"{server.address}/act", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    return torch.tensor(reply.json()["value"])


def test_new_weights_are_served_once_the_probe_has_passed(
    served: tuple[RunningServer, SB3Policy],
) -> None:
    server, policy = served
    newer = random_sb3(policy.spec, seed=1)
    answer = push_policy(newer, None, server.address)
    assert answer.probe_error < 1e-4
    torch.testing.assert_close(
        values(server), newer.get_action(OBSERVATION).value, atol=1e-5, rtol=1e-5
    )
    assert push_policy(policy, None, server.address).previous_version == answer.policy_version


def test_other_networks_and_other_families_are_refused_in_a_sentence(
    served: tuple[RunningServer, SB3Policy],
) -> None:
    server, policy = served
    before = values(server)
    wider = random_sb3(spec_of(recurrence=policy.spec.recurrence, actor_layers=(11,)))
    with pytest.raises(ValueError, match=r"actor_layers\.0 is 11, expected 10$"):
        push_policy(wider, None, server.address)
    with pytest.raises(ValueError, match=r"is of another family than the one that is served, test"):
        push_policy(random_policy(TINY_V1), None, server.address)
    assert torch.equal(values(server), before)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["Tanh", "ReLU"])
def test_a_probe_shows_nothing_that_rounding_moves(
    wiring: str, precision: Precision, activation: Activation
) -> None:
    """What the step makes of it is the probe's own within half the tolerance, in bf16 too."""
    spec = spec_of(
        recurrence=WIRINGS[wiring],
        actor_layers=(64, 64),
        critic_layers=(64, 64),
        activation=activation,
    )
    policy = random_sb3(spec)
    body = load(push_body(copied(policy, None), spec, precision))
    probe = {name.removeprefix("probe."): array for name, array in body.items()}
    step, tolerance = SB3Step(policy, None, precision).eval(), TOLERANCES[precision]
    states = {of.input: probe[of.input] for of in spec.states}
    magnitudes = set()
    for at in range(len(probe["observation"])):
        given = [{**probe, **states}[array.name] for array in step_inputs(spec)]
        given = [
            array if of.name in states else array[at]
            for of, array in zip(step_inputs(spec), given, strict=True)
        ]
        magnitudes |= set(given[0].abs().amax(1).round().tolist())
        with torch.inference_mode():
            outputs = dict(zip((of.name for of in step_outputs(spec)), step(*given), strict=True))
        for name, got in outputs.items():
            expected = probe[name][at]
            allowed = tolerance.atol + tolerance.rtol * expected.abs()
            assert ((got - expected).abs() <= allowed / 2).all(), name
        states = {of.input: outputs[of.output] for of in spec.states}
    assert len(magnitudes) > 5
    if activation == "ReLU" and spec.recurrence is None:  # nothing bounds what is far there
        assert max(magnitudes) < 1e5


def test_a_model_zip_is_pushed_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / PATH, tmp_path / "artifact"
    path.write_bytes(model())
    source = ("--checkpoint", str(path))
    fast = ("--formats", "onnx", "--max-batch-size", "4")
    assert main([*source, "--output", str(output), *fast]) == 0
    capsys.readouterr()
    with running_server(output) as server:
        assert main(["push", *source, "--to", server.address]) == 0
    said = capsys.readouterr().out
    assert f"{server.address} serves sha256:" in said
