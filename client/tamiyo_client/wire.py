"""Requests and answers of `POST /act` as safetensors: arrays there and back, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tamiyo_client.errors import ServerError

SAFETENSORS = "application/vnd.safetensors"

Array = npt.NDArray[Any]
State = tuple[npt.NDArray[np.float32], ...]
"""A recurrent state a caller carries, in the policy's order: `(h, c)`, and after them those of a
critic with its own, each `[n, layers, hidden]` float32."""
ActionMasks = Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike] | Array
"""What is allowed: by head; one array a head, in the policy's order, as gymnasium has it for
MultiDiscrete; or the heads side by side. Booleans, or 0 and 1."""

STATE = "state_"
"""How the tensors are called that are a state: `state_h` is its `h`."""
LENGTH_BYTES = 8
"""Of a safetensors file, before its header."""


@dataclass(frozen=True, eq=False)
class VectorAct:
    """What the policy decided for `n` environments.

    `multi_discrete` is `[n, heads]` int64 in the policy's order, `log_probs` `[n, heads]` float32,
    `value` `[n]` float32. `episode_start` `[n]` says which rows began an episode with this step,
    as a rollout buffer wants it. `extras` are what else the policy gives. `state` comes to calls
    without a session only, and of a policy that has one.
    """

    heads: tuple[str, ...]
    multi_discrete: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]
    policy_version: str
    step: int
    episode_start: npt.NDArray[np.bool_]
    extras: Mapping[str, Array] = field(default_factory=dict)
    state: State | None = None

    @property
    def action(self) -> dict[str, npt.NDArray[np.int64]]:
        """`[n]` for each head."""
        return {head: self.multi_discrete[:, at] for at, head in enumerate(self.heads)}

    @property
    def log_prob(self) -> npt.NDArray[np.float32]:
        """`[n]`: of each whole action, the sum over its heads, which PPO's ratio takes."""
        summed: npt.NDArray[np.float32] = self.log_probs.sum(axis=1, dtype=np.float32)
        return summed

    @property
    def log_prob_by_head(self) -> dict[str, npt.NDArray[np.float32]]:
        """`[n]` for each head."""
        return {head: self.log_probs[:, at] for at, head in enumerate(self.heads)}


@dataclass(frozen=True, eq=False)
class Act:
    """What the policy decided for one environment: `VectorAct` without the leading axis."""

    action: dict[str, int]
    multi_discrete: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    log_prob: float
    value: float
    policy_version: str
    step: int
    episode_start: bool
    extras: Mapping[str, Array] = field(default_factory=dict)
    state: State | None = None

    @classmethod
    def of(cls, vector: VectorAct) -> Act:
        """The only row of a vector of one."""
        return cls(
            action={head: int(column[0]) for head, column in vector.action.items()},
            multi_discrete=vector.multi_discrete[0],
            log_probs=vector.log_probs[0],
            log_prob=float(vector.log_prob[0]),
            value=float(vector.value[0]),
            policy_version=vector.policy_version,
            step=vector.step,
            episode_start=bool(vector.episode_start[0]),
            extras={name: array[0] for name, array in vector.extras.items()},
            state=vector.state,
        )


def one_array(observations: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> Array:
    """The observations as they are. Raises TypeError for a dict of them."""
    if isinstance(observations, Mapping):
        raise TypeError(
            "the policy reads one array of observations, and this is a dict of them: flatten it, "
            "as gymnasium.wrappers.FlattenObservation does"
        )
    return np.asarray(observations)


def packed_observations(observations: npt.ArrayLike, num_rows: int) -> Array:
    """`[num_rows, D]` float32, or float64 as it is. Raises ValueError for another length."""
    array = one_array(observations)
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    if array.ndim < 2 or len(array) != num_rows:
        raise ValueError(
            f"observations have the shape {list(array.shape)}; {num_rows} environments have "
            f"[{num_rows}, ...]"
        )
    return np.ascontiguousarray(array.reshape(num_rows, -1))


def packed_masks(masks: ActionMasks | None, num_rows: int) -> dict[str, Array]:
    """The tensors that say what is allowed. Raises ValueError for what is no mask."""
    if masks is None:
        return {}
    if isinstance(masks, Mapping):
        return {
            f"action_mask.{head}": _booleans(mask, num_rows)
            for head, mask in masks.items()
            if not head.startswith("_")  # gymnasium's note of which rows had one
        }
    if isinstance(masks, np.ndarray) and masks.dtype != object:
        return {"action_mask": _booleans(masks, num_rows)}
    heads = [_booleans(mask, num_rows) for mask in masks]
    return {"action_mask": np.concatenate(heads, axis=1)}


def allow_something(tensors: dict[str, Array], rows: npt.NDArray[np.bool_]) -> None:
    """Of these rows, whose actions nobody takes, a mask that allows nothing is to allow all.

    An environment has no legal action where its episode is over, and a policy refuses that.
    """
    for name, mask in tensors.items():
        if name.startswith("action_mask"):
            empty = rows & ~mask.any(axis=1)
            if empty.any():
                tensors[name] = mask | empty[:, None]


def packed_inputs(inputs: Mapping[str, npt.ArrayLike], num_rows: int) -> dict[str, Array]:
    """The tensors of what only some policies read. Raises ValueError for another length."""
    tensors: dict[str, Array] = {}
    for name, given in inputs.items():
        array = np.asarray(given)
        if array.ndim == 0 or len(array) != num_rows:
            raise ValueError(f"`{name}` has the shape {list(array.shape)}, not [{num_rows}, ...]")
        as_read = array if array.dtype == np.bool_ else array.astype(np.int64)
        tensors[name] = np.ascontiguousarray(as_read)
    return tensors


def _booleans(mask: npt.ArrayLike, num_rows: int) -> Array:
    array = np.asarray(mask)
    if array.ndim != 2 or len(array) != num_rows:
        raise ValueError(
            f"an action mask has the shape {list(array.shape)}; {num_rows} environments have "
            f"[{num_rows}, choices]"
        )
    if array.dtype != np.bool_:
        allowed = array == 1
        if not np.all(allowed | (array == 0)):
            raise ValueError("an action mask has values other than 0 and 1")
        return np.ascontiguousarray(allowed)
    return np.ascontiguousarray(array)


def packed_seeds(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Raises TypeError for what is no whole number, ValueError for one beyond 64 bits."""
    numbers = [index(seed) for seed in seeds]
    if not all(0 <= number < 2**64 for number in numbers):
        raise ValueError(f"the seeds are {numbers}: each is from 0 to 2**64 - 1")
    return np.array(numbers, dtype=np.uint64)


def lone(array: npt.ArrayLike) -> Array:
    """What is of one environment, as of a vector of one."""
    return np.asarray(array)[None]


def lone_masks(masks: ActionMasks | None) -> ActionMasks | None:
    """The same of its masks."""
    if masks is None:
        return None
    if isinstance(masks, Mapping):
        return {head: lone(mask) for head, mask in masks.items()}
    if isinstance(masks, np.ndarray) and masks.dtype != object:
        return lone(masks)
    return [lone(mask) for mask in masks]


def request(tensors: Mapping[str, Array], scalars: Mapping[str, str]) -> bytes:
    """The body."""
    return save(dict(tensors), dict(scalars))


def answer(body: bytes, episode_start: npt.NDArray[np.bool_]) -> VectorAct:
    """What a body says. Raises ServerError where it is no answer."""
    try:
        arrays = load(body)
        header = _header(body)
        metadata = header.pop("__metadata__")
        heads = tuple(metadata["heads"].split(","))
        num_rows = len(episode_start)
        if (
            arrays["action"].shape != (num_rows, len(heads))
            or arrays["log_prob"].shape != (num_rows, len(heads))
            or arrays["value"].shape != (num_rows,)
        ):
            raise ValueError("arrays of other shapes")
        state = tuple([arrays.pop(name) for name in header if name.startswith(STATE)])
        return VectorAct(
            heads=heads,
            multi_discrete=arrays.pop("action"),
            log_probs=arrays.pop("log_prob"),
            value=arrays.pop("value"),
            policy_version=metadata["policy_version"],
            step=int(metadata["step"]),
            episode_start=episode_start,
            extras=arrays,
            state=state or None,
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ServerError("the answer is not a policy's", status=200) from error


def _header(body: bytes) -> dict[str, Any]:
    """The scalars, and the tensors in their order, which the library does not tell."""
    length = int.from_bytes(body[:LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(body[LENGTH_BYTES : LENGTH_BYTES + length])
    return header
