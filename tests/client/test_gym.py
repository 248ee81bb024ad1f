"""A vector environment's loop, whatever form its masks and actions have."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from numpy.typing import NDArray

from model.spec import PolicySpec
from tamiyo_client import wrap
from tests.client.environments import Counting
from tests.running_server import RunningServer

NUM_ENVS = 3
ONLY = 1
"""The choice of the op head that masks leave."""


class Masked(Counting):
    """Allows one op, and says so in `form`; environment 0 says nothing."""

    def __init__(self, spec: PolicySpec, index: int, form: str) -> None:
        super().__init__(spec, index, 9)
        self._form = form
        if form == "dict action":
            self.action_space = gymnasium.spaces.Dict(  # type: ignore[assignment]
                {head.name: gymnasium.spaces.Discrete(head.size) for head in spec.heads}
            )
        if form == "method":
            self.action_masks = lambda: self._by_head(np.bool_)

    def _by_head(self, dtype: Any) -> dict[str, NDArray[Any]]:
        masks = {head.name: np.ones(head.size, dtype) for head in self._spec.heads}
        masks[self._spec.op_head][:] = 0
        masks[self._spec.op_head][ONLY] = 1
        return masks

    def _info(self) -> dict[str, Any]:
        by_head = self._by_head(np.int8)
        if self._index == 0 or self._form == "method":
            return {}
        masks: dict[str, Any] = {
            "dict": by_head,
            "dict action": by_head,
            "tuple": tuple(by_head.values()),
            "side by side": np.concatenate(list(by_head.values())),
        }
        return {"action_mask": masks[self._form]}

    def step(self, action: Any) -> Any:
        if isinstance(action, Mapping):
            action = np.array([action[head] for head in self._spec.head_names])
        return super().step(action)


@pytest.mark.parametrize("form", ["dict", "dict action", "side by side", "method"])
def test_masks_reach_the_policy(server: RunningServer, spec: PolicySpec, form: str) -> None:
    envs = SyncVectorEnv([partial(Masked, spec, at, form) for at in range(NUM_ENVS)])
    ops: list[list[int]] = []
    with wrap(envs, server.address, seed=1) as policy:
        observations, infos = policy.reset()
        for _ in range(30):
            act = policy.act(observations, infos)
            observations, _, _, _, infos = policy.step(act)
            ops.append(act.action[spec.op_head].tolist())
    by_row = np.array(ops).T
    first = 0 if form == "method" else 1
    assert (by_row[first:] == ONLY).all()
    assert first == 0 or len(set(by_row[0].tolist())) > 1  # it said nothing, and all is allowed
    envs.close()


def test_a_tuple_of_masks_for_each_row_reaches_the_policy(
    server: RunningServer, spec: PolicySpec
) -> None:
    """As gymnasium collects what is no array: row by row, in an array of objects."""
    envs = SyncVectorEnv(
        [partial(Masked, spec, at, "tuple") for at in range(NUM_ENVS)],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    with wrap(envs, server.address, seed=1) as policy:
        observations, infos = policy.reset()
        for _ in range(8):
            act = policy.act(observations, infos)
            assert (act.action[spec.op_head][1:] == ONLY).all()
            observations, _, _, _, infos = policy.step(act)
    envs.close()


@pytest.mark.parametrize("form", ["dict", "side by side", "tuple"])
def test_what_was_allowed_stays_so_while_others_are_reset(
    server: RunningServer, spec: PolicySpec, form: str
) -> None:
    """Gymnasium's infos after a reset of some rows are of those alone."""
    envs = SyncVectorEnv(
        [partial(Masked, spec, at, form) for at in range(1, NUM_ENVS)],
        autoreset_mode=AutoresetMode.DISABLED,
    )
    with wrap(envs, server.address, seed=1) as policy:
        observations, infos = policy.reset()
        for step in range(9):
            act = policy.act(observations, infos)
            assert (act.action[spec.op_head] == ONLY).all()
            observations, _, _, _, infos = policy.step(act)
            if step % 3 == 1:
                rows = np.array([True, False])
                observations, infos = policy.reset(options={"reset_mask": rows})
    envs.close()


@pytest.mark.parametrize("form", ["dict", "side by side", "tuple"])
def test_a_row_whose_reset_says_nothing_has_all_allowed_and_the_others_theirs(
    server: RunningServer, spec: PolicySpec, form: str
) -> None:
    envs = SyncVectorEnv(
        [partial(SilentAtReset, spec, at, form) for at in range(1, NUM_ENVS)],
        autoreset_mode=AutoresetMode.DISABLED,
    )
    freed = set()
    with wrap(envs, server.address, seed=1) as policy:
        observations, infos = policy.reset()
        for _ in range(20):
            _, _, _, _, infos = policy.step(policy.act(observations, infos))
            rows = np.array([True, False])
            observations, infos = policy.reset(options={"reset_mask": rows})
            act = policy.act(observations, infos)
            assert act.action[spec.op_head][1] == ONLY
            freed.add(int(act.action[spec.op_head][0]))
            observations, infos = policy.reset()
    assert len(freed) > 1
    envs.close()


def test_the_masks_heeded_are_those_that_are_given(server: RunningServer, spec: PolicySpec) -> None:
    envs = SyncVectorEnv([partial(Masked, spec, 1, "dict")] * 2)
    other = {head: np.array(mask) for head, mask in Masked(spec, 1, "dict")._by_head(int).items()}
    other[spec.op_head] = np.roll(other[spec.op_head], 1)
    with wrap(envs, server.address) as policy:
        observations, _ = policy.reset()
        given = {"action_mask": {head: np.stack([mask, mask]) for head, mask in other.items()}}
        act = policy.act(observations, given)
        assert (act.action[spec.op_head] == ONLY + 1).all()
    envs.close()


class SilentAtReset(Masked):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0], {}


class ListMasked(Counting):
    """As sb3-contrib's environments say it: one flat list."""

    def action_masks(self) -> list[bool]:
        by_head = Masked(self._spec, 1, "method")._by_head(np.bool_)
        masks: list[bool] = np.concatenate(list(by_head.values())).tolist()
        return masks


def test_masks_of_a_method_reach_the_policy_through_a_wrapper_and_as_a_list(
    server: RunningServer, spec: PolicySpec
) -> None:
    envs = RecordEpisodeStatistics(SyncVectorEnv([partial(ListMasked, spec, 1, 9)] * 2))
    with wrap(envs, server.address, autoreset_mode="next_step") as policy:
        observations, infos = policy.reset()
        for _ in range(4):
            act = policy.act(observations, infos)
            assert (act.action[spec.op_head] == ONLY).all()
            observations, _, _, _, infos = policy.step(act)
    envs.close()


class OfItsOwnKind(VectorEnv[Any, Any, Any]):
    """Two environments in one piece, that answers `call`."""

    def __init__(self, spec: PolicySpec) -> None:
        self.num_envs = 2
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_action_space = gymnasium.spaces.MultiDiscrete([h.size for h in spec.heads])
        self._spec = spec

    def reset(self, **options: Any) -> Any:
        return np.ones((2, self._spec.observation_dim), np.float32), {}

    def step(self, actions: Any) -> Any:
        return *self.reset()[:1], np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), {}

    def call(self, name: str) -> Any:
        return [getattr(ListMasked(self._spec, 1, 9), name)()] * 2


def test_a_vector_of_its_own_kind_is_asked_for_masks_too(
    server: RunningServer, spec: PolicySpec
) -> None:
    with wrap(OfItsOwnKind(spec), server.address) as policy:
        observations, infos = policy.reset()
        act = policy.act(observations, infos)
        assert (act.action[spec.op_head] == ONLY).all()
        policy.step(act)


@pytest.mark.parametrize("form", ["dict", "side by side", "tuple"])
def test_where_an_episode_is_over_nothing_needs_to_be_allowed(
    server: RunningServer, spec: PolicySpec, form: str
) -> None:
    """With gymnasium's default mode the last observation is shown, and the action ignored."""
    envs = SyncVectorEnv([partial(SilentAtItsEnd, spec, at, form) for at in (1, 2)])
    with wrap(envs, server.address) as policy:
        observations, infos = policy.reset()
        for _ in range(25):
            act = policy.act(observations, infos)
            observations, _, _, _, infos = policy.step(act)
    envs.close()


class SilentAtItsEnd(Masked):
    """Allows nothing any more."""

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        if self._step == self._length:
            masks = info["action_mask"]
            if isinstance(masks, dict):
                return {"action_mask": {head: mask * 0 for head, mask in masks.items()}}
            nothing = tuple(m * 0 for m in masks) if isinstance(masks, tuple) else masks * 0
            return {"action_mask": nothing}
        return info


@pytest.mark.parametrize("has_masks", [False, True])
def test_an_asynchronous_vector_survives_being_asked_for_masks(
    server: RunningServer, spec: PolicySpec, has_masks: bool
) -> None:
    make = partial(Masked, spec, 1, "method") if has_masks else partial(Counting, spec, 1, 9)
    envs = AsyncVectorEnv([make] * NUM_ENVS, context="fork")
    with wrap(envs, server.address, seed=1) as policy:
        observations, infos = policy.reset()
        for _ in range(4):
            act = policy.act(observations, infos)
            observations, _, _, _, infos = policy.step(act)
            assert not has_masks or (act.action[spec.op_head] == ONLY).all()
    envs.close()


@pytest.mark.parametrize("kind", ["Tuple", "MultiDiscrete", "Dict"])
def test_an_action_has_its_space_s_form_and_its_first_choice_s_name(
    server: RunningServer, spec: PolicySpec, kind: str
) -> None:
    discrete = [gymnasium.spaces.Discrete(head.size, start=5) for head in spec.heads]
    sizes = [head.size for head in spec.heads]
    space: gymnasium.Space[Any] = {
        "Tuple": gymnasium.spaces.Tuple(discrete),
        "Dict": gymnasium.spaces.Dict(dict(zip(spec.head_names, discrete, strict=True))),
        "MultiDiscrete": gymnasium.spaces.MultiDiscrete(sizes, start=[5] * len(sizes)),
    }[kind]
    envs = SyncVectorEnv([partial(Spaced, spec, space)] * 2)
    with wrap(envs, server.address) as policy:
        observations, infos = policy.reset()
        for _ in range(5):  # each environment asserts that the action is its space's
            observations, _, _, _, infos = policy.step(policy.act(observations, infos))
    envs.close()


def test_a_space_of_other_heads_is_refused(server: RunningServer, spec: PolicySpec) -> None:
    envs = SyncVectorEnv([partial(Spaced, spec, gymnasium.spaces.Discrete(3))])
    with wrap(envs, server.address) as policy:
        observations, infos = policy.reset()
        with pytest.raises(TypeError, match=r"takes 1 choices, and the policy makes 8: slot, "):
            policy.step(policy.act(observations, infos))
    envs.close()


class Spaced(Counting):
    def __init__(self, spec: PolicySpec, space: gymnasium.Space[Any]) -> None:
        super().__init__(spec, 0, 9)
        self.action_space = space

    def step(self, action: Any) -> Any:
        if isinstance(self.action_space, gymnasium.spaces.Tuple):
            action = tuple(action)
        assert self.action_space.contains(action), action
        return super().step(np.zeros(len(self._spec.heads), np.int64))
