"""`POST /act` in safetensors: what is read, what is refused and why, what is answered.

The client is the `safetensors` package itself.
"""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from model.spec import PolicySpec
from service.engine.block import Block
from service.errors import ServiceError
from service.http.codec import JSON, SAFETENSORS
from service.http.json_codec import JsonCodec
from service.http.safetensors_codec import SafetensorsCodec
from service.http.safetensors_file import DTYPES, LARGEST_HEADER_BYTES
from service.http.tensors import request_tensors
from tests.random_inputs import random_observations
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient
from tests.service.http.bodies import Json, body, error_of, vector_body

Tensors = dict[str, NDArray[Any]]

V2 = PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, hidden_dim=16, num_layers=2)
MAX_ROWS = 64


def observed(spec: PolicySpec, *xs: float) -> NDArray[np.float32]:
    observation = np.zeros((len(xs), spec.observation_dim), np.float32)
    observation[:, 0] = xs
    return observation


def act(client: AppClient, content: bytes, accept: str = "*/*", **headers: str) -> httpx.Response:
    headers |= {"Content-Type": SAFETENSORS, "Accept": accept}
    return client.request("POST", "/act", content=content, headers=headers)


def send(client: AppClient, tensors: Tensors, **metadata: str) -> httpx.Response:
    return act(client, save(tensors, metadata))


def metadata_of(content: bytes) -> dict[str, str]:
    """Read without the package, which opens files only for this."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def parsed(spec: PolicySpec, content: bytes) -> Block:
    return SafetensorsCodec(spec, max_rows=MAX_ROWS).parse(content).block


def test_an_observation_is_enough(client: AppClient, spec: PolicySpec) -> None:
    response = send(client, {"observation": observed(spec, 3, 1, 2)})
    assert response.status_code == 200
    assert response.headers["content-type"] == SAFETENSORS
    answer = load(response.content)
    assert answer.keys() == {"action", "log_prob", "value", "state_h", "state_c"}
    assert answer["value"].tolist() == [3, 1, 2]
    assert answer["action"].dtype == np.int64
    assert answer["log_prob"].dtype == answer["value"].dtype == np.float32
    assert answer["action"].shape == answer["log_prob"].shape == (3, len(spec.heads))
    for name in ("state_h", "state_c"):
        assert answer[name].dtype == np.float32
        assert answer[name].shape == (3, spec.num_layers, spec.hidden_dim)
    assert metadata_of(response.content) == {
        "step": "0",
        "policy_version": client.served.manifest.policy_version,
        "heads": ",".join(spec.head_names),
    }


def test_a_session_s_answer_names_it_and_has_no_state(client: AppClient, spec: PolicySpec) -> None:
    tensors = {"observation": observed(spec, 1, 2), "episode_start": np.array([True, True])}
    response = send(client, tensors, session_id="é 🙂")
    assert load(response.content).keys() == {"action", "log_prob", "value"}
    metadata = metadata_of(response.content)
    assert (metadata["session_id"], metadata["step"]) == ("é 🙂", "0")


def test_every_tensor_and_every_word_may_be_sent_at_once(
    client: AppClient, spec: PolicySpec
) -> None:
    words = {"session_id": "v", "run": "b6c1", "step": "0", "seed": str(2**64 - 1)}
    words |= {"deterministic": "false", "timeout_ms": "5e3"}
    tensors: Tensors = {"observation": observed(spec, 1, 2)}
    tensors |= {f"action_mask.{of.name}": np.ones((2, of.size), bool) for of in spec.heads}
    response = send(client, tensors | {"episode_start": np.ones(2, bool)}, **words)
    assert response.status_code == 200, response.text
    stateless = {name: np.zeros((2, spec.num_layers, spec.hidden_dim), np.float32) for name in "hc"}
    tensors = {f"state_{name}": array for name, array in stateless.items()} | {
        "observation": observed(spec, 1, 2),
        "action_mask": np.ones((2, spec.num_choices), bool),
        "seed": np.array([0, 2**64 - 1], np.uint64),
        "episode_start": np.zeros(2, bool),
    }
    assert send(client, tensors, step=str(2**64 - 1)).status_code == 200


def test_a_stateless_client_carries_the_state(client: AppClient, spec: PolicySpec) -> None:
    first = load(send(client, {"observation": observed(spec, 3, 30)}).content)
    state = {name: first[name] for name in ("state_h", "state_c")}
    second = load(send(client, {"observation": observed(spec, 4, 40)} | state).content)
    assert second["value"].tolist() == [7, 70]
    assert (second["state_c"] == 2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_observation_is_of_either_width(
    client: AppClient, spec: PolicySpec, dtype: type[np.floating[Any]]
) -> None:
    observation = observed(spec, 0.1, 3e38, 1e-45).astype(dtype)
    answer = load(send(client, {"observation": observation}).content)
    assert answer["value"].tolist() == observation[:, 0].astype(np.float32).tolist()


def test_a_float64_that_is_no_finite_float32_is_invalid_and_named(
    client: AppClient, spec: PolicySpec
) -> None:
    for wrong in (np.nan, np.inf, -np.inf, 1e39):
        observation = observed(spec, 1, 2).astype(np.float64)
        observation[1, 3] = wrong
        sentence = error_of(send(client, {"observation": observation}), 422, "invalid")
        assert sentence == "`observation[1][3]` is not a finite float32"


def test_what_is_read_are_views_of_the_body(spec: PolicySpec) -> None:
    tensors: Tensors = {
        "observation": observed(spec, 1, 2),
        "action_mask": np.ones((2, spec.num_choices), bool),
        "seed": np.array([1, 2], np.uint64),
        "state_h": np.zeros((2, spec.num_layers, spec.hidden_dim), np.float32),
        "state_c": np.zeros((2, spec.num_layers, spec.hidden_dim), np.float32),
    }
    content = bytearray(save(tensors))
    block = parsed(spec, content)  # type: ignore[arg-type]
    whole = np.frombuffer(content, np.uint8)
    assert block.seeds is not None
    assert block.state is not None
    for array in (*block.given, block.seeds, *block.state):
        assert np.shares_memory(array, whole)


@pytest.mark.parametrize("shift", range(8))
def test_a_body_may_be_aligned_anyhow(client: AppClient, spec: PolicySpec, shift: int) -> None:
    tensors: Tensors = {
        "observation": observed(spec, 3, 4).astype(np.float64),
        "seed": np.array([7, 8], np.uint64),
    }
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * shift
    shifted = len(header).to_bytes(8, "little") + header + content[8 + length :]
    plain, other = act(client, content), act(client, shifted)
    assert other.status_code == 200
    assert other.content == plain.content


def test_a_mask_is_given_whole_or_by_head(client: AppClient, spec: PolicySpec) -> None:
    rng = np.random.default_rng(1)
    whole = rng.random((8, spec.num_choices)) < 0.5
    ends = np.cumsum(spec.head_sizes)
    whole[:, ends - 1] = True
    split = [np.ascontiguousarray(part) for part in np.split(whole, ends[:-1], axis=1)]
    by_head = dict(zip(spec.head_names, split, strict=True))  # `save` takes no views of columns
    rest: Tensors = {"observation": observed(spec, *range(8))}
    expected = send(client, rest | {"action_mask": whole}, seed="3").content
    parts = {f"action_mask.{name}": mask for name, mask in by_head.items()}
    assert send(client, rest | parts, seed="3").content == expected
    others = ~np.isin(np.arange(spec.num_choices), np.arange(ends[-2], ends[-1]))
    only = np.where(others, True, whole)
    one = {"action_mask.op": by_head["op"]}
    assert spec.head_names[-1] == "op"
    assert (
        send(client, rest | one, seed="3").content
        == send(client, rest | {"action_mask": only}, seed="3").content
        != expected
    )


def test_rows_of_a_session_go_on_and_start_where_it_says(
    client: AppClient, spec: PolicySpec
) -> None:
    def step(at: int, starts: list[bool] | None = None, **words: str) -> list[float]:
        tensors: Tensors = {"observation": observed(spec, 1, 10, 100)}
        if starts is not None:
            tensors["episode_start"] = np.array(starts)
        response = send(client, tensors, session_id="v", step=str(at), **words)
        assert response.status_code == 200, response.text
        values: list[float] = load(response.content)["value"].tolist()
        return values

    assert step(0, [True] * 3, run="b6c1", seed="42") == [1, 10, 100]
    assert step(1) == [2, 20, 200]
    assert step(2, [False, True, False]) == [3, 10, 300]
    assert step(3, [False] * 3, run="b6c1", seed="42") == [4, 20, 400]


def zeros(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


def ones(*shape: int) -> NDArray[np.bool_]:
    return np.ones(shape, bool)


STATES = {"state_h": zeros(2, 1, 10), "state_c": zeros(2, 1, 10)}
REFUSED: dict[str, tuple[Tensors, dict[str, str], int, str]] = {
    "no observation": ({"seed": zeros(2, dtype=np.uint64)}, {}, 400, "`observation` is required"),
    "an unknown tensor": ({"observations": zeros(2, 11)}, {}, 400, "`observations` is not a"),
    "another policy's": ({"slot_by_op_mask": ones(2, 6, 2)}, {}, 400, "`slot_by_op_mask` is not"),
    "an unknown head": ({"action_mask.opp": ones(2, 6)}, {}, 400, "`action_mask.opp` is not a"),
    "halves": ({"observation": zeros(2, 11, dtype=np.float16)}, {}, 400, "is F16, not F32 or F64"),
    "a mask of bytes": ({"action_mask": zeros(2, 38, dtype=np.uint8)}, {}, 400, "is U8, not BOOL"),
    "signed seeds": ({"seed": zeros(2, dtype=np.int64)}, {}, 400, "`seed.dtype` is I64, not U64"),
    "starts of integers": ({"episode_start": zeros(2, dtype=np.int64)}, {}, 400, "I64, not BOOL"),
    "a wide state": ({"state_h": zeros(2, 1, 10, dtype=np.float64)}, {}, 400, "F64, not F32"),
    "too long": ({"observation": zeros(2, 12)}, {}, 422, "`observation` is [2, 12], the policy"),
    "one environment": ({"observation": zeros(11)}, {}, 422, "is [11], the policy reads [n, 11]"),
    "a scalar": ({"observation": zeros()}, {}, 422, "`observation` is [], the policy reads [n, 11"),
    "no rows": ({"observation": zeros(0, 11)}, {}, 422, "`observation` has no rows"),
    "other masks": ({"action_mask.op": ones(3, 6)}, {}, 422, "has 3 rows, `observation` has 2"),
    "other seeds": ({"seed": zeros(1, dtype=np.uint64)}, {}, 422, "`seed` has 1 rows, `observa"),
    "other states": (STATES | {"state_c": zeros(1, 1, 10)}, {}, 422, "`state_c` has 1 rows, `obs"),
    "a start of rows": ({"episode_start": ones(2, 1)}, {}, 422, "is [2, 1], the policy reads [n]"),
    "half a state": ({"state_h": zeros(2, 1, 10)}, {}, 400, "`state_c` is required where `state_h"),
    "its other half": ({"state_c": zeros(2, 1, 10)}, {}, 400, "`state_h` is required where `stat"),
    "no finite state": (
        STATES | {"state_c": np.full((2, 1, 10), np.nan, np.float32)},
        {},
        422,
        "`state_c[0][0][0]` is not a finite float32",
    ),
    "a state in a session": (STATES, {"session_id": "v"}, 422, "`state` is for stateless requests"),
    "half a state in a session": (
        {"state_c": zeros(2, 1, 10)},
        {"session_id": "v"},
        400,
        "`state_h` is required",
    ),
    "two masks": (
        {"action_mask": ones(2, 38), "action_mask.op": ones(2, 6)},
        {},
        422,
        "two masks for one head",
    ),
    "nothing allowed": (
        {"action_mask.op": ~ones(2, 6)},
        {},
        422,
        "`action_mask.op` allows nothing",
    ),
    "two seeds": ({"seed": zeros(2, dtype=np.uint64)}, {"seed": "1"}, 422, "`seed` is given twice"),
    "a run without a session": ({}, {"run": "1"}, 422, "`run` needs a `session_id`"),
    "a start without one": ({"episode_start": ones(2)}, {}, 422, "`episode_start` needs a `sess"),
    "some rows first": (
        {"episode_start": np.array([True, False])},
        {"session_id": "v", "step": "0"},
        422,
        "`episode_start[1]` is false",
    ),
    "an unknown word": ({}, {"episode": "7"}, 400, "`episode` is not a field of the request's met"),
    "an unprintable word": ({}, {"x\n": "7"}, 400, "`x\\n` is not a field of the request's metada"),
    "no name": ({}, {"session_id": ""}, 400, "`session_id` has 0 characters, not 1 to 256"),
    "a long name": ({}, {"session_id": "x" * 257}, 400, "`session_id` has 257 characters, not"),
    "a long run": ({}, {"session_id": "v", "run": "x" * 257}, 400, "`run` has 257 characters"),
    **{
        f"{word} {value!r}": ({}, {word: value}, 400, f"`{word}` is not an integer from 0 to 2**64")
        for word in ("step", "seed")
        for value in ("", "-1", "1.0", " 1", "+1", "1_0", "٣", "x", str(2**64), "9" * 5000)
    },
    **{
        f"deterministic {value!r}": ({}, {"deterministic": value}, 400, "neither 'true' nor 'fal")
        for value in ("", "True", "1", "yes")
    },
    **{
        f"timeout_ms {value!r}": ({}, {"timeout_ms": value}, 400, "`timeout_ms` is not a number a")
        for value in (
            "",
            "0",
            "-1",
            "nan",
            "inf",
            "1e999",
            "x",
            "1_0",
            " 5",
            "5 ",
            "٣",
            "1.",
            "5\n",
        )
    },
}


@pytest.mark.parametrize(("tensors", "words", "status", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_in_a_sentence_in_json(
    client: AppClient,
    spec: PolicySpec,
    tensors: Tensors,
    words: dict[str, str],
    status: int,
    why: str,
) -> None:
    whole: Tensors = {"observation": observed(spec, 1, 2)} | tensors
    if why.startswith("`observation` is required"):
        del whole["observation"]
    response = act(client, save(whole, words), accept=SAFETENSORS)
    sentence = error_of(response, status, "malformed" if status == 400 else "invalid")
    assert why in sentence
    assert len(sentence) < 200


def test_a_body_that_is_no_file_is_malformed(client: AppClient, spec: PolicySpec) -> None:
    whole = save({"observation": observed(spec, 1)})
    for content in (b"", b"{}", whole[:-1], whole + b"\0", b"\xff" * 100):
        error_of(act(client, content), 400, "malformed")


def test_one_environment_in_json_is_no_file_and_a_file_no_json(
    client: AppClient, spec: PolicySpec
) -> None:
    error_of(act(client, json.dumps(body(spec)).encode()), 400, "malformed")
    error_of(client.act(save({"observation": observed(spec, 1)})), 400, "malformed")


def test_more_rows_than_the_server_takes_are_413(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(max_rows=3)
    assert send(client, {"observation": observed(spec, 1, 2, 3)}).status_code == 200
    sentence = error_of(send(client, {"observation": observed(spec, 1, 2, 3, 4)}), 413, "too_large")
    assert sentence == "the request has 4 rows, the server takes 3"


def test_the_limit_of_a_body_follows_from_the_rows(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    """Whatever `max_body_bytes`, a full request fits, and one byte beyond the limit does not."""
    client = make_client(max_rows=1000, max_body_bytes=1024)
    shape = (1000, spec.num_layers, spec.hidden_dim)
    tensors: Tensors = {
        "observation": observed(spec, *range(1000)).astype(np.float64),
        **{f"action_mask.{head.name}": ones(1000, head.size) for head in spec.heads},
        "seed": np.arange(1000, dtype=np.uint64),
        "episode_start": np.zeros(1000, bool),
        "state_h": np.zeros(shape, np.float32),
        "state_c": np.zeros(shape, np.float32),
    }
    content = save(tensors)
    assert len(content) > 1024
    assert act(client, content).status_code == 200
    limit = client.get("/policy").json()["limits"]["max_safetensors_bytes"]
    assert len(content) < limit
    error_of(act(client, b"\0" * limit), 400, "malformed")
    assert str(limit) in error_of(act(client, b"\0" * (limit + 1)), 413, "too_large")
    error_of(client.act(b"{" + b" " * 1024), 413, "too_large")


def answer_form(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content_type = response.headers["content-type"]
    if content_type == JSON:
        assert response.json()["value"] == [1, 2]
    else:
        assert load(response.content)["value"].tolist() == [1, 2]
    return str(content_type)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (JSON, JSON),
        (SAFETENSORS, SAFETENSORS),
        (f"{SAFETENSORS};q=0.5, {JSON}", JSON),
        (f"{SAFETENSORS}, {JSON};q=0.5", SAFETENSORS),
        ("application/*;q=0.5, application/json;q=0.1", SAFETENSORS),
        ("*/*;q=0.1, application/json", JSON),
        ("Application/JSON", JSON),
    ],
)
def test_the_answer_is_in_the_form_the_client_would_rather_have(
    client: AppClient, spec: PolicySpec, accept: str, expected: str
) -> None:
    request = vector_body(spec, [1, 2])
    file = save({"observation": observed(spec, 1, 2)})
    in_json = client.request(
        "POST", "/act", json=request, headers={"Content-Type": JSON, "Accept": accept}
    )
    assert answer_form(in_json) == answer_form(act(client, file, accept)) == expected


@pytest.mark.parametrize("accept", ["*/*", "application/*", "text/html", "image/*;q=0.1", "", "x;"])
def test_where_the_client_does_not_say_the_answer_is_in_the_request_s_form(
    client: AppClient, spec: PolicySpec, accept: str
) -> None:
    request = vector_body(spec, [1, 2])
    in_json = client.request(
        "POST", "/act", json=request, headers={"Content-Type": JSON, "Accept": accept}
    )
    assert answer_form(in_json) == JSON
    file = save({"observation": observed(spec, 1, 2)})
    assert answer_form(act(client, file, accept)) == SAFETENSORS


def test_one_environment_in_json_may_be_answered_in_a_file(
    client: AppClient, spec: PolicySpec
) -> None:
    response = client.request("POST", "/act", json=body(spec, 3), headers={"Accept": SAFETENSORS})
    answer = load(response.content)
    assert answer["value"].tolist() == [3]
    assert answer["action"].shape == (1, len(spec.heads))


def test_a_session_s_name_in_the_headers_is_the_metadata_s(
    client: AppClient, spec: PolicySpec
) -> None:
    tensors: Tensors = {"observation": observed(spec, 1), "episode_start": ones(1)}
    content = save(tensors, {"session_id": "v"})
    assert act(client, content, **{"X-Session-Id": "v"}).status_code == 200
    sentence = error_of(act(client, content, **{"X-Session-Id": "w"}), 400, "malformed")
    assert "`X-Session-Id`" in sentence
    stateless = save({"observation": observed(spec, 1)})
    error_of(act(client, stateless, **{"X-Session-Id": "v"}), 400, "malformed")


def test_a_retry_is_byte_for_byte_the_answer_and_says_that_it_is_one(
    client: AppClient, spec: PolicySpec
) -> None:
    start = save(
        {"observation": observed(spec, 0.1, 0.2), "episode_start": ones(2)},
        {"session_id": "v", "run": "1", "step": "0"},
    )
    step = save(
        {"observation": observed(spec, 0.3, 0.4), "episode_start": np.array([True, False])},
        {"session_id": "v", "run": "1", "step": "1"},
    )
    for content in (start, step):
        first = act(client, content)
        assert first.status_code == 200
        assert "replayed" not in first.headers
        for _ in range(2):
            again = act(client, content)
            assert again.headers["Replayed"] == "true"
            assert again.content == first.content
    error_of(act(client, start), 409, "step_conflict")


def blocks_are_alike(one: Block, other: Block) -> None:
    for of_one, of_other in zip(one.given, other.given, strict=True):
        assert of_one.dtype == of_other.dtype
        assert np.array_equal(of_one, of_other)
    assert (one.state is None) == (other.state is None)
    if one.state is not None and other.state is not None:
        assert all(np.array_equal(a, b) for a, b in zip(one.state, other.state, strict=True))
    assert np.array_equal(one.starts, other.starts)
    assert (one.seeds is None) == (other.seeds is None)
    if one.seeds is not None and other.seeds is not None:
        assert np.array_equal(one.seeds, other.seeds)
    for name in ("is_vector", "deterministic", "session_id", "run", "step", "seed", "fingerprint"):
        assert getattr(one, name) == getattr(other, name), name


@st.composite
def requests(draw: st.DrawFn, spec: PolicySpec) -> tuple[Tensors, dict[str, str], Json]:
    """The same vector as a file's tensors and words, and as JSON."""
    num_rows = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors: Tensors = {"observation": random_observations(spec, rng, num_rows)}
    fields: Json = {"observation": tensors["observation"].tolist()}
    words: dict[str, str] = {}
    ends = np.cumsum(spec.head_sizes)
    if draw(st.booleans()):
        mask = rng.random((num_rows, spec.num_choices)) < 0.5
        mask[:, ends - 1] = True
        tensors["action_mask"] = mask
        by_head = zip(spec.head_names, np.split(mask, ends[:-1], axis=1), strict=True)
        as_ints = draw(st.booleans())
        fields["action_mask"] = {
            name: (part.astype(int) if as_ints else part).tolist() for name, part in by_head
        }
    if spec.blueprint_embedding_dim is not None and draw(st.booleans()):
        blueprints = rng.integers(-1, spec.num_blueprints, (num_rows, spec.num_slots))
        tensors["blueprint_index"] = blueprints
        fields["blueprint_index"] = blueprints.tolist()
    if spec.has_slot_by_op and draw(st.booleans()):
        slots = rng.random((num_rows, spec.num_ops, spec.num_slots)) < 0.5
        slots[..., 0] = True
        tensors["slot_by_op_mask"], fields["slot_by_op_mask"] = slots, slots.tolist()
    if draw(st.booleans()):
        step = draw(st.integers(0, 2**64 - 1))
        words["step"], fields["step"] = str(step), step
    if draw(st.booleans()):
        is_deterministic = draw(st.booleans())
        words["deterministic"] = str(is_deterministic).lower()
        fields["deterministic"] = is_deterministic
    seed = draw(st.sampled_from(("none", "one", "each")))
    if seed == "one":
        fields["seed"] = draw(st.integers(0, 2**64 - 1))
        words["seed"] = str(fields["seed"])
    elif seed == "each":
        tensors["seed"] = rng.integers(0, 2**64, num_rows, dtype=np.uint64)
        fields["seed"] = tensors["seed"].tolist()
    if draw(st.booleans()):
        words["session_id"] = fields["session_id"] = draw(st.text(min_size=1, max_size=8))
        starts = rng.random(num_rows) < draw(st.sampled_from((0.0, 0.5, 1.0)))
        if starts.all() or fields.get("step") != 0:
            tensors["episode_start"], fields["episode_start"] = starts, starts.tolist()
        if draw(st.booleans()):
            words["run"] = fields["run"] = draw(st.text(min_size=1, max_size=8))
    elif draw(st.booleans()):
        shape = (num_rows, spec.num_layers, spec.hidden_dim)
        state = [rng.standard_normal(shape, dtype=np.float32) for _ in range(2)]
        tensors["state_h"], tensors["state_c"] = state
        fields["state"] = {"h": state[0].tolist(), "c": state[1].tolist()}
    return tensors, words, fields


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_same_vector_is_the_same_block_in_either_form(spec: PolicySpec, version: str) -> None:
    spec = spec if version == "v1" else V2
    in_files = SafetensorsCodec(spec, max_rows=MAX_ROWS)
    in_json = JsonCodec(spec, max_rows=MAX_ROWS, max_body_bytes=0)

    @given(request=requests(spec))
    def check(request: tuple[Tensors, dict[str, str], Json]) -> None:
        tensors, words, fields = request
        try:
            expected = in_json.parse(json.dumps(fields).encode()).block
        except ServiceError as error:
            with pytest.raises(type(error)):
                in_files.parse(save(tensors, words))
        else:
            blocks_are_alike(in_files.parse(save(tensors, words)).block, expected)

    check()


def values_of(response: httpx.Response) -> Mapping[str, Any]:
    """An answer's numbers, whatever its form."""
    if response.headers["content-type"] == SAFETENSORS:
        return {name: array.tolist() for name, array in load(response.content).items()}
    answer = response.json()
    by_head = {
        name: [list(row) for row in zip(*answer[name].values(), strict=True)]
        for name in ("action", "log_prob")
    }
    state = {f"state_{part}": rows for part, rows in answer.get("state", {}).items()}
    return by_head | {"value": answer["value"]} | state


def test_the_same_vector_gets_the_same_numbers_in_either_form(
    client: AppClient, spec: PolicySpec
) -> None:
    """float32 is written in JSON so that it is read back the same, and retried across forms."""
    rng = np.random.default_rng(2)
    observation = random_observations(spec, rng, 64)
    fields: Json = {"observation": observation.tolist(), "seed": 3}
    files = save({"observation": observation}, {"seed": "3"})
    assert values_of(client.act(fields)) == values_of(act(client, files))
    first = client.act(fields | {"session_id": "v", "step": 0, "episode_start": True, "run": "1"})
    words = {"seed": "3", "session_id": "v", "step": "0", "run": "1"}
    again = act(client, save({"observation": observation, "episode_start": ones(64)}, words))
    assert again.headers["Replayed"] == "true"
    assert values_of(again) == values_of(first)


def test_accept_headers_are_one_however_they_are_sent(client: AppClient, spec: PolicySpec) -> None:
    accepts = [("Accept", "text/html"), ("Accept", SAFETENSORS)]
    for headers in (accepts, accepts[::-1]):
        response = client.request("POST", "/act", json=body(spec, 3), headers=headers)
        assert response.headers["content-type"] == SAFETENSORS


def test_the_longest_body_is_a_file_of_all_there_may_be_with_the_longest_header(
    spec: PolicySpec,
) -> None:
    num_rows = 3
    tensors = {
        name: np.zeros((num_rows, *tensor.shape), dtype=DTYPES[tensor.dtypes[-1]])
        for name, tensor in request_tensors(spec).items()
    }
    file = save(tensors)
    spaces = LARGEST_HEADER_BYTES - int.from_bytes(file[:8], "little")
    codec = SafetensorsCodec(spec, max_rows=num_rows)
    assert codec.max_body_bytes == len(file) + spaces
