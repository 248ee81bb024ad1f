"""`python -m export crosscheck`: Stable-Baselines3's own code beside an artifact, and its pickles.

That every recorded policy agrees is in `test_recorded`, whose artifacts are at hand.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces

from export.__main__ import main
from export.comparison import ParityError
from export.crosscheck.comparison import compare
from export.crosscheck.recording import Draw, Recording, record
from export.exporter import export_policy
from export.judge import Judge
from export.manifest import ArtifactError, FormatParity, Manifest, Source
from export.process import plain_process
from model.sb3.checkpoint import load_sb3
from model.sb3.policy import SB3Policy
from model.sb3.spec import SB3Spec
from tests.loaded_step import load_from
from tests.model.sb3.trained import Still, vec_env
from tests.random_inputs import random_policy
from tests.sb3.recorded import needs_recorded, zip_file
from tests.specs import TINY_V1

sb3_contrib: Any = pytest.importorskip("sb3_contrib", reason="sb3-contrib is in the extra `heavy`")
stable_baselines3: Any = pytest.importorskip("stable_baselines3")

pytestmark = needs_recorded

NAME = "maskppo_discrete"
RECURRENT = "rppo_multidiscrete_sepcritic"
SMALL = ("--formats", "onnx", "--max-batch-size", "8")
ONNX: dict[str, Any] = {"formats": ["onnx"], "max_batch_size": 8}
FEW = ("--steps", "3", "--environments", "2")
ROOT = Path(__file__).resolve().parents[2]
Refused = Callable[..., str]


class Payload:
    """A pickle that runs `code` where it is loaded."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (self.code,)


def with_code(path: Path, code: str) -> Path:
    """A recorded model that runs `code` where its trainer loads it, and is itself otherwise."""
    with zipfile.ZipFile(zip_file(NAME)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    serialized = base64.b64encode(cloudpickle.dumps(Payload(code))).decode()
    data["remark"] = {":type:": "<class 'str'>", ":serialized:": serialized}
    members["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def exported(model: Path, output: Path) -> Path:
    assert main(["--checkpoint", str(model), "--output", str(output), *SMALL]) == 0
    return output


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(zip_file(NAME), tmp_path_factory.mktemp("crosscheck") / "artifact")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must end with `code`, and gives its last line."""

    def run(model: Path, artifact: Path, *more: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["crosscheck", str(model), "--artifact", str(artifact), *FEW, *more])
        printed = capsys.readouterr()
        assert exit_.value.code == code
        assert printed.out == ""
        assert "Traceback" not in printed.err
        return printed.err.splitlines()[-1]

    return run


class Acting(Still):
    action_space: Any

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        super().__init__(observation)
        self.action_space = action


FAR_OFF = {"mean": np.array([1e4, -50.0, 0.5]), "var": np.array([9.0, 1e4, 1e-4])}
SPACES: dict[str, tuple[str, spaces.Space[Any], spaces.Space[Any]]] = {
    "bernoulli": (
        "PPO",
        spaces.Dict(
            {
                "bits": spaces.MultiBinary(3),
                "counts": spaces.Box(0, 255, (2,), np.uint8),
                "far": spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
                "kind": spaces.Discrete(3),
            }
        ),
        spaces.MultiBinary(3),
    ),
    "starts-elsewhere": (
        "A2C",
        spaces.MultiDiscrete([3, 2]),
        spaces.Discrete(4, start=np.int64(-1)),
    ),
    "statistics": (
        "RecurrentPPO",
        spaces.Box(-np.inf, np.inf, (3,), np.float64),
        spaces.MultiDiscrete([3, 5, 2]),
    ),
}


@pytest.mark.parametrize("which", SPACES)
def test_a_policy_of_other_spaces_agrees(which: str, tmp_path: Path) -> None:
    """Weights as drawn, but for what starts too small to see."""
    algorithm, observation, action = SPACES[which]
    env: Any = vec_env.DummyVecEnv([lambda: Acting(observation, action)])
    given: tuple[str, ...] = ()
    if which == "statistics":
        env = vec_env.VecNormalize(env, clip_obs=4.0)
        env.obs_rms.mean, env.obs_rms.var = FAR_OFF["mean"], FAR_OFF["var"]
        env.save(str(tmp_path / "vec.pkl"))
        given = ("--normaliser", str(tmp_path / "vec.pkl"))
    lstm = "Lstm" if algorithm == "RecurrentPPO" else ""
    policy = "MultiInputPolicy" if isinstance(observation, spaces.Dict) else f"Mlp{lstm}Policy"
    trainer = getattr(sb3_contrib if lstm else stable_baselines3, algorithm)
    kwargs: dict[str, Any] = {"ortho_init": False, **({"lstm_hidden_size": 9} if lstm else {})}
    made = trainer(policy, env, policy_kwargs=kwargs, seed=3, device="cpu")
    model, artifact = tmp_path / "model.zip", str(tmp_path / "artifact")
    made.save(model)
    if not given:
        given = ("--normaliser", "identity")
    assert main(["--checkpoint", str(model), "--output", artifact, *SMALL, *given]) == 0
    command = ["crosscheck", str(model), "--artifact", artifact, "--run-pickles"]
    assert main([*command, "--seed", "5", *given]) == 0


def manifest_with(artifact: Path, output: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The artifact with another manifest."""
    output.mkdir()
    for file in artifact.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((output / "manifest.json").read_text())
    change(manifest)
    (output / "manifest.json").write_text(json.dumps(manifest))
    return output


def spec_of(artifact: Path) -> SB3Spec:
    spec = Manifest.read(artifact).spec
    assert isinstance(spec, SB3Spec)
    return spec


@pytest.mark.parametrize("is_allowed", [False, True])
def test_pickles_run_only_once_told_and_after_a_sentence(is_allowed: bool, tmp_path: Path) -> None:
    ran, stderr = tmp_path / "ran.json", tmp_path / "stderr"
    model = with_code(
        tmp_path / "model.zip",
        "import json, os, pathlib; "
        f"said = pathlib.Path({str(stderr)!r}).read_text(); "
        f"pathlib.Path({str(ran)!r}).write_text(json.dumps([said, dict(os.environ), os.getcwd()]))",
    )
    artifact = exported(model, tmp_path / "artifact")
    command = ["crosscheck", str(model), "--artifact", str(artifact), *FEW]
    with stderr.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "export", *command, *(["--run-pickles"] if is_allowed else [])],
            cwd=ROOT,
            env=os.environ | {"SECRET": "of the user"},
            stdout=subprocess.DEVNULL,
            stderr=file,
            timeout=200,
        )
    if not is_allowed:
        assert done.returncode == 2
        assert not ran.exists()
        assert "which runs the pickles in it: code of whoever made the file" in stderr.read_text()
        return
    assert done.returncode == 0, stderr.read_text()
    said, environment, folder = json.loads(ran.read_text())
    assert said.startswith(f"export: running the pickles in {model}, by stable_baselines3")
    assert "SECRET" not in environment
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("raise ValueError('no\\nmodel')", "export: stable_baselines3 failed: model"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9 ended it"),
        ("import os; os._exit(3)", "stable_baselines3 failed: exit code 3"),
        ("import os; os._exit(0)", "stable_baselines3 ended without an answer"),
        (
            "raise ModuleNotFoundError(\"No module named 'sb3_contrib'\")",
            "crosscheck takes sb3_contrib, which is not installed: pip install sb3-contrib",
        ),
    ],
    ids=["raises", "killed", "fails", "says-nothing", "not-installed"],
)
def test_a_trainer_that_fails_is_a_sentence(
    code: str, sentence: str, artifact: Path, tmp_path: Path, refused: Refused
) -> None:
    model = with_code(tmp_path / "model.zip", code)
    of_model = manifest_with(artifact, tmp_path / "artifact", _from(model))
    assert sentence in refused(model, of_model, "--run-pickles")


def _from(model: Path) -> Callable[[dict[str, Any]], None]:
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    return lambda manifest: manifest["source"].update(sha256=sha256)


ANSWER = """
import os, sys
import numpy as np
record = sys.argv[sys.argv.index("--record") + 1]
{}
os._exit(0)
"""


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "np.savez(record, value=np.array([{1: 2}]))",
            "an array of something else than floats or integers",
        ),
        ("np.savez(record, value=np.zeros(5))", "as action is None, expected (3, 2, 1)"),
        ("np.savez(record, value=np.zeros(2**22))", "is a damaged .npz"),
        ("np.savez_compressed(record, value=np.zeros(2**22))", "more than 16,777,216 bytes"),
        ("os.mkfifo(record)", "ended without an answer"),
    ],
    ids=["pickle", "shape", "size", "bomb", "pipe"],
)
def test_an_answer_of_another_kind_is_refused_and_not_unpickled(
    code: str, sentence: str, artifact: Path, tmp_path: Path
) -> None:
    model = with_code(tmp_path / "model.zip", ANSWER.format(code))
    with pytest.raises(ArtifactError) as error:
        record(model.read_bytes(), None, spec_of(artifact), Draw(3, 2, 0))
    assert sentence in str(error.value)


def test_a_trainer_that_does_not_end_is_ended(artifact: Path, tmp_path: Path) -> None:
    model = with_code(tmp_path / "model.zip", "import signal; signal.pause()")
    with pytest.raises(ArtifactError, match=r"took longer than 0\.5 s"):
        record(model.read_bytes(), None, spec_of(artifact), Draw(3, 2, 0), patience_s=0.5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ("value_net.bias", "onnx does not do what stable_baselines3 does: value["),
        ("action_net.bias", "onnx does not do what stable_baselines3 does: "),
    ],
)
def test_another_weight_shows(
    changed: str, sentence: str, tmp_path: Path, refused: Refused
) -> None:
    path = zip_file(NAME)
    spec, weights, *_ = load_sb3(path, path.read_bytes())
    weights[changed].flatten()[0] += 1e-3
    policy = SB3Policy(spec)
    policy.load_state_dict(weights)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    source = Source(kind="checkpoint", name=NAME, sha256=sha256)
    artifact = tmp_path / "artifact"
    export_policy(policy, None, artifact, name=NAME, source=source, **ONNX)
    line = refused(path, artifact, "--run-pickles", code=1)
    assert sentence in line
    assert "step 0" in line


def test_an_artifact_of_another_zip_is_refused(artifact: Path, refused: Refused) -> None:
    other = zip_file("maskppo_multidiscrete")
    line = refused(other, artifact, "--run-pickles")
    assert "was not exported from" in line
    assert str(other) in line


def test_a_policy_of_another_family_is_refused(tmp_path: Path, refused: Refused) -> None:
    artifact = tmp_path / "tamiyo"
    export_policy(random_policy(TINY_V1), None, artifact, name="tiny", **ONNX)
    line = refused(zip_file(NAME), artifact, "--run-pickles")
    assert "is no policy of Stable-Baselines3" in line


def test_a_policy_class_of_the_user_s_own_is_refused(
    artifact: Path, tmp_path: Path, refused: Refused
) -> None:
    own = manifest_with(
        artifact, tmp_path / "own", lambda manifest: manifest["spec"].update(name="actor-critic")
    )
    assert "which trainer saved it is not known" in refused(zip_file(NAME), own, "--run-pickles")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--formats", "pt2"), "has no pt2 for a CPU; it has onnx"),
        (("--normaliser", "vec.pkl"), "has no statistics, and --normaliser FILE would bring some"),
        (("--steps", "0"), "'0' is not a number from 1 to 4096"),
        (("--steps", "4096", "--environments", "4096"), "3,000,000 are recorded at most"),
        (("--seed", "-1"), "'-1' is not a number from 0"),
    ],
    ids=["format", "normaliser", "steps", "numbers", "seed"],
)
def test_what_cannot_be_compared_is_refused(
    more: tuple[str, ...], sentence: str, artifact: Path, refused: Refused
) -> None:
    assert sentence in refused(zip_file(NAME), artifact, "--run-pickles", *more)


def test_statistics_are_the_trainer_s_own(artifact: Path, tmp_path: Path, refused: Refused) -> None:
    normalized = manifest_with(
        artifact, tmp_path / "artifact", lambda manifest: manifest.update(has_normalizer=True)
    )
    line = refused(zip_file(NAME), normalized, "--run-pickles")
    assert "has statistics, and --normaliser FILE brings them" in line
    line = refused(zip_file(NAME), normalized, "--run-pickles", "--normaliser", "vec.npz")
    assert "vec.npz: stable_baselines3 takes the .pkl that VecNormalize.save wrote" in line


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, SB3Spec, Path]:
    """An artifact with every state there is, and what its trainer made of a few observations."""
    model = zip_file(RECURRENT)
    artifact = exported(model, tmp_path_factory.mktemp("recurrent") / "artifact")
    spec = spec_of(artifact)
    return record(model.read_bytes(), None, spec, Draw(4, 3, 0)), spec, artifact


def test_episodes_begin_within_what_is_recorded(
    recurrent: tuple[Recording, SB3Spec, Path],
) -> None:
    """Or a reset that is ignored would not show."""
    starts = recurrent[0].episode_start
    assert starts[0].all()
    assert starts[1:].any()
    assert not starts[1:].all()


def compared(recording: Recording, spec: SB3Spec, artifact: Path) -> FormatParity:
    content = Manifest.read(artifact).weights.read(artifact)
    judge = Judge(content, spec, torch.device("cpu"))
    with plain_process():
        return compare({"onnx": load_from(artifact, "onnx")}, recording, judge, 8)["onnx"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_what_is_drawn(
    seed: int, recurrent: tuple[Recording, SB3Spec, Path]
) -> None:
    recording, spec, _ = recurrent
    again = record(zip_file(RECURRENT).read_bytes(), None, spec, Draw(4, 3, seed))
    for name in ("observation", "episode_start"):
        assert torch.equal(getattr(again, name), getattr(recording, name)) == (seed == 0)


def test_what_agrees_agrees_in_every_choice(
    recurrent: tuple[Recording, SB3Spec, Path],
) -> None:
    parity = compared(*recurrent)
    assert parity.rows == 4 * 3 * (1 + max(recurrent[1].head_sizes))
    assert parity.action_agreement == 1.0
    assert max(parity.max_error.values()) < 1e-5


@pytest.mark.parametrize("field", ["log_prob", "value", "h", "c", "critic_h", "critic_c"])
def test_another_number_shows_though_it_is_the_last(
    field: str, recurrent: tuple[Recording, SB3Spec, Path]
) -> None:
    recording, spec, artifact = recurrent
    states = {name: array.clone() for name, array in recording.states.items()}
    wrong = recording._replace(
        states=states, log_prob=recording.log_prob.clone(), value=recording.value.clone()
    )
    array = states[field] if field in states else getattr(wrong, field)
    array.view(-1)[-1] += 1e-3
    named = f"state_{field}_out" if field in states else field
    with pytest.raises(ParityError, match=rf"^onnx does not .*: {named}\[2.* step 3\)$"):
        compared(wrong, spec, artifact)


def test_another_action_of_predict_shows(recurrent: tuple[Recording, SB3Spec, Path]) -> None:
    recording, spec, artifact = recurrent
    action = recording.action.clone()
    action[-1, -1, -1] ^= 1
    with pytest.raises(ParityError, match=r"predict.* 'action_2', row 2, .*\(step 3\)$"):
        compared(recording._replace(action=action), spec, artifact)


def test_the_help_names_it_and_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "export crosscheck"), (["crosscheck", "--help"], "runs")):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert words in capsys.readouterr().out
