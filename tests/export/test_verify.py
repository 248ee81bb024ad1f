"""An artifact is checked again, anywhere: signature, hashes, then what it does."""

import shutil
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from safetensors.torch import load_file, save_file

from export.__main__ import main
from export.artifact import open_artifact
from export.comparison import ParityError
from export.exporter import export_policy
from export.manifest import MANIFEST_FILE, ArtifactError, File, Manifest, Source
from export.parameters import sha256
from export.signature import load_private_key, load_public_key
from export.verify import verify_artifact
from export.weights import WEIGHTS_FILE, pack
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def pristine(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("signed") / "tiny"
    statistics = torch.linspace(0.5, 2.0, policy.spec.observation_dim)
    export_policy(
        policy,
        ObservationNormalizer(statistics, statistics),
        output,
        name="tiny",
        source=Source(kind="preset", name="tiny", seed=0),
        formats=("torchscript", "onnx"),
        max_batch_size=4,
        sign_with=KEY,
    )
    return output


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def test_untouched_artifact_is_what_was_exported(artifact: Path) -> None:
    parity = verify_artifact(open_artifact(artifact, trusted=KEY.public_key()))
    assert parity == Manifest.read(artifact).parity.formats


@pytest.mark.parametrize(
    "name", [WEIGHTS_FILE, "policy.ts", "policy.onnx", "report.json", "report.html"]
)
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_flipped_bit_of_any_file_is_found(name: str, where: float, artifact: Path) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[int(where * len(content)) if where == 0.5 else int(where)] ^= 1
    (artifact / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: its SHA-256 is not the one"):
        verify_artifact(open_artifact(artifact))


def test_weights_that_are_not_the_files_are_found_by_what_they_do(artifact: Path) -> None:
    """Somebody who changes the weights and mends every hash still has the old formats."""
    tensors = load_file(artifact / WEIGHTS_FILE)
    tensors["lstm.weight_hh_l0"] *= 1.001
    save_file(tensors, artifact / WEIGHTS_FILE)
    manifest = Manifest.read(artifact)
    weights = File.describe(artifact / WEIGHTS_FILE)
    manifest.model_copy(update={"weights": weights}).write(artifact)
    with pytest.raises(ArtifactError, match="not those that the policy's version names"):
        verify_artifact(open_artifact(artifact))

    packed = pack((artifact / WEIGHTS_FILE).read_bytes(), manifest.spec, manifest.precision)
    mended = {"weights": weights, "parameters_sha256": sha256(packed)}
    manifest.model_copy(update=mended).write(artifact)
    with pytest.raises(ParityError, match="torchscript differs from the policy"):
        verify_artifact(open_artifact(artifact))


def test_manifest_changed_after_signing_is_refused(artifact: Path) -> None:
    Manifest.read(artifact).model_copy(update={"name": "other"}).write(artifact)
    verify_artifact(open_artifact(artifact))
    with pytest.raises(ArtifactError, match="was not signed by the trusted key, or was changed"):
        open_artifact(artifact, trusted=KEY.public_key())


def test_another_key_is_not_trusted(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="was not signed by the trusted key"):
        open_artifact(artifact, trusted=OTHER_KEY.public_key())


def test_unsigned_artifact_is_not_trusted(artifact: Path) -> None:
    (artifact / "manifest.sig").unlink()
    with pytest.raises(ArtifactError, match="is not signed"):
        open_artifact(artifact, trusted=KEY.public_key())


def test_keys_are_read_from_pem_files_and_others_refused(tmp_path: Path) -> None:
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    elliptic = generate_private_key(SECP256R1())
    (tmp_path / "key").write_bytes(pem)
    (tmp_path / "key.pub").write_bytes(public)
    (tmp_path / "ec").write_bytes(
        elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (tmp_path / "text").write_text("no key")
    message = b"to be signed"
    signature = load_private_key(tmp_path / "key").sign(message)
    load_public_key(tmp_path / "key.pub").verify(signature, message)
    for name in ("ec", "text", "absent", "key.pub"):
        with pytest.raises(ArtifactError, match="is not a PEM Ed25519 private key"):
            load_private_key(tmp_path / name)
    for name in ("key", "text", "absent"):
        with pytest.raises(ArtifactError, match="is not a PEM Ed25519 public key"):
            load_public_key(tmp_path / name)


def test_verify_command_says_so_and_exits_zero(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(artifact)]) == 0
    assert "is what was exported, and does what its policy does" in capsys.readouterr().out


def test_verify_command_refuses_a_damaged_artifact_in_one_line(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "policy.onnx").write_bytes(b"")
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(artifact)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_prints_the_manifest_and_runs_nothing(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("policy.ts", "policy.onnx"):
        (artifact / name).unlink()
    assert main(["inspect", str(artifact)]) == 0
    assert Manifest.read(artifact).policy_version in capsys.readouterr().out
    assert main(["inspect", str(artifact), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (artifact / MANIFEST_FILE).read_text()
