"""What Stable-Baselines3's own code makes of a model.zip: a program, which imports nothing of ours.

It unpickles what it is given, which runs the code in it. `export.crosscheck.recording` starts it.
"""

import argparse
import importlib
import pickle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

START, ALLOWED = 0.15, 0.7
"""The share of rows whose episode begins anew, and of choices that a mask allows."""
WIDE = 1e3
"""A Box with more than this between its bounds is drawn near 0, or near the statistics."""
FAR = 2.0

Arrays = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module")
    parser.add_argument("--algorithm")
    parser.add_argument("--model")
    parser.add_argument("--statistics")
    parser.add_argument("--record")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--environments", type=int)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    algorithm = getattr(importlib.import_module(options.module), options.algorithm)
    statistics = None
    if options.statistics is not None:
        importlib.import_module("stable_baselines3.common.vec_env")
        with open(options.statistics, "rb") as file:
            statistics = pickle.load(file)
    trainer = Trainer(algorithm.load(options.model, device="cpu"), statistics)
    rng = np.random.default_rng(options.seed)
    trainer.space.seed(options.seed)
    with torch.no_grad():
        steps = [trainer.step(options.environments, rng) for _ in range(options.steps)]
    record = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    # By NumPy's stub a keyword might be `allow_pickle`.
    np.savez(options.record, **record)  # type: ignore[arg-type]


class Trainer:
    """A model, and the VecNormalize saved beside it, if any. The states are carried here.

    A step gives observations as an environment does, flattened as the trainer flattens them, then
    what the trainer makes of them: `[environments, ...]`, float32, int64, and uint8 for booleans.
    """

    def __init__(self, model: Any, statistics: Any) -> None:
        self.model = model
        self.policy = model.policy
        self.policy.set_training_mode(False)
        self.space = model.observation_space
        self.sizes = choices(model.action_space)
        self.statistics = statistics
        self.is_recurrent = hasattr(self.policy, "lstm_actor")
        self.is_maskable = hasattr(self.policy.action_dist, "apply_masking")
        self.states: Any = None

    def step(self, environments: int, rng: np.random.Generator) -> Arrays:
        observation = self.drawn(environments, rng)
        seen = (
            observation if self.statistics is None else self.statistics.normalize_obs(observation)
        )
        starts = rng.random(environments) < START
        if self.states is None:
            starts[:] = True
        mask = self.masks(environments, rng)
        acted = self.recurrent(seen, starts) if self.is_recurrent else self.plain(seen, mask)
        return {
            "observation": self.flat(observation),
            "action_mask": mask.astype(np.uint8),
            "episode_start": starts.astype(np.uint8),
            **acted,
        }

    def recurrent(self, seen: Any, starts: NDArray[np.bool_]) -> Arrays:
        from sb3_contrib.common.recurrent.type_aliases import RNNStates

        policy = self.policy
        if self.states is None:
            layers, _, hidden = policy.lstm_hidden_state_shape
            zeros = torch.zeros(layers, len(starts), hidden)
            self.states = RNNStates((zeros, zeros), (zeros, zeros))
        begins = torch.from_numpy(starts.astype(np.float32))
        tensor, _ = policy.obs_to_tensor(seen)
        distribution, _ = policy.get_distribution(tensor, self.states.pi, begins)
        _, value, _, carried = policy.forward(tensor, self.states, begins, deterministic=True)
        before = tuple(array.numpy() for array in self.states.pi)
        action, after = self.model.predict(seen, before, starts, deterministic=True)
        self.states = RNNStates(tuple(map(torch.from_numpy, after)), carried.vf)
        arrays = dict(zip(("h", "c"), self.states.pi, strict=True))
        if policy.lstm_critic is not None:
            arrays |= zip(("critic_h", "critic_c"), self.states.vf, strict=True)
        states = {name: array.numpy().transpose(1, 0, 2) for name, array in arrays.items()}
        return self.answer(action, distribution, value) | states

    def plain(self, seen: Any, mask: NDArray[np.bool_]) -> Arrays:
        self.states = ()
        masks = {"action_masks": mask} if self.is_maskable else {}
        tensor, _ = self.policy.obs_to_tensor(seen)
        distribution = self.policy.get_distribution(tensor, **masks)
        action, _ = self.model.predict(seen, deterministic=True, **masks)
        return self.answer(action, distribution, self.policy.predict_values(tensor))

    def answer(self, action: NDArray[Any], distribution: Any, value: torch.Tensor) -> Arrays:
        return {
            "action": action.reshape(len(value), len(self.sizes)).astype(np.int64),
            "log_prob": log_probs(distribution).numpy(),
            "value": value.flatten().numpy(),
        }

    def masks(self, environments: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Something of each head's is allowed, and everything by a trainer without masks."""
        if not self.is_maskable:
            return np.ones((environments, sum(self.sizes)), np.bool_)
        heads = []
        for size in self.sizes:
            one = np.eye(size, dtype=np.bool_)[rng.integers(size, size=environments)]
            heads.append(one | (rng.random((environments, size)) < ALLOWED))
        return np.concatenate(heads, axis=1)

    def flat(self, observation: Any) -> NDArray[np.float32]:
        """As the network reads it, but for the statistics."""
        from stable_baselines3.common.policies import BasePolicy

        tensor, _ = self.policy.obs_to_tensor(observation)
        extractor = self.policy.pi_features_extractor
        features = BasePolicy.extract_features(self.policy, tensor, extractor)
        flat: NDArray[np.float32] = features.numpy().astype(np.float32)
        return flat

    def drawn(self, environments: int, rng: np.random.Generator) -> Any:
        """Observations `[environments, ...]`, of a Dict by its keys."""
        rows = [self.space.sample() for _ in range(environments)]
        if not isinstance(rows[0], dict):
            return self.near(np.stack(rows), rng)
        return self.near({key: np.stack([row[key] for row in rows]) for key in rows[0]}, rng)

    def near(self, sampled: Any, rng: np.random.Generator) -> Any:
        """`sampled`, but for numbers without near bounds, and in what float32 has."""
        keys = sampled if isinstance(sampled, dict) else None
        normal: Any
        if keys is None:
            normal = rng.normal(scale=FAR, size=sampled.shape)
        else:
            normal = {key: rng.normal(scale=FAR, size=keys[key].shape) for key in keys}
        if self.statistics is not None:
            normal = self.statistics.unnormalize_obs(normal)
        if keys is None:
            return within(self.space, sampled, normal)
        return {key: within(self.space[key], keys[key], normal[key]) for key in keys}


def within(space: Any, sampled: NDArray[Any], normal: NDArray[Any]) -> NDArray[Any]:
    if not hasattr(space, "low"):
        return sampled
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    is_wide = ~(high - low < WIDE)
    drawn = np.where(is_wide, np.clip(normal, low, high), sampled)
    return drawn.astype(np.float32).astype(space.dtype)


def choices(space: Any) -> list[int]:
    """The heads' sizes."""
    if hasattr(space, "nvec"):
        return [int(size) for size in space.nvec]
    n = int(space.n)
    return [n] if type(space).__name__ == "Discrete" else [2] * n


def log_probs(distribution: Any) -> torch.Tensor:
    """Of every choice, `[environments, choices]`."""
    inner = getattr(distribution, "distributions", None) or distribution.distribution
    if isinstance(inner, torch.distributions.Bernoulli):
        both = torch.stack((-inner.logits, inner.logits), dim=2)
        return torch.nn.functional.logsigmoid(both).flatten(1)
    return torch.cat([of.logits for of in (inner if isinstance(inner, list) else [inner])], dim=1)


if __name__ == "__main__":
    main()
