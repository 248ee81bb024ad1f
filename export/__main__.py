"""`python -m export`: a trainer's checkpoint becomes a verified artifact directory.

`python -m export verify DIR` checks an artifact again, anywhere; `inspect DIR` says what it is.

Exit codes: 0 every requested format passed its parity check; 1 one did not, and there is no
artifact; 2 bad input; 130 interrupted, 143 terminated. One clear line on stderr says why.
"""

import argparse
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, get_args

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from export.exporter import export_policy
from export.formats import FORMATS, PORTABLE_FORMATS, FormatError
from export.manifest import ArtifactError, FormatParity, Manifest, Precision, Source
from export.parity import ParityError
from export.report import REPORT_PAGE, Report
from export.signature import load_private_key, load_public_key
from export.verify import verify_artifact
from model.checkpoint import CheckpointError, load_checkpoint, load_normalizer
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec

PRESETS: dict[str, Callable[[], PolicySpec]] = {
    "tamiyo-v1": PolicySpec.tamiyo_v1,
    "tamiyo-v2": PolicySpec.tamiyo_v2,
}
IDENTITY = "identity"

SHOWN = (1, 32, 256)
"""The batch sizes whose speed the closing table shows."""

EXAMPLES = """examples:
  python -m export --checkpoint best.pt --output artifacts/best
  python -m export --preset tamiyo-v1 --seed 0 --output artifacts/fresh --overwrite
  python -m export --checkpoint best.pt --output artifacts/best --formats onnx --sign key.pem
  python -m export verify artifacts/best --trusted key.pub
  python -m export inspect artifacts/best
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see python -m export --help")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = {"verify": _verify, "inspect": _inspect}.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command else _export(arguments)
    except (CheckpointError, ArtifactError, FormatError, FileExistsError) as error:
        _fail(str(error))
    except ParityError as error:
        _fail(str(error), code=1)
    except _Stopped as stopped:
        _fail(f"{stopped}; no artifact was written", code=stopped.code)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _export(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    sign_with = options.sign and load_private_key(options.sign)
    progress = Console(stderr=True)
    torch.set_num_threads(1)  # the gate's many small products are slower with more
    try:
        with _stoppable() as check, progress.status("reading the policy") as status:

            def on_stage(stage: str) -> None:
                check()
                status.update(stage)

            policy, normalizer, source = _load(options)
            manifest = export_policy(
                policy,
                normalizer,
                options.output,
                name=options.name or source.name,
                source=source,
                formats=_chosen(options.formats, options.precision),
                device=options.device,
                precision=options.precision,
                max_batch_size=options.max_batch_size,
                sign_with=sign_with,
                overwrite=options.overwrite,
                on_stage=on_stage,
            )
    except FileExistsError:
        raise
    except OSError as error:
        _fail(f"{error.filename or options.output}: cannot be written ({error.strerror})")
    except (ParityError, ArtifactError) as error:
        raise ParityError(f"no artifact was written: {error}") from error
    if options.json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
    else:
        _summarize(manifest, manifest.parity.formats, Report.read(options.output, manifest))
        _say(f"{manifest.name} ({manifest.policy_version[:19]}) is in {options.output}")
        _say(f"{options.output / REPORT_PAGE} shows what was compared, and how fast each format is")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m export verify",
        description="Checks an artifact: signature, hashes, then what it does, on this machine.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--trusted", type=Path, metavar="KEY.pub", help="refuse what this key has not signed"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with Console(stderr=True).status("reading the artifact") as status:
        parity = verify_artifact(
            options.directory,
            trusted=options.trusted and load_public_key(options.trusted),
            on_stage=status.update,
        )
    _summarize(Manifest.read(options.directory), parity)
    _say(f"{options.directory} is what was exported, and does what its policy does")
    return 0


def _inspect(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m export inspect", description="Says what an artifact is; runs nothing of it."
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    options = parser.parse_args(arguments)
    manifest = Manifest.read(options.directory)
    if options.json:
        sys.stdout.write(manifest.model_dump_json(indent=2) + "\n")
        return 0
    spec = manifest.spec
    heads = ", ".join(f"{head.name} {head.size}" for head in spec.heads)
    origin = manifest.source.sha256 or f"seed {manifest.source.seed}"
    _say(f"{manifest.name}: {manifest.policy_version}")
    _say(f"  from {manifest.source.kind} {manifest.source.name} ({origin})")
    _say(f"  {spec.name}: {spec.observation_dim} features, {spec.num_layers} x {spec.hidden_dim}")
    _say(f"  heads: {heads}")
    floors = (f"{h.name} {h.probability_floor:g}" for h in spec.heads if h.probability_floor > 0)
    _say(f"  probability floors: {', '.join(floors) or 'none'}")
    _say(f"  outputs: {', '.join(array.name for array in manifest.outputs)}")
    if spec.value_scale != 1.0:
        _say(f"  one unit of the network's value is {spec.value_scale:g} in returns")
    _say(f"  {manifest.precision} on {manifest.device}, batches up to {manifest.max_batch_size}")
    for name, file in manifest.formats.items():
        if file.requires is not None:
            _say(f"  {name} is machine code for {file.requires}")
    _say(f"  normaliser: {'inside' if manifest.has_normalizer else 'none'}")
    _say(f"  made with {', '.join(f'{name} {of}' for name, of in manifest.versions.items())}")
    _summarize(manifest, manifest.parity.formats, Report.read(options.directory, manifest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m export",
        description="Exports a recurrent, action-masked policy into verified artifacts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trainer's checkpoint or state_dict (.pt, .safetensors); code in it is refused",
    )
    origin.add_argument("--preset", help=f"a freshly initialised policy: {', '.join(PRESETS)}")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="initialises a preset (default 0)"
    )
    parser.add_argument(
        "--normaliser",
        metavar=f"FILE|{IDENTITY}",
        help="the observation statistics of a checkpoint that has none: a .json or .safetensors "
        f"with mean and var, or another checkpoint; {IDENTITY} says that there are none to apply",
    )
    parser.add_argument(
        "--probability-floors",
        type=_floors,
        default={},
        metavar="default|HEAD=P,...",
        help="raise each allowed choice's probability to this, as V2's trainer does to explore "
        "(default: none; with the trainer's own, `default`, sampling is nearly uniform)",
    )
    parser.add_argument(
        "--outputs",
        type=_outputs,
        default=(),
        metavar="value,q,contribution",
        help="what the step gives of the critic: beside V(s), V2's Q(s, op) of the op taken, and "
        "each slot's predicted contribution (default: value)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the artifact directory to write"
    )
    parser.add_argument("--name", help="the policy's name (default: that of its source)")
    parser.add_argument(
        "--formats",
        type=_formats,
        metavar="LIST",
        help=f"which of {','.join(FORMATS)} to write, or all; aoti is machine code for this kind "
        f"of machine and takes a C++ compiler (default: {','.join(PORTABLE_FORMATS)})",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cpu",
        help="cpu or cuda: where the artifact is traced and compared, and will run (default cpu)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of weights and products (default fp32); everything between stays fp32. onnx has no "
        "bf16",
    )
    parser.add_argument(
        "--max-batch-size",
        type=_batch_size,
        default=256,
        metavar="N",
        help="largest batch the artifact takes and is checked with (default 256)",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign the manifest with this Ed25519 key (PEM)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest, for a machine")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    return parser


def _formats(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _chosen(formats: tuple[str, ...] | None, precision: Precision) -> tuple[str, ...] | None:
    """`all` is every format that has the precision; None is left to `export_policy`."""
    if formats == ("all",):
        return tuple(name for name, written in FORMATS.items() if precision in written.precisions)
    return formats


def _outputs(text: str) -> tuple[str, ...]:
    names = {"value": "value", "q": "q_value", "contribution": "contribution"}
    asked = {name.strip() for name in text.split(",")}
    for name in sorted(asked - names.keys()):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(names)}")
    return tuple(names[name] for name in names if name in asked and name != "value")


def _floors(text: str) -> Mapping[str, float]:
    if text == "default":
        return PROBABILITY_FLOORS_V2
    floors = {}
    for part in text.split(","):
        head, _, number = part.partition("=")
        try:
            floors[head.strip()] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not HEAD=PROBABILITY") from None
    return floors


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2**63 - 1")
    return int(text)


def _batch_size(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to 65536")
    return int(text)


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; the devices are cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no CUDA device is visible to torch on this machine")
    return text


def _load(
    options: argparse.Namespace,
) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None, Source]:
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise CheckpointError(
                f"unknown preset {options.preset!r}; the presets are {', '.join(PRESETS)}"
            )
        spec = _with_options(PRESETS[options.preset](), options)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            policy = FactoredRecurrentActorCritic(spec)
        normalizer = _chosen_normalizer(options, spec, None)
        return policy, normalizer, Source(kind="preset", name=options.preset, seed=options.seed)

    spec, state_dict, normalizer = load_checkpoint(options.checkpoint)
    normalizer = _chosen_normalizer(options, spec, normalizer)
    policy = FactoredRecurrentActorCritic(_with_options(spec, options))
    policy.load_state_dict(state_dict, strict=True)
    digest = hashlib.sha256(options.checkpoint.read_bytes()).hexdigest()
    return (
        policy,
        normalizer,
        Source(kind="checkpoint", name=options.checkpoint.stem, sha256=digest),
    )


def _with_options(spec: PolicySpec, options: argparse.Namespace) -> PolicySpec:
    """The spec with the floors and outputs asked for, where it can have them."""
    try:
        if options.probability_floors:
            spec = spec.with_probability_floors(options.probability_floors)
        return spec.model_validate(spec.model_dump() | {"extra_outputs": options.outputs})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        sentence = first["msg"].removeprefix("Value error, ")
        if "probability_floor" in first["loc"]:
            head = spec.head_names[int(first["loc"][1])]
            sentence = f"--probability-floors: {head}: {sentence}, not {first['input']}"
        raise CheckpointError(sentence) from error
    except ValueError as error:
        raise CheckpointError(f"--probability-floors: {error}") from error


def _chosen_normalizer(
    options: argparse.Namespace, spec: PolicySpec, own: ObservationNormalizer | None
) -> ObservationNormalizer | None:
    """The checkpoint's statistics, or else what `--normaliser` says; without either, a warning."""
    if options.normaliser is not None and own is not None:
        raise CheckpointError(
            f"{options.checkpoint}: holds observation statistics of its own; leave out --normaliser"
        )
    if own is not None or options.normaliser == IDENTITY:
        return own
    if options.normaliser is not None:
        return load_normalizer(options.normaliser, spec.observation_dim)
    if options.checkpoint is not None:
        Console(stderr=True, soft_wrap=True).print(
            f"warning: {options.checkpoint} holds no observation statistics (V1's trainer does not "
            "save them, and a bare state_dict has none): the artifact takes observations as they "
            "come. If the policy was trained on normalised ones, its actions are wrong unless the "
            "client normalises them. --normaliser FILE brings the statistics, --normaliser "
            f"{IDENTITY} says that there are none.",
            style="bold yellow",
            highlight=False,
            markup=False,
        )
    return None


def _summarize(
    manifest: Manifest, parity: Mapping[str, FormatParity], report: Report | None = None
) -> None:
    table = Table("format", "file", "size", "error", "equal", box=None, pad_edge=False)
    sizes = [] if report is None else [size for size in SHOWN if size <= manifest.max_batch_size]
    for size in sizes:
        table.add_column(f"B={size}")
    for name, file in manifest.formats.items():
        speedup = {} if report is None else report.speedup(name)
        table.add_row(
            name,
            file.file,
            f"{file.bytes / 1e6:.2f} MB",
            f"{max(parity[name].max_error.values()):.1e}",
            f"{parity[name].action_agreement:.2%}",
            *(f"{speedup[size]:.1f}x" for size in sizes),
        )
    Console(soft_wrap=True, highlight=False).print(table)
    legend = "error: largest of any output; equal: share of actions that are eager's"
    _say(legend + ("; B: times as fast as eager at that batch size" if sizes else ""))


ENDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _Stopped(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(ENDS[number])
        self.code = 128 + number


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Both Ctrl-C and SIGTERM end the block by way of every `finally`: nothing half-done stays.

    An exception raised while Python runs a destructor is lost. The check it yields raises again.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise _Stopped(number)

    def check() -> None:
        if came:
            raise _Stopped(came[0])

    before = {number: signal.signal(number, stop) for number in ENDS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _fail(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"export: {' '.join(message.split())}\n")
    raise SystemExit(code)


if __name__ == "__main__":
    raise SystemExit(main())
