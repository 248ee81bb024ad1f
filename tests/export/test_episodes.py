"""What the gate's rows see: each kind of fault has a row that shows it, whatever the policy."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from export.episodes import Episode, EpisodeMaker, Moment
from export.manifest import bucket_sizes
from export.weights import pack_weights, rebuild
from model.normalizer import CLIP, VARIANCE_EPSILON, ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import small_v2, statistics, trained

LIFTED = 1e3
"""Noise above it points at a choice."""
WAIT = 0
SMALLEST_LARGEST = 2
"""The least that a largest batch can be: where there are the fewest rows."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """All rows of an episode, step after step; `[steps, rows, ...]` as NumPy has it."""

    maker: EpisodeMaker
    moments: list[Moment]

    def all(self, name: str) -> NDArray[Any]:
        array: Tensor = torch.stack([getattr(moment, name) for moment in self.moments])
        return array.numpy()

    def flat(self, name: str) -> NDArray[Any]:
        array = self.all(name)
        return array.reshape(-1, *array.shape[2:])

    def by_head(self, name: str) -> dict[str, NDArray[Any]]:
        """A packed array's columns."""
        spec = self.maker.spec
        parts = np.split(self.flat(name), np.cumsum(spec.head_sizes)[:-1], axis=-1)
        return dict(zip(spec.head_names, parts, strict=True))


@pytest.fixture(scope="module")
def v2() -> FactoredRecurrentActorCritic:
    return trained(small_v2(num_layers=2))


def maker_of(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None = None,
    max_batch_size: int = SMALLEST_LARGEST,
    seed: int = 0,
) -> EpisodeMaker:
    rebuilt = rebuild(pack_weights(policy, normalizer), policy.spec, torch.device("cpu"))
    return EpisodeMaker(rebuilt, max_batch_size, seed=seed)


def moments_of(maker: EpisodeMaker) -> Iterator[tuple[Episode, Moment]]:
    for episode in maker.episodes:
        for moment in maker.moments(episode):
            yield episode, moment


def rows_of(maker: EpisodeMaker) -> Rows:
    return Rows(maker, list(maker.moments(maker.episodes[0])))


@pytest.fixture(scope="module")
def rows(v2: FactoredRecurrentActorCritic) -> Rows:
    """Of V2 with a normaliser, at the smallest largest batch. Tests only read them."""
    return rows_of(maker_of(v2, statistics(v2.spec.observation_dim)))


@settings(max_examples=10)
@given(max_batch_size=st.integers(2, 4096))
def test_every_size_to_256_is_run_and_beyond_it_the_buckets_and_the_largest(
    policy: FactoredRecurrentActorCritic, max_batch_size: int
) -> None:
    maker = maker_of(policy, None, max_batch_size)
    run = {len(batch) for _, moment in moments_of(maker) for batch in moment.batches}
    assert max(run) == max_batch_size
    assert run >= set(range(1, min(max_batch_size, 256) + 1))
    assert run >= {*bucket_sizes(max_batch_size)}
    assert run >= {*maker.batch_sizes}


def test_sizes_that_are_no_buckets_are_run_too(policy: FactoredRecurrentActorCritic) -> None:
    sizes = {size for size in maker_of(policy, None, 4096).batch_sizes if size > 256}
    between = sizes - {*bucket_sizes(4096)}
    assert len(between) >= 6
    assert min(between) < 2048 < max(between)


@settings(max_examples=6)
@given(max_batch_size=st.integers(2, 600))
def test_every_row_is_in_one_batch_of_each_moment(
    policy: FactoredRecurrentActorCritic, max_batch_size: int
) -> None:
    for episode, moment in moments_of(maker_of(policy, None, max_batch_size)):
        of_row = {row: len(batch) for batch in moment.batches for row in batch.tolist()}
        assert sum(map(len, moment.batches)) == len(of_row) == episode.num_rows
        assert moment.row.tolist() == list(range(episode.num_rows))
        assert moment.batch_size.tolist() == [of_row[row] for row in moment.row.tolist()]


@pytest.mark.parametrize("max_batch_size", [2, 7, 256, 300])
def test_there_are_256_rows_and_50_steps_whatever_the_largest_batch(
    policy: FactoredRecurrentActorCritic, max_batch_size: int
) -> None:
    maker = maker_of(policy, None, max_batch_size)
    moments = list(maker.moments(maker.episodes[0]))
    assert [moment.number for moment in moments] == list(range(len(moments)))
    assert len(moments) >= 50
    assert {len(moment.row) for moment in moments} == {256}


def test_same_seed_makes_the_same_moments_and_another_makes_others(
    v2: FactoredRecurrentActorCritic,
) -> None:
    def first(seed: int) -> list[Tensor]:
        moment = next(moments_of(maker_of(v2, seed=seed)))[1]
        assert moment.blueprint_index is not None
        assert moment.slot_by_op_mask is not None
        return [
            *moment.batches,
            moment.observation,
            moment.action_mask,
            moment.noise,
            moment.blueprint_index,
            moment.slot_by_op_mask,
            moment.begins,
            *moment.begin_state,
        ]

    assert all(map(torch.equal, first(0), first(0)))
    assert not any(map(torch.equal, first(0), first(1)))


def test_moments_leave_torchs_own_random_numbers_alone(v2: FactoredRecurrentActorCritic) -> None:
    before = torch.get_rng_state()
    next(moments_of(maker_of(v2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_moment_is_forgotten_when_the_next_is_made(v2: FactoredRecurrentActorCritic) -> None:
    moments = moments_of(maker_of(v2))
    _, moment = next(moments)
    forgotten = weakref.ref(moment)
    del moment
    _ = next(moments)
    assert forgotten() is None


def live_storages() -> dict[int, int]:
    """Of every strided tensor with memory, its bytes by where it lies; what is shared is one."""
    tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.layout is torch.strided]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}


def test_memory_does_not_grow_with_the_steps(v2: FactoredRecurrentActorCritic) -> None:
    gc.collect()
    others = live_storages().keys()
    taken = [
        sum(size for at, size in live_storages().items() if at not in others)
        for _ in moments_of(maker_of(v2))
    ]
    assert len(taken) >= 50
    assert max(taken[5:]) <= 1.1 * max(taken[:5])


def normalised(rows: Rows) -> Floats:
    """What the network sees, before it is clipped; `[rows, features]`."""
    normalizer = rows.maker.normalizer
    assert normalizer is not None
    mean, var = (array.double().numpy() for array in (normalizer.mean, normalizer.var))
    seen: Floats = (rows.flat("observation") - mean) / np.sqrt(var + VARIANCE_EPSILON)
    return seen


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_feature_alone_is_far_beyond_the_clip_in_some_row(rows: Rows, sign: float) -> None:
    seen = normalised(rows)
    beyond = np.abs(seen) > CLIP
    alone = beyond.sum(axis=-1) == 1
    far = alone[:, None] & (sign * seen > 10 * CLIP)
    assert far.any(axis=0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_feature_alone_is_just_beyond_the_clip_in_some_rows(rows: Rows, sign: float) -> None:
    """Where only a clip that is off by a little shows."""
    seen = normalised(rows)
    beyond = np.abs(seen) > CLIP
    just = (sign * seen > CLIP) & (sign * seen < 1.1 * CLIP)
    assert (just & (beyond.sum(axis=-1) == 1)[:, None]).any(axis=-1).sum() >= 5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_feature_alone_is_just_within_the_clip_in_some_rows(rows: Rows, sign: float) -> None:
    seen = normalised(rows)
    within = (sign * seen > 0.85 * CLIP) & (sign * seen < CLIP)
    others = (np.abs(seen) > CLIP / 2).sum(axis=-1) == 1
    assert (within & others[:, None]).any(axis=-1).sum() >= 5


def test_each_feature_alone_is_not_zero_in_some_row(v2: FactoredRecurrentActorCritic) -> None:
    observation = rows_of(maker_of(v2)).flat("observation") != 0
    assert (observation & (observation.sum(axis=-1) == 1)[:, None]).any(axis=0).all()


def test_without_a_normaliser_single_features_are_a_thousand(
    v2: FactoredRecurrentActorCritic,
) -> None:
    size = np.abs(rows_of(maker_of(v2)).flat("observation"))
    far = (size > 900) & ((size > 100).sum(axis=-1) == 1)[:, None]
    assert far.any(axis=0).all()


@pytest.mark.parametrize("is_allowed", [True, False])
def test_noise_points_at_each_choice_of_each_head(rows: Rows, is_allowed: bool) -> None:
    masks, noises = rows.by_head("action_mask"), rows.by_head("noise")
    unseen = {
        (head, choice)
        for head, noise in noises.items()
        for choice in range(noise.shape[-1])
        if not ((noise[:, choice] > LIFTED) & (masks[head][:, choice] == is_allowed)).any()
    }
    assert unseen == set()


def test_noise_points_at_one_choice_of_a_head_or_at_none(rows: Rows) -> None:
    is_free = rows.flat("is_free")
    for noise in rows.by_head("noise").values():
        pointed = (noise > LIFTED).sum(axis=-1)
        assert (pointed[is_free] == 0).all()
        assert (pointed <= 1).all()
        assert (pointed[~is_free] == 1).mean() > 0.5


def test_noise_is_alike_in_every_head_of_some_rows_but_for_its_last_digits(rows: Rows) -> None:
    alike = ~rows.flat("is_free")
    for noise in rows.by_head("noise").values():
        spread = np.ptp(noise, axis=-1)
        assert (spread[alike & (spread < 1)] > 0).all()
        alike &= spread < 1
    assert alike.mean() > 0.1


def test_greedy_rows_have_no_noise_and_the_others_some_everywhere(rows: Rows) -> None:
    noise, is_greedy = rows.flat("noise"), rows.flat("is_greedy")
    assert 0.2 < is_greedy.mean() < 0.5
    assert (noise[is_greedy] == 0).all()
    assert (noise[~is_greedy] != 0).all()


@pytest.mark.parametrize("greedy", [True, False])
def test_each_choice_is_in_some_row_the_only_one_forbidden_and_in_some_the_only_one_allowed(
    rows: Rows, greedy: bool
) -> None:
    kind = rows.flat("is_greedy") == greedy
    for mask in rows.by_head("action_mask").values():
        allowed = mask.sum(axis=-1)
        only_forbidden = ~mask & (allowed == mask.shape[-1] - 1)[:, None] & kind[:, None]
        only_allowed = mask & (allowed == 1)[:, None] & kind[:, None]
        assert only_forbidden.any(axis=0).all()
        assert only_allowed.any(axis=0).all()
        assert (allowed == mask.shape[-1]).any()
        assert (allowed == mask.shape[-1] - 1)[kind].mean() > 0.25


def test_every_head_allows_something_in_every_row(rows: Rows) -> None:
    assert all(mask.any(axis=-1).all() for mask in rows.by_head("action_mask").values())


def test_ops_that_are_not_allowed_have_no_slot_and_those_that_need_one_have_it(
    rows: Rows,
) -> None:
    has_slot = np.asarray(rows.flat("slot_by_op_mask").any(axis=-1))
    op_allowed = rows.by_head("action_mask")["op"]
    assert not has_slot[~op_allowed].any()
    needing = np.arange(rows.maker.spec.num_ops) != WAIT
    assert has_slot[:, needing][op_allowed[:, needing]].all()
    waiting = has_slot[:, WAIT][op_allowed[:, WAIT]]
    assert 0.2 < waiting.mean() < 0.8


def test_each_slot_of_each_op_is_in_some_row_the_only_one_forbidden_and_in_some_the_only_one(
    rows: Rows,
) -> None:
    mask = rows.flat("slot_by_op_mask")
    allowed = mask.sum(axis=-1, keepdims=True)
    assert (~mask & (allowed == mask.shape[-1] - 1)).any(axis=0).all()
    assert (mask & (allowed == 1)).any(axis=0).all()
    assert (allowed == mask.shape[-1]).any(axis=0).all()


def test_each_slot_holds_each_blueprint_and_none(rows: Rows) -> None:
    index = rows.flat("blueprint_index")
    expected = set(range(-1, rows.maker.spec.num_blueprints))
    assert [{*column.tolist()} for column in index.T] == [expected] * rows.maker.spec.num_slots


def next_moments(maker: EpisodeMaker, number: int) -> list[Moment]:
    return list(islice(maker.moments(maker.episodes[0]), number))


def begin_states(rows: Rows) -> tuple[Floats, Floats]:
    """Those that rows do begin from: h and c, `[rows, layers, hidden]`."""
    begins = rows.flat("begins")
    h, c = (
        np.concatenate([moment.begin_state[part].double().numpy() for moment in rows.moments])
        for part in (0, 1)
    )
    return h[begins], c[begins]


def test_states_drive_gates_of_every_kind_and_layer_as_far_as_they_go(
    rows: Rows, v2: FactoredRecurrentActorCritic
) -> None:
    """Up or down: whichever way the row's observation drives the first layer's already."""
    h, _ = begin_states(rows)
    for layer in range(v2.spec.num_layers):
        weight = v2.state_dict()[f"lstm.layers.{layer}.weight_hh_l0"].double().numpy()
        reach = np.abs(weight).sum(axis=-1)  # h is within -1 and 1
        driven = np.abs(h[:, layer] @ weight.T).max(axis=0)
        assert (driven <= reach + 1e-9).all()
        for kind in np.split(np.arange(len(reach)), 4):  # i, f, g, o
            assert driven[kind].max() >= 0.97 * reach[kind].max()
        assert np.mean(driven >= 0.97 * reach) > 0.7


def test_states_drive_later_layers_gates_both_up_and_down(
    rows: Rows, v2: FactoredRecurrentActorCritic
) -> None:
    h, _ = begin_states(rows)
    weight = v2.state_dict()["lstm.layers.1.weight_hh_l0"].double().numpy()
    reach = np.abs(weight).sum(axis=-1)
    for sign in (1, -1):
        driven = (sign * h[:, 1] @ weight.T).max(axis=0)
        assert np.mean(driven >= 0.97 * reach) > 0.9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_states_drive_further_what_the_observation_drives_already(
    v2: FactoredRecurrentActorCritic, sign: float
) -> None:
    """A gate then goes as far as input and state together take it. Signs at random would take one
    there in half as many rows."""
    normalizer = statistics(v2.spec.observation_dim)
    maker = maker_of(v2, normalizer)
    weights = {name: weight.double() for name, weight in v2.state_dict().items()}
    lstm = "lstm.layers.0"
    bias = weights[f"{lstm}.bias_ih_l0"] + weights[f"{lstm}.bias_hh_l0"]
    reach = weights[f"{lstm}.weight_hh_l0"].abs().sum(-1)
    furthest = []
    for moment in next_moments(maker, 20):
        x = v2.features(normalizer(moment.observation), moment.blueprint_index)
        x = v2.lstm.input_proj(x).detach().double()  # type: ignore[operator]
        given = x @ weights[f"{lstm}.weight_ih_l0"].T + bias
        h = moment.begin_state[0][:, 0].double()
        driven = sign * (given + h @ weights[f"{lstm}.weight_hh_l0"].T)
        furthest.append((driven >= 0.999 * (given.abs() + reach)).any(-1))
    assert torch.cat(furthest).double().mean() > 0.1


def test_states_begin_at_zero_in_between_and_with_the_longest_memories(rows: Rows) -> None:
    h, c = begin_states(rows)
    is_zero = (h == 0).all(axis=(1, 2)) & (c == 0).all(axis=(1, 2))
    assert is_zero.mean() > 0.2
    between = (np.abs(h) < 0.99).all(axis=(1, 2)) & ~is_zero
    assert between.mean() > 0.05
    for sign in (1, -1):
        largest = (sign * c).max(axis=(1, 2))
        assert ((largest > 10) & (largest < 25)).any()
        assert ((largest > 25) & (largest < 100)).any()
        assert ((largest > 150) & (largest <= 200)).any()


def test_some_rows_are_carried_far_and_others_begin_often(rows: Rows) -> None:
    begins = rows.all("begins")
    longest = np.array([longest_run(~column) for column in begins.T])
    assert (longest > 20).sum() >= 64
    assert (longest == len(begins)).any()  # never once begun anew
    assert (begins.sum(axis=0) >= len(begins) / 8).sum() >= 64


def longest_run(is_carried: NDArray[np.bool_]) -> int:
    longest = run = 0
    for carried in is_carried:
        run = run + 1 if carried else 0
        longest = max(longest, run)
    return longest


def test_rows_without_blueprints_have_no_such_inputs(spec: PolicySpec) -> None:
    policy = FactoredRecurrentActorCritic(spec)
    state = policy.initial_state(3)
    inputs = maker_of(policy).moment(3).inputs(spec, state)
    assert set(inputs) == {"observation", "action_mask", "noise", "state_h_in", "state_c_in"}
