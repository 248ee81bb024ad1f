"""A disk that fills at any file of an export is one sentence, exit code 2, and leaves nothing.

The system itself refuses: RLIMIT_FSIZE fails every write beyond it, as a full disk does, with
EFBIG for ENOSPC.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from export.format_kinds import FORMAT_KINDS
from export.manifest import MANIFEST_FILE, SIGNATURE_FILE
from export.report import REPORT_FILE, REPORT_PAGE
from export.weights import WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280
PRESET = ("--preset", "tamiyo-v1", "--max-batch-size", "2")
LARGEST_BYTES = 30
FITS_WEIGHTS_BYTES = 1_000_000
"""The preset's weights fit, and no format's file does."""

FULL_AT_A_FILE = """
import contextlib, io, json, os, resource, sys
from export.__main__ import main

full_at = None

def fill(event, arguments):
    global full_at
    if event == "open" and full_at and os.path.basename(str(arguments[0])) == full_at:
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            full_at = None
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))

sys.addaudithook(fill)
ends = {}
for name, arguments in json.loads(sys.argv[2]).items():
    full_at, said = name, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ends[name] = code, said.getvalue()
print(json.dumps(ends))
"""
"""Exports, each with a disk that is full from the moment its file is opened."""

FULL_AT_A_STAGE = """
import resource, sys
from export import commands
from export.__main__ import main

export_policy = commands.export_policy

def export_until_full(*arguments, on_stage, **options):
    def on_this_stage(stage):
        on_stage(stage)
        if stage == "exporting aoti":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    return export_policy(*arguments, on_stage=on_this_stage, **options)

commands.export_policy = export_until_full
raise SystemExit(main(sys.argv[2:]))
"""

FULL_AT_A_LOAD = """
import resource, sys
from export import exporter
from export.__main__ import main

load_step = exporter.load_step

def load_on_a_full_disk(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    return load_step(*arguments, **options)

exporter.load_step = load_on_a_full_disk
raise SystemExit(main(sys.argv[2:]))
"""

FULL_FROM_THE_START = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from export.__main__ import main
raise SystemExit(main(sys.argv[2:]))
"""


FILES = [
    WEIGHTS_FILE,
    *(kind.file for kind in FORMAT_KINDS.values()),
    REPORT_PAGE,
    REPORT_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
]


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def export_that_writes(name: str, output: Path, key: Path) -> list[str]:
    """A format's file takes that format; one is enough for the files that follow."""
    formats = [of for of, kind in FORMAT_KINDS.items() if kind.file == name] or ["torchscript"]
    return [*PRESET, "--formats", *formats, "--sign", str(key), "--output", str(output)]


class Ends(NamedTuple):
    """Where the exports were to go, and each one's exit code and last words."""

    outputs: Path
    by_file: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    directory = tmp_path_factory.mktemp("full")
    key = directory / "key.pem"
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    outputs = directory / "outputs"
    outputs.mkdir()
    exports = {name: export_that_writes(name, outputs / name / "tiny", key) for name in FILES}
    done = python(FULL_AT_A_FILE, str(LARGEST_BYTES), json.dumps(exports))
    assert (done.returncode, done.stderr) == (0, "")
    return Ends(outputs, json.loads(done.stdout))


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_is_full_at_a_file_is_one_sentence_and_leaves_nothing(
    ends: Ends, name: str
) -> None:
    code, said = ends.by_file[name]
    output = ends.outputs / name / "tiny"
    assert (code, said) == (2, f"export: {output}: cannot be written (File too large)\n")
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("format_name", "limit_bytes"),
    [("onnx", 100_000), ("torchscript", FITS_WEIGHTS_BYTES), ("pt2", FITS_WEIGHTS_BYTES)],
)
def test_a_disk_too_small_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, format_name: str, limit_bytes: int
) -> None:
    """Whoever writes: what safetensors and torch write themselves, they speak of themselves."""
    output = tmp_path / "outputs" / "tiny"
    arguments = (*PRESET, "--formats", format_name, "--output", output)
    done = python(FULL_FROM_THE_START, str(limit_bytes), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"export: {output}: cannot be written (File too large)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [FULL_AT_A_STAGE, FULL_AT_A_LOAD], ids=["compiles", "unpacks"])
def test_no_room_for_what_aoti_compiles_and_unpacks_is_one_sentence(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*PRESET, "--formats", "aoti", "--output", tmp_path / "made" / "tiny")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.with_name("inductor")))
    done = python(code, str(LARGEST_BYTES), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("export: ")
    assert done.stderr.endswith("File too large\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
