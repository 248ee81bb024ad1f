"""`python -m export`: exit codes, one clear line, and nothing half-written.

The truth is a real process; what a process start adds nothing to runs in this one.
"""

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.torch import save_file
from torch import Tensor

from export.__main__ import main
from export.artifact import open_artifact
from export.format_kinds import PORTABLE_FORMATS
from export.formats import FORMATS, StepSource
from export.loaders.torch_formats import load_torchscript
from export.manifest import Manifest, Precision
from export.options import PRESETS, chosen_formats
from export.report import Report
from export.tamiyo_step import TamiyoStep
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.golden import GOLDEN, golden_tensors, needs_golden
from tests.loaded_step import TensorStep
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL
from tests.random_inputs import random_policy

FAST = ("--formats", "torchscript", "--max-batch-size", "16")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
TIMEOUT_S = 200
FORCED_STYLE = 2


def export_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def loaded(output: Path) -> tuple[TensorStep, PolicySpec]:
    """The step of an artifact as a server would load it."""
    manifest = Manifest.read(output)
    content = manifest.formats["torchscript"].read(output)
    assert isinstance(manifest.spec, PolicySpec)
    return load_torchscript(content, "cpu").call, manifest.spec


def checkpoint_of(policy: FactoredRecurrentActorCritic, normalized: bool) -> dict[str, Any]:
    """What the V1 trainer saves, and, on request, the statistics it forgets to."""
    checkpoint: dict[str, Any] = {
        "checkpoint_version": 1,
        "network_state_dict": policy.state_dict(),
        "train_steps": 3,
    }
    if normalized:
        dim = policy.observation_dim
        checkpoint["metadata"] = {
            "obs_normalizer_mean": [0.5] * dim,
            "obs_normalizer_var": [2.0] * dim,
        }
    return checkpoint


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Where a test's input files go: not beside the output, whose surroundings are looked at."""
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "tiny"


@pytest.fixture
def checkpoint(policy: FactoredRecurrentActorCritic, inputs: Path) -> Path:
    torch.save(checkpoint_of(policy, normalized=True), inputs / "best.pt")
    return inputs / "best.pt"


@pytest.fixture
def tiny_preset(spec: PolicySpec, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "tiny", lambda: spec)
    return "tiny"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs the command in this process, which must exit 2, and gives its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("export: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    return printed.err


def test_preset_becomes_an_artifact_of_every_portable_format(tmp_path: Path) -> None:
    output = tmp_path / "fresh"
    done = export_process("--preset", "tamiyo-v1", "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    manifest = Manifest.read(output)
    assert manifest.spec == PolicySpec.tamiyo_v1()
    assert manifest.formats.keys() == manifest.parity.formats.keys() == set(PORTABLE_FORMATS)
    assert manifest.name == "tamiyo-v1"
    assert (manifest.source.kind, manifest.source.seed) == ("preset", 0)
    assert manifest.policy_version[:19] in done.stdout
    assert str(output) in done.stdout
    for name, file in manifest.formats.items():
        assert len(file.read(output)) == file.bytes
        assert name in done.stdout
    assert list(tmp_path.iterdir()) == [output]
    table = done.stdout.splitlines()[: len(manifest.formats) + 1]
    assert table[0].split() == ["format", "file", "size", "error", "equal", "B=1", "B=32", "B=256"]
    speedup = {name: Report.read(output, manifest).speedup(name) for name in manifest.formats}
    for name, row in zip(manifest.formats, table[1:], strict=True):
        assert row.split()[0] == name
        assert row.split()[-3:] == [f"{speedup[name][size]:.1f}x" for size in (1, 32, 256)]
        assert len(row) <= 80


def test_seed_decides_the_weights(tiny_preset: str, tmp_path: Path) -> None:
    def version_of(seed: str, name: str) -> str:
        arguments = ["--preset", tiny_preset, "--seed", seed, "--formats", "torchscript"]
        assert main([*arguments, "--output", str(tmp_path / name)]) == 0
        manifest = Manifest.read(tmp_path / name)
        assert manifest.source.seed == int(seed)
        return manifest.policy_version

    torch.manual_seed(5)
    first = version_of("3", "first")
    torch.manual_seed(6)
    assert version_of("3", "again") == first
    assert version_of("4", "other") != first


def test_export_leaves_the_callers_random_numbers_alone(tiny_preset: str, output: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert main([*FAST, "--preset", tiny_preset, "--output", str(output)]) == 0
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_with_statistics_is_exported_without_a_warning(
    checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FAST, "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""
    manifest = Manifest.read(output)
    assert manifest.has_normalizer
    assert (manifest.name, manifest.source.kind, manifest.source.name) == (
        "best",
        "checkpoint",
        "best",
    )
    content = checkpoint.read_bytes()
    assert manifest.source.sha256 == hashlib.sha256(content).hexdigest()


def test_checkpoint_without_statistics_is_exported_with_a_loud_warning(
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(checkpoint_of(policy, normalized=False), inputs / "v1.pt")
    arguments = ["--checkpoint", str(inputs / "v1.pt"), "--output", str(output)]
    assert main([*FAST, *arguments, "--name", "renamed"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {inputs / 'v1.pt'} holds no observation statistics")
    assert "wrong" in warning
    assert not Manifest.read(output).has_normalizer
    assert Manifest.read(output).name == "renamed"


def test_paths_are_printed_as_they_are(
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = inputs / "run[best].pt"
    torch.save(checkpoint_of(policy, normalized=False), path)
    output = output.with_name("tiny[best]")
    assert main([*FAST, "--checkpoint", str(path), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert str(path) in printed.err
    assert str(output) in printed.out


def missing(inputs: Path, good: Mapping[str, Any]) -> Path:
    return inputs / "missing.pt"


def directory(inputs: Path, good: Mapping[str, Any]) -> Path:
    return inputs


def empty(inputs: Path, good: Mapping[str, Any]) -> Path:
    (inputs / "empty.pt").touch()
    return inputs / "empty.pt"


def text(inputs: Path, good: Mapping[str, Any]) -> Path:
    (inputs / "notes.pt").write_text("not a checkpoint\n")
    return inputs / "notes.pt"


def truncated(inputs: Path, good: Mapping[str, Any]) -> Path:
    path = inputs / "truncated.pt"
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_safetensors(inputs: Path, good: Mapping[str, Any]) -> Path:
    path = inputs / "truncated.safetensors"
    save_file(good["network_state_dict"], path)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def foreign_keys(inputs: Path, good: Mapping[str, Any]) -> Path:
    torch.save({"network_state_dict": {"encoder.weight": torch.ones(2, 2)}}, inputs / "other.pt")
    return inputs / "other.pt"


def one_key_missing(inputs: Path, good: Mapping[str, Any]) -> Path:
    weights = {**good["network_state_dict"]}
    del weights["tempo_head.2.bias"]
    torch.save({"network_state_dict": weights}, inputs / "lacking.pt")
    return inputs / "lacking.pt"


def one_key_too_many(inputs: Path, good: Mapping[str, Any]) -> Path:
    weights = good["network_state_dict"] | {"q_head.0.bias": torch.ones(3)}
    torch.save({"network_state_dict": weights}, inputs / "more.pt")
    return inputs / "more.pt"


def wrong_shape(inputs: Path, good: Mapping[str, Any]) -> Path:
    weights = good["network_state_dict"] | {"tempo_head.2.bias": torch.ones(4)}
    torch.save({"network_state_dict": weights}, inputs / "shape.pt")
    return inputs / "shape.pt"


def not_a_number(inputs: Path, good: Mapping[str, Any]) -> Path:
    bias = good["network_state_dict"]["lstm_ln.bias"].clone()
    bias[3] = torch.nan
    weights = good["network_state_dict"] | {"lstm_ln.bias": bias}
    torch.save({"network_state_dict": weights}, inputs / "diverged.pt")
    return inputs / "diverged.pt"


def third_version(inputs: Path, good: Mapping[str, Any]) -> Path:
    torch.save({**good, "checkpoint_version": 3}, inputs / "v3.pt")
    return inputs / "v3.pt"


def statistics_of_another_width(inputs: Path, good: Mapping[str, Any]) -> Path:
    metadata = {"obs_normalizer_mean": [0.0] * 3, "obs_normalizer_var": [1.0] * 3}
    torch.save({**good, "metadata": metadata}, inputs / "width.pt")
    return inputs / "width.pt"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "there is no such file"),
        (directory, "is a directory, not a file"),
        (empty, "truncated or no checkpoint"),
        (text, "is text, not a checkpoint; it begins with 'not a checkpoint'"),
        (truncated, "truncated or no checkpoint"),
        (truncated_safetensors, "truncated or no checkpoint"),
        (foreign_keys, "has no 'feature_net.0.weight' anywhere, so it holds no Tamiyo policy"),
        (one_key_missing, "it lacks tempo_head.2.bias"),
        (one_key_too_many, "it has the unknown q_head.0.bias"),
        (wrong_shape, "'tempo_head.2.bias' has shape (4,), expected (3,)"),
        (not_a_number, "'lstm_ln.bias' holds NaN or infinity"),
        (third_version, "is checkpoint version 3; 1 and 2 can be read"),
        (statistics_of_another_width, "has observation statistics for 3 features"),
    ],
)
def test_bad_checkpoint_is_refused_in_one_line(
    make: Callable[[Path, Mapping[str, Any]], Path],
    says: str,
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(inputs, checkpoint_of(policy, normalized=False))
    line = refusal(capsys, "--checkpoint", path, "--output", output)
    assert line.startswith(f"export: {path}: ")
    assert says in line
    assert list(output.parent.iterdir()) == []


def exported(inputs: Path, output: Path, policy: FactoredRecurrentActorCritic, *more: str) -> int:
    """The exit code of exporting a checkpoint without observation statistics."""
    torch.save(checkpoint_of(policy, normalized=False), inputs / "v1.pt")
    arguments = ["--checkpoint", str(inputs / "v1.pt"), "--output", str(output)]
    return main([*FAST, *arguments, *more])


def test_statistics_the_checkpoint_has_not_may_come_from_a_file(
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    statistics = {"mean": [1.0] * policy.observation_dim, "var": [2.0] * policy.observation_dim}
    (inputs / "statistics.json").write_text(json.dumps(statistics))
    file = str(inputs / "statistics.json")
    assert exported(inputs, output, policy, "--normaliser", file) == 0
    assert "warning" not in capsys.readouterr().err
    assert Manifest.read(output).has_normalizer


def test_identity_says_that_there_are_no_statistics_to_apply(
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exported(inputs, output, policy, "--normaliser", "identity") == 0
    assert "warning" not in capsys.readouterr().err
    assert not Manifest.read(output).has_normalizer


def test_statistics_beside_the_checkpoint_s_own_are_refused(
    policy: FactoredRecurrentActorCritic,
    inputs: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(checkpoint_of(policy, normalized=True), inputs / "v1.pt")
    path = inputs / "v1.pt"
    line = refusal(capsys, "--checkpoint", path, "--normaliser", "identity", "--output", output)
    assert "holds observation statistics of its own; leave out --normaliser" in line
    assert not output.exists()


def test_probability_floors_are_the_manifest_s_too(tiny_preset: str, output: Path) -> None:
    floors = ["--probability-floors", "op=0.1,slot=0.02"]
    assert main([*FAST, "--preset", tiny_preset, *floors, "--output", str(output)]) == 0
    by_head = {head.name: head.probability_floor for head in Manifest.read(output).spec.heads}
    assert {name: floor for name, floor in by_head.items() if floor} == {"op": 0.1, "slot": 0.02}


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ("value,advantage", "'advantage' is not one of value, q, contribution"),
        ("value,q", "has no q_value"),
    ],
)
def test_outputs_a_policy_has_not_are_refused_in_one_line(
    tiny_preset: str, output: Path, capsys: pytest.CaptureFixture[str], outputs: str, says: str
) -> None:
    arguments = ["--preset", tiny_preset, "--outputs", outputs]
    assert says in refusal(capsys, *arguments, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("floors", "says"),
    [
        (
            "slot=0.1,op=1.5",
            "export: --probability-floors: op: Input should be less than 1, not 1.5",
        ),
        ("op=nan", "export: --probability-floors: op: "),
        ("op=0.1,oops=0.2", "there is no head 'oops'"),
        ("op=1.5", "less than 1, not 1.5"),
        ("op=nan", "not nan"),
        ("op", "'op' is not HEAD=PROBABILITY"),
    ],
)
def test_floors_that_cannot_be_are_refused_in_one_line(
    tiny_preset: str, output: Path, capsys: pytest.CaptureFixture[str], floors: str, says: str
) -> None:
    preset = ["--preset", tiny_preset, "--probability-floors", floors]
    assert says in refusal(capsys, *preset, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "nonesuch"], "unknown preset 'nonesuch'; the presets are tamiyo-v1"),
        (["--preset", "tiny", "--formats", "tflite"], "unknown format 'tflite'"),
        (["--preset", "tiny", "--formats", "torchscript,tflite"], "unknown format 'tflite'"),
        (["--preset", "tiny", "--formats", ","], "at least one format is needed"),
        (["--preset", "tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["--preset", "tiny", "--precision", "fp7"], "fp7"),
        (["--preset", "tiny", "--precision", "bf16", "--formats", "onnx"], "onnx has no bf16"),
        (["--preset", "tiny", "--seed", "one"], "--seed"),
        (["--preset", "tiny", "--checkpoint", "x.pt"], "not allowed with"),
        (["--preset", "tiny", "--nonesuch"], "--nonesuch"),
        ([], "--checkpoint --preset is required"),
        (["--preset", "tiny", "--seed", str(2**64)], "--seed"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_bad_arguments_are_refused_in_one_line(
    arguments: list[str], says: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refusal(capsys, *arguments, "--output", output)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", set(FORMATS)), ("bf16", set(FORMATS) - {"onnx"})],
)
def test_all_means_every_format_that_has_the_precision(
    precision: Precision, expected: set[str]
) -> None:
    assert set(chosen_formats(("all",), precision) or ()) == expected


def test_output_is_required(tiny_preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--output" in refusal(capsys, "--preset", tiny_preset)


def test_existing_directory_is_refused_and_untouched(
    tiny_preset: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    for options, says in (([], "exists already"), (["--overwrite"], "is not an artifact")):
        line = refusal(capsys, "--preset", tiny_preset, "--output", output, *options)
        assert line.startswith(f"export: {output} {says}")
        assert [path.name for path in output.parent.rglob("*")] == ["tiny", "thesis.tex"]


def test_overwrite_replaces_an_artifact(
    tiny_preset: str, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FAST, "--preset", tiny_preset, "--output", str(output)]) == 0
    version = Manifest.read(output).policy_version
    refusal(capsys, "--checkpoint", checkpoint, "--output", output)
    assert Manifest.read(output).policy_version == version
    assert (
        main([*FAST, "--checkpoint", str(checkpoint), "--output", str(output), "--overwrite"]) == 0
    )
    assert Manifest.read(output).policy_version != version
    assert list(output.parent.iterdir()) == [output]


def test_overwrite_leaves_what_is_not_the_artifacts_and_names_it(
    tiny_preset: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FAST, "--preset", tiny_preset, "--output", str(output), "--overwrite", "--json"]
    assert main(arguments) == 0
    (output / "thesis.tex").write_text("precious")
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert (output / "thesis.tex").read_text() == "precious"
    assert printed.err == "export: not part of the artifact: thesis.tex\n"
    assert Manifest.model_validate_json(printed.out) == Manifest.read(output)


def test_a_link_to_nothing_is_refused_before_the_checkpoint_is_read(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.symlink_to("nowhere")
    line = refusal(capsys, "--checkpoint", "absent.pt", "--output", output)
    assert line == f"export: {output} is a link to nowhere, which does not exist\n"


@pytest.mark.parametrize(
    "below",
    [
        "tiny",
        "deeper/tiny",
    ],
)
def test_output_below_a_regular_file_is_refused(
    below: str, tiny_preset: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.write_text("a file")
    line = refusal(capsys, "--preset", tiny_preset, "--output", output / below)
    assert str(output) in line
    assert "cannot be written" in line
    assert output.read_text() == "a file"


def test_format_that_differs_from_the_policy_is_exit_code_one(
    tiny_preset: str,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = FORMATS["torchscript"]

    def write_another(source: StepSource) -> bytes:
        another = random_policy(PRESETS[tiny_preset](), seed=9)
        return right.write(StepSource(TamiyoStep(another, None).eval(), max_batch_size=64))

    monkeypatch.setitem(FORMATS, "torchscript", right._replace(write=write_another))
    with pytest.raises(SystemExit) as exit_:
        main([*FAST, "--preset", tiny_preset, "--output", str(output)])
    line = capsys.readouterr().err
    assert exit_.value.code == 1
    assert line.startswith("export: no artifact was written: torchscript differs from the policy")
    assert "state_h_out" in line
    assert line.count("\n") == 1
    assert list(output.parent.iterdir()) == []


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({"network_state_dict": Malicious()}, tmp_path / "gift.pt")
    done = export_process("--checkpoint", tmp_path / "gift.pt", "--output", tmp_path / "tiny")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"export: {tmp_path / 'gift.pt'}: ")
    assert done.stderr.endswith("nothing in it was run\n")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gift.pt"]


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, b"interrupted; no artifact was written"),
        (signal.SIGTERM, 143, b"terminated; no artifact was written"),
    ],
)
def test_export_that_is_stopped_leaves_nothing(
    number: signal.Signals, code: int, says: bytes, tmp_path: Path
) -> None:
    """At the keyboard or by the system, while the terminal shows that it is at work."""
    spec = PolicySpec.tamiyo_v1(hidden_dim=256, feature_dim=256, num_layers=2)
    state_dict = FactoredRecurrentActorCritic(spec).state_dict()
    save_file(state_dict, tmp_path / "wide.safetensors")  # takes a while to compare
    arguments = ["--checkpoint", tmp_path / "wide.safetensors", "--output", tmp_path / "tiny"]
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "export", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=its_end,
    )
    os.close(its_end)
    with process, os.fdopen(terminal, "rb", buffering=0) as screen:
        try:
            seen = b""
            while b"beside it" not in seen:
                seen += screen.read(1024)
            beside = {path.name for path in tmp_path.iterdir()}
            process.send_signal(number)
            seen += everything(screen)
            assert process.wait(TIMEOUT_S) == code
        finally:
            process.kill()
    assert any(name.startswith(".tiny.") for name in beside)
    assert says in seen
    assert b"Traceback" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["wide.safetensors"]


STOPPED_AT_AN_EVENT = """
import os, sys
from export.__main__ import main

number, awaited, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def stop(event, arguments):
    if event == awaited and str(arguments[0]).endswith(path):
        os.kill(os.getpid(), number)

sys.addaudithook(stop)
raise SystemExit(main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "event", "path", "says"),
    [
        pytest.param(
            *(signal.SIGTERM, 143, "open", "/new/weights.safetensors"),
            "terminated; no artifact was written",
            id="before",
        ),
        pytest.param(
            *(signal.SIGTERM, 143, "os.rename", "/new"), "terminated; {} was written", id="in it"
        ),
        pytest.param(
            *(signal.SIGINT, 130, "open", "/tiny/report.json"),
            "interrupted; {} was written",
            id="after",
        ),
    ],
)
def test_a_stopped_export_says_whether_it_has_written(
    number: signal.Signals, code: int, event: str, path: str, says: str, output: Path
) -> None:
    """Before it is put in its place, as it is, and as it is read again for the table."""
    output.mkdir()
    arguments = [*FAST, "--preset", "tamiyo-v1", "--output", str(output), "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_AN_EVENT, str(int(number)), event, path, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stderr) == (code, f"export: {says.format(output)}\n")
    assert list(output.parent.iterdir()) == [output]
    assert any(output.iterdir()) == ("no artifact" not in says)


def everything(screen: Any) -> bytes:
    """The rest of what a terminal shows; Linux ends it with an error instead of an end of file."""
    seen = b""
    try:
        while more := screen.read(1024):
            seen += more
    except OSError:
        pass
    return seen


def packed_masks(recorded: Mapping[str, Tensor], spec: PolicySpec) -> Tensor:
    return torch.cat([recorded[f"in.mask.{head}"] for head in spec.head_names], dim=-1)


def recorded_heads(recorded: Mapping[str, Tensor], prefix: str, spec: PolicySpec) -> Tensor:
    return torch.stack([recorded[f"{prefix}.{head}"] for head in spec.head_names], dim=-1)


def assert_acts_as_recorded(
    got: tuple[Tensor, Tensor, Tensor],
    recorded_action: Tensor,
    recorded_log_prob: Tensor,
    recorded_value: Tensor,
    style_mask: Tensor,
    spec: PolicySpec,
) -> None:
    """Equal but for the rows of the original's style quirk: there ours forces the style."""
    style = spec.head_names.index("style")
    op = recorded_action[:, spec.op_index]
    quirk = (op != 1) & (op != 2) & ~style_mask[:, FORCED_STYLE]
    expected_action, expected_log_prob = recorded_action.clone(), recorded_log_prob.clone()
    expected_action[quirk, style] = FORCED_STYLE
    expected_log_prob[quirk, style] = 0.0
    action, log_prob, value = got
    np.testing.assert_array_equal(action, expected_action)
    np.testing.assert_allclose(log_prob, expected_log_prob, rtol=0, atol=LOG_PROB_ATOL)
    np.testing.assert_allclose(value, recorded_value, rtol=0, atol=FLOAT_ATOL)


@needs_golden
@torch.inference_mode()
def test_recorded_checkpoint_acts_from_disk_as_it_did(output: Path) -> None:
    done = export_process("--checkpoint", GOLDEN / "ckpt_v1_meta.pt", "--output", output)
    assert done.returncode == 0, done.stderr
    step, spec = loaded(output)
    recorded = golden_tensors("ckpt_v1_io")
    raw = recorded["in.raw_states"]
    mask = packed_masks(recorded, spec)
    zeros = torch.zeros(len(raw), spec.num_layers, spec.hidden_dim)
    action, log_prob, value, h, c = step(raw, mask, torch.zeros(mask.shape), zeros, zeros)
    assert_acts_as_recorded(
        (action, log_prob, value),
        recorded_heads(recorded, "out.actions", spec),
        recorded_heads(recorded, "out.log_probs", spec),
        recorded["out.values"],
        recorded["in.mask.style"],
        spec,
    )
    for got, expected in ((h, recorded["out.h"]), (c, recorded["out.c"])):
        torch.testing.assert_close(got, expected.transpose(0, 1), rtol=0, atol=FLOAT_ATOL)


@needs_golden
@torch.inference_mode()
def test_recorded_steps_are_taken_again_from_disk(output: Path) -> None:
    weights = GOLDEN / "weights_v1_a.safetensors"
    assert main([*FAST, "--checkpoint", str(weights), "--output", str(output)]) == 0
    step, spec = loaded(output)
    recorded = golden_tensors("io_v1_a") | golden_tensors("io_v1_a_hidden")
    actions = recorded_heads(recorded, "step.actions", spec)
    log_probs = recorded_heads(recorded, "step.log_probs", spec)
    masks = packed_masks(recorded, spec)
    batch_size, length = actions.shape[:2]
    assert (batch_size, length) == (64, 12)
    h = c = torch.zeros(batch_size, spec.num_layers, spec.hidden_dim)
    noise = torch.zeros(batch_size, spec.num_choices)
    for t in range(length):
        action, log_prob, value, h, c = step(recorded["in.states"][:, t], masks[:, t], noise, h, c)
        assert_acts_as_recorded(
            (action, log_prob, value),
            actions[:, t],
            log_probs[:, t],
            recorded["step.values"][:, t],
            recorded["in.mask.style"][:, t],
            spec,
        )
        for got, kept in ((h, "step.h"), (c, "step.c")):
            torch.testing.assert_close(
                got, recorded[kept][t].transpose(0, 1), rtol=0, atol=FLOAT_ATOL
            )


def test_export_can_print_the_manifest_for_a_machine_and_sign_it(
    tiny_preset: str, output: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Ed25519PrivateKey.generate()
    pem = inputs / "key.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    arguments = ("--preset", tiny_preset, "--output", str(output), "--json", "--sign", str(pem))
    assert main([*FAST, *arguments]) == 0
    assert Manifest.model_validate_json(capsys.readouterr().out) == Manifest.read(output)
    open_artifact(output, trusted=key.public_key())


def test_key_that_is_none_is_refused_before_anything_is_written(
    tiny_preset: str, output: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(
        capsys, *FAST, "--preset", tiny_preset, "--output", output, "--sign", inputs / "absent"
    )
    assert "is not a PEM Ed25519 private key" in line
    assert not output.exists()
