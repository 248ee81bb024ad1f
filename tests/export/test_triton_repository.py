"""`python -m export triton`: whole models, one clear line, and nothing that was there is lost."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from export.__main__ import main
from export.manifest import Manifest, Source
from export.signature import sign
from export.triton.comparison import GraphError
from export.triton.graph import sequence_graph
from export.triton.repository import Model, place, publish
from tests.specs import TINY_V1

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
KEY = Ed25519PrivateKey.generate()

Tree = dict[str, bytes]


@pytest.fixture
def artifacts(onnx_artifacts: dict[str, Path]) -> list[Path]:
    """Of two policies."""
    return [onnx_artifacts["v1"], onnx_artifacts["v1-other"]]


def changed(artifact: Path, directory: Path, **update: Any) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(artifact, directory)
    Manifest.read(artifact).model_copy(update=update).write(directory)
    return directory


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "models"


def to_triton(artifact: Path, repository: Path, *more: str) -> int:
    return main(["triton", str(artifact), "--repository", str(repository), *more])


def tree(directory: Path) -> Tree:
    """Every file by where it is."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def refusal(
    capsys: pytest.CaptureFixture[str], artifact: Path, repository: Path, *more: str, code: int = 2
) -> str:
    """Runs the command, which must exit with `code`, and gives its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        to_triton(artifact, repository, *more)
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out) == (code, "")
    assert printed.err.startswith("export: ")
    assert printed.err.count("\n") == 1
    return printed.err


def version_of(artifact: Path) -> str:
    return Manifest.read(artifact).policy_version


def test_a_policy_without_a_state_is_one_model(
    onnx_artifacts: dict[str, Path], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_triton(onnx_artifacts["mlps"], repository) == 0
    assert sorted(tree(repository)) == ["mlps/1/model.onnx", "mlps/config.pbtxt"]
    assert capsys.readouterr().out.startswith(f"{repository} has mlps, version 1\n")


def test_each_state_of_four_is_kept_by_its_name(
    onnx_artifacts: dict[str, Path], repository: Path
) -> None:
    assert to_triton(onnx_artifacts["lstms"], repository) == 0
    config = (repository / "lstms_seq" / "config.pbtxt").read_text()
    for name in ("h", "c", "critic_h", "critic_c"):
        pair = f'input_name: "state_{name}_in" output_name: "state_{name}_out"'
        assert f"{pair} data_type: TYPE_FP32 dims: [ 2, 10 ]" in config


FILES = [
    *("tiny/1/model.onnx", "tiny/config.pbtxt"),
    *("tiny_seq/1/model.onnx", "tiny_seq/config.pbtxt"),
]


def test_a_repository_is_made_with_both_models_and_nothing_else(
    artifacts: list[Path], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_triton(artifacts[0], repository) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{repository} has tiny and tiny_seq, version 1" in printed.out
    assert version_of(artifacts[0]) in printed.out
    assert sorted(tree(repository)) == FILES
    assert list(repository.parent.iterdir()) == [repository]
    for path in (repository, *repository.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_another_user_may_read_it_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        published(tmp_path, "new")
    finally:
        os.umask(before)
    for path in (tmp_path / "models", *(tmp_path / "models").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_directory_whose_name_only_looks_like_a_number_is_no_version(tmp_path: Path) -> None:
    published(tmp_path, "first")
    (tmp_path / "models" / "a" / "²").mkdir()
    published(tmp_path, "second")
    names = sorted(path.name for path in (tmp_path / "models" / "a").iterdir())
    assert names == ["1", "2", "config.pbtxt", "²"]


def test_what_lies_beside_the_artifact_s_files_is_named(
    artifacts: list[Path], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    (artifact / "notes.txt").write_text("another's")
    assert to_triton(artifact, repository) == 0
    assert capsys.readouterr().err == "export: not part of the artifact: notes.txt\n"


def test_it_runs_where_there_is_no_torch(artifacts: list[Path], repository: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from export.__main__ import main; "
        "raise SystemExit(main(sys.argv[1:]))"
    )
    arguments = ["triton", str(artifacts[0]), "--repository", str(repository)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(tree(repository)) == FILES


def test_without_onnx_it_says_which_extra_brings_it(
    artifacts: list[Path], repository: Path
) -> None:
    code = (
        "import sys; sys.modules['onnx'] = None; from export.__main__ import main; "
        "raise SystemExit(main(sys.argv[1:]))"
    )
    arguments = ["triton", str(artifacts[0]), "--repository", str(repository)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("export: triton takes onnx, which is not installed; the extra")
    assert not repository.parent.exists()


def test_another_policy_is_the_next_version_and_the_older_ones_stay(
    artifacts: list[Path], repository: Path, tmp_path: Path
) -> None:
    source = Source(kind="checkpoint", name='"best" é\x85\u2028', sha256="0" * 64)
    third = changed(artifacts[0], tmp_path / "third", source=source)
    fourth = changed(artifacts[1], tmp_path / "fourth", source=source)
    for artifact in (*artifacts, third, fourth):
        before = tree(repository)
        assert to_triton(artifact, repository) == 0
        after = tree(repository)
        assert {name for name in before if before[name] != after[name]} <= {
            "tiny/config.pbtxt",
            "tiny_seq/config.pbtxt",
        }
    for name in ("tiny", "tiny_seq"):
        versions = sorted(path.name for path in (repository / name).iterdir())
        assert versions == ["1", "2", "3", "4", "config.pbtxt"]
        first, second, *again = (
            (repository / name / number / "model.onnx").read_bytes() for number in "1234"
        )
        assert again == [first, second]
        assert first != second
        config = (repository / name / "config.pbtxt").read_text("utf-8")
        of_versions = [version_of(artifacts[at]) for at in (0, 1, 0, 1)]
        facts = {"policy_version": of_versions[-1]}
        facts |= {f"policy_version.{at + 1}": of for at, of in enumerate(of_versions)}
        for key, value in facts.items():
            assert config.count(f'key: "{key}" value {{ string_value: "{value}" }}') == 1
        assert config.count('"module tiny"') == 2
        assert config.count('"checkpoint \\"best\\" é\x85\u2028 (000') == 3
    assert list(repository.parent.iterdir()) == [repository]


def test_a_version_that_was_removed_is_not_spoken_of(
    artifacts: list[Path], repository: Path
) -> None:
    for artifact in artifacts:
        assert to_triton(artifact, repository) == 0
    shutil.rmtree(repository / "tiny" / "2")
    assert to_triton(artifacts[0], repository) == 0
    for name, is_there in (("tiny", False), ("tiny_seq", True)):
        config = (repository / name / "config.pbtxt").read_text("utf-8")
        assert (version_of(artifacts[1]) in config) == is_there
        assert config.count(version_of(artifacts[0])) == 3


def test_an_older_policy_may_be_the_newest_version_again(
    artifacts: list[Path], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for artifact in (artifacts[0], artifacts[1], artifacts[0]):
        assert to_triton(artifact, repository) == 0
    graphs = [repository / "tiny" / n / "model.onnx" for n in ("1", "3")]
    assert graphs[0].read_bytes() == graphs[1].read_bytes()
    before = tree(repository)
    line = refusal(capsys, artifacts[0], repository)
    assert f"has {version_of(artifacts[0])} as its newest version already" in line
    assert tree(repository) == before


def test_a_model_that_is_missing_gets_the_version_of_the_other(
    artifacts: list[Path], repository: Path
) -> None:
    assert to_triton(artifacts[0], repository) == 0
    shutil.rmtree(repository / "tiny_seq")
    assert to_triton(artifacts[0], repository) == 0
    assert sorted(path.name for path in (repository / "tiny").glob("[0-9]")) == ["1", "2"]
    assert [path.name for path in (repository / "tiny_seq").glob("[0-9]")] == ["2"]


def test_other_models_stay_and_a_link_to_the_repository_leads_there(
    artifacts: list[Path], repository: Path, tmp_path: Path
) -> None:
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "1" / "model.onnx").write_text("another's")
    (tmp_path / "link").symlink_to(repository)
    assert to_triton(artifacts[0], tmp_path / "link", "--name", "policy.v2") == 0
    assert sorted(path.name for path in repository.iterdir()) == [
        "other",
        "policy.v2",
        "policy.v2_seq",
    ]
    assert (repository / "other" / "1" / "model.onnx").read_text() == "another's"
    assert (tmp_path / "link").is_symlink()


def edited_by_hand(repository: Path) -> None:
    config = repository / "tiny_seq" / "config.pbtxt"
    config.write_text(config.read_text("utf-8").replace("count: 1", "count: 4"), "utf-8")


def made_by_somebody_else(repository: Path) -> None:
    (repository / "tiny" / "config.pbtxt").write_bytes(b'name: "tiny"\nbackend: "\xff"\n')


def without_a_configuration(repository: Path) -> None:
    (repository / "tiny" / "config.pbtxt").unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (edited_by_hand, "it has `instance_group [ { kind: KIND_CPU count: 4 } ]`, not `instance"),
        (made_by_somebody_else, "config.pbtxt is not what would be written for this artifact"),
        (without_a_configuration, "tiny exists, and has no config.pbtxt"),
    ],
)
def test_a_model_with_another_configuration_is_left_as_it_is(
    artifacts: list[Path],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    says: str,
) -> None:
    assert to_triton(artifacts[0], repository) == 0
    harm(repository)
    before = tree(repository)
    assert says in refusal(capsys, artifacts[1], repository)
    assert tree(repository) == before
    assert list(repository.parent.iterdir()) == [repository]


def test_a_policy_of_other_arrays_needs_another_name(
    artifacts: list[Path], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_triton(artifacts[0], repository) == 0
    other = changed(artifacts[1], tmp_path / "other", max_batch_size=8)
    line = refusal(capsys, other, repository)
    assert "it has `max_batch_size: 16`, not `max_batch_size: 8`; --name gives another" in line
    assert to_triton(other, repository, "--name", "larger") == 0


def test_an_artifact_without_onnx_is_refused(
    artifacts: list[Path], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = {"torchscript": Manifest.read(artifacts[0]).formats["onnx"]}
    artifact = changed(artifacts[0], tmp_path / "traced", formats=formats)
    line = refusal(capsys, artifact, repository)
    assert line.startswith(f"export: {artifact}: has no onnx")
    assert line.endswith("it holds torchscript\n")
    assert not repository.parent.exists()


@pytest.mark.parametrize("name", ["policy.onnx", "weights.safetensors", "report.json"])
def test_a_damaged_artifact_is_refused(
    artifacts: list[Path],
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    artifact = Path(shutil.copytree(artifacts[0], tmp_path / "damaged"))
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    assert "its SHA-256 is not the one in manifest.json" in refusal(capsys, artifact, repository)
    assert not repository.parent.exists()


def no_graph(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_start(content: bytes) -> bytes:
    return sequence_graph(content, TINY_V1)


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (no_graph, "policy.onnx: cannot be loaded: "),
        (with_start, "policy.onnx: input 5 'START' is one too many, expected 5"),
    ],
)
def test_a_graph_that_is_not_the_step_s_is_refused_though_its_hash_is_right(
    artifacts: list[Path],
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    replaced: Callable[[bytes], bytes],
    says: str,
) -> None:
    file = Manifest.read(artifacts[0]).formats["onnx"]
    content = replaced(file.read(artifacts[0]))
    mended = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    formats = {"onnx": file.model_copy(update=mended)}
    artifact = changed(artifacts[0], tmp_path / "mended", formats=formats)
    (artifact / file.file).write_bytes(content)
    assert f"export: {artifact}: {says}" in refusal(capsys, artifact, repository)
    assert not repository.parent.exists()


def test_what_is_no_artifact_is_refused(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not an artifact" in refusal(capsys, tmp_path, repository)


def test_only_a_trusted_key_s_artifact_is_taken_where_one_is_given(
    artifacts: list[Path], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(artifacts[0], tmp_path / "signed"))
    sign(artifact, KEY)
    for name, key in (("key", KEY), ("other", Ed25519PrivateKey.generate())):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / name).write_bytes(pem)
    line = refusal(capsys, artifact, repository, "--trusted", str(tmp_path / "other"))
    assert "was not signed by the trusted key" in line
    assert not repository.parent.exists()
    assert to_triton(artifact, repository, "--trusted", str(tmp_path / "key")) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "a/b"], "'a/b' cannot be a model's name; --name gives another"),
        (["--name", ""], "'' cannot be a model's name; --name gives another"),
        (["--name", ".hidden"], "'.hidden' cannot be a model's name"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--max-sequences", "0"], "'0' is not a number from 1 to 2147483647"),
        (["--max-sequences", "٣"], "'٣' is not a number from 1"),
        (["--max-sequences", "many"], "'many' is not a number from 1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(
    artifacts: list[Path],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    assert says in refusal(capsys, artifacts[0], repository, *arguments)
    assert not repository.parent.exists()


@pytest.mark.parametrize("where", ["models", "outputs"])
def test_a_file_in_the_repository_s_place_is_one_sentence(
    artifacts: list[Path], repository: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    file = repository if where == "models" else repository.parent
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file")
    line = refusal(capsys, artifacts[0], repository)
    assert line == f"export: {repository}: cannot be written (Not a directory)\n"
    assert file.read_text() == "a file"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("inside", ["", "models", "a/b"])
def test_a_repository_is_not_made_in_the_artifact(
    artifacts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    artifact = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    before = tree(artifact)
    (tmp_path / "link").symlink_to(artifact)
    for directory in (artifact, tmp_path / "link"):
        line = refusal(capsys, artifact, directory / inside)
        assert (
            line == f"export: {directory / inside} is in the artifact; a repository is beside it\n"
        )
    assert tree(artifact) == before


@pytest.mark.parametrize("where", ["models", "models/tiny", "models/tiny_seq"])
def test_a_link_to_nothing_is_one_sentence(
    artifacts: list[Path], repository: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    link = repository.parent / where
    link.parent.mkdir(parents=True)
    link.symlink_to("nowhere")
    line = refusal(capsys, artifacts[0], repository)
    assert line == f"export: {link} is a link to nowhere, which does not exist\n"
    assert list(link.parent.iterdir()) == [link]


FULL_FROM_THE_START = """
import resource, sys
from export.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    artifacts: list[Path], repository: Path, is_new: bool
) -> None:
    if not is_new:
        assert to_triton(artifacts[0], repository) == 0
    before = tree(repository)
    limit = artifacts[1] / "policy.onnx"
    done = subprocess.run(
        [
            *(sys.executable, "-c", FULL_FROM_THE_START, str(limit.stat().st_size + 10)),
            *("triton", str(artifacts[1]), "--repository", str(repository)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"export: {repository}: cannot be written (File too large)\n"
    assert tree(repository) == before
    assert repository.parent.exists() != is_new
    assert is_new or list(repository.parent.iterdir()) == [repository]


def test_a_full_stdout_is_not_said_to_be_the_repository(
    artifacts: list[Path], repository: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [
                *(sys.executable, "-u", "-m", "export"),
                *("triton", str(artifacts[0]), "--repository", str(repository)),
            ],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.stderr == "export: stdout: cannot be written (No space left on device)\n"
    assert done.returncode == 2
    assert sorted(tree(repository)) == FILES


def test_a_graph_that_differs_is_exit_code_1_and_nothing_is_written(
    artifacts: list[Path],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def differs(*arguments: object, **options: object) -> None:
        raise GraphError("with START the step gives another value (batch size 2)")

    monkeypatch.setattr("export.triton.export.check_sequence_graph", differs)
    line = refusal(capsys, artifacts[0], repository, code=1)
    assert line.endswith("gives another value (batch size 2); nothing was written\n")
    assert not repository.parent.exists()


def test_a_request_to_end_is_one_word_and_its_code(
    artifacts: list[Path],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("export.triton.export.publish", asked)
    assert refusal(capsys, artifacts[0], repository, code=143) == "export: terminated\n"
    assert not repository.parent.exists()


MODELS = [Model("a", "is a\n", b"graph a"), Model("b", "is b\n", b"graph b")]
"""What publishing knows of a model."""

STOPPED_AT_EACH_STEP = """
import json, os, sys
from pathlib import Path
from export.stopping import Stopped, stoppable
from tests.export.test_triton_repository import published, texts

number, root, has_older = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "older"
steps_left = None

def stop(event, arguments):
    global steps_left
    if steps_left is not None and event.startswith(("os.", "open", "shutil.", "fcntl.")):
        steps_left -= 1
        if steps_left < 0:
            steps_left = None
            os.kill(os.getpid(), number)

sys.addaudithook(stop)
ends, is_whole = [], False
while not is_whole:
    made = root / str(len(ends)) / "made"
    if has_older:
        published(made, "old")
    try:
        with stoppable():
            steps_left = len(ends)
            published(made, "new")
            is_whole, steps_left = steps_left is not None, None
    except Stopped:
        pass
    ends.append(texts(made.parent))
print(json.dumps(ends))
"""
"""Publishes again and again, each time with the signal one step later, until it comes too late."""


def published(directory: Path, *policy_versions: str) -> None:
    for version in policy_versions:
        publish(MODELS, directory / "models", policy_version=version, source="")


def texts(directory: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in tree(directory).items()}


@pytest.mark.parametrize(("number", "older"), [(signal.SIGINT, []), (signal.SIGTERM, ["old"])])
def test_a_signal_before_any_step_leaves_all_of_it_or_nothing(
    tmp_path: Path, number: int, older: list[str]
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", STOPPED_AT_EACH_STEP, str(int(number)), tmp_path / "stopped"),
            "older" if older else "new",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert len(ends) > 20
    published(tmp_path / "before" / "made", *older)
    published(tmp_path / "after" / "made", *older, "new")
    whole = [texts(tmp_path / "before"), texts(tmp_path / "after")]
    assert [end for end in ends if end not in whole] == []
    assert [end for end in whole if end not in ends] == []


def test_a_move_that_fails_takes_back_those_before_it(tmp_path: Path) -> None:
    for name in ("ours/1", "theirs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ours/1/graph", "ours/config", "ours/late", "theirs/config"):
        (tmp_path / name).write_text(name)
    before = texts(tmp_path)
    moves = [(tmp_path / "ours" / at, tmp_path / "theirs" / at) for at in ("1", "config")]
    with pytest.raises(FileNotFoundError):
        place([*moves, (tmp_path / "ours" / "late", tmp_path / "nowhere" / "late")])
    assert {name: text for name, text in texts(tmp_path).items() if "theirs" in name} == {
        "theirs/config": "theirs/config"
    }
    assert before.items() - texts(tmp_path).items() == {("ours/config", "ours/config")}


def test_what_a_killed_export_has_left_beside_the_repository_goes_with_the_next(
    tmp_path: Path,
) -> None:
    left = tmp_path / f".models.export-{'0' * 16}" / "new"
    left.mkdir(parents=True)
    (left / "a").write_text("half of a graph")
    published(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
