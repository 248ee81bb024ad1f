"""A learner in miniature: its actors' states live in the server while it pushes what it learns.

Two vectors act all the time, episodes start at random, and after each update the learner pushes. It
must find in every answer, by `evaluate_actions` with the weights of the version that it names, the
log-probs and values that its algorithm will divide by.
"""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import push_policy
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import State
from model.spec import PolicySpec
from tamiyo_client import VectorAct, VectorPolicyClient
from tests.export.gate_cases import statistics
from tests.pushes import Learner
from tests.random_inputs import (
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    tensors,
)
from tests.running_server import running_server
from tests.specs import TINY_V1, TINY_V2

SPECS = {
    "v1": TINY_V1.model_copy(update={"num_layers": 2}),
    "v2": TINY_V2,
}
NUM_PUSHES = 52
NUM_ACTORS = 2
NUM_ENVS = 6
ROLLOUT_STEPS = 3
START_SHARE = 0.15
LEARNING_RATE = 3e-3
ATOL = 2e-5
WAIT_S = 60.0
Arrays = Mapping[str, NDArray[Any]]


class Seen(NamedTuple):
    """One step of an actor: what its environments showed, and what it was told to do."""

    observations: NDArray[np.float32]
    masks: Arrays
    inputs: Arrays
    starts: NDArray[np.bool_]
    act: VectorAct

    def masks_by_name(self) -> dict[str, Tensor]:
        """`[B, 1, n]`."""
        masks = dict(self.masks)
        if "slot_by_op_mask" in self.inputs:
            masks["slot_by_op"] = self.inputs["slot_by_op_mask"]
        return {name: mask[:, None] for name, mask in tensors(masks).items()}

    def blueprints(self) -> Tensor | None:
        index = self.inputs.get("blueprint_index")
        return None if index is None else torch.from_numpy(index)[:, None]


class Actor(threading.Thread):
    """Acts rollout after rollout, as fast as they are taken."""

    def __init__(self, url: str, spec: PolicySpec, seed: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._spec = spec
        self._seed = seed
        self.seen: list[Seen] = []
        self.rollouts: Queue[list[Seen] | Exception] = Queue(maxsize=2)
        self.start()

    def run(self) -> None:
        try:
            with VectorPolicyClient(
                self._url, NUM_ENVS, autoreset_mode="disabled", seed=self._seed
            ) as client:
                rng = np.random.default_rng(self._seed)
                for _ in range(NUM_PUSHES + 1):
                    rollout = [self._step(client, rng) for _ in range(ROLLOUT_STEPS)]
                    self.rollouts.put(rollout, timeout=WAIT_S)
        except Exception as error:
            self.rollouts.put(error, timeout=WAIT_S)

    def _step(self, client: VectorPolicyClient, rng: np.random.Generator) -> Seen:
        spec = self._spec
        observations = random_observations(spec, rng, NUM_ENVS)
        masks = random_masks(spec, rng, NUM_ENVS)
        inputs: dict[str, NDArray[Any]] = {}
        if spec.has_slot_by_op:
            inputs["slot_by_op_mask"] = random_slots_by_op(spec, rng, masks["op"])
            inputs["blueprint_index"] = random_blueprints(spec, rng, NUM_ENVS)
        starts = rng.random(NUM_ENVS) < (START_SHARE if self.seen else 1.0)
        act = client.act(observations, masks, episode_start=starts, inputs=inputs)
        self.seen.append(Seen(observations, masks, inputs, starts, act))
        return self.seen[-1]

    def rollout(self) -> list[Seen]:
        rollout = self.rollouts.get(timeout=WAIT_S)
        if isinstance(rollout, Exception):
            raise rollout
        return rollout


class Evaluated(NamedTuple):
    log_prob: Tensor  # [B, heads]
    value: Tensor  # [B]
    state: State


def evaluated(learner: Learner, seen: Seen, state: State) -> Evaluated:
    """What the learner's policy says of a step that was taken, from the state before it."""
    observations = torch.from_numpy(seen.observations)
    if learner.normalizer is not None:
        observations = learner.normalizer(observations)
    goes_on = torch.from_numpy(~seen.starts)[:, None, None]
    h, c = (half * goes_on for half in state)
    actions = {name: action[:, None] for name, action in tensors(seen.act.action).items()}
    evaluation = learner.policy.evaluate_actions(
        observations[:, None],
        actions,
        seen.masks_by_name(),
        (h, c),
        blueprint_index=seen.blueprints(),
    )
    log_prob = torch.stack([evaluation.log_prob[name][:, 0] for name in seen.act.heads], dim=-1)
    return Evaluated(log_prob, evaluation.value[:, 0], evaluation.state)


def update(learner: Learner, optimizer: torch.optim.Optimizer, rollouts: list[list[Seen]]) -> None:
    """One step of policy gradients, towards op 0, through time; and statistics that move on."""
    optimizer.zero_grad()
    for rollout in rollouts:
        state = learner.policy.initial_state(NUM_ENVS)
        for seen in rollout:
            log_prob, value, state = evaluated(learner, seen, state)
            reward = torch.from_numpy(seen.act.action["op"] == 0).float()
            advantage = reward - value.detach()
            loss = ((value - reward) ** 2 - log_prob.sum(-1) * advantage).mean()
            (loss / len(rollout)).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in learner.policy.lstm.parameters())
    optimizer.step()
    if learner.normalizer is not None:
        shown = np.concatenate([seen.observations for rollout in rollouts for seen in rollout])
        learner.normalizer.mean.lerp_(torch.from_numpy(shown.mean(0)), 0.05)
        learner.normalizer.var.lerp_(torch.from_numpy(shown.var(0)), 0.05)


@torch.no_grad()
def check(spec: PolicySpec, actor: Actor, learners: Mapping[str, Learner]) -> set[str]:
    """Every answer of the actor is what its version's weights say; which versions there were."""
    state = random_policy(spec).initial_state(NUM_ENVS)
    for at, seen in enumerate(actor.seen):
        log_prob, value, state = evaluated(learners[seen.act.policy_version], seen, state)
        where = f"step {at}, {seen.act.policy_version}"
        np.testing.assert_allclose(seen.act.log_probs, log_prob, rtol=0, atol=ATOL, err_msg=where)
        got = seen.act.value / spec.value_scale
        np.testing.assert_allclose(got, value, rtol=0, atol=ATOL, err_msg=where)
    return {seen.act.policy_version for seen in actor.seen}


@pytest.mark.parametrize(("name", "fmt"), [("v1", "onnx"), ("v2", "torchscript")])
def test_what_actors_were_told_is_what_the_learner_s_policies_say(
    name: str, fmt: str, tmp_path: Path
) -> None:
    spec = SPECS[name]
    policy: FactoredRecurrentActorCritic = random_policy(spec).train()
    normalizer: ObservationNormalizer | None = None
    if name == "v1":
        normalizer = statistics(spec.observation_dim)
    learner = Learner(policy, normalizer)
    manifest = learner.export(tmp_path / "first", fmt)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    learners = {manifest.policy_version: copy.deepcopy(learner)}
    with running_server(tmp_path / "first") as server:
        actors = [Actor(server.address, spec, seed) for seed in range(NUM_ACTORS)]
        version = manifest.policy_version
        for _ in range(NUM_PUSHES):
            update(learner, optimizer, [actor.rollout() for actor in actors])
            learners[learner.version()] = copy.deepcopy(learner)
            answer = push_policy(policy, normalizer, server.address, if_match=version)
            assert answer.previous_version == version
            assert 0 <= answer.probe_error <= ATOL
            version = answer.policy_version
            assert version == learner.version()
        for actor in actors:
            actor.rollout()
            actor.join(WAIT_S)
        assert server.stop() == 0
        assert "Traceback" not in server.log()
    assert len(learners) == NUM_PUSHES + 1
    acted = [check(spec, actor, learners) for actor in actors]
    assert all(len(versions) > NUM_PUSHES / 2 for versions in acted), "it was pushed under them"
