"""Real files of Stable-Baselines3, and what its own code made of them, step by step.

They are not part of this repository: a checkout without them skips these tests, with the reason.
Facts: the recording's README; the log-probs here are NumPy's, in float64, of the recorded logits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "sb3"

needs_recorded = pytest.mark.skipif(
    not RECORDED.is_dir(), reason=f"no recorded policies: {RECORDED.parent.name}/sb3 is absent"
)

MULTI_DISCRETE = (3, 4, 2)
SIZES: dict[str, tuple[int, ...]] = {
    "rppo_multidiscrete_sepcritic": MULTI_DISCRETE,
    "rppo_multidiscrete_shared_2layer": MULTI_DISCRETE,
    "rppo_multidiscrete_nocriticlstm": MULTI_DISCRETE,
    "rppo_multidiscrete_relu": MULTI_DISCRETE,
    "rppo_nonet": MULTI_DISCRETE,
    "rppo_discrete": (5,),
    "rppo_dictobs": MULTI_DISCRETE,
    "rppo_vecnorm": MULTI_DISCRETE,
    "maskppo_discrete": (5,),
    "maskppo_multidiscrete": MULTI_DISCRETE,
    "maskppo_multibinary": (2, 2, 2, 2),
    "a2c_multidiscrete_elu": MULTI_DISCRETE,
}
"""Each file with choices for actions, and its heads' sizes."""
NUM_MODES = 3
STATES = {"h": "h_pi", "c": "c_pi", "critic_h": "h_vf", "critic_c": "c_vf"}


@dataclass(frozen=True)
class Step:
    """One step of all rows: what goes in, and what the trainer made of it.

    `log_probs` `[rows, choices]` are of the choices that `mask` allows; `can_act` `[rows, heads]`
    is False where the recorded mask allows nothing, which it is all allowed here instead.
    """

    observation: NDArray[np.float32]
    mask: NDArray[np.bool_]
    starts: NDArray[np.bool_]
    action: NDArray[np.int64]
    can_act: NDArray[np.bool_]
    log_probs: NDArray[np.float64]
    value: NDArray[np.float32]
    states: dict[str, NDArray[np.float32]]


def zip_file(name: str) -> Path:
    return RECORDED / f"{name}.zip"


def statistics_of(name: str) -> Path | None:
    """What VecNormalize saved beside the model, where it did."""
    path = RECORDED / f"{name}_vecnormalize.pkl"
    return path if path.exists() else None


def steps(name: str) -> list[Step]:
    """The recorded steps; states `[rows, layers, hidden]` by the names of ours."""
    with np.load(RECORDED / f"{name}.ref.npz") as file:
        record: dict[str, NDArray[Any]] = dict(file)
    return [_step(record, SIZES[name], at) for at in range(len(record["value"]))]


def _step(record: dict[str, NDArray[Any]], sizes: tuple[int, ...], at: int) -> Step:
    logits = record["action_out"][at].astype(np.float64)
    rows = len(logits)
    mask = record["mask"][at] if "mask" in record else np.ones(logits.shape, np.bool_)
    parts = np.split(mask, np.cumsum(sizes)[:-1], axis=1)
    can_act = np.stack([part.any(axis=1) for part in parts], axis=1)
    mask = np.concatenate([part | ~part.any(axis=1, keepdims=True) for part in parts], axis=1)
    starts = np.zeros(rows, np.bool_)
    if "episode_start" in record:
        starts = record["episode_start"][at].astype(np.bool_)
    return Step(
        observation=_observation(record, at),
        mask=mask,
        starts=starts,
        action=record["predict_action"][at].reshape(rows, len(sizes)),
        can_act=can_act,
        log_probs=_log_softmax(np.where(mask, logits, -np.inf), sizes),
        value=record["value"][at],
        states={
            name: record[key][at].transpose(1, 0, 2)
            for name, key in STATES.items()
            if key in record
        },
    )


def _observation(record: dict[str, NDArray[Any]], at: int) -> NDArray[np.float32]:
    """As the environment gives it: a Dict's in the order of its keys, and before VecNormalize."""
    if "obs_mode" in record:
        one_hot = np.eye(NUM_MODES, dtype=np.float32)[record["obs_mode"][at]]
        return np.concatenate([one_hot, record["obs_vec"][at]], axis=1)
    observation: NDArray[Any] = record["obs"][at]
    if "vn_mean" not in record:
        return observation.astype(np.float32)
    deviation = np.sqrt(record["vn_var"] + record["vn_epsilon"])
    raw: NDArray[Any] = observation * deviation + record["vn_mean"]
    return raw.astype(np.float32)


def _log_softmax(logits: NDArray[np.float64], sizes: tuple[int, ...]) -> NDArray[np.float64]:
    parts = []
    for part in np.split(logits, np.cumsum(sizes)[:-1], axis=1):
        shifted = part - part.max(axis=1, keepdims=True)
        parts.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    return np.concatenate(parts, axis=1)
