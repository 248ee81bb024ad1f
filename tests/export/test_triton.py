"""What Triton is given says what its rules ask for, and does what the service does.

No Triton runs here: `triton_server` is what its documentation and sources say of it. NVIDIA's own
protobuf reads the configuration.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from export.__main__ import main
from export.manifest import Manifest, bucket_sizes
from model.spec import PolicySpec
from tamiyo_client.noise import gumbel_noise
from tests.loaded_step import allocated, load_from
from tests.random_inputs import (
    packed,
    random_blueprints,
    random_masks,
    random_observations,
    random_slots_by_op,
    random_state,
)
from tests.running_server import ROOT, RunningServer, running_server
from tests.specs import TINY_V1, TINY_V2

pytest.importorskip("tritonclient", reason="tritonclient is in the extra `heavy`")

from tritonclient.utils import triton_to_np_dtype

from tests.export.triton_server import Model, Refused, Request, SequenceBatcher, proto

LARGEST = 16
NUM_SEQUENCES, ACTING, NUM_BATCHES = 6, 4, 60
Arrays = dict[str, NDArray[Any]]
SPECS = {"v1": TINY_V1, "v2": TINY_V2}


@dataclass
class Exported:
    """An artifact and what became of it."""

    spec: PolicySpec
    artifact: Path
    repository: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.artifact)

    def model(self, suffix: str = "") -> Model:
        return Model(self.repository / f"tiny{suffix}")


@pytest.fixture(scope="module", params=SPECS)
def exported(
    request: pytest.FixtureRequest,
    onnx_artifacts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    artifact = onnx_artifacts[request.param]
    repository = tmp_path_factory.mktemp("triton") / "models"
    assert main(["triton", str(artifact), "--repository", str(repository)]) == 0
    return Exported(SPECS[request.param], artifact, repository)


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[RunningServer]:
    with running_server(exported.artifact) as running:
        yield running


def sent(spec: PolicySpec, rng: np.random.Generator, num_rows: int) -> Arrays:
    """What clients of either model send, but for noise and state."""
    masks = random_masks(spec, rng, num_rows)
    inputs: Arrays = {"observation": random_observations(spec, rng, num_rows)}
    if spec.has_slot_by_op:
        inputs["slot_by_op_mask"] = random_slots_by_op(spec, rng, masks["op"])
        masks["slot"][:] = True  # the service's client leaves it out
    if spec.blueprint_embedding_dim is not None:
        inputs["blueprint_index"] = random_blueprints(spec, rng, num_rows)
    return inputs | {"action_mask": packed(spec, masks)}


def test_both_models_load_with_their_batches_up_to_the_artifact_s_largest(
    exported: Exported,
) -> None:
    assert sorted(path.name for path in exported.repository.iterdir()) == ["tiny", "tiny_seq"]
    for suffix in ("", "_seq"):
        config = exported.model(suffix).config
        assert (config.name, config.platform) == (f"tiny{suffix}", "onnxruntime_onnx")
        assert config.max_batch_size == LARGEST
        assert config.version_policy.latest.num_versions == 2
        (group,) = config.instance_group
        assert (group.kind, group.count) == (proto.ModelInstanceGroup.KIND_CPU, 1)
        assert config.parameters["intra_op_thread_count"].string_value == "1"
        assert not config.HasField("optimization")


def test_the_stateless_model_is_the_artifact_s_file_under_its_own_names(exported: Exported) -> None:
    model, manifest = exported.model(), exported.manifest
    file = exported.repository / "tiny" / "1" / "model.onnx"
    assert file.read_bytes() == manifest.formats["onnx"].read(exported.artifact)
    assert [array.name for array in model.config.input] == [x.name for x in manifest.inputs]
    assert [array.name for array in model.config.output] == [x.name for x in manifest.outputs]


def test_requests_without_a_sequence_wait_for_no_company_and_not_for_long(
    exported: Exported,
) -> None:
    config = exported.model().config
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == proto.ModelQueuePolicy.REJECT
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (50_000, 1024)
    assert policy.allow_timeout_override


def test_each_batch_size_is_warmed_up_once_with_all_inputs(exported: Exported) -> None:
    model = exported.model()
    sizes = []
    for size, inputs in model.warmup():
        told = model.infer(inputs)
        assert all(np.isfinite(array).all() for array in told.values())
        assert {len(array) for array in told.values()} == {size}
        sizes.append(size)
    assert tuple(sizes) == bucket_sizes(LARGEST)
    for request in model.config.model_warmup:
        assert all(given.zero_data for given in request.inputs.values())


def test_the_sequence_model_keeps_each_state_and_nobody_else_is_shown_it(
    exported: Exported,
) -> None:
    config = exported.model("_seq").config
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    batching = config.sequence_batching
    assert batching.WhichOneof("strategy_choice") == "oldest"
    assert batching.max_sequence_idle_microseconds == 600_000_000
    assert batching.oldest.max_candidate_sequences == 1024
    assert batching.oldest.max_queue_delay_microseconds == 0
    names = {array.name for array in [*config.input, *config.output]}
    spec, states = exported.spec, list(batching.state)
    for state in states:
        assert not {state.input_name, state.output_name} & names
        assert list(state.dims) == [spec.num_layers, spec.hidden_dim]
        (initial,) = state.initial_state
        assert initial.zero_data
        assert (initial.data_type, initial.dims) == (state.data_type, state.dims)
    by_order = zip(
        sorted(state.input_name for state in states),
        sorted(state.output_name for state in states),
        strict=True,
    )
    assert {*by_order} == {("state_c_in", "state_c_out"), ("state_h_in", "state_h_out")}
    assert {(s.input_name, s.output_name) for s in states} == {
        ("state_c_in", "state_c_out"),
        ("state_h_in", "state_h_out"),
    }
    assert len({state.initial_state[0].name for state in states}) == len(states)


def test_a_sequence_s_start_is_its_only_control(exported: Exported) -> None:
    (control_input,) = exported.model("_seq").config.sequence_batching.control_input
    (control,) = control_input.control
    assert control_input.name == "START"
    assert control.kind == proto.ModelSequenceBatching.Control.CONTROL_SEQUENCE_START
    assert list(control.bool_false_true) == [False, True]
    assert not [*control.fp32_false_true, *control.int32_false_true]


def test_a_model_whose_requests_are_of_sequences_has_no_warmup(exported: Exported) -> None:
    assert not exported.model("_seq").config.model_warmup


def test_the_configuration_says_which_policy_it_is(exported: Exported) -> None:
    for suffix in ("", "_seq"):
        parameters = exported.model(suffix).config.parameters
        for number in ("", ".1"):
            version = parameters[f"policy_version{number}"].string_value
            assert version == exported.manifest.policy_version
            assert parameters[f"source{number}"].string_value == "module tiny"


def test_for_a_gpu_it_asks_for_one_and_for_all_digits(exported: Exported, tmp_path: Path) -> None:
    arguments = ["triton", str(exported.artifact), "--repository", str(tmp_path / "models")]
    assert main([*arguments, "--device", "cuda", "--max-sequences", "7"]) == 0
    for name in ("tiny", "tiny_seq"):
        config = Model(tmp_path / "models" / name).config
        (group,) = config.instance_group
        assert group.kind == proto.ModelInstanceGroup.KIND_GPU
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda"
        assert dict(accelerator.parameters) == {"use_tf32": "0"}
        assert "intra_op_thread_count" not in config.parameters
    assert config.sequence_batching.oldest.max_candidate_sequences == 7


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('name: "START"', 'name: "READY"'),
        ("bool_false_true: [ false, true ]", "fp32_false_true: [ 0, 1 ]"),
        ('input_name: "state_c_in"', 'input_name: "state_x_in"'),
        ('{ name: "noise"', '{ name: "seed"'),
        (" reshape { shape: [ ] }", ""),
        ("TYPE_INT64", "TYPE_FP32"),
    ],
)
def test_a_configuration_against_its_graph_would_not_load(
    exported: Exported, tmp_path: Path, before: str, after: str
) -> None:
    """That is: `triton_server` looks."""
    model = Path(shutil.copytree(exported.repository / "tiny_seq", tmp_path / "tiny_seq"))
    text = (model / "config.pbtxt").read_text()
    assert before in text
    (model / "config.pbtxt").write_text(text.replace(before, after))
    with pytest.raises(Refused):
        Model(model)


@pytest.mark.parametrize("num_rows", [1, 3, LARGEST])
def test_the_stateless_model_is_the_step_to_the_bit(
    exported: Exported, rng: np.random.Generator, num_rows: int
) -> None:
    spec, model = exported.spec, exported.model()
    step = load_from(exported.artifact, "onnx")
    h, c = random_state(spec, rng, num_rows)
    inputs = sent(spec, rng, num_rows) | {"state_h_in": h, "state_c_in": c}
    inputs["noise"] = rng.gumbel(size=(num_rows, spec.num_choices)).astype(np.float32)
    expected = allocated(exported.manifest.outputs, num_rows)
    step.bind(inputs, expected)()
    told = model.infer(inputs)
    assert told.keys() == expected.keys()
    for name, array in expected.items():
        assert told[name].tobytes() == array.tobytes(), name
    assert told["value"].shape == (num_rows, 1)


def act(http: httpx.Client, spec: PolicySpec, inputs: Arrays, **more: Any) -> dict[str, Any]:
    """The service's answer for the one row of `inputs`."""
    row = {name: array[0].tolist() for name, array in inputs.items()}
    flat, masks = row.pop("action_mask"), {}
    for head in spec.heads:
        masks[head.name], flat = flat[: head.size], flat[head.size :]
    if spec.has_slot_by_op:
        del masks["slot"]
    answer = http.post("/act", json=row | {"action_mask": masks} | more)
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


@dataclass
class Environment:
    """An environment that acts by both servers at once."""

    sequence_id: int
    session_id: str
    spec: PolicySpec
    seed: int = -1
    step: int = 0
    episode: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    def request(
        self, http: httpx.Client, rng: np.random.Generator, *, starts: bool, ends: bool
    ) -> Request:
        """Steps its session in the service, and gives what Triton's client sends for the same."""
        of_run: dict[str, Any] = {}
        if starts:
            self.episode, self.step, self.seed = self.episode + 1, 0, int(rng.integers(2**63))
            of_run = {"episode_start": True, "seed": self.seed}
        of_run |= {"episode": str(self.episode), "step": self.step}
        inputs = sent(self.spec, rng, 1)
        self.told = act(http, self.spec, inputs, session_id=self.session_id, **of_run)
        seeds, steps = (np.array([x], dtype=np.uint64) for x in (self.seed, self.step))
        inputs["noise"] = gumbel_noise(seeds, steps, self.spec.num_choices)
        self.step += 1
        return Request(self.sequence_id, inputs, start=starts, end=ends)

    def check(self, told: Arrays) -> None:
        """What Triton tells is what the service has told, bit for bit."""
        assert told["action"].tolist() == [[*self.told["action"].values()]]
        assert told["log_prob"].tolist() == [[*self.told["log_prob"].values()]]
        assert told["value"].tolist() == [[self.told["value"]]]


@pytest.mark.parametrize(("uninitialised", "num_empty"), [(7.0, 0), (np.nan, 3)])
def test_sequences_are_the_service_s_sessions_to_the_bit(
    exported: Exported,
    server: RunningServer,
    rng: np.random.Generator,
    uninitialised: float,
    num_empty: int,
) -> None:
    """Live sequences in one batch, in any order; some start again, live or ended, or wait."""
    batcher = SequenceBatcher(exported.model("_seq"), uninitialised, num_empty)
    environments = [
        Environment(at + 1, f"of-{num_empty}-{at}", exported.spec) for at in range(NUM_SEQUENCES)
    ]
    num_restarted, longest, batches = {True: 0, False: 0}, 0, set()
    with httpx.Client(base_url=server.address) as http:
        for _ in range(NUM_BATCHES):
            acting = [environments[at] for at in rng.permutation(NUM_SEQUENCES)[:ACTING]]
            requests = []
            for environment in acting:
                is_live = environment.sequence_id in batcher.live
                starts = not is_live or bool(rng.random() < 0.1)
                num_restarted[is_live] += starts and environment.episode > 0
                ends = bool(rng.random() < 0.05)
                requests.append(environment.request(http, rng, starts=starts, ends=ends))
                longest = max(longest, environment.step)
            for environment, told in zip(acting, batcher.infer(requests), strict=True):
                environment.check(told)
            batches.add(sum(request.start for request in requests))
    assert min(num_restarted.values()) > 3
    assert longest > 10
    assert batches >= {0, 1, 2}


def test_a_sequence_s_state_reaches_its_answers(
    exported: Exported, rng: np.random.Generator
) -> None:
    """So that the states above could not have been any."""
    batcher = SequenceBatcher(exported.model("_seq"))
    noise = np.zeros((1, exported.spec.num_choices), np.float32)
    inputs = sent(exported.spec, rng, 1) | {"noise": noise}
    first, again, restarted = (
        batcher.infer([Request(1, inputs, start=starts)])[0]["value"].item()
        for starts in (True, False, True)
    )
    assert again != first
    assert restarted == first


def test_noise_of_zeros_takes_the_most_likely_actions(
    exported: Exported, server: RunningServer, rng: np.random.Generator
) -> None:
    inputs = sent(exported.spec, rng, 1)
    with httpx.Client(base_url=server.address) as http:
        told = act(http, exported.spec, inputs, deterministic=True)
    inputs["noise"] = np.zeros((1, exported.spec.num_choices), np.float32)
    (answer,) = SequenceBatcher(exported.model("_seq")).infer([Request(1, inputs, start=True)])
    assert answer["action"].tolist() == [[*told["action"].values()]]


class Told:
    """`tritonclient.http.InferResult`, of arrays."""

    def __init__(self, outputs: Arrays) -> None:
        self.as_numpy = outputs.__getitem__


class Client:
    """`tritonclient.http.InferenceServerClient`, of a server in this process."""

    def __init__(self, batcher: SequenceBatcher) -> None:
        self._batcher = batcher

    def infer(
        self, model_name: str, inputs: list[Any], *, sequence_id: int, sequence_start: bool
    ) -> Told:
        assert model_name == "best_seq"
        arrays = {
            given.name(): np.frombuffer(
                given._get_binary_data(), triton_to_np_dtype(given.datatype())
            ).reshape(given.shape())
            for given in inputs
        }
        (told,) = self._batcher.infer([Request(sequence_id, arrays, start=sequence_start)])
        return Told(told)


def test_a_client_as_documented_acts_as_by_the_service(
    exported: Exported, server: RunningServer, rng: np.random.Generator
) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
    )
    documented: dict[str, Any] = {}
    exec(code, documented)
    client = Client(SequenceBatcher(exported.model("_seq")))
    with httpx.Client(base_url=server.address) as http:
        for step in range(5):
            inputs = sent(exported.spec, rng, 1)
            start = {"episode_start": True, "seed": 7} if step == 0 else {}
            expected = act(http, exported.spec, inputs, session_id="documented", **start)
            got = documented["act"](client, 3, inputs, seed=7, step=step)
            assert got.tolist() == [*expected["action"].values()]
