"""`python -m export inspect`: what an artifact says of itself. Runs nothing of it; torch-free."""

import sys
from pathlib import Path

from export.console import say, summarize
from export.manifest import Manifest
from export.report import Report


def show_artifact(directory: Path, *, as_json: bool) -> None:
    """Prints the manifest, in words or as JSON; ArtifactError where it is no artifact."""
    manifest = Manifest.read(directory)
    if as_json:
        sys.stdout.write(manifest.model_dump_json(indent=2) + "\n")
        return
    spec = manifest.spec
    heads = ", ".join(f"{head.name} {head.size}" for head in spec.heads)
    origin = manifest.source.sha256 or f"seed {manifest.source.seed}"
    say(f"{manifest.name}: {manifest.policy_version}")
    say(f"  from {manifest.source.kind} {manifest.source.name} ({origin})")
    say(f"  {spec.name}: {spec.observation_dim} features, {spec.num_layers} x {spec.hidden_dim}")
    say(f"  heads: {heads}")
    floors = (f"{h.name} {h.probability_floor:g}" for h in spec.heads if h.probability_floor > 0)
    say(f"  probability floors: {', '.join(floors) or 'none'}")
    say(f"  outputs: {', '.join(array.name for array in manifest.outputs)}")
    if spec.value_scale != 1.0:
        say(f"  one unit of the network's value is {spec.value_scale:g} in returns")
    say(f"  {manifest.precision} on {manifest.device}, batches up to {manifest.max_batch_size}")
    for name, file in manifest.formats.items():
        if file.requires is not None:
            say(f"  {name} is machine code for {file.requires}")
    say(f"  normaliser: {'inside' if manifest.has_normalizer else 'none'}")
    say(f"  made with {', '.join(f'{name} {of}' for name, of in manifest.versions.items())}")
    summarize(manifest, manifest.parity.formats, Report.read(directory, manifest))
