"""The image's own artifact and file list, taken from a container that never ran."""

import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.image.engine import ENGINE, IMAGE, TIMEOUT_S, engine


class Contents(NamedTuple):
    """Every path in the image, without the leading slash, and the default artifact's copy."""

    paths: frozenset[str]
    artifact: Path

    def under(self, directory: str) -> set[str]:
        return {path for path in self.paths if path.startswith(f"{directory}/")}


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    target = tmp_path_factory.mktemp("image")
    archive = target / "image.tar"
    container = engine("create", IMAGE).strip()
    try:
        subprocess.run(
            [ENGINE, "export", "--output", str(archive), container], check=True, timeout=TIMEOUT_S
        )
    finally:
        engine("rm", container)
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        ours = [member for member in members if member.name.startswith("artifacts/")]
        tar.extractall(target, members=ours, filter="data")
    archive.unlink()
    return Contents(frozenset(member.name for member in members), target / "artifacts")
