"""`python -m export triton`. Torch-free: it takes onnx and jinja2."""

import argparse

from rich.console import Console

from export.artifact import open_artifact
from export.console import fail, name_unlisted, say
from export.manifest import ArtifactError
from export.signature import load_public_key
from export.stopping import Stopped, stoppable
from export.triton.comparison import GraphError
from export.triton.export import export_to_triton
from export.triton.repository import RepositoryError


def run(options: argparse.Namespace) -> int:
    """The exit code; where it is not 0, one line on stderr says why, and SystemExit is raised."""
    try:
        with stoppable():
            return _export(options)
    except Stopped as stopped:
        fail(str(stopped), code=stopped.code)
    except (ArtifactError, RepositoryError) as error:
        fail(str(error))
    except GraphError as error:
        fail(f"{options.directory}: {error}; nothing was written", code=1)
    except OSError as error:
        fail(f"{options.repository}: cannot be written ({error.strerror})")


def _export(options: argparse.Namespace) -> int:
    trusted = options.trusted and load_public_key(options.trusted)
    artifact = open_artifact(options.directory, trusted=trusted)
    with Console(stderr=True).status("reading the artifact") as status:
        names, version = export_to_triton(
            artifact,
            options.repository,
            name=options.name,
            device=options.device,
            max_sequences=options.max_sequences,
            on_stage=status.update,
        )
    say(f"{options.repository} has {' and '.join(names)}, version {version}")
    say(f"  {artifact.manifest.policy_version}")
    name_unlisted(artifact)
    return 0
