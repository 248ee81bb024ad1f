"""`/openapi.json` says what is accepted and answered: no more, no less, and for this policy."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save

from export.manifest import Manifest
from model.spec import PolicySpec
from model.step_spec import HeadSpec
from service.errors import Disconnected, Forbidden, ServiceError, VersionMismatch
from service.http.codec import JSON, SAFETENSORS
from service.http.inference_codec import BINARY
from service.http.safetensors_codec import SCALARS
from service.http.safetensors_file import read_file
from service.http.schemas import (
    BEYOND_FLOAT32,
    act_request,
    act_response,
    vector_act_request,
    vector_act_response,
)
from service.http.tensors import request_tensors
from service.settings import Settings
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, Served, SummingRuntime
from tests.service.http.bodies import Json, body, vector_body


@pytest.fixture(scope="module")
def openapi(artifact: Path, manifest: Manifest, spec: PolicySpec) -> Json:
    served = Served.make(manifest, SummingRuntime(spec), Settings(artifact=artifact))
    with AppClient(served, is_warm=False) as client:
        document: Json = client.get("/openapi.json").json()
    return document


def operations(openapi: Json) -> dict[str, Json]:
    return {
        f"{method.upper()} {path}": operation
        for path, of_path in openapi["paths"].items()
        for method, operation in of_path.items()
    }


def documents(openapi: Json, name: str, value: Any) -> bool:
    """Whether the component of this name says that `value` may be."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": openapi["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def one_or_many(name: str) -> list[Json]:
    prefix = "#/components/schemas/"
    return [{"$ref": f"{prefix}Act{name}"}, {"$ref": f"{prefix}VectorAct{name}"}]


def without_nulls(node: Any) -> Any:
    """FastAPI leaves them out of its document."""
    if isinstance(node, dict):
        return {name: without_nulls(value) for name, value in node.items() if value is not None}
    return [without_nulls(value) for value in node] if isinstance(node, list) else node


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_resolves(openapi: Json) -> None:
    found = set(references(openapi))
    assert found
    for reference in found:
        node: Any = openapi
        for name in reference.removeprefix("#/").split("/"):
            node = node[name]


def test_the_documented_request_is_the_one_that_is_read(openapi: Json, spec: PolicySpec) -> None:
    content = openapi["paths"]["/act"]["post"]["requestBody"]["content"]
    assert content.keys() == {JSON, SAFETENSORS}
    assert content[JSON]["schema"]["anyOf"] == one_or_many("Request")
    models = {"ActRequest": act_request(spec), "VectorActRequest": vector_act_request(spec)}
    for name, model in models.items():
        documented = openapi["components"]["schemas"][name]
        assert documented["properties"].keys() == model.model_fields.keys()
        assert documented["required"] == ["observation"]


def test_the_documented_answer_is_the_one_that_is_written(
    openapi: Json, client: AppClient, spec: PolicySpec
) -> None:
    content = openapi["paths"]["/act"]["post"]["responses"]["200"]["content"]
    assert content.keys() == {JSON, SAFETENSORS}
    assert content[JSON]["schema"]["anyOf"] == one_or_many("Response")
    of_one, of_many = body(spec), vector_body(spec, [1, 2])
    models = {"ActResponse": act_response(spec), "VectorActResponse": vector_act_response(spec)}
    for (name, model), plain in zip(models.items(), (of_one, of_many), strict=True):
        documented = openapi["components"]["schemas"][name]
        assert documented["properties"].keys() == model.model_fields.keys()
        session = client.act(plain | {"session_id": name, "episode_start": True}).json()
        stateless = client.act(plain).json()
        assert session.keys() | stateless.keys() == documented["properties"].keys()
        assert documents(openapi, name, session)
        assert documents(openapi, name, stateless)


def test_lengths_heads_and_bounds_are_the_policy_s(openapi: Json, spec: PolicySpec) -> None:
    schemas = openapi["components"]["schemas"]
    fields = schemas["ActRequest"]["properties"]
    assert fields["observation"]["minItems"] == fields["observation"]["maxItems"] == 11
    masks = schemas["ActionMask"]
    assert masks["additionalProperties"] is False
    sizes = {name: (of["minItems"], of["maxItems"]) for name, of in masks["properties"].items()}
    assert sizes == {head.name: (head.size, head.size) for head in spec.heads}
    for name in ("step", "seed"):
        number, null = fields[name]["anyOf"]
        assert (number["minimum"], number["exclusiveMaximum"]) == (0, 2**64)
        assert isinstance(number["exclusiveMaximum"], int), "a validator may compare it as a float"
        assert null == {"type": "null"}
    rows = schemas["HiddenStateBody"]["properties"]["h"]
    assert (rows["minItems"], rows["maxItems"]) == (spec.num_layers, spec.num_layers)
    assert (rows["items"]["minItems"], rows["items"]["maxItems"]) == (10, 10)


ROW = [[0.5] * 10]
LARGEST = math.nextafter(BEYOND_FLOAT32, 0)
ACCEPTED: dict[str, Json] = {
    "an observation": {},
    "nulls for what is absent": {"action_mask": None, "session_id": None, "step": None}
    | {"episode": None, "seed": None, "timeout_ms": None, "state": None},
    "a session": {"session_id": "s", "episode_start": True},
    "a session from step 0": {"session_id": "s", "episode_start": True, "step": 0},
    "an episode": {"session_id": "s", "episode_start": True, "episode": "7", "state": None},
    "a state": {"state": {"h": ROW, "c": ROW}},
    "a stateless step, and no start": {"step": 5, "episode_start": False, "episode": None},
    "the largest numbers": {"step": 2**64 - 1, "seed": 2**64 - 1, "timeout_ms": 1e308},
    "a mask": {"action_mask": {"op": [True, 0, 1, False, 0, 0], "tempo": [0, 0, 1]}},
    "an empty mask": {"action_mask": {}},
    "the longest name": {"session_id": "x" * 256, "episode_start": True},
    "the largest float32": {"observation": [LARGEST, -LARGEST] + [0.0] * 9},
}
REFUSED: dict[str, Json] = {
    "too short": {"observation": [0.0] * 10},
    "too long": {"observation": [0.0] * 12},
    "no float32": {"observation": [BEYOND_FLOAT32] + [0.0] * 10},
    "none below either": {"observation": [-BEYOND_FLOAT32] + [0.0] * 10},
    "an unknown field": {"sesion_id": "s"},
    "a state in a session": {"session_id": "s", "episode_start": True}
    | {"state": {"h": ROW, "c": ROW}},
    "an episode without a session": {"episode": "7"},
    "an episode of no session": {"episode": "7", "session_id": None},
    "a start without a session": {"episode_start": True},
    "a start at a later step": {"session_id": "s", "episode_start": True, "step": 1},
    "a seed below 0": {"seed": -1},
    "a seed beyond 64 bits": {"seed": 2**64},
    "a step below 0": {"step": -1},
    "a step beyond 64 bits": {"step": 2**64},
    "no time": {"timeout_ms": 0},
    "an empty name": {"session_id": "", "episode_start": True},
    "too long a name": {"session_id": "x" * 257, "episode_start": True},
    "too long an episode": {"session_id": "s", "episode_start": True, "episode": "x" * 257},
    "an unknown head": {"action_mask": {"opp": [True] * 6}},
    "a short mask": {"action_mask": {"op": [True] * 5}},
    "a long mask": {"action_mask": {"op": [True] * 7}},
    "a mask that allows nothing": {"action_mask": {"op": [False, 0, 0, 0, 0, 0]}},
    "a mask of 2": {"action_mask": {"op": [2] * 6}},
    "a mask of null": {"action_mask": {"op": None}},
    "half a state": {"state": {"h": ROW}},
    "a state of another shape": {"state": {"h": ROW, "c": ROW * 2}},
    "a state of other rows": {"state": {"h": ROW, "c": [[0.5] * 9]}},
    "more than a state": {"state": {"h": ROW, "c": ROW, "x": ROW}},
    "a start that is null": {"episode_start": None},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_documented_is_accepted(
    openapi: Json, client: AppClient, spec: PolicySpec, fields: Json
) -> None:
    request = body(spec, **fields) if "observation" not in fields else fields
    assert documents(openapi, "ActRequest", request)
    answer = client.act(request)
    assert answer.status_code == 200, answer.text
    assert documents(openapi, "ActResponse", answer.json())


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_documented_to_be(
    openapi: Json, client: AppClient, spec: PolicySpec, fields: Json
) -> None:
    request = body(spec, **fields) if "observation" not in fields else fields
    assert not documents(openapi, "ActRequest", request)
    answer = client.act(request)
    assert answer.status_code in (400, 422)
    assert documents(openapi, "ErrorResponse", answer.json())


VECTORS_ACCEPTED: dict[str, Json] = {
    "observations": {},
    "nulls for what is absent": {"action_mask": None, "session_id": None, "step": None}
    | {"run": None, "seed": None, "timeout_ms": None, "state": None},
    "a session": {"session_id": "s", "episode_start": True, "run": "b6c1", "step": 0},
    "a start of each row": {"session_id": "s", "episode_start": [True, True]},
    "no start of any row": {"episode_start": [False, False]},
    "a state": {"state": {"h": [ROW] * 2, "c": [ROW] * 2}},
    "the largest numbers": {"step": 2**64 - 1, "seed": 2**64 - 1, "timeout_ms": 1e308},
    "a seed for each row": {"seed": [0, 2**64 - 1]},
    "a mask": {"action_mask": {"op": [[True, 0, 1, False, 0, 0]] * 2, "tempo": [[0, 0, 1]] * 2}},
    "an empty mask": {"action_mask": {}},
}
VECTORS_REFUSED: dict[str, Json] = {
    "none": {"observation": []},
    "a row too short": {"observation": [[0.0] * 11, [0.0] * 10]},
    "a row of none": {"observation": [[0.0] * 11, None]},
    "one environment among many": {"observation": [[0.0] * 11, 0.0]},
    "no float32": {"observation": [[BEYOND_FLOAT32] + [0.0] * 10] * 2},
    "an episode": {"session_id": "s", "episode_start": True, "episode": "7"},
    "a state in a session": {"session_id": "s", "episode_start": True}
    | {"state": {"h": [ROW] * 2, "c": [ROW] * 2}},
    "a run without a session": {"run": "7"},
    "a start without a session": {"episode_start": True},
    "a row's start without a session": {"episode_start": [False, True]},
    "starts of nobody": {"session_id": "s", "episode_start": []},
    "starts of integers": {"session_id": "s", "episode_start": [1, 0]},
    "seeds of nobody": {"seed": []},
    "a seed below 0": {"seed": [0, -1]},
    "a seed beyond 64 bits": {"seed": [2**64, 0]},
    "a mask of one row": {"action_mask": {"op": [True] * 6}},
    "a mask that allows nothing": {"action_mask": {"op": [[True] * 6, [0] * 6]}},
    "an unknown head": {"action_mask": {"opp": [[True] * 6] * 2}},
    "a short mask": {"action_mask": {"op": [[True] * 6, [True] * 5]}},
    "a state of one": {"state": {"h": ROW, "c": ROW}},
    "half a state": {"state": {"h": [ROW] * 2}},
    "an unknown field": {"sesion_id": "s"},
}


@pytest.mark.parametrize("fields", VECTORS_ACCEPTED.values(), ids=VECTORS_ACCEPTED)
def test_what_is_documented_of_a_vector_is_accepted(
    openapi: Json, client: AppClient, spec: PolicySpec, fields: Json
) -> None:
    request = vector_body(spec, [1.0, 2.0]) | fields
    assert documents(openapi, "VectorActRequest", request)
    answer = client.act(request)
    assert answer.status_code == 200, answer.text
    assert documents(openapi, "VectorActResponse", answer.json())


@pytest.mark.parametrize("fields", VECTORS_REFUSED.values(), ids=VECTORS_REFUSED)
def test_what_is_refused_of_a_vector_is_documented_to_be(
    openapi: Json, client: AppClient, spec: PolicySpec, fields: Json
) -> None:
    request = vector_body(spec, [1.0, 2.0]) | fields
    assert not documents(openapi, "VectorActRequest", request)
    assert not documents(openapi, "ActRequest", request)
    assert client.act(request).status_code in (400, 422)


def test_every_tensor_and_every_word_of_the_metadata_is_documented(
    openapi: Json, client: AppClient, spec: PolicySpec
) -> None:
    operation = operations(openapi)["POST /act"]
    asked = operation["requestBody"]["content"][SAFETENSORS]["schema"]["description"]
    for name, tensor in request_tensors(spec).items():
        shape = ", ".join(map(str, ("n", *tensor.shape)))
        assert f"- `{name}`: {' or '.join(tensor.dtypes)} [{shape}]\n" in asked
    for name in SCALARS:
        assert f"`{name}`" in asked
    answered = operation["responses"]["200"]["content"][SAFETENSORS]["schema"]["description"]
    content = client.request(
        "POST",
        "/act",
        content=save({"observation": np.zeros((2, spec.observation_dim), np.float32)}),
        headers={"Content-Type": SAFETENSORS},
    ).content
    tensors, metadata = read_file(content)
    for name, array in tensors.items():
        assert f"`{name}`" in answered
        assert ", ".join(map(str, ("[n", *array.shape[1:]))) + "]" in answered
    assert all(f"`{name}`" in answered for name in metadata)


def test_every_example_of_a_request_works_as_it_is(openapi: Json, client: AppClient) -> None:
    content = openapi["paths"]["/act"]["post"]["requestBody"]["content"][JSON]
    of_one = ["start", "step", "stateless"]
    assert list(content["examples"]) == [*of_one, *(f"vector_{name}" for name in of_one)]
    for name, example in content["examples"].items():
        model = "VectorActRequest" if name.startswith("vector") else "ActRequest"
        assert documents(openapi, model, example["value"])
        answer = client.act(example["value"])
        assert answer.status_code == 200, answer.text
        again = client.act(example["value"])
        assert again.content == answer.content, "who tries it out twice is answered twice"


def test_every_example_of_an_inference_works_as_it_is(openapi: Json, client: AppClient) -> None:
    asked = openapi["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    assert asked.keys() == {JSON, BINARY}
    for example in asked[JSON]["examples"].values():
        assert documents(openapi, "InferRequest", example["value"])
        answers = [
            client.request("POST", "/v2/models/tiny/infer", json=example["value"]) for _ in range(2)
        ]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        assert answers[0].content == answers[1].content, "who tries it out twice is answered twice"
        assert documents(openapi, "InferResponse", answers[0].json())


def test_every_success_shows_what_one_looks_like(openapi: Json, client: AppClient) -> None:
    for name, operation in operations(openapi).items():
        for status, response in operation["responses"].items():
            if status == "200":
                for content_type, content in response["content"].items():
                    assert "example" in content or content_type in (SAFETENSORS, BINARY), name
                    assert "schema" in content, name
    examples = {
        name: operation["responses"]["200"]["content"][JSON]["example"]
        for name, operation in operations(openapi).items()
        if JSON in operation["responses"].get("200", {}).get("content", {})
    }
    assert documents(openapi, "ActResponse", examples.pop("POST /act"))
    paths = ("/healthz", "/readyz", "/policy", "/", "/v2", "/v2/health/live", "/v2/health/ready")
    for name in (f"GET {path}" for path in paths):
        answer = client.get(name.removeprefix("GET ")).json()
        assert without_nulls(answer) == examples.pop(name)
    for name in ("PUT /policy/weights", "POST /policy/rollback"):
        assert documents(openapi, "WeightsResponse", examples.pop(name))
    assert documents(openapi, "VersionsResponse", examples.pop("GET /policy/versions"))
    model, tiny = "/v2/models/{model}", "/v2/models/tiny"
    for path in ("", "/ready"):
        assert client.get(tiny + path).json() == examples.pop(f"GET {model}{path}")
    assert documents(openapi, "InferResponse", examples.pop(f"POST {model}/infer"))
    assert not examples


def statuses(root: type[ServiceError] = ServiceError) -> set[int]:
    return {root.status_code}.union(*map(statuses, root.__subclasses__()))


def test_every_error_of_act_is_documented_in_the_one_form(openapi: Json) -> None:
    responses = operations(openapi)["POST /act"]["responses"]
    never = {Disconnected.status_code, Forbidden.status_code, VersionMismatch.status_code}
    assert {int(status) for status in responses} == statuses() - never | {200}
    assert {400, 401, 404, 409, 410, 413, 415, 422, 429, 500, 503, 504} <= {
        int(of) for of in responses
    }
    assert responses["429"]["headers"]["Retry-After"]["required"] is True
    assert responses["503"]["headers"]["Retry-After"]["required"] is False
    assert responses["401"]["headers"]["WWW-Authenticate"]["schema"] == {"const": "Bearer"}
    assert responses["200"]["headers"]["Replayed"]["schema"] == {"const": "true"}


def error_types(operation: Json) -> dict[str, set[str]]:
    """By status, the words that a route's errors come with."""
    return {
        status: set(response["content"][JSON]["examples"])
        for status, response in operation["responses"].items()
        if not status.startswith("2")
    }


def test_errors_of_changing_weights_are_documented_where_weights_are_changed(openapi: Json) -> None:
    of = {name: error_types(operation) for name, operation in operations(openapi).items()}
    assert of["POST /act"]["409"] == {"step_conflict"}
    assert of["PUT /policy/weights"]["409"] == {"push_conflict"}
    assert of["POST /policy/rollback"]["409"] == {"push_conflict", "no_previous_version"}
    changing = {name for name, by_status in of.items() if "412" in by_status}
    assert changing == {"PUT /policy/weights", "POST /policy/rollback"}
    assert {"400", "413", "415", "422", "503"} <= of["PUT /policy/weights"].keys()


def test_no_route_documents_an_error_of_another_form(openapi: Json) -> None:
    assert len(operations(openapi)) >= 7
    for name, operation in operations(openapi).items():
        assert "500" in operation["responses"]
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                content = response["content"][JSON]
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}, name
                for error_type, example in content["examples"].items():
                    assert documents(openapi, "ErrorResponse", example["value"])
                    assert example["value"]["error_type"] == error_type
    sessions = operations(openapi)["DELETE /sessions/{session_id}"]["responses"]
    assert {"204", "404", "410"} <= sessions.keys()
    assert "422" not in sessions, "FastAPI's own form of a validation error"
    assert "503" in operations(openapi)["GET /readyz"]["responses"]


def test_which_routes_take_a_key_is_documented(
    make_client: MakeClient, openapi: Json, tmp_path: Path
) -> None:
    """One that is not needed may be there all the same."""
    file = tmp_path / "act.keys"
    file.write_text("x" * 20)
    documents = {True: make_client(act_keys=file).get("/openapi.json").json(), False: openapi}
    for is_needed, document in documents.items():
        scheme = document["components"]["securitySchemes"]["bearer"]
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        security = {name: of.get("security") for name, of in operations(document).items()}
        expected: list[Json] = [{"bearer": []}] if is_needed else [{}, {"bearer": []}]
        model = "/v2/models/{model}"
        keyed = (
            *("POST /act", "DELETE /sessions/{session_id}", f"POST {model}/infer"),
            *("GET /v2", f"GET {model}", f"GET {model}/ready"),
        )
        administered = ("PUT /policy/weights", "POST /policy/rollback")
        assert {name for name, of in security.items() if of} == {*keyed, *administered}
        for name in keyed:
            assert security[name] == expected
            assert "401" in operations(document)[name]["responses"]


def test_a_header_for_load_balancers_is_documented(openapi: Json) -> None:
    (parameter,) = operations(openapi)["POST /act"]["parameters"]
    assert (parameter["in"], parameter["name"].lower()) == ("header", "x-session-id")
    assert parameter["required"] is False


def test_a_policy_s_own_inputs_have_its_lengths_and_bounds() -> None:
    spec = PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, hidden_dim=16)
    fields = act_request(spec).model_json_schema()["properties"]
    index = fields["blueprint_index"]["anyOf"][0]
    assert (index["minItems"], index["maxItems"]) == (2, 2)
    assert (index["items"]["minimum"], index["items"]["maximum"]) == (-1, 12)
    rows = fields["slot_by_op_mask"]["anyOf"][0]
    assert (rows["minItems"], rows["maxItems"]) == (6, 6)
    assert (rows["items"]["minItems"], rows["items"]["maxItems"]) == (2, 2)


def test_a_head_may_have_any_name_a_spec_allows() -> None:
    names = ("copy", "model_config", "items", "json", "class", "op")
    heads = tuple(HeadSpec(name=name, size=2) for name in names)
    spec = PolicySpec.tamiyo_v1(observation_dim=1).model_copy(update={"heads": heads})
    masks = {name: [1, 0] for name in names}
    content = json.dumps({"observation": [0.0], "action_mask": masks})
    assert act_request(spec).model_validate_json(content).action_mask == masks
    assert act_request(spec).model_json_schema()["$defs"]["ActionMask"]["properties"].keys() == {
        *names
    }


def test_the_document_costs_no_request(make_client: MakeClient, spec: PolicySpec) -> None:
    """It is made when it is first asked for, and kept."""
    client = make_client()
    assert client.act(body(spec)).status_code == 200
    assert client.app.openapi_schema is None
    assert client.get("/openapi.json").content == client.get("/openapi.json").content
