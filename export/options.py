"""What the command line may say. Torch-free: it can be asked for help where nothing else runs."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, get_args

from export.console import fail
from export.format_kinds import FORMAT_KINDS, PORTABLE_FORMATS
from export.manifest import LARGEST_BATCH_SIZE, Device, Precision
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec

PRESETS: dict[str, Callable[[], PolicySpec]] = {
    "tamiyo-v1": PolicySpec.tamiyo_v1,
    "tamiyo-v2": PolicySpec.tamiyo_v2,
}
IDENTITY = "identity"
MOST_SEQUENCES = 2**31 - 1
"""What Triton's configuration has room for."""
MOST_ROWS = 4096
"""Of steps, and of environments, that are compared with another program."""

EXAMPLES = """examples:
  python -m export --checkpoint best.pt --output artifacts/best
  python -m export --checkpoint model.zip --output artifacts/model
  python -m export --preset tamiyo-v1 --seed 0 --output artifacts/fresh --overwrite
  python -m export --checkpoint best.pt --output artifacts/best --formats onnx --sign key.pem
  python -m export verify artifacts/best --trusted key.pub
  python -m export inspect artifacts/best
  python -m export push --checkpoint newer.pt --to http://127.0.0.1:8000
  python -m export triton artifacts/best --repository models
  python -m export crosscheck model.zip --artifact artifacts/model --run-pickles
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see python -m export --help")


def export_parser() -> Parser:
    parser = Parser(
        prog="python -m export",
        description="Exports a recurrent, action-masked policy into verified artifacts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(parser)
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
        help=f"which of {','.join(FORMAT_KINDS)} to write, or all; aoti is machine code for this "
        f"kind of machine and takes a C++ compiler (default: {','.join(PORTABLE_FORMATS)})",
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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the artifact in DIR; what else lies there stays, and is named",
    )
    return parser


def verify_parser() -> Parser:
    parser = Parser(
        prog="python -m export verify",
        description="Checks an artifact: signature, hashes, then what it does, on this machine.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--trusted", type=Path, metavar="KEY.pub", help="refuse what this key has not signed"
    )
    parser.add_argument(
        "--device",
        type=_device,
        help="cpu or cuda: where it is compared (default: where it was exported); machine code for "
        "the other is not run",
    )
    return parser


def push_parser() -> Parser:
    parser = Parser(
        prog="python -m export push",
        description="Has a running service take a policy's weights, once it has seen them do what "
        "the policy does.",
    )
    _add_source(parser)
    parser.add_argument(
        "--to",
        required=True,
        action="append",
        metavar="URL",
        help="of the service, as http://127.0.0.1:8000 is; given again, of each of its replicas",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="an admin key of the service, as its first word; needed from another host",
    )
    parser.add_argument(
        "--if-match", metavar="VERSION", help="refuse where another version serves than this one"
    )
    parser.add_argument(
        "--restart-sessions",
        action="store_true",
        help="give up every session (410), whose states the older weights made; without it they "
        "go on",
    )
    # What is served decides it.
    parser.set_defaults(outputs=(), device="cpu")
    return parser


def _add_source(parser: Parser) -> None:
    """Which policy."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a trainer's checkpoint or state_dict (.pt, .safetensors), or a model.zip of "
        "Stable-Baselines3; code in it is refused, or not run",
    )
    origin.add_argument("--preset", help=f"a freshly initialised policy: {', '.join(PRESETS)}")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="initialises a preset (default 0)"
    )
    parser.add_argument(
        "--normaliser",
        metavar=f"FILE|{IDENTITY}",
        help="the observation statistics of a checkpoint that has none: a .json or .safetensors "
        "with mean and var, or another checkpoint; of a model.zip, VecNormalize's .pkl, or a .npz "
        f"or .json; {IDENTITY} says that there are none to apply",
    )
    parser.add_argument(
        "--action-space",
        metavar="SPACE",
        help='of a model.zip that does not say it: "MultiDiscrete([3 4 2])", "Discrete(5)"',
    )
    parser.add_argument(
        "--observation-space",
        metavar="SPACE",
        help='the same of what it observes: "Box(-1.0, 1.0, (6,), float32)"',
    )
    parser.add_argument(
        "--any-policy-class",
        action="store_true",
        help="take a model.zip whose policy is a class of your own for one of Stable-Baselines3's, "
        "if its weights fit; what else that class does is not exported",
    )
    parser.add_argument(
        "--probability-floors",
        type=_floors,
        default={},
        metavar="default|HEAD=P,...",
        help="raise each allowed choice's probability to this, as V2's trainer does to explore "
        "(default: none; with the trainer's own, `default`, sampling is nearly uniform)",
    )


def inspect_parser() -> Parser:
    parser = Parser(
        prog="python -m export inspect", description="Says what an artifact is; runs nothing of it."
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    return parser


def triton_parser() -> Parser:
    parser = Parser(
        prog="python -m export triton",
        description="Puts an artifact's ONNX step into a Triton model repository, once with its "
        "state as inputs and outputs and once with the state that Triton keeps of a sequence.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--repository",
        type=Path,
        required=True,
        metavar="REPOSITORY",
        help="what tritonserver is given as --model-repository; made where there is none",
    )
    parser.add_argument(
        "--name",
        help="of the first model; the second's has _seq behind it (default: the artifact's)",
    )
    parser.add_argument(
        "--device",
        type=_device,
        help="cpu or cuda: where Triton runs it (default: where it was exported for); it need not "
        "be here",
    )
    parser.add_argument(
        "--max-sequences",
        type=_max_sequences,
        default=1024,
        metavar="N",
        help="environments that Triton keeps a state of at once; another waits, untold, until one "
        "ends (default 1024)",
    )
    parser.add_argument(
        "--trusted", type=Path, metavar="KEY.pub", help="refuse what this key has not signed"
    )
    return parser


def crosscheck_parser() -> Parser:
    parser = Parser(
        prog="python -m export crosscheck",
        description="Compares an artifact with what stable_baselines3, where that is installed, "
        "makes of the model.zip it was exported from. That runs the pickles in the zip.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL.zip", help="what the artifact was exported from"
    )
    parser.add_argument("--artifact", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--run-pickles",
        action="store_true",
        help="let stable_baselines3 run the code in the zip, and in VecNormalize's .pkl, in a "
        "process of its own; without it nothing is compared. Only for files that you trust",
    )
    parser.add_argument(
        "--normaliser",
        metavar=f"FILE|{IDENTITY}",
        help="the .pkl of VecNormalize that the artifact was exported with",
    )
    parser.add_argument(
        "--formats",
        type=_formats,
        metavar="LIST",
        help="which to compare (default: all that run on a CPU)",
    )
    parser.add_argument(
        "--steps", type=_count, default=24, metavar="N", help="to carry states for (default 24)"
    )
    parser.add_argument(
        "--environments", type=_count, default=8, metavar="N", help="side by side (default 8)"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="draws observations, masks and where episodes start (default 0)",
    )
    parser.add_argument(
        "--trusted", type=Path, metavar="KEY.pub", help="refuse what this key has not signed"
    )
    return parser


def chosen_formats(formats: tuple[str, ...] | None, precision: Precision) -> tuple[str, ...] | None:
    """`all` is every format that has the precision; None is left to `export_policy`."""
    if formats == ("all",):
        return tuple(name for name, kind in FORMAT_KINDS.items() if precision in kind.precisions)
    return formats


def _formats(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


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
    if not _is_number(text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2**63 - 1")
    return int(text)


def _batch_size(text: str) -> int:
    if not _is_number(text) or not 2 <= int(text) <= LARGEST_BATCH_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to {LARGEST_BATCH_SIZE}")
    return int(text)


def _max_sequences(text: str) -> int:
    if not _is_number(text) or not 1 <= int(text) <= MOST_SEQUENCES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_SEQUENCES}")
    return int(text)


def _count(text: str) -> int:
    if not _is_number(text) or not 1 <= int(text) <= MOST_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_ROWS}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _device(text: str) -> str:
    if text not in get_args(Device):
        devices = ", ".join(get_args(Device))
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; the devices are {devices}")
    return text
