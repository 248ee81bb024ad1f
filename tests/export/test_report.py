"""`report.json`: read back as it was written, and only as it was written."""

from pathlib import Path

import pytest

from export.exporter import export_policy
from export.manifest import ArtifactError, File, Manifest
from export.report import REPORT_FILE, Report
from model.policy import FactoredRecurrentActorCritic
from tests.export.test_report_page import report


@pytest.fixture
def artifact(policy: FactoredRecurrentActorCritic, tmp_path: Path) -> Path:
    output = tmp_path / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("torchscript",), max_batch_size=2)
    return output


def with_report(artifact: Path, content: str) -> Manifest:
    """The artifact's manifest, vouching for another report."""
    (artifact / REPORT_FILE).write_text(content)
    reports = (File.describe(artifact / REPORT_FILE),)
    return Manifest.read(artifact).model_copy(update={"reports": reports})


def test_report_survives_its_file(artifact: Path) -> None:
    written = report()
    manifest = with_report(artifact, written.model_dump_json())
    assert Report.read(artifact, manifest) == written


def test_speedup_is_how_many_times_as_fast_as_eager_at_each_batch_size() -> None:
    speedup = report({"onnx": 91.0}, sizes=(1, 4)).speedup("onnx")
    assert speedup == pytest.approx({1: (1000 + 9) / (91 + 9), 4: (1000 + 36) / (91 + 36)})


def test_changed_report_is_refused(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    (artifact / REPORT_FILE).write_text(report().model_dump_json())
    with pytest.raises(ArtifactError, match=r"report.json: its SHA-256 is not the one"):
        Report.read(artifact, manifest)


def test_file_that_is_no_report_is_refused_in_a_sentence(artifact: Path) -> None:
    manifest = with_report(artifact, '{"name": "tiny"}')
    with pytest.raises(ArtifactError, match=r"report.json: policy_version: Field required$"):
        Report.read(artifact, manifest)


def test_artifact_without_a_report_says_so(artifact: Path) -> None:
    manifest = Manifest.read(artifact).model_copy(update={"reports": ()})
    with pytest.raises(ArtifactError, match=r"its manifest names no report.json"):
        Report.read(artifact, manifest)
