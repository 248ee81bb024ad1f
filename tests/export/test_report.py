"""`report.json`: read back as it was written, and only as it was written."""

import json
from pathlib import Path

import pytest

from export.exporter import export_policy
from export.manifest import ArtifactError, File, Manifest
from export.report import REPORT_FILE, Report
from model.policy import FactoredRecurrentActorCritic
from tests.export.test_manifest import SCHEMA_1
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


def test_report_of_the_first_release_has_no_version_and_is_read() -> None:
    assert "schema_version" not in json.loads((SCHEMA_1 / REPORT_FILE).read_bytes())
    read = Report.read(SCHEMA_1, Manifest.read(SCHEMA_1))
    assert read.schema_version == 1
    assert read.speedup("onnx").keys() >= {1, 32, 256}


def test_report_says_its_version_and_another_one_is_refused(artifact: Path) -> None:
    document = json.loads((artifact / REPORT_FILE).read_bytes())
    assert document["schema_version"] == 1
    later = with_report(artifact, json.dumps(document | {"schema_version": 2}))
    with pytest.raises(ArtifactError, match=r"report.json: schema_version: Input should be 1$"):
        Report.read(artifact, later)


def test_figures_that_a_later_report_adds_are_passed_over(artifact: Path) -> None:
    document = json.loads((artifact / REPORT_FILE).read_bytes())
    expected = Report.read(artifact, Manifest.read(artifact))
    document["added"] = document["machine"]["added"] = document["eager"][0]["added"] = 1
    document["formats"]["torchscript"]["added"] = 1
    assert Report.read(artifact, with_report(artifact, json.dumps(document))) == expected


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
