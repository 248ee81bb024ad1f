"""The artifact directory: whole and right, or not there at all."""

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from export.comparison import ParityError
from export.episodes import ROWS, STEPS
from export.exporter import export_policy
from export.formats import FORMATS, StepSource
from export.loaders.torch_formats import load_torchscript
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import (
    MANIFEST_FILE,
    Manifest,
    Source,
    step_inputs,
    step_outputs,
    timed_sizes,
)
from export.packed_step import StepOutput
from export.parity import TOLERANCES
from export.report import REPORT_FILE, REPORT_PAGE, Report
from export.report_page import render
from export.tamiyo_step import TamiyoStep
from export.weights import WEIGHTS_FILE
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.named_version import version_of
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_masks,
    random_observations,
    random_policy,
    stacked,
    tensors,
)

SOURCE = Source(kind="preset", name="tiny", seed=0)
FORMAT = "torchscript"
MAX_BATCH_SIZE = 16
FILES = {MANIFEST_FILE, WEIGHTS_FILE, FORMATS[FORMAT].file, REPORT_FILE, REPORT_PAGE}
STAGES = (
    "writing the weights",
    f"exporting {FORMAT}",
    "running the policy's own episodes, and each format beside it",
    "measuring how fast each format is",
)

Snapshot = Mapping[Path, bytes | None]


def export(
    policy: FactoredRecurrentActorCritic,
    output: Path,
    normalizer: ObservationNormalizer | None = None,
    **options: Any,
) -> Manifest:
    return export_policy(
        policy,
        normalizer,
        output,
        name="tiny",
        source=SOURCE,
        formats=(FORMAT,),
        max_batch_size=MAX_BATCH_SIZE,
        **options,
    )


def snapshot(directory: Path) -> Snapshot:
    """Everything below the directory, hidden or not, with its content."""
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def normalizer(spec: PolicySpec) -> ObservationNormalizer:
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(spec.observation_dim, generator=generator)
    return ObservationNormalizer(mean, torch.rand(mean.shape, generator=generator))


@pytest.fixture(scope="module")
def exported(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Manifest]:
    """An artifact with a normaliser, and the manifest the export returned. Tests only read it."""
    output = tmp_path_factory.mktemp("exported") / "missing" / "parents" / "tiny"
    with umask(0o027):
        return output, export(policy, output, normalizer)


@pytest.fixture(scope="module")
def other_policy(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    return random_policy(spec, seed=1)


@pytest.fixture
def old(tmp_path: Path, exported: tuple[Path, Manifest]) -> Path:
    """An artifact that is there already, with a file this version no longer writes."""
    output = tmp_path / "tiny"
    output.mkdir()
    for file in exported[0].iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    (output / "report.html").write_text("of an older version")
    return output


def test_artifact_is_its_files_and_nothing_beside_it(exported: tuple[Path, Manifest]) -> None:
    output, _ = exported
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_artifact_is_readable_by_others_whatever_the_umask(
    exported: tuple[Path, Manifest],
) -> None:
    output, _ = exported
    assert stat.S_IMODE(output.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o644}


def test_manifest_on_disk_is_the_one_returned(exported: tuple[Path, Manifest]) -> None:
    output, manifest = exported
    assert Manifest.read(output) == manifest


def test_every_file_has_its_hash_and_size_in_the_manifest(
    exported: tuple[Path, Manifest],
) -> None:
    output, manifest = exported
    described = [manifest.weights, *manifest.formats.values(), *manifest.reports]
    assert {file.file for file in described} == FILES - {MANIFEST_FILE}
    for file in described:
        content = (output / file.file).read_bytes()
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert file.bytes == len(content)


def test_manifest_says_what_was_exported_and_how_it_compared(
    exported: tuple[Path, Manifest], spec: PolicySpec
) -> None:
    _, manifest = exported
    assert manifest.schema_version == 2
    assert (manifest.name, manifest.source, manifest.spec) == ("tiny", SOURCE, spec)
    assert (manifest.precision, manifest.device, manifest.has_normalizer) == ("fp32", "cpu", True)
    assert manifest.inputs == step_inputs(spec)
    assert manifest.outputs == step_outputs(spec)
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.versions.keys() == {"python", "tamiyo-serve", "torch"}
    parity = manifest.parity
    assert (parity.atol, parity.rtol, parity.min_greedy_agreement) == TOLERANCES["fp32"]
    assert parity.batch_sizes == tuple(range(1, MAX_BATCH_SIZE + 1))
    assert parity.steps == STEPS
    assert parity.formats.keys() == manifest.formats.keys() == {FORMAT}
    assert parity.formats[FORMAT].rows == STEPS * ROWS
    assert parity.formats[FORMAT].action_agreement == 1.0
    assert max(parity.formats[FORMAT].max_error.values()) < parity.atol


def test_report_tells_of_every_format_at_every_timed_size_on_this_machine(
    exported: tuple[Path, Manifest],
) -> None:
    output, manifest = exported
    report = Report.read(output, manifest)
    assert (report.name, report.policy_version) == ("tiny", manifest.policy_version)
    assert (report.parity, report.source) == (manifest.parity, SOURCE)
    assert report.machine.threads == torch.get_num_threads()
    assert report.machine.torch == torch.__version__
    assert report.formats.keys() == {FORMAT}
    of = report.formats[FORMAT]
    sizes = list(timed_sizes(MAX_BATCH_SIZE))
    assert [latency.batch_size for latency in report.eager] == sizes
    assert [latency.batch_size for latency in of.latency] == sizes
    assert list(of.row_difference) == sizes
    assert max(of.row_difference.values()) <= 2e-5
    assert len(of.error_by_step) == STEPS
    assert max(of.error_by_step) == max(manifest.parity.formats[FORMAT].max_error.values())
    assert of.export_seconds > 0
    assert of.check_seconds > 0


def test_report_page_shows_the_report(exported: tuple[Path, Manifest]) -> None:
    output, manifest = exported
    page = (output / REPORT_PAGE).read_text(encoding="utf-8")
    assert manifest.policy_version in page
    assert page == render(Report.read(output, manifest))


def test_policy_of_ones_own_is_exported_without_naming_a_source(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    manifest = export_policy(
        policy,
        None,
        str(tmp_path / "mine"),
        name="mine",
        formats=(FORMAT,),
        max_batch_size=MAX_BATCH_SIZE,
    )
    assert manifest.source == Source(kind="module", name="mine")
    assert Manifest.read(tmp_path / "mine") == manifest


def test_weights_are_the_state_dict_and_the_normaliser(
    exported: tuple[Path, Manifest],
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    spec: PolicySpec,
) -> None:
    path = exported[0] / WEIGHTS_FILE
    expected = policy.state_dict() | {
        "observation_normalizer.mean": normalizer.mean,
        "observation_normalizer.var": normalizer.var,
    }
    weights = load_file(path)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name
    with safe_open(path, "pt") as file:
        stored = file.metadata()["spec"]
    assert PolicySpec.model_validate_json(stored) == spec
    # Or the version of every policy would change when a release adds to the spec.
    assert not {"value_scale", "recurrence", "extra_outputs"} & json.loads(stored).keys()


@torch.inference_mode()
def test_file_on_disk_acts_on_raw_observations_as_the_policy_on_normalised_ones(
    exported: tuple[Path, Manifest],
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    spec: PolicySpec,
    rng: np.random.Generator,
) -> None:
    output, manifest = exported
    content = manifest.formats[FORMAT].read(output)
    step = load_torchscript(content, "cpu").call
    observation = torch.from_numpy(random_observations(spec, rng, 5))
    masks, noise = random_masks(spec, rng, 5), torch.from_numpy(gumbel_noise(spec, rng, 5))
    state = policy.initial_state(5)
    action, log_prob, value, h, c = step(
        observation, torch.from_numpy(packed(spec, masks)), noise, *state
    )
    act = policy.get_action(normalizer(observation), state, tensors(masks), noise)
    np.testing.assert_array_equal(action, stacked(spec, act.action))
    np.testing.assert_allclose(log_prob, stacked(spec, act.log_prob), rtol=0, atol=2e-5)
    for got, expected in ((value, act.value), (h, act.state[0]), (c, act.state[1])):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_policy_version_is_the_hash_of_the_file_s_own_parameters_and_the_same_each_time(
    exported: tuple[Path, Manifest],
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, manifest = exported
    monkeypatch.chdir(tmp_path)
    again = export(policy, Path("again"), normalizer)
    content = io.BytesIO((output / FORMATS[FORMAT].file).read_bytes())
    with torch_speaks_of_itself():
        traced = torch.jit.load(content)  # type: ignore[no-untyped-call]
    held = {**dict(traced.named_parameters()), **dict(traced.named_buffers())}
    own = {parameter.name: held[parameter.name].numpy() for parameter in manifest.parameters}
    assert again.policy_version == manifest.policy_version == version_of(own)
    assert (tmp_path / "again" / WEIGHTS_FILE).is_file()


def test_policy_without_normaliser_has_none_and_another_version(
    exported: tuple[Path, Manifest], policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    manifest = export(policy, tmp_path / "bare")
    assert not manifest.has_normalizer
    assert load_file(tmp_path / "bare" / WEIGHTS_FILE).keys() == policy.state_dict().keys()
    assert manifest.policy_version != exported[1].policy_version


def test_overwriting_replaces_the_whole_artifact(
    old: Path, other_policy: FactoredRecurrentActorCritic
) -> None:
    manifest = export(other_policy, old, overwrite=True)
    assert Manifest.read(old) == manifest
    assert {path.name for path in old.iterdir()} == FILES
    assert torch.equal(
        load_file(old / WEIGHTS_FILE)["op_head.2.bias"],
        other_policy.state_dict()["op_head.2.bias"],
    )
    assert stat.S_IMODE(old.stat().st_mode) == 0o755
    assert list(old.parent.iterdir()) == [old]


def test_existing_artifact_is_not_replaced_unasked(
    old: Path, other_policy: FactoredRecurrentActorCritic
) -> None:
    before = snapshot(old.parent)
    with pytest.raises(FileExistsError, match="overwrite") as refusal:
        export(other_policy, old)
    assert str(old) in str(refusal.value)
    assert snapshot(old.parent) == before


def regular_file(output: Path) -> None:
    output.write_text("precious")


def directory_of_something_else(output: Path) -> None:
    (output / "photographs").mkdir(parents=True)
    (output / "photographs" / "one.jpeg").write_text("precious")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [regular_file, directory_of_something_else])
def test_what_is_no_artifact_is_never_replaced(
    make: Callable[[Path], None],
    overwrite: bool,
    policy: FactoredRecurrentActorCritic,
    tmp_path: Path,
) -> None:
    make(tmp_path / "output")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError) as refusal:
        export(policy, tmp_path / "output", overwrite=overwrite)
    assert str(tmp_path / "output") in str(refusal.value)
    assert snapshot(tmp_path) == before


def test_web_application_with_a_manifest_of_its_own_is_never_replaced(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    (tmp_path / MANIFEST_FILE).write_text('{"name": "shop", "icons": []}')
    (tmp_path / "index.html").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError):
        export(policy, tmp_path, overwrite=True)
    assert snapshot(tmp_path) == before


def test_artifact_that_appears_during_the_export_is_not_replaced_unasked(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    """Two exports to one directory: the one that is done first stands."""
    output = tmp_path / "tiny"

    def another_is_done_first(stage: str) -> None:
        if stage == STAGES[-1]:
            output.mkdir()
            (output / MANIFEST_FILE).write_text("the other's")

    with pytest.raises(FileExistsError):
        export(policy, output, on_stage=another_is_done_first)
    assert snapshot(tmp_path) == {
        Path("tiny"): None,
        Path("tiny") / MANIFEST_FILE: b"the other's",
    }


@pytest.mark.parametrize(
    ("number", "error"),
    [
        pytest.param(1, OSError(5, "Input/output error")),
        pytest.param(1, KeyboardInterrupt()),
        pytest.param(2, OSError(5, "Input/output error")),
        pytest.param(2, KeyboardInterrupt()),
    ],
)
def test_older_artifact_stands_where_the_new_one_cannot_be_put_in_its_place(
    number: int,
    error: BaseException,
    old: Path,
    policy: FactoredRecurrentActorCritic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replacing takes two renames, of the older out of the way and of the new one into it."""
    before = snapshot(old.parent)
    rename = Path.rename
    calls = 0

    def failing(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)):
        export(policy, old, overwrite=True)
    assert snapshot(old.parent) == before


class Wrong(TamiyoStep):
    """The step with values off by a thousandth."""

    def forward(  # type: ignore[override]
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        state_h_in: Tensor,
        state_c_in: Tensor,
    ) -> StepOutput:
        action, log_prob, value, h, c = super().forward(
            observation, action_mask, noise, state_h_in, state_c_in
        )
        return action, log_prob, value + 1e-3, h, c


@pytest.fixture
def faulty_format(policy: FactoredRecurrentActorCritic, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMATS[FORMAT]

    def write_wrong(source: StepSource) -> bytes:
        return right.write(StepSource(Wrong(policy, None), MAX_BATCH_SIZE))

    monkeypatch.setitem(FORMATS, FORMAT, right._replace(write=write_wrong))


@pytest.mark.usefixtures("faulty_format")
def test_format_that_fails_its_comparison_leaves_no_artifact(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match=r"^torchscript differs from the policy: value\[\d+\] is"):
        export(policy, tmp_path / "tiny")
    assert snapshot(tmp_path) == {}


@pytest.mark.usefixtures("faulty_format")
def test_format_that_fails_its_comparison_leaves_the_older_artifact(
    old: Path, policy: FactoredRecurrentActorCritic
) -> None:
    before = snapshot(old.parent)
    with pytest.raises(ParityError):
        export(policy, old, overwrite=True)
    assert snapshot(old.parent) == before


def test_stages_are_told_in_their_order(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    told: list[str] = []
    export(policy, tmp_path / "tiny", on_stage=told.append)
    assert tuple(told) == STAGES


def raising_at(stage: str, error: BaseException) -> Callable[[str], None]:
    def on_stage(told: str) -> None:
        if told == stage:
            raise error

    return on_stage


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("stage", STAGES)
def test_export_that_ends_early_leaves_nothing(
    stage: str, error: BaseException, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        export(policy, tmp_path / "tiny", on_stage=raising_at(stage, error))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("stage", STAGES)
def test_overwriting_that_ends_early_leaves_the_older_artifact(
    stage: str, old: Path, policy: FactoredRecurrentActorCritic
) -> None:
    before = snapshot(old.parent)
    with pytest.raises(KeyboardInterrupt):
        export(policy, old, overwrite=True, on_stage=raising_at(stage, KeyboardInterrupt()))
    assert snapshot(old.parent) == before
