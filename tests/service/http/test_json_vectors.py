"""Vectors of environments in JSON: what is read, what is refused and why, what is answered."""

import json
from typing import Any

import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.service.conftest import MakeClient
from tests.service.fakes import POISON, AppClient
from tests.service.http.bodies import Json, body, error_of, vector_body

LARGEST = 2**64 - 1


def most_likely(spec: PolicySpec, seed: int, step: int, allowed: Json | None = None) -> list[int]:
    """What the fake policy chooses of each head: its allowed choice with the most noise."""
    noise = gumbel_noise(np.array([seed], np.uint64), np.array([step], np.uint64), spec.num_choices)
    by_head = zip(spec.heads, np.split(noise[0], np.cumsum(spec.head_sizes)[:-1]), strict=True)
    masks = allowed or {}
    return [
        int(np.where(masks.get(head.name, [True] * head.size), part, -np.inf).argmax())
        for head, part in by_head
    ]


def by_row(answer: Json, name: str = "action") -> list[list[Any]]:
    return [list(row) for row in zip(*answer[name].values(), strict=True)]


def test_a_vector_is_answered_row_by_row(client: AppClient, spec: PolicySpec) -> None:
    response = client.act(vector_body(spec, [3, 1, 2]))
    answer = response.json()
    assert response.status_code == 200
    assert list(answer) == ["step", "action", "log_prob", "value", "policy_version", "state"]
    assert answer["value"] == [3, 1, 2]
    assert answer["step"] == 0
    for name in ("action", "log_prob"):
        assert list(answer[name]) == list(spec.head_names)
        assert {len(rows) for rows in answer[name].values()} == {3}
    shape = (3, spec.num_layers, spec.hidden_dim)
    assert np.shape(answer["state"]["h"]) == np.shape(answer["state"]["c"]) == shape


def test_a_vector_of_one_is_a_vector(client: AppClient, spec: PolicySpec) -> None:
    answer = client.act(vector_body(spec, [3])).json()
    assert answer["value"] == [3]
    assert np.shape(answer["state"]["h"]) == (1, spec.num_layers, spec.hidden_dim)


def test_rows_of_a_session_go_on_and_start_where_it_says(
    client: AppClient, spec: PolicySpec
) -> None:
    def step(at: int, **fields: Any) -> Json:
        request = vector_body(spec, [1, 10, 100], session_id="v", step=at, **fields)
        answer: Json = client.act(request).raise_for_status().json()
        assert (answer["session_id"], answer["step"]) == ("v", at)
        assert "state" not in answer
        return answer

    assert step(0, episode_start=True, run="b6c1", seed=42)["value"] == [1, 10, 100]
    assert step(1)["value"] == [2, 20, 200]
    assert step(2, episode_start=[False, True, False])["value"] == [3, 10, 300]
    assert step(3, episode_start=[False, False, False])["value"] == [4, 20, 400]
    assert step(4, episode_start=True)["value"] == [1, 10, 100]
    assert step(5, run="b6c1", seed=42)["value"] == [2, 20, 200]


def test_each_row_draws_with_the_published_seed_of_its_episode(
    client: AppClient, spec: PolicySpec
) -> None:
    fields: Json = {"session_id": "v", "episode_start": True, "seed": 42}
    started = [[0, 0, 0], [1, 1, 1], [2, 0, 2]]  # the step each row's episode is at
    episodes = [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    for at, more in enumerate((fields, {}, {"episode_start": [False, True, False]})):
        request = vector_body(spec, [1, 2, 3], **({"session_id": "v"} | more))
        rows = by_row(client.act(request).raise_for_status().json())
        for row in range(3):
            seed = int(row_seed(42, np.array([row]), np.array([episodes[at][row]]))[0])
            assert rows[row] == most_likely(spec, seed, started[at][row])


def test_seeds_may_be_given_for_the_rows_that_start(client: AppClient, spec: PolicySpec) -> None:
    start = vector_body(spec, [1, 2], session_id="v", episode_start=True, seed=[7, LARGEST])
    assert by_row(client.act(start).json()) == [
        most_likely(spec, 7, 0),
        most_likely(spec, LARGEST, 0),
    ]
    again = vector_body(spec, [1, 2], session_id="v", episode_start=[False, True], seed=[5, 6])
    assert by_row(client.act(again).json()) == [most_likely(spec, 7, 1), most_likely(spec, 6, 0)]


def test_a_stateless_vector_draws_with_its_seeds_and_step(
    client: AppClient, spec: PolicySpec
) -> None:
    answer = client.act(vector_body(spec, [1, 2], seed=[7, 8], step=3)).json()
    assert answer["step"] == 3
    assert by_row(answer) == [most_likely(spec, 7, 3), most_likely(spec, 8, 3)]


def test_a_stateless_vector_carries_its_state(client: AppClient, spec: PolicySpec) -> None:
    state = client.act(vector_body(spec, [3, 30])).json()["state"]
    answer = client.act(vector_body(spec, [4, 40], state=state)).json()
    assert answer["value"] == [7, 70]
    assert answer["state"]["c"] == [[[2.0] * spec.hidden_dim]] * 2


def test_each_row_has_masks_of_its_own(client: AppClient, spec: PolicySpec) -> None:
    ops = [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, True], [False, False, True, False, False, False]]
    tempos = [[1, 0, 1], [0, 1, 0], [True, True, True]]
    request = vector_body(spec, [1, 2, 3], seed=[7, 8, 9])
    answer = client.act(request | {"action_mask": {"tempo": tempos, "op": ops}}).json()
    assert by_row(answer) == [
        most_likely(spec, 7 + row, 0, {"op": ops[row], "tempo": tempos[row]}) for row in range(3)
    ]


def test_a_deterministic_vector_has_no_noise(client: AppClient, spec: PolicySpec) -> None:
    answer = client.act(vector_body(spec, [1, 2], deterministic=True, seed=7)).json()
    assert by_row(answer) == [[0] * len(spec.heads)] * 2


def test_every_row_answers_bit_for_bit_what_it_would_alone(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    """A vector of 64 in batches of 16 beside others, against single sessions one at a time."""
    client = make_client(max_batch_size=16)
    rng = np.random.default_rng(3)
    xs = rng.standard_normal((3, 64)).astype(np.float32)
    ops = rng.random((3, 64, 6)) < 0.5
    ops[..., 2] = True
    starts = [True, [False] * 64, (rng.random(64) < 0.3).tolist()]
    at, episode = np.zeros(64, int), np.zeros(64, int)
    for step in range(3):
        fields: Json = {"session_id": "v", "seed": 42, "action_mask": {"op": ops[step].tolist()}}
        vector = vector_body(spec, xs[step].tolist(), step=step, **fields)
        beside = [body(spec, float(n), seed=n) for n in range(9)]
        answer, *_ = client.act_at_once([vector | {"episode_start": starts[step]}, *beside])
        assert answer.status_code == 200, answer.text
        actions, log_probs = (by_row(answer.json(), name) for name in ("action", "log_prob"))
        for row in range(64):
            begins = step == 0 or (step == 2 and starts[2][row])
            episode[row] += begins and step > 0
            at[row] = 0 if begins else at[row] + 1
            seed = int(row_seed(42, np.array([row]), np.array([episode[row]]))[0])
            mask = {"op": ops[step, row].tolist()}
            request = body(spec, float(xs[step, row]), session_id=f"row-{row}", action_mask=mask)
            if begins:
                request |= {"episode_start": True, "seed": seed}
            alone = client.act(request | {"step": int(at[row])}).raise_for_status().json()
            assert alone["value"] == answer.json()["value"][row]
            assert list(alone["action"].values()) == actions[row]
            assert list(alone["log_prob"].values()) == log_probs[row]


ROW = [0.0] * 11
WRONG_TYPES: dict[str, list[Any]] = {
    "observation": [[ROW, None], [["1"]], [[True]], [[[1.0]]], [ROW, 1.0], [{}], [ROW, {}]],
    "action_mask": ["x", [], {"op": None}, {"op": [True] * 6}, {"op": [[2] * 6] * 2}, {"op": [6]}],
    "session_id": [1, "", "x" * 257, []],
    "run": [1, "", "x" * 257, {}],
    "step": [-1, 1.5, "0", 2**64, True, [0, 0]],
    "episode_start": [None, 0, "true", [], [0, 1], [None, True], [[True], [True]], {}],
    "seed": [-1, 1.5, 2**64, "0", True, [], [0, -1], [0, 2**64], [0, 1.5], ["0", "1"], [[0], [1]]],
    "deterministic": [None, 1, [False, False]],
    "timeout_ms": [0, -1, "5", True, [5, 5]],
    "state": [[], "x", {}, {"h": [[[0.0] * 10]] * 2}, {"h": [[0.0]], "c": [[0.0]]}, [{}, {}]],
}
CASES = [(name, value) for name, wrong in WRONG_TYPES.items() for value in wrong]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r:.20}" for n, v in CASES])
def test_a_field_of_a_wrong_type_is_malformed_and_named(
    client: AppClient, spec: PolicySpec, name: str, value: Any
) -> None:
    request = vector_body(spec, [1, 2]) | {name: value}
    sentence = error_of(client.act(request), 400, "malformed")
    assert f"`{name}" in sentence
    assert len(sentence) < 120


WRONG_VALUES: dict[str, tuple[Json, str]] = {
    "another number of masks": (
        {"action_mask": {"op": [[True] * 6] * 3}},
        "`action_mask.op` has 3 rows, `observation` has 2",
    ),
    "another number of starts": (
        {"session_id": "v", "episode_start": [True]},
        "`episode_start` has 1 rows, `observation` has 2",
    ),
    "another number of seeds": ({"seed": [1, 2, 3]}, "`seed` has 3 rows, `observation` has 2"),
    "another number of states": (
        {"state": {"h": [[[0.0] * 10]] * 3, "c": [[[0.0] * 10]] * 2}},
        "`state.h` has 3 rows, `observation` has 2",
    ),
    "a mask that allows nothing": (
        {"action_mask": {"op": [[1] * 6, [0] * 6], "tempo": [[1] * 3, [0] * 3]}},
        "`action_mask.tempo` allows nothing in row 1",
    ),
    "a short mask": (
        {"action_mask": {"op": [[True] * 6, [True] * 5]}},
        "`action_mask.op[1]` has 5 values, the policy reads 6",
    ),
    "an unknown head": (
        {"action_mask": {"opp": [[True] * 6] * 2}},
        "`action_mask` names an unknown head 'opp'",
    ),
    "a state of another shape": (
        {"state": {"h": [[[0.0] * 10]] * 2, "c": [[[0.0] * 10], [[0.0] * 9]]}},
        "`state.c[1][0]` has 9 values, the policy reads 10",
    ),
    "a state that is not finite": (
        {"state": {"h": [[[0.0] * 10]] * 2, "c": [[[0.0] * 10], [[0.0] * 9 + [1e39]]]}},
        "`state.c[1][0][9]` is not a finite float32",
    ),
    "a run without a session": ({"run": "b6c1"}, "`run` needs a `session_id`"),
    "a start without a session": (
        {"episode_start": [False, True]},
        "`episode_start` needs a `session_id`",
    ),
    "a state in a session": (
        {"session_id": "v", "state": {"h": [[[0.0] * 10]] * 2, "c": [[[0.0] * 10]] * 2}},
        "`state` is for stateless requests",
    ),
    "a run that begins with some rows": (
        {"session_id": "v", "step": 0, "episode_start": [True, False]},
        "a run's first step starts every row, and `episode_start[1]` is false",
    ),
    "no rows": ({"observation": []}, "`observation` has 0 values, the policy reads 11"),
    "a short row": (
        {"observation": [[0.0] * 11, [0.0] * 10]},
        "`observation[1]` has 10 values, the policy reads 11",
    ),
    "a row of nothing": (
        {"observation": [[], [0.0] * 11]},
        "`observation[0]` has 0 values, the policy reads 11",
    ),
}


@pytest.mark.parametrize(("fields", "why"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_what_the_policy_cannot_read_is_invalid_and_says_where(
    client: AppClient, spec: PolicySpec, fields: Json, why: str
) -> None:
    sentence = error_of(client.act(vector_body(spec, [1, 2]) | fields), 422, "invalid")
    assert why in sentence


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e39", "-1e999", "9" * 400])
def test_a_value_that_is_no_finite_float32_is_named_by_its_row(
    client: AppClient, spec: PolicySpec, number: str
) -> None:
    request = json.dumps(vector_body(spec, [1, 2])).replace("[2, 0.0", f"[2, {number}")
    sentence = error_of(client.act(request.encode()), 422, "invalid")
    assert sentence == "`observation[1][1]` is not a finite float32"


@pytest.mark.parametrize("name", ["episode", "sesion_id", "x\n"])
def test_an_unknown_field_is_malformed_and_named(
    client: AppClient, spec: PolicySpec, name: str
) -> None:
    sentence = error_of(client.act(vector_body(spec, [1, 2]) | {name: "7"}), 400, "malformed")
    assert sentence.endswith(" is not a field of the request")
    assert sentence.isprintable()


def test_a_run_is_no_field_of_one_environment(client: AppClient, spec: PolicySpec) -> None:
    request = body(spec, session_id="a", episode_start=True, run="b6c1")
    assert "`run` is not a field" in error_of(client.act(request), 400, "malformed")


def test_more_rows_than_the_server_takes_are_413(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(max_rows=3)
    assert client.act(vector_body(spec, [1, 2, 3])).json()["value"] == [1, 2, 3]
    sentence = error_of(client.act(vector_body(spec, [1, 2, 3, 4])), 413, "too_large")
    assert sentence == "the request has 4 rows, the server takes 3"


def test_a_row_whose_output_is_not_finite_refuses_all_and_nothing_moves(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(vector_body(spec, [1, 10], session_id="v", episode_start=True))
    poison = vector_body(spec, [1, 10], session_id="v", step=1)
    poison["observation"][1][-1] = POISON
    sentence = error_of(client.act(poison), 422, "invalid")
    assert "observation[1]" in sentence
    assert "has not moved" in sentence
    step = vector_body(spec, [1, 10], session_id="v", step=1)
    assert client.act(step).json()["value"] == [2, 20]


def test_a_vector_s_session_is_no_single_one_and_the_reverse(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(vector_body(spec, [1], session_id="v", episode_start=True))
    client.act(body(spec, session_id="a", episode_start=True))
    for start in (False, True):
        one = body(spec, session_id="v", episode_start=start)
        assert "vector" in error_of(client.act(one), 409, "step_conflict")
        many = vector_body(spec, [1], session_id="a", episode_start=start)
        assert "single" in error_of(client.act(many), 409, "step_conflict")
    assert client.act(vector_body(spec, [1], session_id="v", step=1)).json()["value"] == [2]
    assert client.act(body(spec, session_id="a", step=1)).json()["value"] == 2


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_rows_is_422_until_another_run_begins(
    client: AppClient, spec: PolicySpec, number: int
) -> None:
    client.act(vector_body(spec, [1, 1], session_id="v", episode_start=True, run="1"))
    others = vector_body(spec, [1] * number, session_id="v")
    assert "has 2 rows" in error_of(client.act(others), 422, "invalid")
    begun = client.act(others | {"episode_start": True, "step": 0, "run": "2"})
    assert begun.json()["value"] == [1] * number


def test_a_retry_is_byte_for_byte_the_answer_whatever_mask_says_the_same(
    client: AppClient, spec: PolicySpec
) -> None:
    booleans = {"op": [[True, False, True, True, False, True]] * 2}
    integers = {"op": [[1, 0, 1, 1, 0, 1]] * 2}
    start = vector_body(spec, [0.1, 0.2], session_id="v", episode_start=True, run="1", step=0)
    step = vector_body(spec, [0.3, 0.4], session_id="v", run="1", step=1)
    for request in (start, step | {"episode_start": [True, False], "seed": [3, 4]}):
        first = client.act(request | {"action_mask": booleans})
        assert first.status_code == 200
        assert "replayed" not in first.headers
        again = client.act(request | {"action_mask": integers})
        assert again.headers["Replayed"] == "true"
        assert again.content == first.content
        other = request | {"action_mask": {"op": [[1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]]}}
        error_of(client.act(other), 409, "step_conflict")
    late = error_of(client.act(start | {"action_mask": booleans}), 409, "step_conflict")
    assert "next step is 2" in late
