"""Which artifact a path means."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from export.manifest import ArtifactError, Manifest
from service.artifact import find_artifact


def test_an_artifact_is_itself(artifact: Path) -> None:
    assert find_artifact(artifact) == artifact


def test_an_artifact_with_another_inside_is_itself(artifact: Path, tmp_path: Path) -> None:
    outer = Path(shutil.copytree(artifact, tmp_path / "outer"))
    shutil.copytree(artifact, outer / "inner")
    assert find_artifact(outer) == outer


def test_the_only_artifact_of_a_folder_is_meant(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(artifact, tmp_path / "best")
    shutil.copytree(artifact, tmp_path / ".best.half-written")
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("not an artifact")
    with caplog.at_level(logging.INFO):
        assert find_artifact(tmp_path) == tmp_path / "best"
    assert caplog.messages == [f"{tmp_path} holds one artifact, best"]


def test_of_several_none_is_guessed_and_the_error_names_them(
    artifact: Path, tmp_path: Path
) -> None:
    for name in ("b", "a"):
        shutil.copytree(artifact, tmp_path / name)
    with pytest.raises(ArtifactError) as refused:
        find_artifact(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: holds several artifacts; --artifact or TAMIYO_ARTIFACT names one of "
        f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    )


@pytest.mark.parametrize("name", ["", "nowhere", "a-file"])
def test_reading_the_manifest_says_what_is_wrong_with_a_path_that_holds_none(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(ArtifactError, match="is not an artifact"):
        Manifest.read(find_artifact(tmp_path / name))


def test_a_folder_that_may_not_be_read_is_an_error_that_says_so(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user finds it; root, who may be testing, may read everything."""

    def refuse(path: object, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    assert find_artifact(tmp_path) == tmp_path
