"""What V2 adds to a request: blueprints and slots by op, read, refused, batched and replayed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.exporter import export_policy
from export.loaders.protocol import RenewableStep
from export.manifest import Manifest
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.bench.load import Session
from service.bench.pool import Pool
from service.bench.replay import replay
from service.bench.wire import JsonWire
from service.runtime.load import load_runtime
from service.settings import Settings
from tamiyo_client.noise import gumbel_noise
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL
from tests.random_inputs import random_policy
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, Served
from tests.specs import TINY_V2 as SPEC

NUM_SESSIONS, NUM_STEPS = 5, 6

Json = dict[str, Any]


@pytest.fixture(scope="module")
def v2_policy() -> FactoredRecurrentActorCritic:
    return random_policy(SPEC)


@pytest.fixture(scope="module")
def v2_artifact(
    v2_policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("v2") / "tiny"
    formats = ("onnx", "torchscript", "pt2")
    export_policy(v2_policy, None, output, name="tiny-v2", formats=formats, max_batch_size=8)
    return output


@pytest.fixture(scope="module", params=["onnx", "torchscript", "eager"])
def v2_runtime(request: pytest.FixtureRequest, v2_artifact: Path) -> RenewableStep:
    manifest = Manifest.read(v2_artifact)
    return load_runtime(v2_artifact, manifest, name=request.param, device="cpu", num_threads=1)


@pytest.fixture
def v2_client(v2_artifact: Path, v2_runtime: RenewableStep) -> Iterator[AppClient]:
    manifest = Manifest.read(v2_artifact)
    with AppClient(Served.make(manifest, v2_runtime, Settings(artifact=v2_artifact))) as client:
        yield client


def body(**fields: Any) -> Json:
    return {"observation": [1.0] + [0.0] * 6, **fields}


def refusal(client: AppClient, fields: Json) -> tuple[int, str]:
    response = client.act(body(**fields))
    return response.status_code, response.json()["error"]


def requests_of(pool: Pool, session: int, step: int) -> Json:
    """The step's inputs, each session its own walk through the pool."""
    at = (session * 7 + step) % len(pool.observations)
    ends = np.cumsum(SPEC.head_sizes)[:-1]
    by_head = zip(SPEC.head_names, np.split(pool.action_masks[at], ends), strict=True)
    assert pool.blueprint_indices is not None
    assert pool.slot_by_op_masks is not None
    return {
        "observation": pool.observations[at].tolist(),
        "action_mask": {name: columns.tolist() for name, columns in by_head},
        "blueprint_index": pool.blueprint_indices[at].tolist(),
        "slot_by_op_mask": pool.slot_by_op_masks[at].tolist(),
        "session_id": f"env-{session}",
        "episode_start": step == 0,
        "step": step,
        "seed": session,
    }


def test_every_answer_is_the_policy_s_own(
    v2_client: AppClient, v2_policy: FactoredRecurrentActorCritic
) -> None:
    """Against the eager policy, which the recordings hold to the original."""
    pool = Pool.random(SPEC, 3)
    for session in range(NUM_SESSIONS):
        state = None
        for step in range(NUM_STEPS):
            request = requests_of(pool, session, step)
            answer = v2_client.act(request).raise_for_status().json()
            masks = {
                name: torch.tensor([mask])
                for name, mask in {
                    **request["action_mask"],
                    "slot_by_op": request["slot_by_op_mask"],
                }.items()
            }
            noise = gumbel_noise(
                np.array([session], np.uint64), np.array([step], np.uint64), SPEC.num_choices
            )
            act = v2_policy.get_action(
                torch.tensor([request["observation"]]),
                state,
                masks,
                torch.from_numpy(noise),
                blueprint_index=torch.tensor([request["blueprint_index"]]),
            )
            state = act.state
            assert answer["action"] == {name: int(a) for name, a in act.action.items()}
            for name, log_prob in act.log_prob.items():
                assert answer["log_prob"][name] == pytest.approx(float(log_prob), abs=LOG_PROB_ATOL)
            assert answer["value"] == pytest.approx(3.0 * float(act.value), abs=3 * FLOAT_ATOL)


def test_the_bench_finds_every_answer_of_v2_its_artifact_s_own(
    v2_client: AppClient, v2_runtime: RenewableStep, v2_artifact: Path
) -> None:
    pool = Pool.random(SPEC, 4)
    wire = JsonWire(SPEC, pool, None)
    session = Session("bench", seed=5)
    for step in range(NUM_STEPS):
        response = v2_client.act(wire.body("bench", 5, step, step, None))
        session.pool_index.append(step)
        session.answers.append(response.raise_for_status().content)
    loaded = {Manifest.read(v2_artifact).policy_version: v2_runtime}
    differences = replay([session], pool, wire, loaded, SPEC)
    assert (differences.answers, differences.other_actions) == (NUM_STEPS, 0)
    assert differences.largest < FLOAT_ATOL


def test_an_observation_is_enough_and_means_that_no_slot_holds_a_blueprint(
    v2_client: AppClient,
) -> None:
    alone = v2_client.act(body(deterministic=True)).raise_for_status().json()
    none = v2_client.act(body(deterministic=True, blueprint_index=[-1, -1])).json()
    other = v2_client.act(body(deterministic=True, blueprint_index=[3, -1])).json()
    null = body(deterministic=True, blueprint_index=None, slot_by_op_mask=None)
    assert alone == none == v2_client.act(null).json()
    assert alone["value"] != other["value"]


def test_without_slots_by_op_the_slot_s_own_mask_holds_for_every_op(v2_client: AppClient) -> None:
    only_second = {"slot": [False, True]}
    own = v2_client.act(body(deterministic=True, action_mask=only_second)).json()
    by_op = v2_client.act(body(deterministic=True, slot_by_op_mask=[[False, True]] * 6)).json()
    assert own == by_op
    assert own["action"]["slot"] == 1
    integers = v2_client.act(body(deterministic=True, slot_by_op_mask=[[0, 1], [False, 1]] * 3))
    assert integers.json() == own


def test_slots_by_op_take_the_place_of_the_slot_s_own_mask(v2_client: AppClient) -> None:
    both = body(
        deterministic=True,
        action_mask={"slot": [True, False]},
        slot_by_op_mask=[[False, True]] * 6,
    )
    assert v2_client.act(both).json()["action"]["slot"] == 1


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"blueprint_index": [0]}, 422, "`blueprint_index` has 1 values, the policy reads 2"),
        ({"blueprint_index": [0, 13]}, 422, "`blueprint_index[1]` is not -1 (none) or one of"),
        ({"blueprint_index": [-2, 0]}, 422, "`blueprint_index[0]` is not -1 (none) or one of"),
        ({"blueprint_index": [2**70, 0]}, 422, "`blueprint_index[0]` is not -1 (none) or one"),
        ({"blueprint_index": [0.5, 0]}, 400, "`blueprint_index[0]`: Input should be a valid int"),
        ({"slot_by_op_mask": [[True, True]] * 5}, 422, "_mask` has 5 values, the policy reads 6"),
        ({"slot_by_op_mask": [[True]] * 6}, 422, "_mask[0]` has 1 values, the policy reads 2"),
        ({"slot_by_op_mask": [[1, 2]] * 6}, 400, "`slot_by_op_mask[0][1]`: Input should be true,"),
        (
            {"slot_by_op_mask": [[True, True]] * 3 + [[False, False]] * 3},
            422,
            "`slot_by_op_mask[3]` allows no slot, and op 3 is allowed",
        ),
    ],
)
def test_what_the_policy_cannot_read_is_refused_by_name(
    v2_client: AppClient, fields: Json, status: int, sentence: str
) -> None:
    got, error = refusal(v2_client, fields)
    assert got == status
    assert sentence in error


def test_an_op_without_a_slot_may_have_none_where_it_is_not_allowed_or_needs_none(
    v2_client: AppClient,
) -> None:
    rows = [[False, False], *[[True, True]] * 4, [False, False]]
    action_mask = {"op": [True] * 5 + [False]}
    answer = v2_client.act(body(slot_by_op_mask=rows, action_mask=action_mask))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "other",
    [
        {"blueprint_index": [1, 2]},
        {"slot_by_op_mask": [[True, False]] * 6},
    ],
)
def test_a_step_sent_again_with_another_input_is_a_conflict_and_not_a_retry(
    v2_client: AppClient, other: Json
) -> None:
    first = body(session_id="env", episode="0", step=0, episode_start=True)
    assert v2_client.act(first).status_code == 200
    assert v2_client.act(first).headers["Replayed"] == "true"
    assert v2_client.act(first | other).status_code == 409


def test_the_critic_s_other_outputs_are_answered_where_the_artifact_has_them(
    tmp_path: Path,
) -> None:
    policy = random_policy(SPEC.model_copy(update={"extra_outputs": ("q_value", "contribution")}))
    export_policy(policy, None, tmp_path / "v2", name="v2", formats=("onnx",), max_batch_size=4)
    manifest = Manifest.read(tmp_path / "v2")
    runtime = load_runtime(tmp_path / "v2", manifest, name="onnx", device="cpu", num_threads=1)
    served = Served.make(manifest, runtime, Settings(artifact=tmp_path / "v2"))
    request = body(session_id="env", step=0, episode="0", episode_start=True, deterministic=True)
    with AppClient(served) as client:
        first, again = client.act(request), client.act(request)
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"q_value", "contribution"} <= schemas["ActResponse"]["properties"].keys()
    assert first.content == again.content
    assert again.headers["Replayed"] == "true"
    answer = first.json()
    with torch.no_grad():
        forward = policy(torch.tensor([[request["observation"]]]))
        op = torch.tensor([[answer["action"]["op"]]])
        q_value = 3.0 * float(policy.q_value(forward.output, op))
        contribution = policy.contribution(forward.output).flatten().tolist()
    assert answer["q_value"] == pytest.approx(q_value, abs=3 * FLOAT_ATOL)
    assert answer["contribution"] == pytest.approx(contribution, abs=FLOAT_ATOL)


def test_without_them_they_are_not_in_the_answer(v2_client: AppClient) -> None:
    assert not {"q_value", "contribution"} & v2_client.act(body()).json().keys()


def test_v1_knows_none_of_it(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client()
    plain: Json = {"observation": [0.0] * spec.observation_dim}
    for name, value in (("blueprint_index", [-1, -1]), ("slot_by_op_mask", [[True, True]] * 6)):
        response = client.act(plain | {name: value})
        assert response.status_code == 400
        assert response.json()["error"] == f"`{name}` is not a field of the request"


def test_the_documentation_shows_what_the_policy_reads(
    v2_client: AppClient, make_client: MakeClient
) -> None:
    added = {"blueprint_index", "slot_by_op_mask"}
    shown = [
        set(client.get("/openapi.json").json()["components"]["schemas"]["ActRequest"]["properties"])
        for client in (v2_client, make_client())
    ]
    assert shown[0] - shown[1] == added
    assert shown[1] <= shown[0]
