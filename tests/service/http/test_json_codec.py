"""JSON bodies of `POST /act`: what is read, what is refused and why, what is answered."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from export.manifest import Manifest
from model.spec import PolicySpec
from service.errors import Invalid, Malformed
from service.http.json_codec import JsonCodec
from service.settings import Settings
from tamiyo_client.noise import gumbel_noise
from tests.service.fakes import AppClient, Served, SummingRuntime
from tests.service.http.bodies import Json, body, error_of, raw, vector_body


def test_an_observation_is_enough(client: AppClient, spec: PolicySpec) -> None:
    response = client.act(body(spec, 3.0))
    answer = response.json()
    assert response.status_code == 200
    assert answer.keys() == {"step", "action", "log_prob", "value", "policy_version", "state"}
    assert list(answer["action"]) == list(answer["log_prob"]) == list(spec.head_names)
    assert answer["step"] == 0
    assert answer["value"] == 3.0
    assert answer["policy_version"] == client.served.manifest.policy_version
    shape = (spec.num_layers, spec.hidden_dim)
    assert np.shape(answer["state"]["h"]) == np.shape(answer["state"]["c"]) == shape


def test_a_session_s_answer_names_it_and_has_no_state(client: AppClient, spec: PolicySpec) -> None:
    answer = client.act(body(spec, session_id="env-17", episode_start=True)).json()
    assert answer["session_id"] == "env-17"
    assert "state" not in answer


def test_every_documented_field_may_be_sent_at_once(client: AppClient, spec: PolicySpec) -> None:
    masks = {head.name: [True] * head.size for head in spec.heads}
    request = body(
        spec,
        session_id="env-17",
        episode="7",
        step=0,
        episode_start=True,
        seed=2**64 - 1,
        action_mask=masks,
        deterministic=False,
        timeout_ms=5000,
    )
    assert client.act(request).status_code == 200


def test_the_seed_and_step_make_the_noise(client: AppClient, spec: PolicySpec) -> None:
    answer = client.act(body(spec, seed=42, step=3)).json()
    noise = gumbel_noise(np.array([42], np.uint64), np.array([3], np.uint64), spec.num_choices)
    expected = [part.argmax() for part in np.split(noise[0], np.cumsum(spec.head_sizes)[:-1])]
    assert list(answer["action"].values()) == expected
    assert answer["step"] == 3


def test_a_deterministic_request_has_no_noise(client: AppClient, spec: PolicySpec) -> None:
    answers = client.act_at_once([body(spec, seed=n, deterministic=True) for n in range(5)])
    assert {tuple(answer.json()["action"].values()) for answer in answers} == {
        (0,) * len(spec.heads)
    }
    assert client.act(body(spec, seed=0)).json()["action"] != answers[0].json()["action"]


def test_a_mask_names_heads_and_one_left_out_has_everything_allowed(
    client: AppClient, spec: PolicySpec
) -> None:
    only = [False] * 5 + [True]
    answers = client.act_at_once([body(spec, seed=n, action_mask={"op": only}) for n in range(32)])
    actions = [answer.json()["action"] for answer in answers]
    assert {action["op"] for action in actions} == {5}
    for head in spec.heads:
        if head.name not in ("op", "blueprint"):
            assert len({action[head.name] for action in actions}) == head.size


def test_a_mask_of_zeros_and_ones_is_one_of_booleans(client: AppClient, spec: PolicySpec) -> None:
    """gymnasium's masks are int8, and `tolist` keeps them so."""
    booleans = {"op": [False, True, False, False, True, True], "tempo": [True, False, False]}
    integers = {"op": [0, 1, 0, 0, 1, 1], "tempo": [1, 0, 0]}
    mixed = {"op": [0, True, False, 0, 1, True], "tempo": [1, False, 0]}
    start = body(spec, session_id="a", episode="7", episode_start=True, seed=3)
    first = client.act(start | {"action_mask": booleans})
    for same in (integers, mixed):
        again = client.act(start | {"action_mask": same})
        assert again.headers["Replayed"] == "true", "another mask would be a conflict"
        assert again.content == first.content


def test_a_mask_of_zeros_allows_nothing(client: AppClient, spec: PolicySpec) -> None:
    request = body(spec, action_mask={"op": [0] * 6})
    assert "allows nothing" in error_of(client.act(request), 422, "invalid")


@pytest.mark.parametrize(
    "value",
    [
        "2",
        "-1",
        "1.0",
        "0.0",
        "1e0",
        "0.5",
        '"yes"',
        '"1"',
        '"true"',
        "null",
        "[1]",
        "{}",
        "9" * 30,
    ],
)
def test_anything_else_in_a_mask_is_malformed_and_the_sentence_says_where(
    client: AppClient, spec: PolicySpec, value: str
) -> None:
    request = json.dumps(body(spec, action_mask={"op": [1, True, 0, "?", 0, 0]}))
    sentence = error_of(client.act(request.replace('"?"', value).encode()), 400, "malformed")
    assert sentence == "`action_mask.op[3]`: Input should be true, false, 1 or 0"


def test_a_stateless_client_carries_the_state(client: AppClient, spec: PolicySpec) -> None:
    first = client.act(body(spec, 3.0)).json()
    second = client.act(body(spec, 4.0, state=first["state"])).json()
    assert second["value"] == 7.0
    assert second["state"]["c"] == [[2.0] * spec.hidden_dim]


MALFORMED = {
    "empty": (b"", "not JSON"),
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "two values": (b"{} {}", "not JSON"),
    "a trailing comma": (b'{"observation": [1,]}', "not JSON"),
    "half a surrogate pair": (b'{"session_id": "\\ud800"}', "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "object"),
    "null": (b"null", "object"),
    "a number": (b"1", "object"),
}


@pytest.mark.parametrize(("content", "why"), MALFORMED.values(), ids=MALFORMED)
def test_a_body_that_is_no_json_object_is_malformed(
    client: AppClient, content: bytes, why: str
) -> None:
    assert why in error_of(client.act(content), 400, "malformed")


WRONG_TYPES: dict[str, list[Any]] = {
    "observation": [None, "x", 1, {}, [None], ["1"], [True]],
    "action_mask": ["x", [], {"op": None}, {"op": [2] * 6}, {"op": ["true"] * 6}, {"op": True}],
    "session_id": [1, "", "x" * 257, [], True],
    "episode": [1, "", "x" * 257, {}],
    "step": [-1, 1.5, 1.0, "0", 2**64, 10**30, True, []],
    "episode_start": [None, 0, "true", []],
    "seed": [-1, 1.5, 2**64, "0", True],
    "deterministic": [None, 1, "false"],
    "timeout_ms": [0, -1, "5", True, [], float("nan"), float("inf")],
    "state": [[], "x", {}, {"h": [[0.0] * 10]}, {"h": 1, "c": 1}, {"h": 1, "c": 1, "x": []}],
}
CASES = [(name, value) for name, wrong in WRONG_TYPES.items() for value in wrong]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r:.20}" for n, v in CASES])
def test_a_field_of_a_wrong_type_is_malformed_and_named(
    client: AppClient, spec: PolicySpec, name: str, value: Any
) -> None:
    sentence = error_of(client.act(body(spec) | {name: value}), 400, "malformed")
    assert f"`{name}" in sentence


def test_an_unknown_field_is_malformed_and_named(client: AppClient, spec: PolicySpec) -> None:
    sentence = error_of(client.act(body(spec, sesion_id="typo")), 400, "malformed")
    assert "`sesion_id` is not a field" in sentence


def test_an_unknown_field_of_the_state_is_malformed_and_named(
    client: AppClient, spec: PolicySpec
) -> None:
    state = client.act(body(spec)).json()["state"]
    for name, wrong in (("H", state | {"H": state["h"]}), ("x", state | {"x": None})):
        sentence = error_of(client.act(body(spec, state=wrong)), 400, "malformed")
        assert f"`state.{name}` is not a field" in sentence


@pytest.mark.parametrize("missing", ["h", "c"])
def test_half_a_state_is_malformed_and_says_what_is_missing(
    client: AppClient, spec: PolicySpec, missing: str
) -> None:
    state = client.act(body(spec)).json()["state"]
    del state[missing]
    sentence = error_of(client.act(body(spec, state=state)), 400, "malformed")
    assert f"`state.{missing}` is required" in sentence


def test_a_body_of_another_form_is_malformed_even_where_a_length_is_wrong_too(
    client: AppClient,
) -> None:
    error_of(client.act({"observation": [0.0], "seed": "x"}), 400, "malformed")


def test_a_missing_observation_is_malformed_and_named(client: AppClient) -> None:
    assert "`observation` is required" in error_of(client.act({}), 400, "malformed")


MANY: Json = {f"x{n}": 0 for n in range(1000)}
ZEROS = [[0.0] * 10]
MANY_MISTAKES: dict[str, Json] = {
    "values of another type": {"observation": [""] * 1000},
    "too many values": {"observation": [0] * 1000},
    "as many as there should be, of another type": {"observation": [""] * 11},
    "a mask of another type": {"action_mask": {"blueprint": [2] * 13}},
    "a row of another type": {"state": {"h": ZEROS, "c": [[""] * 10]}},
    "masks of another type": {"action_mask": {"op": [2] * 1000}},
    "unknown heads": {"action_mask": {name: [True] for name in MANY}},
    "unknown heads of another type": {"action_mask": MANY},
    "a state of another type": {"state": {"h": ZEROS, "c": [[""] * 1000]}},
    "rows of another type": {"state": {"h": ZEROS, "c": [""] * 1000}},
    "empty rows": {"state": {"h": ZEROS, "c": [[]] * 1000}},
    "unknown fields": MANY,
    "unknown fields of the state": {"state": {"h": ZEROS, "c": ZEROS, **MANY}},
    "unknown fields in place of the state's": {"state": MANY},
}


@pytest.mark.parametrize("fields", MANY_MISTAKES.values(), ids=MANY_MISTAKES)
def test_a_body_with_many_mistakes_is_given_up_at_the_first(spec: PolicySpec, fields: Json) -> None:
    """Else it holds the event loop several times as long as a good one of its size."""
    assert num_mistakes_found(spec, body(spec) | fields) <= 1


@pytest.mark.parametrize(
    "fields", [MANY, {"state": MANY}, {"action_mask": MANY}], ids=["body", "state", "mask"]
)
def test_a_body_with_many_mistakes_and_no_observation_is_given_up_at_the_first(
    spec: PolicySpec, fields: Json
) -> None:
    assert num_mistakes_found(spec, fields) <= 1


VECTORS_OF_MISTAKES: dict[str, Json] = {
    "rows of another type": {"observation": [[0.0] * 11] + [[""] * 11] * 1000},
    "no rows": {"observation": [[0.0] * 11] + [""] * 1000},
    "starts of another type": {"episode_start": [""] * 1000},
    "seeds of another type": {"seed": [""] * 1000},
    "masks of another type": {"action_mask": {"op": [[2] * 6] * 1000}},
    "masks of many heads": {"action_mask": MANY},
    "states of another type": {"state": {"h": [[[""] * 10]] * 1000, "c": [ZEROS] * 1000}},
    "unknown fields": MANY,
}


@pytest.mark.parametrize("fields", VECTORS_OF_MISTAKES.values(), ids=VECTORS_OF_MISTAKES)
def test_a_vector_with_many_mistakes_is_given_up_at_the_first(
    spec: PolicySpec, fields: Json
) -> None:
    assert num_mistakes_found(spec, vector_body(spec, [0.0] * 1000) | fields) <= 1


def test_a_head_that_is_named_a_thousand_times_is_read_once(spec: PolicySpec) -> None:
    heads = ", ".join(['"op": 0'] * 1000)
    content = json.dumps(body(spec)).replace("{", f'{{"action_mask": {{{heads}}}, ', 1)
    assert num_mistakes_found(spec, content) == 1


def num_mistakes_found(spec: PolicySpec, request: Json | str) -> int:
    content = request if isinstance(request, str) else json.dumps(request)
    codec = JsonCodec(spec, max_rows=2000, max_body_bytes=0)
    with pytest.raises((Malformed, Invalid)) as refusal:
        codec.parse(content.encode())
    cause = refusal.value.__cause__
    return cause.error_count() if isinstance(cause, ValidationError) else 0


@pytest.mark.parametrize("where", ["field", "head"])
def test_an_error_does_not_repeat_a_long_name_whole(
    client: AppClient, spec: PolicySpec, where: str
) -> None:
    name = "x" * 100_000
    wrong = {name: 0} if where == "field" else {"action_mask": {name: [True]}}
    assert len(client.act(body(spec) | wrong).content) < 2000


@pytest.mark.parametrize("change", [-1, 1, None])
def test_an_observation_of_a_wrong_length_is_invalid_and_says_both_lengths(
    client: AppClient, spec: PolicySpec, change: int | None
) -> None:
    length = 0 if change is None else spec.observation_dim + change
    sentence = error_of(client.act({"observation": [0.0] * length}), 422, "invalid")
    assert f"has {length} values" in sentence
    assert f"reads {spec.observation_dim}" in sentence


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e39", "-1e39", "1e999", "9" * 400, "3.5e38"]
)
def test_a_value_that_is_no_finite_float32_is_invalid_and_named(
    client: AppClient, spec: PolicySpec, number: str
) -> None:
    sentence = error_of(client.act(raw(spec, number)), 422, "invalid")
    assert "`observation[0]`" in sentence


@pytest.mark.parametrize("number", ["3.4e38", "1e-50", "-0.0", "7", "12345678901234567890"])
def test_any_finite_float32_is_read(client: AppClient, spec: PolicySpec, number: str) -> None:
    answer = client.act(raw(spec, number)).json()
    assert answer["value"] == float(np.float32(number))


def test_a_mask_of_an_unknown_head_is_invalid_and_lists_the_heads(
    client: AppClient, spec: PolicySpec
) -> None:
    request = body(spec, action_mask={"opp": [True] * 6})
    sentence = error_of(client.act(request), 422, "invalid")
    assert "'opp'" in sentence
    assert ", ".join(spec.head_names) in sentence


@pytest.mark.parametrize("length", [0, 5, 7])
def test_a_mask_of_a_wrong_length_is_invalid_and_names_the_head(
    client: AppClient, spec: PolicySpec, length: int
) -> None:
    request = body(spec, action_mask={"op": [True] * length})
    sentence = error_of(client.act(request), 422, "invalid")
    assert f"`action_mask.op` has {length} values, the policy reads 6" in sentence


def test_a_mask_that_allows_nothing_is_invalid_and_names_the_head(
    client: AppClient, spec: PolicySpec
) -> None:
    for head in spec.heads:
        request = body(spec, action_mask={head.name: [False] * head.size})
        sentence = error_of(client.act(request), 422, "invalid")
        assert f"`action_mask.{head.name}` allows nothing" in sentence


def test_a_state_of_a_wrong_shape_is_invalid_and_named(client: AppClient, spec: PolicySpec) -> None:
    right = [[0.0] * spec.hidden_dim] * spec.num_layers
    shapes: list[list[list[float]]] = [[], [[]], [*right, right[0]], [[*right[0], 0.0]]]
    for wrong in shapes:
        for state in ({"h": wrong, "c": right}, {"h": right, "c": wrong}):
            sentence = error_of(client.act(body(spec, state=state)), 422, "invalid")
            assert f"`state.{'h' if state['h'] is wrong else 'c'}" in sentence
            assert "the policy reads" in sentence


def test_a_state_that_is_not_finite_is_invalid_and_named(
    client: AppClient, spec: PolicySpec
) -> None:
    right = [[0.0] * spec.hidden_dim] * spec.num_layers
    wrong = [[0.0] * (spec.hidden_dim - 1) + [1e39]]
    sentence = error_of(client.act(body(spec, state={"h": right, "c": wrong})), 422, "invalid")
    assert f"`state.c[0][{spec.hidden_dim - 1}]`" in sentence


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"episode": "7"}, "episode"),
        ({"episode_start": True}, "episode_start"),
        ({"session_id": "a", "episode_start": True, "step": 1}, "step 0, not 1"),
    ],
)
def test_fields_that_contradict_each_other_are_invalid(
    client: AppClient, spec: PolicySpec, fields: Json, name: str
) -> None:
    assert name in error_of(client.act(body(spec, **fields)), 422, "invalid")


def test_a_session_s_request_may_not_bring_a_state(client: AppClient, spec: PolicySpec) -> None:
    state = client.act(body(spec)).json()["state"]
    request = body(spec, session_id="a", episode_start=True, state=state)
    assert "`state` is for stateless" in error_of(client.act(request), 422, "invalid")


HARMLESS = {200, 400, 404, 409, 410, 422, 504}
"""Whatever a client sends with the right content type and size ends in one of these."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**64, 1e39, "a", "op", "h"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["op", "h", "c"]), inner)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from([*WRONG_TYPES, "unknown"])


@pytest.fixture(scope="module")
def fuzzed(artifact: Path, manifest: Manifest, spec: PolicySpec) -> Iterator[AppClient]:
    settings = Settings(artifact=artifact, max_sessions=2)
    with AppClient(Served.make(manifest, SummingRuntime(spec), settings)) as client:
        yield client


def assert_harmless(response: httpx.Response) -> None:
    assert response.status_code in HARMLESS, response.text
    if response.status_code == 200:
        assert response.json()["action"]
    else:
        error_of(response, response.status_code, response.json()["error_type"])


@given(content=st.binary(max_size=64))
def test_arbitrary_bytes_are_refused_in_good_order(fuzzed: AppClient, content: bytes) -> None:
    assert_harmless(fuzzed.act(content))


@given(value=json_values)
def test_arbitrary_json_is_refused_in_good_order(fuzzed: AppClient, value: Any) -> None:
    assert_harmless(fuzzed.act(value))


@given(fields=st.dictionaries(FIELDS, json_values, max_size=3))
def test_a_good_request_with_arbitrary_fields_is_answered_or_refused_in_good_order(
    fuzzed: AppClient, spec: PolicySpec, fields: Json
) -> None:
    assert_harmless(fuzzed.act(body(spec) | fields))


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "session_id": st.sampled_from(["a", "b", "c", "\x00", "é/%2F", "🙂"]),
            "episode": st.sampled_from(["7", "8", " "]),
            "step": st.integers(min_value=0, max_value=3) | st.just(2**64 - 1),
            "episode_start": st.booleans(),
            "seed": st.sampled_from([0, 2**32, 2**64 - 1]),
            "deterministic": st.booleans(),
            "timeout_ms": st.sampled_from([1e-12, 1e308, 100]),
        },
    )
)
def test_any_well_formed_request_is_answered_or_refused_in_good_order(
    fuzzed: AppClient, spec: PolicySpec, fields: Json
) -> None:
    assert_harmless(fuzzed.act(body(spec) | fields))


@pytest.mark.parametrize("name", ["h\n", "h\r\nX: y", "\u2028", "\x1b[2J"])
@pytest.mark.parametrize("where", ["field", "state", "head"])
def test_a_sentence_is_one_line_whatever_a_client_calls_things(
    client: AppClient, spec: PolicySpec, name: str, where: str
) -> None:
    request = body(spec)
    if where == "field":
        request[name] = 1
    elif where == "state":
        request["state"] = {"h": ZEROS, "c": ZEROS, name: 1}
    else:
        request["action_mask"] = {name: [True]}
    response = client.act(request)
    assert response.status_code in (400, 422)
    assert response.json()["error"].isprintable()
