"""`python -m export inspect`: what an artifact says of itself. Runs nothing of it; torch-free."""

import sys
from pathlib import Path

from export.artifact import open_artifact
from export.console import name_unlisted, printing, say, summarize
from export.manifest import Source
from export.report import REPORT_FILE, Report
from model.step_spec import StepSpec


def show_artifact(directory: Path, *, as_json: bool) -> None:
    """Prints the manifest, in words or as JSON; ArtifactError where it is no artifact."""
    artifact = open_artifact(directory)
    manifest = artifact.manifest
    name_unlisted(artifact)
    if as_json:
        with printing():
            sys.stdout.write(artifact.content.decode())
        return
    spec = manifest.spec
    heads = ", ".join(f"{head.name} {head.size}" for head in spec.heads)
    say(f"{manifest.name}: {manifest.policy_version}")
    say(f"  from {origin(manifest.source)}")
    for fact, where in manifest.source.provenance.items():
        say(f"    {fact}: {where}")
    say(f"  {spec.name}: {spec.observation_dim} features, {_memory(spec)}")
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
    missing = artifact.missing()
    has_report = REPORT_FILE in {file.file for file in manifest.reports} - {*missing}
    report = Report.read(directory, manifest) if has_report else None
    summarize(manifest, manifest.parity.formats, report)
    if missing:
        say(f"missing: {', '.join(missing)}")


def _memory(spec: StepSpec) -> str:
    """The sizes of what a row carries, each once."""
    shapes = dict.fromkeys(" x ".join(map(str, state.shape)) for state in spec.states)
    return ", ".join(shapes) or "no state"


def origin(source: Source) -> str:
    """A module has neither a file nor a seed, only the name its owner gave it."""
    seed = None if source.seed is None else f"seed {source.seed}"
    known = source.sha256 or seed
    return f"{source.kind} {source.name}" + (f" ({known})" if known else "")
