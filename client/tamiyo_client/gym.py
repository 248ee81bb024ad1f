"""A gymnasium vector environment and a policy on a server, as one loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tamiyo_client.vector import VectorPolicyClient
from tamiyo_client.wire import ActionMasks, VectorAct

if TYPE_CHECKING:
    from typing_extensions import Self


class VectorLoop:
    """`envs` stepped by the policy at `url`: `reset`, then `act` and `step` in turn."""

    def __init__(self, envs: Any, url: str | Sequence[str], **options: Any) -> None:
        options.setdefault("autoreset_mode", envs)
        self.envs = envs
        self.client = VectorPolicyClient(url, envs.num_envs, **options)
        self._bare = getattr(envs, "unwrapped", envs)  # wrappers of vectors have no `call`
        self._has_method = _have_action_masks(self._bare)
        self._masks: Any = None  # of the last infos

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """`envs.reset`, of which the policy is told: all rows, or those of `reset_mask`.

        What such a reset's infos do not say of the other rows' masks, they are completed by.
        """
        rows = (options.get("options") or {}).get("reset_mask")
        observations, infos = self.envs.reset(**options)
        self.client.reset(rows)
        self._masks, before = _masks_of(infos), self._masks
        if rows is not None and before is not None:
            self._masks = _merged(self._masks, before, np.asarray(rows, dtype=np.bool_))
            infos = {**infos, "action_mask": self._masks}
            infos.pop("_action_mask", None)
        return observations, infos

    def act(self, observations: Any, infos: Mapping[str, Any], **options: Any) -> VectorAct:
        """What to do; what is allowed comes from `infos["action_mask"]`, or from the environments'
        `action_masks()` where they have it."""
        masks = _masks_of(infos)
        if masks is None and self._has_method:
            masks = _stacked(self._bare.call("action_masks"))
        return self.client.act(observations, masks, **options)

    def step(self, act: VectorAct) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """`envs.step` with the action in the form that its space has."""
        observations, rewards, terminated, truncated, infos = self.envs.step(self._action(act))
        self.client.observe(terminated, truncated)
        self._masks = _masks_of(infos)
        return observations, rewards, terminated, truncated, infos

    def close(self) -> None:
        """Ends the session; the environments are their owner's."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _action(self, act: VectorAct) -> Any:
        """In the form of the action space. Raises TypeError where that has other heads."""
        space = self.envs.single_action_space
        spaces = getattr(space, "spaces", None)
        if isinstance(spaces, Mapping):
            _check_heads(spaces, act)
            return {head: act.action[head] + _start(spaces[head]) for head in spaces}
        if spaces is not None:
            _check_heads(range(len(spaces)), act)
            return tuple(
                act.multi_discrete[:, at] + _start(of_head) for at, of_head in enumerate(spaces)
            )
        if hasattr(space, "nvec"):
            _check_heads(space.nvec, act)
            return act.multi_discrete + _start(space)
        _check_heads(range(1), act)
        return act.multi_discrete[:, 0] + _start(space)


def _masks_of(infos: Mapping[str, Any]) -> Any:
    """The masks of all rows, by head, one array a head or side by side; None where there are none.

    Gymnasium fills rows without a mask, which allow everything, with zeros, or None.
    """
    if infos.get("action_mask") is None:
        return None
    return _with_all_allowed(infos["action_mask"], infos.get("_action_mask"))


def _start(space: Any) -> Any:
    """What the space's first choice is called; the policy's is 0."""
    return getattr(space, "start", 0)


def _check_heads(of_space: Any, act: VectorAct) -> None:
    if len(of_space) != len(act.heads):
        raise TypeError(
            f"the environment takes {len(of_space)} choices, and the policy makes "
            f"{len(act.heads)}: {', '.join(act.heads)}"
        )


def _have_action_masks(bare: Any) -> bool:
    """Whether `call("action_masks")` can be had of a vector without its wrappers.

    One is asked first, because gymnasium's asynchronous vector does not survive an attribute that
    its environments lack.
    """
    if not hasattr(bare, "call"):
        return False
    if getattr(bare, "envs", None):
        return _has_action_masks(bare.envs[0])
    if getattr(bare, "env_fns", None):
        env = bare.env_fns[0]()
        try:
            return _has_action_masks(env)
        finally:
            env.close()
    try:  # a vector of its own kind
        bare.call("action_masks")
    except AttributeError:
        return False
    return True


def _has_action_masks(env: Any) -> bool:
    has = getattr(env, "has_wrapper_attr", None)
    return bool(has("action_masks")) if has is not None else hasattr(env, "action_masks")


def wrap(envs: Any, url: str | Sequence[str], **options: Any) -> VectorLoop:
    """The loop of a gymnasium vector environment; `options` are `VectorPolicyClient`'s.

    The autoreset mode is read off `envs`, which stays the caller's to close.
    """
    return VectorLoop(envs, url, **options)


def _stacked(rows: Sequence[Any]) -> ActionMasks:
    """One mask a row -> one array a head, or one of all heads."""
    if isinstance(rows[0], Mapping):
        return {head: np.stack([row[head] for row in rows]) for head in rows[0]}
    if all(np.ndim(choice) == 0 for choice in rows[0]):
        return np.stack(rows)
    return [np.stack(of_head) for of_head in zip(*rows, strict=True)]


def _with_all_allowed(masks: Any, has_one: Any) -> Any:
    if isinstance(masks, (list, tuple)):  # one array a head already
        return list(masks)
    if isinstance(masks, Mapping):
        return {
            head: _with_all_allowed(of_head, masks.get(f"_{head}", has_one))
            for head, of_head in masks.items()
            if not head.startswith("_")
        }
    array = np.asarray(masks)
    if array.dtype == object:  # a tuple a row
        rows = list(array)
        everything = [np.ones_like(of_head) for of_head in next(r for r in rows if r is not None)]
        return _stacked([everything if row is None else row for row in rows])
    if has_one is not None:
        array = np.where(np.asarray(has_one)[:, None], array, 1)
    return array


def _merged(new: Any, old: Any, is_new: npt.NDArray[np.bool_]) -> Any:
    """Row by row; where there is no mask, all is allowed."""
    if isinstance(old, Mapping):
        new = new or {}
        return {head: _merged(new.get(head), old.get(head), is_new) for head in {**old, **new}}
    if isinstance(old, list):
        pairs = zip(new or [None] * len(old), old, strict=True)
        return [_merged(of_new, of_old, is_new) for of_new, of_old in pairs]
    everything = np.ones_like(old if new is None else new)
    new, old = (everything if mask is None else mask for mask in (new, old))
    return np.where(is_new[:, None], new, old)
