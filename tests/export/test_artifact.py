"""An artifact is opened once: what was read is what was signed, parsed and loaded."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from export.__main__ import main
from export.artifact import open_artifact
from export.exporter import export_policy
from export.manifest import MANIFEST_FILE, SIGNATURE_FILE, ArtifactError, FormatFile, Manifest
from export.verify import verify_artifact
from model.policy import FactoredRecurrentActorCritic

KEY = Ed25519PrivateKey.generate()

_watched: list[list[str]] = []


def _watch(event: str, arguments: Any) -> None:
    if event == "open" and _watched:
        _watched[-1].append(os.path.basename(str(arguments[0])))


sys.addaudithook(_watch)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The names of what Python opens, each time it does; a hook cannot be taken off again."""
    names: list[str] = []
    _watched.append(names)
    yield names
    _watched.remove(names)


@pytest.fixture(scope="module")
def pristine(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("signed") / "tiny"
    formats = ("torchscript",)
    export_policy(
        policy, None, output, name="tiny", formats=formats, max_batch_size=2, sign_with=KEY
    )
    return output


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    return tmp_path / "key.pub"


def test_verify_reads_manifest_and_signature_once(artifact: Path, trusted: Path) -> None:
    with opened_files() as names:
        assert main(["verify", str(artifact), "--trusted", str(trusted)]) == 0
    assert (names.count(MANIFEST_FILE), names.count(SIGNATURE_FILE)) == (1, 1)


def test_inspect_reads_the_manifest_once(artifact: Path) -> None:
    with opened_files() as names:
        assert main(["inspect", str(artifact)]) == 0
    assert names.count(MANIFEST_FILE) == 1


def test_a_checkpoint_is_read_once(policy: FactoredRecurrentActorCritic, tmp_path: Path) -> None:
    torch.save({"network_state_dict": policy.state_dict()}, tmp_path / "best.pt")
    arguments = ["--checkpoint", str(tmp_path / "best.pt"), "--output", str(tmp_path / "out")]
    with opened_files() as names:
        fast = ["--normaliser", "identity", "--formats", "torchscript", "--max-batch-size", "2"]
        assert main([*arguments, *fast]) == 0
    assert names.count("best.pt") == 1


def test_what_was_opened_stays_what_it_was(artifact: Path) -> None:
    opened = open_artifact(artifact, trusted=KEY.public_key())
    opened.manifest.model_copy(update={"name": "another"}).write(artifact)
    assert opened.manifest.name == "tiny"
    with pytest.raises(ArtifactError, match="its manifest is no longer the one that was read"):
        open_artifact(artifact, sha256=opened.sha256)
    (artifact / MANIFEST_FILE).write_bytes(opened.content)
    assert open_artifact(artifact, sha256=opened.sha256) == opened


def test_a_signature_is_checked_before_what_is_signed_is_parsed(artifact: Path) -> None:
    (artifact / MANIFEST_FILE).write_bytes(b"not JSON")
    with pytest.raises(ArtifactError, match="was not signed by the trusted key"):
        open_artifact(artifact, trusted=KEY.public_key())


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_lies_beside_the_artifacts_files_is_named(
    command: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(artifact)]) == 0
    assert capsys.readouterr().err == ""
    (artifact / "notes.txt").touch()
    (artifact / "a\nb").mkdir()
    (artifact / os.fsdecode(b"\xff")).touch()
    assert main([command, str(artifact)]) == 0
    named = "'a\\nb', notes.txt, '\\udcff'"
    assert capsys.readouterr().err == f"export: not part of the artifact: {named}\n"


def test_json_is_nothing_but_the_manifest_whatever_lies_beside_it(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "notes.txt").touch()
    assert main(["inspect", str(artifact), "--json"]) == 0
    assert capsys.readouterr().out == (artifact / MANIFEST_FILE).read_text()


def test_inspect_does_without_the_report_and_says_so(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "report.json").unlink()
    (artifact / "report.html").unlink()
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    assert "missing: report.html, report.json" in out
    assert "B=1" not in out
    assert "policy.ts" in out


def test_inspect_says_of_a_modules_export_what_is_known(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact)]) == 0
    assert "\n  from module tiny\n" in capsys.readouterr().out


def with_machine_code_for_cuda(artifact: Path, *others: str) -> Manifest:
    """As if exported on a GPU, with machine code that this machine could not even load."""
    manifest = Manifest.read(artifact)
    (artifact / "policy.aoti.pt2").write_bytes(b"machine code")
    aoti = FormatFile(**FormatFile.describe(artifact / "policy.aoti.pt2").model_dump())
    formats = {name: manifest.formats[name] for name in others} | {"aoti": aoti}
    changed = manifest.model_copy(update={"device": "cuda", "formats": formats})
    changed.write(artifact)
    return changed


def test_machine_code_for_another_device_is_not_run_and_the_rest_is(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_machine_code_for_cuda(artifact, "torchscript")
    assert verify_artifact(open_artifact(artifact), device="cpu").keys() == {"torchscript"}
    assert main(["verify", str(artifact), "--device", "cpu"]) == 0
    assert "aoti is machine code for cuda, and was not run\n" in capsys.readouterr().out


def test_nothing_but_machine_code_for_another_device_cannot_be_verified(artifact: Path) -> None:
    with_machine_code_for_cuda(artifact)
    with pytest.raises(ArtifactError, match="holds nothing but machine code for cuda"):
        verify_artifact(open_artifact(artifact), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_verifying_on_a_device_that_is_not_there_is_refused_in_a_sentence(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(artifact), "--device", "cuda"])
    assert exit_.value.code == 2
    said = "export: argument --device: no CUDA device is visible to torch on this machine\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ArtifactError, match="no CUDA device is visible"):
        verify_artifact(open_artifact(artifact), device="cuda")
