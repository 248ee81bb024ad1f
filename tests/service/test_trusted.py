"""`--trusted`: what is served is what a key has signed, or nothing is."""

import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from export.manifest import SIGNATURE_FILE, Manifest
from export.signature import sign
from service.server import main
from tests.running_server import running_server

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture
def signed(artifact: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(artifact, tmp_path / "signed"))
    sign(copy, KEY)
    return copy


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    return tmp_path / "key.pub"


def refusal(
    artifact: Path,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line of `python -m service`, which exits 2."""
    monkeypatch.setattr(
        sys, "argv", ["service", "--artifact", str(artifact), "--trusted", str(trusted)]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    line = capsys.readouterr().err
    assert exit_.value.code == 2
    assert line.count("\n") == 1
    return line


def test_what_the_key_has_signed_is_served(signed: Path, trusted: Path) -> None:
    with running_server(signed, "--trusted", str(trusted)) as server:
        assert server.address


def test_what_nobody_signed_is_refused(
    signed: Path,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (signed / SIGNATURE_FILE).unlink()
    line = refusal(signed, trusted, monkeypatch, capsys)
    assert line == f"service: {signed}: is not signed (No such file or directory)\n"


def test_what_somebody_else_signed_is_refused(
    signed: Path,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sign(signed, OTHER_KEY)
    line = refusal(signed, trusted, monkeypatch, capsys)
    assert "was not signed by the trusted key, or was changed since" in line


def test_what_was_changed_after_signing_is_refused(
    signed: Path,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Manifest.read(signed).model_copy(update={"name": "other"}).write(signed)
    line = refusal(signed, trusted, monkeypatch, capsys)
    assert "was not signed by the trusted key, or was changed since" in line


def test_a_key_that_is_none_is_refused_whatever_is_signed(
    signed: Path,
    trusted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trusted.unlink()
    line = refusal(signed, trusted, monkeypatch, capsys)
    assert f"{trusted}: is not a PEM Ed25519 public key" in line
