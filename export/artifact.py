"""An opened artifact: its manifest was read once, and by it every file is known. Torch-free.

The bytes whose signature was checked are the bytes that were parsed; what is swapped in the
directory afterwards is found by the hashes they hold.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    ArtifactError,
    File,
    Manifest,
    read_manifest,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory, and `content`, the bytes its manifest was parsed from."""

    directory: Path
    manifest: Manifest
    content: bytes

    @property
    def sha256(self) -> str:
        """The manifest's own SHA-256: two processes with the same one serve the same files."""
        return hashlib.sha256(self.content).hexdigest()

    def read(self, file: File) -> bytes:
        """A file's content, or ArtifactError where it is missing or not what was exported."""
        return file.read(self.directory)

    def missing(self) -> list[str]:
        """The names of files that the manifest lists and the directory has not."""
        names = (file.file for file in self.manifest.files)
        return [name for name in names if not (self.directory / name).is_file()]

    def unlisted(self) -> list[str]:
        """The names of what lies in the directory and is no part of the artifact."""
        listed = {file.file for file in self.manifest.files} | {MANIFEST_FILE, SIGNATURE_FILE}
        return sorted(path.name for path in self.directory.iterdir() if path.name not in listed)


def open_artifact(
    directory: Path, *, trusted: "Ed25519PublicKey | None" = None, sha256: str | None = None
) -> Artifact:
    """Reads the manifest of `directory`, once; no other file of it.

    Raises ArtifactError where it is no artifact, where a `trusted` key is given and did not sign
    it, and where its manifest has not the `sha256` that it had for another process.
    """
    content = read_manifest(directory)
    if trusted is not None:
        from export.signature import check_signature

        check_signature(directory, content, trusted)
    artifact = Artifact(directory, Manifest.parse(content, directory), content)
    if sha256 is not None and artifact.sha256 != sha256:
        raise ArtifactError(f"{directory}: its manifest is no longer the one that was read")
    return artifact
