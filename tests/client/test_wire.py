"""The forms that observations and masks come in, and what is no answer."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from model.spec import PolicySpec
from tamiyo_client import (
    InvalidRequest,
    PolicyClient,
    ServerError,
    VectorPolicyClient,
    gumbel_noise,
)
from tamiyo_client.wire import (
    answer,
    packed_inputs,
    packed_masks,
    packed_observations,
    request,
)
from tests.random_inputs import random_masks, random_observations
from tests.running_server import RunningServer

NUM_ROWS = 3


def forms_of(spec: PolicySpec) -> dict[str, Any]:
    """One mask of `NUM_ROWS` rows in every form."""
    by_head = {
        head: mask[0]
        for head, mask in random_masks(spec, np.random.default_rng(1), 1, NUM_ROWS).items()
    }
    in_order = [by_head[head] for head in spec.head_names]
    return {
        "by head": by_head,
        "by head, int8": {head: mask.astype(np.int8) for head, mask in by_head.items()},
        "a list of lists": {head: mask.tolist() for head, mask in by_head.items()},
        "one array a head": tuple(in_order),
        "side by side": np.concatenate(in_order, axis=1),
        "side by side, int8": np.concatenate(in_order, axis=1).astype(np.int8),
    }


def test_a_mask_says_the_same_in_every_form(server: RunningServer, spec: PolicySpec) -> None:
    observations = random_observations(spec, np.random.default_rng(2), 1, NUM_ROWS)[0]
    acts = {}
    for name, mask in forms_of(spec).items():
        with VectorPolicyClient(server.address, NUM_ROWS, seed=3) as client:
            acts[name] = client.act(observations, mask)
    first, *others = acts.values()
    for act in others:
        assert np.array_equal(act.log_probs, first.log_probs)
    with VectorPolicyClient(server.address, NUM_ROWS, seed=3) as client:
        unmasked = client.act(observations)
    assert not np.array_equal(unmasked.log_probs, first.log_probs)


def test_a_lone_mask_says_the_same_in_every_form(server: RunningServer, spec: PolicySpec) -> None:
    masks = {head: mask[0] for head, mask in forms_of(spec)["by head"].items()}
    observation = np.ones(spec.observation_dim)
    told = set()
    for mask in (
        masks,
        [masks[head] for head in spec.head_names],
        np.concatenate([masks[head] for head in spec.head_names]),
    ):
        with PolicyClient(server.address) as client:
            told.add(client.act(observation, mask, seed=3).log_probs.tobytes())
    assert len(told) == 1


def test_arrays_of_any_layout_say_what_they_hold() -> None:
    """safetensors writes a strided array's neighbours, and says nothing."""
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    flags = np.arange(24).reshape(4, 6) % 3 == 0
    tensors = {
        "observation": packed_observations(wide[::2, ::2], 2),
        **packed_masks({"op": flags[::2, ::2], "slot": flags.astype(np.int8)[1::2, 1::3]}, 2),
        **packed_inputs({"blueprint_index": np.arange(24).reshape(4, 6)[::2, 1::2]}, 2),
    }
    read = load(request(tensors, {}))
    assert np.array_equal(read["observation"], wide[::2, ::2])
    assert np.array_equal(read["action_mask.op"], flags[::2, ::2])
    assert np.array_equal(read["action_mask.slot"], flags[1::2, 1::3])
    assert np.array_equal(read["blueprint_index"], np.arange(24).reshape(4, 6)[::2, 1::2])


def test_what_is_no_mask_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        packed_masks({"op": [[0, 2], [1, 1]]}, 2)
    with pytest.raises(ValueError, match=r"shape \[3, 2\]; 2 environments have \[2, choices\]"):
        packed_masks({"op": np.ones((3, 2))}, 2)


def test_what_are_no_observations_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 4\]; 2 environments have \[2, \.\.\.\]"):
        packed_observations(np.ones((3, 4)), 2)
    with pytest.raises(TypeError, match="this is a dict"):
        packed_observations({"image": 1}, 2)  # type: ignore[arg-type]


def test_observations_of_any_shape_and_number_are_flat_float32() -> None:
    assert packed_observations(np.ones((2, 3, 4), np.uint8), 2).shape == (2, 12)
    assert packed_observations([[1, 2], [3, 4]], 2).dtype == np.float32
    assert packed_observations(np.ones((2, 3), np.float64), 2).dtype == np.float64
    strided = np.ones((4, 3), np.float32)[::2]
    assert packed_observations(strided, 2).flags.c_contiguous


def test_the_servers_sentence_reaches_the_caller(server: RunningServer, spec: PolicySpec) -> None:
    observations = np.zeros((NUM_ROWS, spec.observation_dim), np.float32)
    observations[1, 4] = np.nan
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        with pytest.raises(
            InvalidRequest, match=r"`observation\[1\]\[4\]` is not a finite float32"
        ):
            client.act(observations)
        observations[1, 4] = 0.0
        assert client.act(observations).step == 0  # nothing had moved


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 8,
        save({"action": np.zeros((1, 2), np.int64)}, {"step": "0"}),
        save(
            {
                "action": np.zeros((2, 1), np.int64),
                "log_prob": np.zeros((2, 1), np.float32),
                "value": np.zeros(2, np.float32),
            },
            {"step": "0", "heads": "op", "policy_version": "of two rows"},
        ),
    ],
)
def test_what_is_no_answer_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ServerError, match="not a policy's"):
        answer(body, np.ones(1, dtype=np.bool_))


def test_a_learner_has_all_of_a_rollout(server: RunningServer, spec: PolicySpec) -> None:
    observations = random_observations(spec, np.random.default_rng(5), 1, NUM_ROWS)[0]
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        act = client.act(observations)
        described = client.policy()
    assert act.heads == spec.head_names
    assert list(act.action) == list(act.log_prob_by_head) == list(spec.head_names)
    for at, head in enumerate(act.heads):
        assert act.action[head].tolist() == act.multi_discrete[:, at].tolist()
        assert act.log_prob_by_head[head].tolist() == act.log_probs[:, at].tolist()
    assert np.allclose(act.log_prob, sum(act.log_prob_by_head.values()))
    assert act.value.shape == act.log_prob.shape == (NUM_ROWS,)
    assert act.policy_version == described["policy_version"]
    assert act.multi_discrete.flags.writeable  # a buffer may have them as they are


def test_a_state_of_the_callers_is_gone_on_from(server: RunningServer, spec: PolicySpec) -> None:
    """Burn-in: steps without a session are bit for bit those of one with the same draws."""
    shown = random_observations(spec, np.random.default_rng(6), 4, NUM_ROWS)
    seeds = [7, 8, 9]
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        state = None
        carried = []
        for step in range(4):
            act = client.act_from(state, shown[step], step=step, seeds=seeds)
            state = act.state
            carried.append(act)
    assert state is not None
    assert state[0].shape == (NUM_ROWS, spec.num_layers, spec.hidden_dim)
    for row, seed in enumerate(seeds):
        with PolicyClient(server.address) as single:
            for step in range(4):
                act_of_row = single.act(shown[step, row], seed=seed)
                assert act_of_row.log_probs.tolist() == carried[step].log_probs[row].tolist()


def test_the_published_noise_is_the_clients_own() -> None:
    noise = gumbel_noise(np.array([1], np.uint64), np.array([2], np.uint64), 5)
    assert noise.shape == (1, 5)
    assert noise.dtype == np.float32
