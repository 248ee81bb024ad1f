"""VecNormalize's statistics: what it does itself, out of any file of them, or a sentence."""

import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.checkpoint_file import CheckpointError
from model.sb3.normalizer import VecNormalizer
from model.sb3.spec import ObservationPart
from model.sb3.vec_normalize import LARGEST, MOST_BYTES, MOST_JSON_BYTES, load_statistics
from tests.model.sb3.trained import box, flat, parts_of, vec_env, vec_normalize, with_moments
from tests.sb3.recorded import RECORDED, needs_recorded

PICKLE = RECORDED / "rppo_vecnorm_vecnormalize.pkl"

ULPS = 4
"""Of float32; SB3 computes in float64 and rounds once."""

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
BOX = (ObservationPart(size=2),)
DICT = (
    ObservationPart(key="mode", kind="one_hot", size=3),
    ObservationPart(key="pos", size=2),
    ObservationPart(key="vel", size=2),
)
NOT_RUN = "nothing in it was run"


def written(directory: Path, content: object, protocol: int = 4) -> Path:
    """Bytes as they are, a mapping of text as JSON, and anything else as a pickle."""
    path = directory / "statistics"
    if not isinstance(content, bytes):
        is_json = isinstance(content, dict)
        content = json.dumps(content).encode() if is_json else pickle.dumps(content, protocol)
    path.write_bytes(content)
    return path


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def loaded(path: Path, parts: tuple[ObservationPart, ...] = BOX) -> VecNormalizer:
    return load_statistics(path, parts, sum(part.size for part in parts))


def refusal(path: Path, parts: tuple[ObservationPart, ...] = BOX) -> str:
    """The sentence, without the path it begins with."""
    with pytest.raises(CheckpointError) as caught:
        loaded(path, parts)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def assert_same(normalizer: VecNormalizer, vec: Any, space: Any, observation: Any) -> None:
    """Within a few roundings of what SB3 itself makes of it."""
    expected = flat(vec.normalize_obs(observation), space)
    found = normalizer(torch.from_numpy(flat(observation, space))).numpy()
    np.testing.assert_array_max_ulp(found, expected, ULPS)


# The recorded file.


@needs_recorded
def test_a_recorded_file_is_read_as_its_trainer_reads_it() -> None:
    recorded = np.load(RECORDED / "rppo_vecnorm.ref.npz")
    normalizer = load_statistics(PICKLE, (), 6)
    mean = normalizer.mean.double() + normalizer.mean_rest.double()
    np.testing.assert_allclose(mean, recorded["vn_mean"], rtol=2**-47)
    assert np.array_equal(normalizer.var, recorded["vn_var"].astype(np.float32))
    assert normalizer.normalization.epsilon == recorded["vn_epsilon"]
    assert normalizer.normalization.clip == recorded["vn_clip_obs"] == 5.0
    assert normalizer.normalization.keys is None
    found = normalizer(torch.from_numpy(recorded["raw_obs_example"])).numpy()
    np.testing.assert_array_max_ulp(found, recorded["normalised_example"], ULPS)


@needs_recorded
def test_a_file_cut_short_anywhere_is_a_sentence(tmp_path: Path) -> None:
    content = PICKLE.read_bytes()
    for length in range(len(content)):
        said = refusal(written(tmp_path, content[:length]), (ObservationPart(size=6),))
        assert said == f"is a damaged pickle; {NOT_RUN}" or (not length and "neither" in said)


@needs_recorded
def test_a_damaged_file_is_read_or_a_sentence(tmp_path: Path) -> None:
    content, chance = PICKLE.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(2500):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            load_statistics(written(tmp_path, bytes(damaged)), (), 6)
        except CheckpointError as error:
            refused.append(str(error))
    assert 600 < len(refused) < 2500
    assert all(sentence.isprintable() for sentence in refused)


# What SB3 does.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_box_of_any_protocol_is_normalised_as_sb3_does(tmp_path: Path, protocol: int) -> None:
    chance, space = np.random.default_rng(protocol), box(2, 3)
    vec = vec_normalize(space, clip_obs=3)
    for _ in range(5):
        vec.obs_rms.update(chance.normal(5, 2, (7, 2, 3)))
    normalizer = loaded(written(tmp_path, vec, protocol), parts_of(space))
    observation = chance.normal(5, 9, (50, 2, 3)).astype(np.float32)
    assert_same(normalizer, vec, space, observation)
    assert normalizer(torch.from_numpy(flat(observation, space))).abs().max() == 3


def test_what_vec_normalize_saves_is_read(tmp_path: Path) -> None:
    vec = vec_normalize(box(2))
    vec.save(str(tmp_path / "saved.pkl"))
    assert_same(loaded(tmp_path / "saved.pkl"), vec, box(2), np.ones((1, 2), np.float32))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_normalised_keys_of_a_dict_are_and_the_rest_are_left(
    tmp_path: Path, protocol: int
) -> None:
    chance = np.random.default_rng(protocol)
    space = spaces.Dict({"vel": box(2), "pos": box(2), "mode": spaces.Discrete(3)})
    vec = vec_normalize(space, norm_obs_keys=["vel"], clip_obs=1.0)
    vec.obs_rms["vel"].update(chance.normal(-3, 2, (9, 2)))
    normalizer = loaded(written(tmp_path, vec, protocol), DICT)
    assert normalizer.normalization.keys == ("vel",)
    batch = {
        "vel": chance.normal(-3, 5, (20, 2)).astype(np.float32),
        "pos": chance.normal(0, 50, (20, 2)).astype(np.float32),
        "mode": chance.integers(3, size=20),
    }
    assert_same(normalizer, vec, space, batch)
    assert parts_of(space) == DICT


@pytest.mark.parametrize("has_keys", [True, False], ids=["as now", "before norm_obs_keys"])
def test_a_dict_of_boxes_is_normalised_whole_in_the_order_of_its_keys(
    tmp_path: Path, has_keys: bool
) -> None:
    space = spaces.Dict({"vel": box(2), "pos": box(2)})
    moments: dict[str | None, Any] = {"vel": (np.array([1.0, 2.0]), np.array([3.0, 4.0]))}
    moments["pos"] = (np.array([5.0, 6.0]), np.array([7.0, 8.0]))
    vec = with_moments(vec_normalize(space), moments)
    batch = {key: np.full((1, 2), 9, np.float32) for key in ("pos", "vel")}
    expected = flat(vec.normalize_obs(batch), space)
    if not has_keys:
        del vec.norm_obs_keys
    normalizer = loaded(written(tmp_path, vec), parts_of(space))
    assert normalizer.normalization.keys is None
    assert normalizer.mean.tolist() == [5, 6, 1, 2]
    found = normalizer(torch.from_numpy(flat(batch, space))).numpy()
    np.testing.assert_array_max_ulp(found, expected, ULPS)


MEANS = st.floats(-1e6, 1e6)
VARIANCES = st.one_of(st.just(1.0), st.floats(0, 1e6), st.floats(0, 1e-12))
OFF_BY = st.floats(-20, 20)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(features=st.lists(st.tuples(MEANS, VARIANCES, OFF_BY), min_size=1, max_size=6))
def test_means_far_from_0_and_tiny_variances_cost_no_digits(
    tmp_path: Path, features: list[tuple[float, float, float]]
) -> None:
    mean, var, off_by = (np.array(column) for column in zip(*features, strict=True))
    space = box(len(mean))
    vec = with_moments(vec_normalize(space), {None: (mean, var)})
    normalizer = loaded(written(tmp_path, vec), parts_of(space))
    observation = (mean + off_by * np.sqrt(var + 1e-8)).astype(np.float32)[None]
    expected = vec.normalize_obs(observation)
    found = normalizer(torch.from_numpy(observation)).numpy()
    # The mean is held to 48 bits: what that leaves, in units of the normalised observation.
    held = np.abs(mean) * 2.0**-48 / np.sqrt(var + 1e-8)
    np.testing.assert_array_less(np.abs(found - expected), held + 5e-7 * np.abs(expected) + 1e-30)


def test_a_mean_of_a_million_and_a_standard_deviation_of_1_cost_no_digits(tmp_path: Path) -> None:
    chance, space = np.random.default_rng(0), box(64)
    mean = chance.uniform(-1e6, 1e6, 64)
    vec = with_moments(vec_normalize(space), {None: (mean, np.ones(64))})
    observation = (mean + chance.normal(0, 3, (500, 64))).astype(np.float32)
    assert_same(loaded(written(tmp_path, vec), parts_of(space)), vec, space, observation)


@pytest.mark.parametrize("clip", [np.float64(2.5), np.inf, 1e300, 7])
def test_any_clip_is_vec_normalize_s(tmp_path: Path, clip: float) -> None:
    vec = vec_normalize(box(2), clip_obs=clip, epsilon=np.float32(0.5))
    normalizer = loaded(written(tmp_path, vec))
    assert normalizer.normalization.clip == min(clip, LARGEST)
    assert_same(normalizer, vec, box(2), np.array([[1e30, -4]], np.float32))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", "<f2", "<i8", "|u1"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_statistics_of_any_dtype_and_order_are_read(
    tmp_path: Path, protocol: int, dtype: str
) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for stored in (values, np.asfortranarray(values), values.transpose(1, 2, 0)):
        vec = with_moments(vec_normalize(box(*stored.shape)), {None: (stored, stored)})
        normalizer = loaded(written(tmp_path, vec, protocol), (ObservationPart(size=24),))
        assert normalizer.mean.tolist() == stored.ravel().tolist()
        assert normalizer.var.tolist() == stored.ravel().tolist()


def test_numpy_1_s_names_are_read_as_numpy_2_s(tmp_path: Path) -> None:
    vec = with_moments(vec_normalize(box(2)), {None: (np.array([1.0, 2.0]), np.ones(2))})
    content = pickle.dumps(vec, 3)
    assert b"numpy._core" in content
    path = written(tmp_path, content.replace(b"numpy._core", b"numpy.core"))
    assert loaded(path).mean.tolist() == [1, 2]


# Mean and variance themselves.


KEYED: dict[str, Any] = {
    "mean": {"pos": [1, 2], "vel": [[3.0], [4.0]]},
    "var": {"pos": [1, 1], "vel": [2, 2]},
}


@pytest.mark.parametrize(
    ("content", "epsilon", "clip"),
    [
        ({"mean": [1, 2.0], "var": [3.0, 4]}, 1e-8, 10),
        ({"mean": [[1], [2]], "var": [[3], [4]], "epsilon": 0.5, "clip_obs": 2}, 0.5, 2),
        (npz(mean=np.array([1.0, 2]), var=np.array([3, 4])), 1e-8, 10),
        (npz(mean=[1, 2], var=[3, 4], epsilon=0.5, clip_obs=np.int32(2)), 0.5, 2),
        (b'\n {"mean": [1, 2], "var": [3, 4]}', 1e-8, 10),
        (b'\xef\xbb\xbf{"mean": [1, 2], "var": [3, 4]}', 1e-8, 10),
    ],
    ids=["json", "json with all", "npz", "npz with all", "json after blanks", "json after a mark"],
)
def test_mean_and_variance_are_enough(
    tmp_path: Path, content: object, epsilon: float, clip: float
) -> None:
    normalizer = loaded(written(tmp_path, content))
    assert normalizer.mean.tolist() == [1, 2]
    assert normalizer.var.tolist() == [3, 4]
    assert normalizer.normalization.epsilon == epsilon
    assert normalizer.normalization.clip == clip


KEYED_NPZ = {
    f"{entry}.{key}": np.array(KEYED[entry][key]).reshape(2)
    for entry in KEYED
    for key in KEYED[entry]
}


@pytest.mark.parametrize("content", [KEYED, npz(**KEYED_NPZ)], ids=["json", "npz"])
def test_a_dict_s_are_by_key(tmp_path: Path, content: object) -> None:
    normalizer = loaded(written(tmp_path, content), DICT)
    assert normalizer.mean.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert normalizer.var.tolist() == [1, 1, 1, 1, 1, 2, 2]
    assert normalizer.normalization.keys == ("pos", "vel")
    observation = torch.tensor([[0.0, 1.0, 0.0, 50.0, 2.0, 3.0, 4.0]])
    assert normalizer(observation).tolist() == [[0, 1, 0, 10, 0, 0, 0]]


# Sentences.


def mean_and_var(**more: Any) -> dict[str, Any]:
    return {"mean": [1, 2], "var": [3, 4], **more}


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is neither a pickle that VecNormalize.save wrote, nor an .npz, nor JSON"),
        (b"[1]", "is neither a pickle that VecNormalize.save wrote, nor an .npz, nor JSON"),
        (b"\x1f\x8b\x08", "is compressed by gzip; unpack it first"),
        (
            npy(),
            "is one NumPy array (.npy), and mean and variance are two; "
            "np.savez(file, mean=rms.mean, var=rms.var) saves both",
        ),
        (b"{" * 200_000, "cannot be read as JSON"),
        (b'{"mean": ' + b"[" * 200_000, "cannot be read as JSON"),
        (b'{"mean": "\xff"}', "cannot be read as JSON"),
        (b'{"mean": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"mean": [1, 2], "var": [1, 2], "mean": [3, 4]}', "has two entries 'mean'"),
        (
            b"{" + b", ".join(b'"%d": 0' % (at % 150_000) for at in range(150_001)) + b"}",
            "has two entries '0'",
        ),
        (mean_and_var(mean=[[1], [1, 2]]), "has a mean that is something else than numbers"),
        ({"var": [1, 2]}, "has no mean"),
        ({"mean": [1, 2]}, "has no var"),
        (
            mean_and_var(clip=1, count=2),
            "has 'clip', 'count', and only mean, var, epsilon, clip_obs are read",
        ),
        (mean_and_var(mean=["1", 2]), "has a mean that is something else than numbers"),
        (mean_and_var(var=[True, 2]), "has a var that is something else than numbers"),
        (mean_and_var(mean=[10**400, 2]), "has a mean that is something else than numbers"),
        (mean_and_var(mean=10**400), "has a mean that is an integer beyond float64"),
        ({"mean": {}, "var": {}}, "has statistics of nothing; --normaliser identity says so"),
        (
            mean_and_var(mean=[1, float("nan")]),
            "has unusable observation statistics: normaliser statistics of feature 1 are "
            "mean nan, variance 4.0, epsilon 1e-08",
        ),
        (
            mean_and_var(var=[float("inf"), 1]),
            "has unusable observation statistics: normaliser statistics of feature 0 are "
            "mean 1.0, variance inf, epsilon 1e-08",
        ),
        (
            mean_and_var(var=[-1, 1]),
            "has unusable observation statistics: normaliser statistics of feature 0 are "
            "mean 1.0, variance -1.0, epsilon 1e-08",
        ),
        (
            mean_and_var(var=[0, 1], epsilon=1e-50),
            "has unusable observation statistics: normaliser statistics of feature 0 are "
            "mean 1.0, variance 0.0, epsilon 1e-50",
        ),
        (mean_and_var(epsilon=0), "has epsilon 0.0, and it is a number above 0"),
        (mean_and_var(epsilon=[1, 2]), "has epsilon that is no number"),
        (mean_and_var(clip_obs="10"), "has clip_obs that is no number"),
        (mean_and_var(clip_obs=-1), "has clip_obs -1.0, and it is a number above 0"),
        (
            mean_and_var(mean=[1, 2, 3]),
            "has a mean of shape (3,) and a variance of (2,), and the policy reads 2 numbers",
        ),
        (
            mean_and_var(var=[]),
            "has a mean of shape (2,) and a variance of (0,), and the policy reads 2 numbers",
        ),
        (KEYED, "has statistics of 'pos', and the policy reads no Dict"),
        (mean_and_var(var={"a": [1, 2]}), "has mean and var by different keys"),
        (
            npz(**{"mean": [1.0], "mean.pos": [1.0], "var": [1.0]}),
            "has 'mean' both by key and as a whole",
        ),
        (
            npz(mean=[1j], var=[1j]),
            "is an .npz with an array of something else than floats or integers",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_a_sentence(tmp_path: Path, content: object, said: str) -> None:
    assert refusal(written(tmp_path, content)) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            mean_and_var(),
            "has the statistics of one Box, and the policy reads a Dict of 'mode', 'pos', 'vel'",
        ),
        (
            {"mean": {"x": [1]}, "var": {"x": [1]}},
            "has statistics of 'x', and the policy reads a Dict of 'mode', 'pos', 'vel'",
        ),
        (
            {"mean": {"mode": [1, 2, 3]}, "var": {"mode": [1, 2, 3]}},
            "has statistics of 'mode' that is no Box, which VecNormalize never has",
        ),
        (
            {"mean": {"pos": [1]}, "var": {"pos": [1, 2]}},
            "has a mean of shape (1,) and a variance of (2,) of 'pos', and the policy reads 2 "
            "numbers",
        ),
        (
            {"mean": {"pos": [None]}, "var": {"pos": [1]}},
            "has a mean of 'pos' that is something else than numbers",
        ),
    ],
)
def test_statistics_of_another_dict_are_a_sentence(
    tmp_path: Path, content: object, said: str
) -> None:
    assert refusal(written(tmp_path, content), DICT) == said


def test_statistics_of_a_space_without_numbers_are_a_sentence(tmp_path: Path) -> None:
    discrete = (ObservationPart(kind="one_hot", size=2),)
    assert refusal(written(tmp_path, mean_and_var()), discrete) == (
        "has statistics of an observation that is no Box, which VecNormalize never has"
    )


class Subclass(vec_env.VecNormalize):  # type: ignore[misc]
    pass


def changed(**attributes: Any) -> Any:
    vec = vec_normalize(box(2))
    vec.__dict__.update(attributes)
    return vec


def of_dict(**attributes: Any) -> Any:
    vec = vec_normalize(spaces.Dict({"pos": box(2), "vel": box(2)}))
    vec.__dict__.update(attributes)
    return vec


def with_mean(mean: Any) -> Any:
    return with_moments(vec_normalize(box(2)), {None: (mean, np.ones(2))})


def in_itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def subclassed() -> Any:
    return Subclass(vec_normalize(box(2)).venv)


LEAVES = (
    "is of a VecNormalize that leaves observations as they are (norm_obs is not True); "
    "--normaliser identity says so"
)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            subclassed,
            f"is a pickle of {__name__}.Subclass, and only Stable-Baselines3's own VecNormalize "
            f"is read; {NOT_RUN}",
        ),
        (
            lambda: vec_env.VecNormalize,
            "is a pickle of stable_baselines3.common.vec_env.vec_normalize.VecNormalize without "
            "its attributes",
        ),
        (
            lambda: [1],
            "is a pickle of list, and only Stable-Baselines3's own VecNormalize is read; "
            + NOT_RUN,
        ),
        (
            lambda: vec_normalize(box(2)).obs_rms,
            "is a pickle of stable_baselines3.common.running_mean_std.RunningMeanStd, and only "
            f"Stable-Baselines3's own VecNormalize is read; {NOT_RUN}",
        ),
        (lambda: vec_normalize(box(2), norm_obs=False), LEAVES),
        (
            lambda: changed(obs_rms=None),
            "has statistics in NoneType, and only Stable-Baselines3's own RunningMeanStd is read; "
            + NOT_RUN,
        ),
        (
            lambda: of_dict(obs_rms={"pos": 1, "vel": 2}),
            "has statistics of 'pos' in int, and only Stable-Baselines3's own RunningMeanStd is "
            f"read; {NOT_RUN}",
        ),
        (
            lambda: of_dict(norm_obs_keys=["pos", "acc"]),
            "normalises 'acc', and has no statistics of it",
        ),
        (lambda: of_dict(norm_obs_keys=1), "has norm_obs_keys that are no list of text"),
        (lambda: of_dict(norm_obs_keys=[("pos",)]), "has norm_obs_keys that are no list of text"),
        (lambda: changed(epsilon=None), "has epsilon that is no number"),
        (lambda: changed(clip_obs=np.ones(2)), "has clip_obs that is no number"),
        (lambda: with_mean([1.0, 2.0]), "has a mean that is something else than numbers"),
        (lambda: with_mean(in_itself()), "has a mean that is something else than numbers"),
        (lambda: changed(epsilon=in_itself()), "has epsilon that is no number"),
        (
            lambda: of_dict(norm_obs_keys=[]),
            "has statistics of nothing; --normaliser identity says so",
        ),
        (lambda: of_dict(obs_rms={}), "normalises 'pos', and has no statistics of it"),
        (lambda: changed(clip_obs=float("nan")), "has clip_obs nan, and it is a number above 0"),
        (lambda: with_mean(None), "has a mean that is something else than numbers"),
        (
            lambda: with_mean(np.array([1, "a"], object)),
            "has a mean that is an array of something else than floats or integers",
        ),
        (
            lambda: with_mean(np.array([True, False])),
            "has a mean that is an array of something else than floats or integers",
        ),
        (
            lambda: with_mean(np.frombuffer(b"\1\0\x80\x7f" * 2, "<f4")),  # signalling NaNs
            "has unusable observation statistics: normaliser statistics of feature 0 are "
            "mean nan, variance 1.0, epsilon 1e-08",
        ),
        (lambda: with_mean(np.zeros((0, 2))), "has a mean that is an array without numbers"),
        (
            lambda: with_mean(np.zeros((2, 1))),
            "has a mean of shape (2, 1) and a variance of (2,), and the policy reads 2 numbers",
        ),
        (
            lambda: with_mean(spaces.Discrete(2)),
            "has a mean that is something else than an array of NumPy",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_a_pickle_that_does_not_fit_is_a_sentence(tmp_path: Path, make: Any, said: str) -> None:
    vec = make()
    parts = DICT[1:] if isinstance(getattr(vec, "obs_rms", None), dict) else BOX
    assert refusal(written(tmp_path, pickle.dumps(vec, 4)), parts) == said


def test_vec_normalize_of_another_package_is_a_sentence(tmp_path: Path) -> None:
    content = pickle.dumps(vec_normalize(box(2)), 4)
    path = written(
        tmp_path, content.replace(b"baselines3.common.vec_env", b"baselines2.common.vec_env")
    )
    assert refusal(path) == (
        "is a pickle of stable_baselines2.common.ve...v.vec_normalize.VecNormalize, and only "
        f"Stable-Baselines3's own VecNormalize is read; {NOT_RUN}"
    )


def test_a_key_named_often_is_read_once(tmp_path: Path) -> None:
    large = np.zeros(2**20, np.uint8)
    vec = of_dict(norm_obs_keys=["pos"] * 300_000)
    path = written(tmp_path, with_moments(vec, {"pos": (large, large)}))
    parts = (ObservationPart(key="pos", size=2**20), *DICT[2:])
    assert loaded(path, parts).normalization.keys == ("pos",)


def test_a_policy_of_a_box_does_not_take_a_dict_s(tmp_path: Path) -> None:
    vec = of_dict()
    for _ in range(2):
        said = refusal(written(tmp_path, vec))
        assert said == "has statistics of 'pos', and the policy reads no Dict"
        vec.norm_obs_keys = None


def test_a_file_too_large_is_a_sentence_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert refusal(path) == ("is 33,554,433 bytes, and statistics are read up to 33,554,432")
    content = b"{" + b" " * MOST_JSON_BYTES
    assert refusal(written(tmp_path, content)) == (
        "is JSON of 8,388,609 bytes, which is read up to 8,388,608"
    )


def test_no_file_is_a_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == "there is no such file"
    assert refusal(tmp_path) == "is a directory, not a file"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is no regular file"
