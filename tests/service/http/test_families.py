"""Policies of another family over HTTP: one that carries no state, and one that carries four."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load, save

from export.manifest import Manifest, Spec
from model.sb3.spec import SB3Spec
from service.engine.policy_versions import Successor
from service.errors import Invalid
from tests.service.fakes import AppClient, SummingRuntime, manifest_of
from tests.service.http.bodies import Json, body, error_of, vector_body
from tests.service.http.test_policy_routes import SAFETENSORS, changed, push_body, put, version
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1

Numbers = dict[str, NDArray[Any]]

NUM_ROWS, NUM_STEPS = 3, 4
DATATYPES = {"<f4": "FP32", "<u8": "UINT64", "|b1": "BOOL"}


@pytest.fixture(params=[TINY_MLPS, TINY_LSTMS], ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> SB3Spec:
    of_family: SB3Spec = request.param
    return of_family


@pytest.fixture
def manifest(spec: SB3Spec) -> Manifest:
    return manifest_of(spec)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Which nobody reads."""
    return tmp_path


def zeros(spec: SB3Spec, num_rows: int | None = None) -> Json:
    """A state as JSON has it, of one environment or of several."""
    lead = () if num_rows is None else (num_rows,)
    return {state.name: np.zeros((*lead, *state.shape)).tolist() for state in spec.states}


def in_json(client: AppClient, spec: SB3Spec, tensors: Numbers, **fields: Any) -> Numbers:
    """What is answered to a vector's tensors, sent as JSON."""
    asked = fields | {name: array.tolist() for name, array in tensors.items()}
    if spec.states and spec.states[0].tensor in tensors:
        asked["state"] = {state.name: asked.pop(state.tensor) for state in spec.states}
    answer = ok(client.act(asked)).json()
    told = {name: np.array(list(answer[name].values())).T for name in ("action", "log_prob")}
    told["log_prob"] = told["log_prob"].astype(np.float32)
    told["value"] = np.array(answer["value"], np.float32)
    assert ("state" in answer) == (bool(spec.states) and "session_id" not in fields)
    state = answer.get("state", {})
    return told | {f"state_{name}": np.array(rows, np.float32) for name, rows in state.items()}


def in_a_file(client: AppClient, spec: SB3Spec, tensors: Numbers, **fields: Any) -> Numbers:
    """The same as safetensors."""
    words = {name: str(value) for name, value in fields.items()}
    answer = client.request(
        "POST", "/act", content=save(tensors, words), headers={"Content-Type": SAFETENSORS}
    )
    return load(ok(answer).content)


def in_the_protocol(client: AppClient, spec: SB3Spec, tensors: Numbers, **fields: Any) -> Numbers:
    """The same in the Open Inference Protocol, whose sessions are sequences."""
    if "session_id" in fields:
        fields["sequence_id"] = fields.pop("session_id")
    inputs = [
        {
            "name": name,
            "datatype": DATATYPES[array.dtype.str],
            "shape": array.shape,
            "data": array.ravel().tolist(),
        }
        for name, array in tensors.items()
    ]
    asked = {"inputs": inputs, "parameters": fields}
    answer = ok(client.request("POST", "/v2/models/tiny/infer", json=asked)).json()
    return {
        of["name"]: np.array(
            of["data"], np.int64 if of["datatype"] == "INT64" else np.float32
        ).reshape(of["shape"])
        for of in answer["outputs"]
    }


FORMS = {"json": in_json, "safetensors": in_a_file, "protocol": in_the_protocol}


def ok(response: httpx.Response) -> httpx.Response:
    assert response.status_code == 200, response.text
    return response


def same(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(
        array.tobytes() == other[name].tobytes() for name, array in one.items()
    )


def test_a_state_is_carried_in_every_form_and_equals_a_session_s(
    client: AppClient, spec: SB3Spec
) -> None:
    rng = np.random.default_rng(1)
    seeds = np.arange(NUM_ROWS, dtype=np.uint64)
    carried: dict[str, Numbers] = {form: {} for form in FORMS}
    for step in range(NUM_STEPS):
        shown = rng.standard_normal((NUM_ROWS, spec.observation_dim), dtype=np.float32)
        plain: Numbers = {"observation": shown, "seed": seeds}
        told, held = {}, {}
        for form, act in FORMS.items():
            told[form] = act(client, spec, plain | carried[form], step=step)
            names = [name for name in told[form] if name.startswith("state_")]
            assert names == [state.tensor for state in spec.states] or form == "safetensors"
            carried[form] = {name: told[form][name] for name in names}
            starts = {"episode_start": np.full(NUM_ROWS, step == 0)}
            held[form] = act(client, spec, plain | starts, step=step, session_id=form)
        assert len(carried["json"]) == len(spec.states)
        for form in FORMS:
            assert same(told[form], told["json"])
            decided = {name: x for name, x in told[form].items() if name not in carried[form]}
            assert same(decided, held[form])


def test_one_environment_carries_its_state_too(client: AppClient, spec: SB3Spec) -> None:
    fields: Json = {"seed": 1}
    for step in range(NUM_STEPS):
        held = client.act(
            body(spec, 2, session_id="a", episode_start=step == 0, step=step, seed=1)
        ).json()
        free = ok(client.act(body(spec, 2, step=step, **fields))).json()
        assert ("state" in free) == bool(spec.states)
        if spec.states:
            fields["state"] = free.pop("state")
            assert list(fields["state"]) == [state.name for state in spec.states]
        assert free == {name: value for name, value in held.items() if name != "session_id"}
        assert list(free["action"]) == list(spec.head_names)


def test_a_step_sent_again_is_answered_again_and_another_is_a_conflict(
    client: AppClient, spec: SB3Spec
) -> None:
    client.act(body(spec, session_id="a", episode_start=True, step=0))
    first = client.act(body(spec, 2, session_id="a", step=1))
    again = client.act(body(spec, 2, session_id="a", step=1))
    assert again.content == ok(first).content
    assert again.headers["replayed"] == "true"
    other = client.act(body(spec, 3, session_id="a", step=1))
    assert "with another content" in error_of(other, 409, "step_conflict")


@pytest.mark.parametrize("spec", [TINY_MLPS], ids=["no state"])
def test_a_state_is_refused_where_the_policy_has_none(client: AppClient, spec: SB3Spec) -> None:
    state = {"h": [[0.0]], "c": [[0.0]]}
    wrong: list[Any] = [state, {}, [], "h"]
    for given in wrong:
        for asked in (body(spec, state=given), vector_body(spec, [1, 2], state=given)):
            said = error_of(client.act(asked), 400, "malformed")
            assert said == "`state`: this policy has no state that a client could carry"
    for asked in (body(spec, state=None), vector_body(spec, [1, 2], state=None)):
        assert "state" not in ok(client.act(asked)).json()
    tensors: Numbers = {"observation": np.zeros((1, 11), np.float32)}
    tensors["state_h"] = np.zeros((1, 1, 1), np.float32)
    answer = client.request(
        "POST", "/act", content=save(tensors), headers={"Content-Type": SAFETENSORS}
    )
    assert "`state_h` is not a tensor that is read here" in error_of(answer, 400, "malformed")


STATE = zeros(TINY_LSTMS)
WRONG_STATES: dict[str, tuple[Json, int, str]] = {
    "a pair": (
        {"h": STATE["h"], "c": STATE["c"]},
        400,
        "`state.critic_h` is required",
    ),
    "the critic's alone": (
        {"critic_h": STATE["h"], "critic_c": STATE["c"]},
        400,
        "`state.h` is required",
    ),
    "one too many": (STATE | {"x": []}, 400, "`state.x` is not a field of the request"),
    "a short one": (
        STATE | {"critic_c": STATE["c"][:1]},
        422,
        "`state.critic_c` has 1 values, the policy reads 2",
    ),
    "an infinity": (
        STATE | {"critic_h": [[1e39] * 10] * 2},
        422,
        "`state.critic_h[0][0]` is not a finite float32",
    ),
}


@pytest.mark.parametrize("spec", [TINY_LSTMS], ids=["four arrays"])
@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_is_not_the_policy_s_is_refused_by_name(
    client: AppClient, spec: SB3Spec, wrong: str
) -> None:
    state, status, sentence = WRONG_STATES[wrong]
    error_type = "malformed" if status == 400 else "invalid"
    assert error_of(client.act(body(spec, state=state)), status, error_type) == sentence


@pytest.mark.parametrize("spec", [TINY_LSTMS], ids=["four arrays"])
def test_a_file_without_one_of_the_arrays_is_refused(client: AppClient, spec: SB3Spec) -> None:
    tensors = {"observation": np.zeros((2, spec.observation_dim), np.float32)}
    for state in spec.states[:3]:
        tensors[state.tensor] = np.zeros((2, *state.shape), np.float32)
    answer = client.request(
        "POST", "/act", content=save(tensors), headers={"Content-Type": SAFETENSORS}
    )
    said = error_of(answer, 400, "malformed")
    assert said == "`state_critic_c` is required where `state_h` is given"


def test_the_policy_says_what_it_carries_and_of_which_family_it_is(
    client: AppClient, spec: SB3Spec
) -> None:
    served = client.get("/policy").json()
    assert TypeAdapter(Spec).validate_python(served["spec"]) == spec
    states = [
        {"name": state.name, "dtype": "float32", "shape": ["batch", *state.shape]}
        for state in spec.states
    ]
    assert served["states"] == states
    metadata = client.get("/v2/models/tiny").json()
    for side in ("inputs", "outputs"):
        named = [of["name"] for of in metadata[side] if of["name"].startswith("state_")]
        assert named == [state.tensor for state in spec.states]


def test_what_is_documented_is_what_is_read_and_written(client: AppClient, spec: SB3Spec) -> None:
    document = client.get("/openapi.json").json()
    schemas, act = document["components"]["schemas"], document["paths"]["/act"]["post"]
    for name, example in act["requestBody"]["content"]["application/json"]["examples"].items():
        assert client.act(example["value"]).status_code == 200, name
    for kind in ("HiddenStateBody", "VectorHiddenStateBody"):
        assert (kind in schemas) == bool(spec.states)
        if spec.states:
            assert schemas[kind]["required"] == [state.name for state in spec.states]
            assert schemas[kind]["properties"].keys() == {state.name for state in spec.states}
    for kind in ("ActResponse", "VectorActResponse"):
        assert ("state" in schemas[kind]["properties"]) == bool(spec.states)
    for kind in ("ActRequest", "VectorActRequest"):
        is_null = schemas[kind]["properties"]["state"].get("type") == "null"
        assert is_null == (not spec.states)
    told = act["responses"]["200"]["content"][SAFETENSORS]["schema"]["description"]
    states = "`state_h`, `state_c`, `state_critic_h` and `state_critic_c` F32 [n, 2, 10]"
    assert (states in told) == ("stateless" in told) == bool(spec.states)


def test_new_weights_are_probed_and_serve(client: AppClient, spec: SB3Spec) -> None:
    new, _ = changed(put(client, push_body(spec, 3.0)))
    assert new == version(3.0)
    assert client.act(body(spec, 2)).json()["value"] == 6.0
    said = error_of(put(client, push_body(spec, 2.0, probed=5.0)), 422, "invalid")
    assert "they are not of the policy that made the probe" in said


def test_an_artifact_of_another_family_does_not_succeed(client: AppClient, spec: SB3Spec) -> None:
    other = Successor(manifest_of(TINY_V1), lambda: SummingRuntime(TINY_V1))
    with pytest.raises(Invalid, match="its family is tamiyo, and that of the policy that serves"):
        client.run(client.engine.versions.succeed(lambda: other, by="somebody"))
