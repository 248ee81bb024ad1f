"""A VecNormalize's observation statistics: out of its pickle, an .npz or JSON, running nothing."""

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint_file import (
    NOT_RUN,
    SIGNATURES,
    ZIP,
    CheckpointError,
    names,
    read_content,
    short,
)
from model.sb3.normalizer import VecNormalizer
from model.sb3.npz_file import NPY, read_npz
from model.sb3.passive_pickle import StandIn, read_pickle
from model.sb3.pickled_array import pickled_array
from model.sb3.spec import Normalization, ObservationPart

MOST_BYTES = 32 * 2**20
MOST_JSON_BYTES = 8 * 2**20
"""JSON takes some twenty times its size in memory."""

PICKLES = (b"\x80", b"ccopy_reg\n", b"ccopyreg\n")
"""How one of an object begins, from protocol 2 on, and before."""

VEC_NORMALIZE = "stable_baselines3.common.vec_env.vec_normalize.VecNormalize"
RUNNING_MEAN_STD = "stable_baselines3.common.running_mean_std.RunningMeanStd"

EPSILON = 1e-8
CLIP = 10.0
"""VecNormalize's own, for a file that does not say."""

LARGEST = float(np.finfo(np.float32).max)
"""A clip of it leaves every float32 as it is, as an infinite one does."""

ENTRIES = ("mean", "var", "epsilon", "clip_obs")
SAVE_ALL = "np.savez(file, mean=rms.mean, var=rms.var)"

Array = NDArray[np.float64]


class _Statistics(NamedTuple):
    """`moments` are mean and variance by the key of a Dict's part, or by None for a Box.

    Each is read when it is asked for: a small file may give a large array many keys.
    """

    moments: Iterator[tuple[str | None, Array, Array]]
    epsilon: object
    clip: object


def load_statistics(
    path: Path, observation: tuple[ObservationPart, ...], observation_dim: int
) -> VecNormalizer:
    """What VecNormalize does to an observation of these parts, or of one Box where there are none.

    The file is read by what it holds, not by its name. Raises CheckpointError where that is not
    statistics of such an observation.
    """
    observation = observation or (ObservationPart(size=observation_dim),)
    _check_size(path)
    content = read_content(path)
    try:
        return _normalizer(_read(content, observation), observation)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_size(path: Path) -> None:
    try:
        size_bytes = path.stat().st_size
    except OSError:
        return  # reading it says why
    if size_bytes > MOST_BYTES:
        raise CheckpointError(
            f"{path}: is {size_bytes:,} bytes, and statistics are read up to {MOST_BYTES:,}"
        )


def _read(content: bytes, observation: tuple[ObservationPart, ...]) -> _Statistics:
    if content.startswith(PICKLES):
        return _of_pickle(read_pickle(content), observation)
    if content.startswith(ZIP):
        return _of_entries(_by_entry(read_npz(content)))
    if content.startswith(NPY):
        raise CheckpointError(
            f"is one NumPy array (.npy), and mean and variance are two; {SAVE_ALL} saves both"
        )
    for signature, sentence in SIGNATURES:
        if content.startswith(signature):
            raise CheckpointError(sentence)
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return _of_entries(_json(content))
    raise CheckpointError("is neither a pickle that VecNormalize.save wrote, nor an .npz, nor JSON")


def _normalizer(statistics: _Statistics, observation: tuple[ObservationPart, ...]) -> VecNormalizer:
    parts = {part.key: part for part in observation}
    fitting = {}
    for key, mean, var in statistics.moments:
        _check_fit(key, mean, var, parts)
        fitting[key] = (mean.ravel(), var.ravel())
    if not fitting:
        raise CheckpointError("has statistics of nothing; --normaliser identity says so")
    identity = [(np.zeros(part.size), np.ones(part.size)) for part in observation]
    pairs = [fitting.get(part.key, same) for part, same in zip(observation, identity, strict=True)]
    means, variances = (np.concatenate(vectors) for vectors in zip(*pairs, strict=True))
    keys = tuple(key for key in parts if key is not None and key in fitting)
    normalization = Normalization(
        epsilon=_positive("epsilon", statistics.epsilon),
        clip=_positive("clip_obs", statistics.clip),
        keys=None if len(fitting) == len(parts) else keys,
    )
    try:
        return VecNormalizer(
            torch.from_numpy(means), torch.from_numpy(variances), normalization, observation
        )
    except ValueError as error:
        raise CheckpointError(f"has unusable observation statistics: {error}") from error


def _check_fit(
    key: str | None, mean: Array, var: Array, parts: Mapping[str | None, ObservationPart]
) -> None:
    if key not in parts:
        known = names([part for part in parts if part is not None])
        if key is None:
            raise CheckpointError(
                f"has the statistics of one Box, and the policy reads a Dict of {known}"
            )
        what = f"a Dict of {known}" if known else "no Dict"
        raise CheckpointError(f"has statistics{_of(key)}, and the policy reads {what}")
    if parts[key].kind != "box":
        which = short(key) if key else "an observation"
        raise CheckpointError(
            f"has statistics of {which} that is no Box, which VecNormalize never has"
        )
    if mean.shape != var.shape or mean.size != parts[key].size:
        raise CheckpointError(
            f"has a mean of shape {mean.shape} and a variance of {var.shape}{_of(key)}, and the "
            f"policy reads {parts[key].size} numbers"
        )


def _positive(name: str, value: object) -> float:
    try:
        number = _vector(value).item()
    except ValueError as error:
        raise CheckpointError(f"has {name} that is no number") from error
    if not number > 0:
        raise CheckpointError(f"has {name} {number}, and it is a number above 0")
    return min(number, LARGEST)


def _vector(value: object) -> Array:
    """Of a number, an array, or what is one in a pickle; ValueError for anything else."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, StandIn):
        return pickled_array(value)
    if type(value) not in (int, float):
        raise ValueError("something else than numbers")
    try:
        return np.array(value, np.float64)
    except OverflowError:
        raise ValueError("an integer beyond float64") from None


def _moment(name: str, key: str | None, value: object) -> Array:
    try:
        return _vector(value)
    except ValueError as error:
        raise CheckpointError(f"has a {name}{_of(key)} that is {error}") from error


def _of(key: str | None) -> str:
    return "" if key is None else f" of {short(key)}"


# VecNormalize.save's pickle.


def _of_pickle(wrapper: object, observation: tuple[ObservationPart, ...]) -> _Statistics:
    state = _state(wrapper, VEC_NORMALIZE, "is a pickle of")
    if state.get("norm_obs") is not True:
        raise CheckpointError(
            "is of a VecNormalize that leaves observations as they are (norm_obs is not True); "
            "--normaliser identity says so"
        )
    return _Statistics(_running(state, observation), state.get("epsilon"), state.get("clip_obs"))


def _running(
    state: Mapping[str, object], observation: tuple[ObservationPart, ...]
) -> Iterator[tuple[str | None, Array, Array]]:
    """Before it had `norm_obs_keys`, VecNormalize normalised all parts of a Dict."""
    running, keys = state.get("obs_rms"), state.get("norm_obs_keys")
    if not isinstance(running, dict):
        yield None, *_mean_and_var(None, running)
        return
    if keys is None:
        keys = [part.key for part in observation if part.key is not None] or list(running)
    if not isinstance(keys, list | tuple) or not all(type(key) is str for key in keys):
        raise CheckpointError("has norm_obs_keys that are no list of text")
    for key in dict.fromkeys(keys):
        if key not in running:
            raise CheckpointError(f"normalises {short(key)}, and has no statistics of it")
        yield key, *_mean_and_var(key, running[key])


def _mean_and_var(key: str | None, running: object) -> tuple[Array, Array]:
    state = _state(running, RUNNING_MEAN_STD, f"has statistics{_of(key)} in")
    return _moment("mean", key, state.get("mean")), _moment("var", key, state.get("var"))


def _state(value: object, expected: str, what: str) -> Mapping[str, object]:
    """The attributes of an object of this class; CheckpointError goes on from `what`."""
    found = value.dotted if isinstance(value, StandIn) else type(value).__name__
    if found != expected:
        raise CheckpointError(
            f"{what} {short(found)[1:-1]}, and only Stable-Baselines3's own "
            f"{expected.rpartition('.')[2]} is read; {NOT_RUN}"
        )
    if not isinstance(value, StandIn) or not isinstance(value.state, dict):
        raise CheckpointError(f"{what} {found} without its attributes")
    return value.state


# Mean and variance themselves, in an .npz or JSON.


def _json(content: bytes) -> Mapping[str, object]:
    if len(content) > MOST_JSON_BYTES:
        raise CheckpointError(
            f"is JSON of {len(content):,} bytes, which is read up to {MOST_JSON_BYTES:,}"
        )
    try:
        entries = json.loads(content, object_pairs_hook=_distinct)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError("cannot be read as JSON") from error
    assert isinstance(entries, dict), "it begins with a brace"
    return entries


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries: dict[str, object] = {}
    for name, value in pairs:
        if name in entries:
            raise CheckpointError(f"has two entries {short(name)}")
        entries[name] = value
    return entries


def _by_entry(arrays: Mapping[str, Array]) -> Mapping[str, object]:
    """`mean.KEY` as the entry KEY of `mean`."""
    entries: dict[str, object] = {}
    for name in sorted(arrays):
        entry, dot, key = name.partition(".")
        if not dot:
            entries[entry] = arrays[name]
            continue
        by_key = entries.setdefault(entry, {})
        if not isinstance(by_key, dict):
            raise CheckpointError(f"has {short(entry)} both by key and as a whole")
        by_key[key] = arrays[name]
    return entries


def _of_entries(entries: Mapping[str, object]) -> _Statistics:
    unknown = [name for name in entries if name not in ENTRIES]
    if unknown:
        raise CheckpointError(f"has {names(unknown)}, and only {', '.join(ENTRIES)} are read")
    for name in ("mean", "var"):
        if name not in entries:
            raise CheckpointError(f"has no {name}")
    mean, var = (_keyed(entries[name]) for name in ("mean", "var"))
    if mean.keys() != var.keys():
        raise CheckpointError("has mean and var by different keys")
    moments = (
        (key, _moment("mean", key, mean[key]), _moment("var", key, var[key])) for key in mean
    )
    return _Statistics(moments, entries.get("epsilon", EPSILON), entries.get("clip_obs", CLIP))


def _keyed(value: object) -> Mapping[str | None, object]:
    by_key = value if isinstance(value, dict) else {None: value}
    return {key: _laid_out(item) for key, item in by_key.items()}


def _laid_out(value: object) -> object:
    """A list of numbers, or of such lists, as one array; anything else as it is.

    Not for a pickle's lists, which may hold themselves.
    """
    waiting = [value] if isinstance(value, list) else []
    while waiting:
        first = waiting.pop()
        if isinstance(first, list):
            waiting += reversed(first)
        elif type(first) not in (int, float):
            return value
    if not isinstance(value, list):
        return value
    try:
        return np.array(value, np.float64).ravel()
    except (OverflowError, ValueError):  # or its lists are of different lengths
        return value
