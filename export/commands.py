"""The commands that take torch: `python -m export`, `verify` and `push`."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from export.artifact import open_artifact
from export.comparison import ParityError
from export.console import fail, name_unlisted, say, summarize
from export.directory import check_output
from export.exporter import export_policy
from export.formats import FormatError
from export.manifest import ArtifactError, Manifest
from export.options import chosen_formats
from export.push import push_policy
from export.report import REPORT_PAGE, Report
from export.signature import load_private_key, load_public_key
from export.sources import load_source, readable
from export.stopping import Stopped, stoppable
from export.verify import verify_artifact
from model.checkpoint import CheckpointError
from tamiyo_client import PolicyError
from tamiyo_client.session import checked_url

PATIENCE_S = 10.0
"""With a service that does not answer."""


def run(command: str, options: argparse.Namespace) -> int:
    """The exit code; where it is not 0, one line on stderr says why, and SystemExit is raised."""
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: no CUDA device is visible to torch on this machine")
    torch.set_num_threads(1)  # the gate's many small products are slower with more
    try:
        return COMMANDS[command](options)
    except (CheckpointError, ArtifactError, FormatError, FileExistsError) as error:
        fail(str(error))
    except ParityError as error:
        fail(str(error), code=1)


def _export(options: argparse.Namespace) -> int:
    sign_with = options.sign and load_private_key(options.sign)
    check_output(options.output, overwrite=options.overwrite)
    before = _identity(options.output)
    try:
        with stoppable() as check:
            manifest = _exported(options, sign_with, check)
            _say_exported(options, manifest)
    except Stopped as stopped:
        is_written = _identity(options.output) not in (None, before)
        what = f"{options.output} was written" if is_written else "no artifact was written"
        fail(f"{stopped}; {what}", code=stopped.code)
    except FileExistsError:
        raise
    except OSError as error:
        fail(f"{error.filename or options.output}: cannot be written ({error.strerror})")
    except (ParityError, ArtifactError) as error:
        if isinstance(error.__cause__, OSError):
            fail(f"no artifact was written: {error}")
        raise ParityError(f"no artifact was written: {error}") from error
    return 0


def _identity(directory: Path) -> tuple[int, int] | None:
    """Which directory it is: another one once an export has put its own there."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _exported(
    options: argparse.Namespace, sign_with: Ed25519PrivateKey | None, check: Callable[[], None]
) -> Manifest:
    with Console(stderr=True).status("reading the policy") as status:

        def on_stage(stage: str) -> None:
            check()
            status.update(stage)

        policy, normalizer, source = load_source(options)
        return export_policy(
            policy,
            normalizer,
            options.output,
            name=readable(options.name or source.name),
            source=source,
            formats=chosen_formats(options.formats, options.precision),
            device=options.device,
            precision=options.precision,
            max_batch_size=options.max_batch_size,
            sign_with=sign_with,
            overwrite=options.overwrite,
            on_stage=on_stage,
        )


def _say_exported(options: argparse.Namespace, manifest: Manifest) -> None:
    if options.json:
        say(manifest.model_dump_json())
    else:
        summarize(manifest, manifest.parity.formats, Report.read(options.output, manifest))
        say(f"{manifest.name} ({manifest.policy_version[:19]}) is in {options.output}")
        say(f"{options.output / REPORT_PAGE} shows what was compared, and how fast each format is")
    name_unlisted(open_artifact(options.output))


def _verify(options: argparse.Namespace) -> int:
    trusted = options.trusted and load_public_key(options.trusted)
    with Console(stderr=True).status("reading the artifact") as status:
        artifact = open_artifact(options.directory, trusted=trusted)
        parity = verify_artifact(artifact, device=options.device, on_stage=status.update)
    summarize(artifact.manifest, parity)
    for name in artifact.manifest.formats.keys() - parity.keys():
        say(f"{name} is machine code for {artifact.manifest.device}, and was not run")
    say(f"{options.directory} is what was exported, and does what its policy does")
    name_unlisted(artifact)
    return 0


def _push(options: argparse.Namespace) -> int:
    """To every URL, whatever the others answer: replicas that differ are the fewer the better."""
    api_key = None if options.api_key_file is None else _first_word(options.api_key_file)
    try:
        for url in options.to:
            checked_url(url)
    except ValueError as error:
        fail(str(error))
    policy, normalizer, _ = load_source(options)
    refused: list[tuple[str, Exception]] = []
    for url in options.to:
        try:
            answer = push_policy(
                policy,
                normalizer,
                url,
                api_key,
                if_match=options.if_match,
                restart_sessions=options.restart_sessions,
                timeout_s=PATIENCE_S,
            )
        except (ValueError, PolicyError) as error:
            refused.append((url, error))
            continue
        say(f"{url} serves {answer.policy_version}")
        say(f"  before it {answer.previous_version or 'none that is kept'}")
        say(f"  {answer.probe_error:.1e} from the probe at most")
    if refused:
        is_input = all(isinstance(error, ValueError) for _, error in refused)
        code = 2 if is_input and len(refused) == len(options.to) else 1
        fail("; ".join(f"{url}: {error}" for url, error in refused), code)
    return 0


def _first_word(path: Path) -> str:
    """The key in a file as `--admin-keys` has them. ArtifactError where there is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    words = [line.split()[0] for line in lines if line.strip()]
    keys = [word for word in words if not word.startswith(b"#")]
    if not keys:
        raise ArtifactError(f"{path}: holds no key")
    if not all(0x21 <= letter <= 0x7E for letter in keys[0]):
        raise ArtifactError(f"{path}: the key is not of printable ASCII letters")
    return keys[0].decode()


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "export": _export,
    "verify": _verify,
    "push": _push,
}
