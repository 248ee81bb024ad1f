"""A verified artifact, put into a Triton model repository: its step twice, under two schedulers."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from export.artifact import Artifact
from export.inspection import origin
from export.manifest import ArtifactError, Device, Manifest
from export.triton.comparison import check_sequence_graph, load_graph
from export.triton.config import sequence_config, stateless_config
from export.triton.graph import START, sequence_graph
from export.triton.repository import NAME, Model, RepositoryError, publish

SEQUENCE_SUFFIX = "_seq"


class Published(NamedTuple):
    names: tuple[str, ...]
    version: int


def export_to_triton(
    artifact: Artifact,
    repository: Path,
    *,
    name: str | None = None,
    device: Device | None = None,
    max_sequences: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Published:
    """Writes `name`, the artifact's ONNX file as it is, and `name`_seq, whose state Triton keeps;
    of a policy without a state the first alone.

    By default the name and the device are the artifact's own. Raises ArtifactError where the
    artifact is damaged or has no onnx, GraphError where the second graph does not do what the first
    does, and what `publish` raises; then nothing is written.
    """
    manifest, directory = artifact.manifest, artifact.directory
    name = manifest.name if name is None else name
    device = device or manifest.device
    if not NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} cannot be a model's name; --name gives another")
    if "onnx" not in manifest.formats:
        raise ArtifactError(
            f"{directory}: has no onnx, which is what Triton is given; it holds "
            f"{', '.join(manifest.formats)}"
        )
    if repository.resolve().is_relative_to(directory.resolve()):
        raise RepositoryError(f"{repository} is in the artifact; a repository is beside it")
    on_stage("checking the hashes")
    contents = {file.file: artifact.read(file) for file in manifest.files}
    content = contents[manifest.formats["onnx"].file]
    models = [Model(name, stateless_config(manifest, name, device), content)]
    if manifest.spec.states:
        on_stage("comparing both graphs")
        try:
            edited = _compared(content, manifest)
        except ArtifactError as error:
            raise ArtifactError(f"{directory}: {error}") from error
        sequence_name = f"{name}{SEQUENCE_SUFFIX}"
        config = sequence_config(manifest, sequence_name, device, max_sequences=max_sequences)
        models.append(Model(sequence_name, config, edited))
    on_stage("writing the repository")
    version = publish(
        models,
        repository,
        policy_version=manifest.policy_version,
        source=origin(manifest.source),
    )
    return Published(tuple(model.name for model in models), version)


def _compared(content: bytes, manifest: Manifest) -> bytes:
    """The graph whose state Triton keeps, once it has done what the step does."""
    step = load_graph(content, manifest.inputs, manifest)
    edited = sequence_graph(content, manifest.spec)
    sequence_step = load_graph(edited, (*manifest.inputs, START), manifest)
    check_sequence_graph(step, sequence_step, manifest)
    return edited
