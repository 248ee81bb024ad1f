"""The exported step against stable_baselines3's own `predict()` and `policy.forward()`, one thread.

`python -m benchmarks.sb3` prints a table for each policy: of default sizes, as drawn, saved by the
trainer and read from its zip. `predict()` gives actions and the actor's states; `forward()`, on
tensors, all that the exported step gives. No episode begins, which is the trainer's faster way.
Every format is loaded from its file, compared with the trainer, and timed in turn with it.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from benchmarks.step import bound, loaded
from export.formats import FORMATS
from export.report import Latency
from export.sb3_step import SB3Step
from export.timing import Call, latencies, this_machine
from model.sb3.checkpoint import load_sb3
from model.sb3.policy import SB3Policy

ENVIRONMENTS = (1, 32, 256)
POLICIES = {"RecurrentPPO": "MlpLstmPolicy", "MaskablePPO": "MlpPolicy"}
OBSERVATION = spaces.Box(-1.0, 1.0, (32,), np.float32)
ACTION = spaces.MultiDiscrete([3, 4, 2])
DEVICE = torch.device("cpu")
ATOL = 2e-5


class Still(gymnasium.Env):
    """Never stepped: a trainer asks an environment for its spaces."""

    observation_space = OBSERVATION
    action_space = ACTION


def trained(algorithm: str) -> tuple[Any, SB3Step]:
    """A model as its trainer draws it, and the step that is exported of it."""
    torch.manual_seed(0)
    model = getattr(sb3_contrib, algorithm)(POLICIES[algorithm], Still(), device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.zip"
        model.save(path)
        checkpoint = load_sb3(path, path.read_bytes())
    policy = SB3Policy(checkpoint.spec).eval()
    policy.load_state_dict(checkpoint.state_dict)
    return model, SB3Step(policy, None).eval()


class Inputs:
    """What both sides are given: arrays, and the tensors that `forward()` takes."""

    def __init__(self, model: Any, step: SB3Step, environments: int) -> None:
        rng = np.random.default_rng(environments)
        self.model, self.policy = model, model.policy
        self.policy.set_training_mode(False)
        self.observation = rng.uniform(-1, 1, (environments, 32)).astype(np.float32)
        self.is_recurrent = bool(step.spec.states)
        self.mask = np.ones((environments, step.spec.num_choices), np.bool_)
        if not self.is_recurrent:
            self.mask = rng.random(self.mask.shape) < 0.7
            self.mask[:, np.cumsum([0, *step.spec.head_sizes[:-1]])] = True
        self.states = [
            rng.uniform(-1, 1, (environments, *of.shape)).astype(np.float32)
            for of in step.spec.states
        ]

    def exported(self) -> tuple[torch.Tensor, ...]:
        noise = np.zeros(self.mask.shape, np.float32)
        return tuple(map(torch.from_numpy, (self.observation, self.mask, noise, *self.states)))

    def trainer(self) -> dict[str, Call]:
        if not self.is_recurrent:
            masks = {"action_masks": self.mask}
            tensor, _ = self.policy.obs_to_tensor(self.observation)
            return {
                "predict": partial(
                    self.model.predict, self.observation, deterministic=True, **masks
                ),
                "forward": partial(self.policy.forward, tensor, deterministic=True, **masks),
            }
        h, c, *of_critic = (state.transpose(1, 0, 2).copy() for state in self.states)
        tensor, _ = self.policy.obs_to_tensor(self.observation)
        starts = np.zeros(len(self.observation), np.bool_)
        tensors = [torch.from_numpy(state) for state in (h, c, *of_critic)]
        states = RNNStates((tensors[0], tensors[1]), (tensors[2], tensors[3]))
        begins = torch.from_numpy(starts.astype(np.float32))
        return {
            "predict": partial(
                self.model.predict, self.observation, (h, c), starts, deterministic=True
            ),
            "forward": partial(self.policy.forward, tensor, states, begins, deterministic=True),
        }


def check(got: tuple[torch.Tensor, ...], action: Any, forward: Any) -> None:
    """Both must do the same, or their times are not comparable."""
    np.testing.assert_array_equal(got[0].numpy(), action)
    np.testing.assert_allclose(got[1].sum(1), forward[2], atol=ATOL)
    np.testing.assert_allclose(got[2], forward[1].flatten(), atol=ATOL)
    if len(got) > 3:
        for have, want in zip(got[3:], [*forward[3].pi, *forward[3].vf], strict=True):
            np.testing.assert_allclose(have, want.transpose(0, 1), atol=ATOL)


def measure(
    algorithm: str, formats: list[str], seconds: float
) -> Iterator[tuple[int, Mapping[str, Latency]]]:
    model, source = trained(algorithm)
    steps = {name: loaded(name, source, DEVICE) for name in formats}
    for environments in ENVIRONMENTS:
        inputs = Inputs(model, source, environments)
        calls = inputs.trainer()
        (action, _), forward = calls["predict"](), calls["forward"]()
        for name, step in steps.items():
            call, got = bound(step, source.spec, inputs.exported())
            call()
            check(got, action, forward)
            calls[name] = call
        yield (
            environments,
            latencies(calls, batch_size=environments, seconds=seconds, device=DEVICE),
        )


def print_table(algorithm: str, rows: list[tuple[int, Mapping[str, Latency]]]) -> None:
    print(f"\n{algorithm}: µs a step, medians (times as fast as predict(), as forward())\n")
    names = list(rows[0][1])
    print("| environments | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for environments, times in rows:
        cells = []
        for name, latency in times.items():
            cell = f"{latency.median_us:.0f}"
            if name in FORMATS:
                ratios = (times[of].median_us / latency.median_us for of in ("predict", "forward"))
                cell += " (" + ", ".join(f"{ratio:.1f} x" for ratio in ratios) + ")"
            cells.append(cell)
        print(f"| {environments} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="which, by commas")
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = this_machine(DEVICE)
    print(f"{machine.cpu}, {machine.vector_isa}, torch {machine.torch}, 1 thread")
    for algorithm in options.policies:
        with torch.no_grad():
            rows = list(measure(algorithm, options.formats.split(","), options.seconds))
        print_table(algorithm, rows)


if __name__ == "__main__":
    main()
