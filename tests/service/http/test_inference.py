"""The Open Inference Protocol over the fake policy: what is read, refused and why, and answered.

That its answers are the bits of every other form is in `tests/test_vectors.py`; that Triton's own
client speaks with it, in `tests/test_tritonclient.py`.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.errors import Malformed, TooLarge
from service.http.compression import compressed, decompressed
from service.http.inference_routes import MANY_BYTES
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient
from tests.service.http.bodies import Json, error_of

INFER = "/v2/models/tiny/infer"
JSON_BYTES = "Inference-Header-Content-Length"
DATATYPES = {"<f4": "FP32", "<f8": "FP64", "<i8": "INT64", "<u8": "UINT64", "|b1": "BOOL"}


def observed(spec: PolicySpec, *xs: float) -> NDArray[np.float32]:
    observation = np.zeros((len(xs), spec.observation_dim), np.float32)
    observation[:, 0] = xs
    return observation


def tensor(name: str, array: NDArray[Any], **fields: Any) -> Json:
    of = {"name": name, "shape": [*array.shape], "datatype": DATATYPES[array.dtype.str]}
    return {**of, "data": array.tolist(), **fields}


def asked(spec: PolicySpec, *xs: float, **parameters: Any) -> Json:
    return {"inputs": [tensor("observation", observed(spec, *xs))], "parameters": parameters}


def post(client: AppClient, content: bytes, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request("POST", INFER, content=content, headers=given)


def infer(client: AppClient, body: Json, **headers: str) -> httpx.Response:
    return post(client, json.dumps(body).encode(), **headers)


def outputs(response: httpx.Response) -> dict[str, Any]:
    """By name, of an answer in JSON."""
    assert response.status_code == 200, response.text
    return {of["name"]: np.reshape(of["data"], of["shape"]) for of in response.json()["outputs"]}


def in_binary(tensors: Mapping[str, NDArray[Any]], **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A body, and the header that it takes."""
    inputs = []
    for name, array in tensors.items():
        of = tensor(name, array, parameters={"binary_data_size": array.nbytes})
        del of["data"]
        inputs.append(of)
    text = json.dumps({"inputs": inputs, **fields}).encode()
    content = b"".join((text, *(array.tobytes() for array in tensors.values())))
    return content, {JSON_BYTES: str(len(text))}


def test_an_observation_is_enough(client: AppClient, spec: PolicySpec) -> None:
    response = infer(client, {"id": "7"} | asked(spec, 3, 1, 2))
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "7")
    assert answer["parameters"] == {
        "step": 0,
        "policy_version": client.served.manifest.policy_version,
        "heads": ",".join(spec.head_names),
    }
    by_name = {of["name"]: of for of in answer["outputs"]}
    state = [3, spec.num_layers, spec.hidden_dim]
    assert {name: (of["datatype"], of["shape"]) for name, of in by_name.items()} == {
        "action": ("INT64", [3, len(spec.heads)]),
        "log_prob": ("FP32", [3, len(spec.heads)]),
        "value": ("FP32", [3]),
        "state_h": ("FP32", state),
        "state_c": ("FP32", state),
    }
    assert by_name["value"]["data"] == [3, 1, 2]


def test_the_metadata_has_every_tensor(client: AppClient, spec: PolicySpec) -> None:
    metadata = client.get("/v2/models/tiny").json()
    inputs = {of["name"]: (of["datatype"], of["shape"]) for of in metadata["inputs"]}
    state = ("FP32", [-1, spec.num_layers, spec.hidden_dim])
    assert inputs == {
        "observation": ("FP32", [-1, spec.observation_dim]),
        "action_mask": ("BOOL", [-1, spec.num_choices]),
        "episode_start": ("BOOL", [-1]),
        "seed": ("UINT64", [-1]),
        "state_h": state,
        "state_c": state,
    }
    answered = infer(client, asked(spec, 1)).json()["outputs"]
    assert [(of["name"], of["datatype"], of["shape"]) for of in metadata["outputs"]] == [
        (of["name"], of["datatype"], [-1, *of["shape"][1:]]) for of in answered
    ]
    assert client.get("/v2/models/tiny/versions/1").json() == metadata
    assert client.get("/v2/models/tiny/versions/1/ready").json() == {"name": "tiny", "ready": True}
    server = client.get("/v2").json()
    assert server["name"] == "tamiyo-serve"
    names = {"binary_tensor_data", "parameters", "sequence", "sequence(string_id)"}
    assert {*server["extensions"]} == names


@pytest.mark.parametrize(
    "path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/other/ready"]
)
def test_another_model_is_not_there(client: AppClient, spec: PolicySpec, path: str) -> None:
    sentence = error_of(client.get(path), 404, "unknown_model")
    assert ("'other', only 'tiny'" if "other" in path else "'2', only '1'") in sentence
    answer = client.request("POST", "/v2/models/other/infer", json=asked(spec, 1))
    error_of(answer, 404, "unknown_model")


def test_it_is_not_ready_before_it_is_warm(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(is_warm=False)
    assert client.get("/v2/health/live").json() == {"live": True}
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        error_of(client.get(path), 503, "not_ready")
    error_of(infer(client, asked(spec, 1)), 503, "not_ready")
    assert client.get("/v2/models/tiny").status_code == 200


def test_a_sequence_is_a_session_of_a_vector(client: AppClient, spec: PolicySpec) -> None:
    turn = {"sequence_id": 7, "seed": 5}
    first = infer(client, asked(spec, 1, 2, sequence_start=True, **turn))
    assert outputs(first).keys() == {"action", "log_prob", "value"}, "its state is kept here"
    assert outputs(infer(client, asked(spec, 1, 2, **turn)))["value"].tolist() == [2, 4]
    vector = {"session_id": "7", "observation": observed(spec, 1, 1).tolist()}
    answer = client.act(vector)
    assert answer.json()["value"] == [3, 5], "whichever form it goes on in"
    assert answer.json()["step"] == 2


@pytest.mark.parametrize("none", [0, ""])
def test_a_sequence_that_is_none_is_stateless(
    client: AppClient, spec: PolicySpec, none: object
) -> None:
    for _ in range(2):
        assert outputs(infer(client, asked(spec, 1, sequence_id=none)))["value"].tolist() == [1]
    assert len(client.served.engine.sessions) == 0


def test_a_step_sent_twice_counts_once(client: AppClient, spec: PolicySpec) -> None:
    turn = {"sequence_id": "env-1", "run": "a"}
    first = asked(spec, 1, sequence_start=True, step=0, **turn)
    answers = [infer(client, first), infer(client, {"id": "again"} | first)]
    assert [answer.headers.get("replayed") for answer in answers] == [None, "true"]
    assert outputs(answers[0])["action"].tolist() == outputs(answers[1])["action"].tolist()
    second = asked(spec, 2, step=1, **turn)
    assert outputs(infer(client, second))["value"].tolist() == [3]
    assert outputs(infer(client, second))["value"].tolist() == [3]
    sentence = error_of(infer(client, asked(spec, 9, step=1, **turn)), 409, "step_conflict")
    assert "its next step is 2" in sentence


def test_an_ended_sequence_is_gone_with_its_answer(client: AppClient, spec: PolicySpec) -> None:
    sessions = client.served.engine.sessions
    infer(client, asked(spec, 1, sequence_id=3, sequence_start=True))
    assert len(sessions) == 1
    ended = infer(client, asked(spec, 1, sequence_id=3, sequence_end=True))
    assert outputs(ended)["value"].tolist() == [2]
    assert (len(sessions), sessions.events["ended"]) == (0, 1)
    error_of(infer(client, asked(spec, 1, sequence_id=3)), 404, "unknown_session")
    both = asked(spec, 4, sequence_id=3, sequence_start=True, sequence_end=True)
    assert outputs(infer(client, both))["value"].tolist() == [4]
    assert len(sessions) == 0


def test_a_numbered_end_may_be_asked_for_again_and_nothing_after_it(
    client: AppClient, spec: PolicySpec
) -> None:
    turn = {"sequence_id": 3, "run": "a"}
    infer(client, asked(spec, 1, sequence_start=True, step=0, **turn))
    end = asked(spec, 1, sequence_end=True, step=1, **turn)
    answers = [infer(client, end) for _ in range(2)]
    assert answers[1].headers["replayed"] == "true"
    assert answers[0].content == answers[1].content
    for step in (1, 2):
        sentence = error_of(infer(client, asked(spec, 1, step=step, **turn)), 410, "session_lost")
        assert "has taken its last step" in sentence
    error_of(infer(client, asked(spec, 1, sequence_id=3)), 404, "unknown_session")
    assert infer(client, end).headers["replayed"] == "true", "as long as there is room"
    again = asked(spec, 5, sequence_start=True, step=0, sequence_id=3, run="b")
    assert outputs(infer(client, again))["value"].tolist() == [5]
    assert outputs(infer(client, asked(spec, 1, sequence_id=3)))["value"].tolist() == [6]


def test_tensors_may_be_in_binary_in_json_or_mixed(client: AppClient, spec: PolicySpec) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((2, spec.num_choices)) < 0.5
    mask[:, np.cumsum([0, *spec.head_sizes[:-1]])] = True
    tensors = {
        "action_mask": mask,
        "observation": observed(spec, 1, 2),
        "seed": np.array([3, 2**64 - 1], np.uint64),
    }
    inputs = [tensor(name, array) for name, array in tensors.items()]
    expected = outputs(infer(client, {"inputs": inputs}))
    flat = [tensor(name, array, data=array.ravel().tolist()) for name, array in tensors.items()]
    integers = [flat[0] | {"data": [int(value) for value in flat[0]["data"]]}, *flat[1:]]
    content, header = in_binary(tensors)
    length = int(header[JSON_BYTES])
    mixed = json.loads(content[:length])
    mixed["inputs"][2] = inputs[2]
    text = json.dumps(mixed).encode()
    without_seed = content[length : len(content) - tensors["seed"].nbytes]
    answers = [
        infer(client, {"inputs": flat}),
        infer(client, {"inputs": integers}),
        post(client, content, **header),
        post(client, text + without_seed, **{JSON_BYTES: str(len(text))}),
    ]
    for answer in answers:
        got = outputs(answer)
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)


def test_a_bare_body_is_the_observation(client: AppClient, spec: PolicySpec) -> None:
    observation = observed(spec, 4, 5)
    answer = post(client, observation.tobytes(), **{JSON_BYTES: "0"})
    assert outputs(answer)["value"].tolist() == [4, 5]
    sentence = error_of(
        post(client, observation.tobytes()[:-1], **{JSON_BYTES: "0"}), 400, "malformed"
    )
    assert "a row of `observation` has" in sentence


def test_outputs_are_those_asked_for_each_as_it_was(client: AppClient, spec: PolicySpec) -> None:
    wanted = [
        {"name": "value", "parameters": {"binary_data": True}},
        {"name": "action"},
        {"name": "state_h", "parameters": {"binary_data": True}},
    ]
    answer = infer(client, asked(spec, 1, 2) | {"outputs": wanted})
    length = int(answer.headers[JSON_BYTES])
    assert answer.headers["content-type"] == "application/octet-stream"
    value, action, state = json.loads(answer.content[:length])["outputs"]
    raw = answer.content[length:]
    size = value["parameters"]["binary_data_size"]
    assert np.frombuffer(raw[:size], np.float32).tolist() == [1, 2]
    assert "data" in action
    assert state["parameters"]["binary_data_size"] == len(raw) - size
    parameters = {"binary_data_output": True}
    but_one = [{"name": "action", "parameters": {"binary_data": False}}]
    answer = infer(client, asked(spec, 1, **parameters) | {"outputs": but_one})
    assert JSON_BYTES.lower() not in answer.headers
    assert outputs(answer).keys() == {"action"}


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(
    client: AppClient, spec: PolicySpec, encoding: str
) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    said = {"deterministic": True}
    content, header = in_binary({"observation": observed(spec, 1, 2)}, parameters=said)
    headers = {**header, "Content-Encoding": encoding, "Accept-Encoding": encoding}
    answer = post(client, compress(content), **headers)
    assert answer.headers["content-encoding"] == encoding
    assert outputs(answer)["value"].tolist() == [1, 2], "httpx has decompressed it"
    plain = post(client, content, **header, **{"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.json() == answer.json()
    refused = post(client, compress(b"{}"), **headers)
    assert "content-encoding" not in refused.headers
    error_of(refused, 400, "malformed")


def test_a_client_that_would_rather_not_gets_it_plain(client: AppClient, spec: PolicySpec) -> None:
    answer = infer(client, asked(spec, 1), **{"Accept-Encoding": "gzip;q=0, br"})
    assert "content-encoding" not in answer.headers


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no gzip", "the body is not gzip"),
        (gzip.compress(b"{}")[:-1], "one whole gzip stream"),
        (gzip.compress(b"{}") + b"more", "one whole gzip stream"),
    ],
    ids=["plain", "cut short", "and more"],
)
def test_what_is_not_compressed_as_said_is_refused(
    client: AppClient, content: bytes, sentence: str
) -> None:
    refused = post(client, content, **{"Content-Encoding": "gzip"})
    assert sentence in error_of(refused, 400, "malformed")


def test_an_encoding_nobody_knows_is_refused(client: AppClient) -> None:
    refused = post(client, b"{}", **{"Content-Encoding": "br"})
    assert "'br'" in error_of(refused, 415, "unsupported_content_type")


def test_nor_is_one_read_that_is_for_its_way(client: AppClient) -> None:
    refused = post(client, b"{}", Transfer_Encoding="gzip, chunked")
    sentence = error_of(refused, 415, "unsupported_content_type")
    assert sentence == "the Transfer-Encoding is 'gzip'; send the body as it is"


def test_a_bomb_is_no_more_than_its_limit() -> None:
    bomb = compressed(bytes(50_000_000), "gzip")
    with pytest.raises(TooLarge, match="larger than 1000 bytes"):
        decompressed(bomb, "gzip", 1000)
    assert decompressed(compressed(bytes(1000), "gzip"), "gzip", 1000) == bytes(1000)
    with pytest.raises(Malformed):
        decompressed(b"", "deflate", 1000)


def test_a_bomb_is_no_more_than_its_limit_on_the_route(client: AppClient, spec: PolicySpec) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    refused = post(client, bomb, **{"Content-Encoding": "gzip", JSON_BYTES: "0"})
    error_of(refused, 413, "too_large")


def test_a_large_answer_is_compressed_as_a_small_one(client: AppClient, spec: PolicySpec) -> None:
    many = asked(spec, *range(200), deterministic=True)
    plain = infer(client, many, **{"Accept-Encoding": "identity"})
    assert len(plain.content) > MANY_BYTES
    answer = infer(client, many, **{"Accept-Encoding": "deflate"})
    assert answer.headers["content-encoding"] == "deflate"
    assert int(answer.headers["content-length"]) < len(plain.content)
    assert answer.json() == plain.json()


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.1, deflate;q=0.5", "deflate"),
        ("gzip;q=nan, deflate;q=0.5", "deflate"),
        ("identity, gzip;q=0.5", None),
        ("br", None),
        ("", None),
    ],
)
def test_the_encoding_is_the_one_the_client_would_rather_have(
    client: AppClient, spec: PolicySpec, accepted: str, encoding: str | None
) -> None:
    answer = infer(client, asked(spec, 1), **{"Accept-Encoding": accepted})
    assert answer.headers.get("content-encoding") == encoding
    assert answer.headers["vary"] == "accept-encoding"
    assert outputs(answer)["value"].tolist() == [1]


def test_names_of_encodings_are_of_any_case_and_two_are_none(
    client: AppClient, spec: PolicySpec
) -> None:
    content = gzip.compress(json.dumps(asked(spec, 1)).encode())
    assert post(client, content, **{"Content-Encoding": "GZIP"}).status_code == 200
    refused = post(client, content, **{"Content-Encoding": "gzip, gzip"})
    error_of(refused, 415, "unsupported_content_type")


def test_what_may_be_said_and_makes_no_difference(client: AppClient, spec: PolicySpec) -> None:
    floats = {"name": "observation", "shape": [1, spec.observation_dim], "datatype": "FP64"}
    data = [2] + [0] * (spec.observation_dim - 1)
    body = {"inputs": [{**floats, "data": data}], "id": "", "parameters": {"priority": 3}}
    answer = infer(client, body)
    assert outputs(answer)["value"].tolist() == [2]
    assert "id" not in answer.json()


def test_two_names_of_a_session_are_refused(client: AppClient, spec: PolicySpec) -> None:
    headers = [("X-Session-Id", "a"), ("X-Session-Id", "b")]
    body = json.dumps(asked(spec, 1)).encode()
    refused = client.request("POST", INFER, content=body, headers=headers)
    assert "given twice" in error_of(refused, 400, "malformed")


def test_the_bodys_limit_is_that_of_its_json_and_that_of_its_tensors(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(max_body_bytes=2000)
    text = json.dumps(asked(spec, 1))
    assert post(client, text.ljust(2000).encode()).status_code == 200
    sentence = error_of(post(client, text.ljust(2001).encode()), 413, "too_large")
    assert "the JSON is larger than 2000 bytes" in sentence
    many = {"observation": np.zeros((100, spec.observation_dim), np.float32)}
    content, header = in_binary(many, id="x" * 200)
    assert len(content) > 2000
    padded = content[: int(header[JSON_BYTES])].ljust(2001) + content[int(header[JSON_BYTES]) :]
    error_of(post(client, padded, **{JSON_BYTES: "2001"}), 413, "too_large")
    assert post(client, content, **header).status_code == 200
    error_of(post(client, content + bytes(10_000_000), **header), 413, "too_large")


def test_the_header_of_a_balancer_is_the_sequence(client: AppClient, spec: PolicySpec) -> None:
    body = asked(spec, 1, sequence_id=12, sequence_start=True)
    assert infer(client, body, X_Session_Id="12").status_code == 200
    assert "X-Session-Id" in error_of(infer(client, body, X_Session_Id="13"), 400, "malformed")


def test_keys_are_asked_for_but_by_health(
    make_client: MakeClient, spec: PolicySpec, tmp_path: Any
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 20)
    keys.chmod(0o600)
    client = make_client(act_keys=keys)
    for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/ready", "/v2/models/other"):
        error_of(client.get(path), 401, "unauthorized")
        shown = client.request("GET", path, headers={"Authorization": f"Bearer {'k' * 20}"})
        assert shown.status_code == (404 if "other" in path else 200)
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    error_of(infer(client, asked(spec, 1)), 401, "unauthorized")
    unknown = client.request("POST", "/v2/models/other/infer", json=asked(spec, 1))
    error_of(unknown, 401, "unauthorized")
    assert infer(client, asked(spec, 1), Authorization=f"Bearer {'k' * 20}").status_code == 200


def changed(**fields: Any) -> Any:
    """The input with other fields; None takes one away."""

    def change(body: Json) -> Json:
        given = body["inputs"][0] | fields
        given = {name: value for name, value in given.items() if value is not None}
        return body | {"inputs": [given]}

    return change


def more(name: str, array: NDArray[Any], **fields: Any) -> Any:
    return lambda body: body | {"inputs": [*body["inputs"], tensor(name, array, **fields)]}


def saying(**parameters: Any) -> Any:
    return lambda body: body | {"parameters": parameters}


ONE = np.zeros(1, np.float32)
REFUSED: dict[str, tuple[Any, int, str]] = {
    "no inputs": (lambda body: {"inputs": []}, 422, "`inputs` has 0 values"),
    "no observation": (changed(name="action_mask", datatype="BOOL"), 400, "`action_mask.data` has"),
    "nothing": (lambda body: {}, 400, "`inputs`: Field required"),
    "a list": (lambda body: [body], 400, "the body: "),
    "unknown tensor": (changed(name="obs"), 400, "`obs` is not a tensor that is read here"),
    "twice": (more("observation", ONE), 400, "`observation` is given twice"),
    "datatype": (changed(datatype="INT32"), 400, "`observation` is INT32, not FP32 or FP64"),
    "bytes": (changed(datatype="BYTES"), 400, "`observation` is BYTES, not FP32 or FP64"),
    "shape": (changed(shape=[2, 3], data=[0.0] * 6), 422, "`observation` is [2, 3], the policy"),
    "no rows": (changed(shape=[0, 3], data=[]), 422, "`observation` is [0, 3], the policy"),
    "of no rank": (changed(shape=[], data=[0.0]), 422, "`observation` is [], the policy reads"),
    "size": (changed(data=[0.0]), 400, "`observation.data` has 1 values, which are not ["),
    "ragged": (changed(data=[[0.0], [0.0, 1.0]]), 400, "`observation.data` is not nested as its"),
    "mixed": (changed(data=[[0.0], 1.0]), 400, "`observation.data` is not nested as its shape"),
    "no data": (changed(data=None), 400, "`observation` has neither `data`, a list, nor a `binary"),
    "data of text": (changed(data="abc"), 400, "`observation` has neither `data`, a list, nor"),
    "negative size": (changed(shape=[-1, 3]), 400, "`inputs[0].shape[0]`: Input should be"),
    "huge": (changed(shape=[0, 2**62], data=[]), 400, "`observation` has a shape that no array"),
    "beyond all": (changed(shape=[2**63]), 400, "`inputs[0].shape[0]`: Input should be less than"),
    "of a thousand ranks": (changed(shape=[9] * 1000), 422, "`inputs[0].shape` has 1000 values"),
    "output twice": (
        lambda body: body | {"outputs": [{"name": "value"}, {"name": "value"}]},
        400,
        "`value` is asked for twice",
    ),
    "unknown field of an input": (changed(type="FP32"), 400, "`inputs[0].type` is not a field"),
    "nested and flat": (
        more("seed", np.zeros(1, np.uint64), data=[[1]]),
        400,
        "`seed.data` has at 0 what is no UINT64",
    ),
    "step beyond 64 bits": (saying(step=2**64), 400, "`parameters.step`: Input should be less"),
    "long id": (lambda body: body | {"id": "x" * 257}, 400, "`id`: String should have at most 256"),
    "both": (
        changed(parameters={"binary_data_size": 4}),
        400,
        "`observation` has both `data` and a `binary_data_size`",
    ),
    "shared memory": (
        changed(data=None, parameters={"shared_memory_region": "a"}),
        400,
        "`inputs[0].parameters.shared_memory_region` is not a field of the request",
    ),
    "unknown field": (lambda body: body | {"input": 1}, 400, "`input` is not a field of the req"),
    "unknown parameter": (saying(determinstic=True), 400, "`parameters.determinstic` is not a"),
    "classes": (
        lambda body: body | {"outputs": [{"name": "action", "parameters": {"classification": 3}}]},
        400,
        "`outputs[0].parameters.classification` is not a field of the request",
    ),
    "unknown output": (
        lambda body: body | {"outputs": [{"name": "logits"}]},
        400,
        "`logits` is no output; there are action, log_prob, value",
    ),
    "state of a session": (
        lambda body: (
            body
            | {"outputs": [{"name": "state_h"}]}
            | {"parameters": {"sequence_id": 1, "sequence_start": True}}
        ),
        422,
        "`state_h` is for stateless requests",
    ),
    "start of nothing": (
        saying(sequence_start=True),
        422,
        "`sequence_start` needs a `sequence_id`",
    ),
    "end of nothing": (saying(sequence_end=True), 422, "`sequence_end` needs a `sequence_id`"),
    "run of nothing": (saying(run="a"), 422, "`run` needs a `sequence_id`"),
    "fraction": (saying(sequence_id=1.5), 400, "`parameters.sequence_id`: Input should be an int"),
    "negative": (saying(sequence_id=-1), 400, "`parameters.sequence_id`: Input should be an int"),
    "long name": (saying(sequence_id="x" * 257), 400, "`parameters.sequence_id`: Input should be"),
    "truth as text": (
        saying(deterministic="true"),
        400,
        "`parameters.deterministic`: Input should",
    ),
    "two seeds": (
        lambda body: more("seed", np.zeros(1, np.uint64))(saying(seed=1)(body)),
        422,
        "`seed` is given twice",
    ),
    "some start": (
        lambda body: more("episode_start", np.zeros(1, np.bool_))(
            saying(sequence_id=1, sequence_start=True)(body)
        ),
        422,
        "the request starts every row, and `episode_start[0]` is false",
    ),
    "number in a mask": (
        more("episode_start", np.zeros(1, np.bool_), data=[2]),
        400,
        "`episode_start.data` has at 0 what is no BOOL",
    ),
    "truth in numbers": (
        lambda body: changed(data=[True, *body["inputs"][0]["data"][0][1:]])(body),
        400,
        "`observation.data` has at 0 what is no FP32",
    ),
    "text in numbers": (changed(data=["1"]), 400, "`observation.data` has 1 values"),
    "beyond 64 bits": (
        more("seed", np.zeros(1, np.uint64), data=[2**64]),
        400,
        "`seed.data` has what is no UINT64",
    ),
    "below zero": (
        more("seed", np.zeros(1, np.uint64), data=[-1]),
        400,
        "`seed.data` has what is no UINT64",
    ),
}


@pytest.mark.parametrize(("change", "status", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_in_a_sentence_and_moves_nothing(
    client: AppClient, spec: PolicySpec, change: Any, status: int, sentence: str
) -> None:
    error_type = "malformed" if status == 400 else "invalid"
    refused = infer(client, change(asked(spec, 1)))
    assert sentence in error_of(refused, status, error_type)
    assert len(client.served.engine.sessions) == 0
    assert infer(client, asked(spec, 1)).status_code == 200


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        ("x", "is not a number"),
        ("-1", "is not a number"),
        ("9" * 30, "is not a number"),
        ("\u00b2", "is not a number"),
        ("1000000", "is 1000000, and the body has"),
        ("3", "the body is not JSON"),
    ],
)
def test_a_wrong_length_of_the_json_is_refused(
    client: AppClient, spec: PolicySpec, length: str, sentence: str
) -> None:
    content, _ = in_binary({"observation": observed(spec, 1)})
    header = {JSON_BYTES: length.encode("latin-1")}
    refused = client.request("POST", INFER, content=content, headers=header)
    assert sentence in error_of(refused, 400, "malformed")


def test_binary_that_does_not_add_up_is_refused(client: AppClient, spec: PolicySpec) -> None:
    content, header = in_binary({"observation": observed(spec, 1)})
    for wrong, sentence in (
        (content[:-1], "`observation` ends after the body, which has"),
        (content + b"x", "of the body, which has"),
    ):
        assert sentence in error_of(post(client, wrong, **header), 400, "malformed")
    mask = {"episode_start": np.array([True]), "observation": observed(spec, 1)}
    content, header = in_binary(mask)
    at = int(header[JSON_BYTES])
    assert content[at] == 1
    wrong = content[:at] + b"\2" + content[at + 1 :]
    assert "`episode_start[0]` is neither 0 nor 1" in error_of(
        post(client, wrong, **header), 400, "malformed"
    )
    body = json.loads(content[:at])
    body["inputs"][1]["parameters"]["binary_data_size"] -= 4
    text = json.dumps(body).encode()
    refused = post(client, text + content[at:], **{JSON_BYTES: str(len(text))})
    assert "bytes, which are not FP32 [" in error_of(refused, 400, "malformed")


def test_time_runs_out_in_microseconds(make_client: MakeClient, spec: PolicySpec) -> None:
    """The server's own patience ends before any batch is formed."""
    client = make_client(timeout_ms=1e-6)
    assert infer(client, asked(spec, 1, timeout=60_000_000)).status_code == 200
    for said in ({}, {"timeout": 0}):
        error_of(infer(client, asked(spec, 1, **said)), 504, "deadline_exceeded")
    patient = make_client(timeout_ms=60_000)
    error_of(infer(patient, asked(spec, 1, timeout=1)), 504, "deadline_exceeded")
    assert infer(patient, asked(spec, 1, timeout=0)).status_code == 200
