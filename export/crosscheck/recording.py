"""What Stable-Baselines3 made of random observations, in a process of its own; read as data."""

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from export.crosscheck import trainer
from export.manifest import ArtifactError
from model.checkpoint_file import CheckpointError, short
from model.sb3.npz_file import MOST_BYTES, read_npz
from model.sb3.spec import SB3Spec
from model.step_spec import StepSpec

ALGORITHMS = {
    "recurrent-ppo": ("sb3_contrib", "RecurrentPPO"),
    "maskable-ppo": ("sb3_contrib", "MaskablePPO"),
    "ppo": ("stable_baselines3", "PPO"),
    "a2c": ("stable_baselines3", "A2C"),
}
"""Where the class is that saved a policy of this name."""
TRAINERS = {"stable_baselines3": "stable-baselines3", "sb3_contrib": "sb3-contrib"}
PATIENCE_S = 300.0
MOST_NUMBERS = 3_000_000
"""Of a recording, which `read_npz` has room for."""
LAST = 4096
"""Bytes of what the process said that are read, for its last line."""
LONGEST_LINE = 300


class Draw(NamedTuple):
    """How much is drawn, and from what."""

    steps: int
    environments: int
    seed: int


class Recording(NamedTuple):
    """By step and environment, `[T, B, ...]`: what went in, then what the trainer made of it.

    `log_prob` are those of all choices side by side; `states` by the spec's names, after the step.
    """

    observation: Tensor
    action_mask: Tensor
    episode_start: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    states: dict[str, Tensor]


def record(
    model: bytes,
    statistics: bytes | None,
    spec: SB3Spec,
    draw: Draw,
    *,
    patience_s: float = PATIENCE_S,
) -> Recording:
    """Runs the pickles in both. ArtifactError where that fails, or gives something else."""
    numbers = draw.steps * draw.environments * sum(map(math.prod, _shapes(spec).values()))
    if numbers > MOST_NUMBERS:
        raise ArtifactError(
            f"{draw.steps} steps of {draw.environments} environments are {numbers:,} numbers, and "
            f"{MOST_NUMBERS:,} are recorded at most; give fewer --steps or --environments"
        )
    module, algorithm = ALGORITHMS[spec.name]
    with tempfile.TemporaryDirectory(prefix="crosscheck-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        files = {"--model": directory / "model.zip"}
        files["--model"].write_bytes(model)
        if statistics is not None:
            files["--statistics"] = directory / "statistics.pkl"
            files["--statistics"].write_bytes(statistics)
        files["--record"] = directory / "record.npz"
        options: dict[str, object] = {"--module": module, "--algorithm": algorithm, **files}
        options |= {f"--{field}": value for field, value in draw._asdict().items()}
        _run(options, directory, patience_s)
        return _read(files["--record"], spec, draw)


def _run(options: Mapping[str, object], directory: Path, patience_s: float) -> None:
    """Nothing of this process but its user: no input, environment, search path or folder."""
    words = [word for option, value in options.items() for word in (option, str(value))]
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(trainer.__file__).resolve()), *words],
            cwd=directory,
            env={"HOME": str(directory), "TMPDIR": str(directory), "MPLBACKEND": "Agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise ArtifactError(
                f"stable_baselines3 took longer than {patience_s:g} s; fewer --steps or "
                "--environments take less"
            ) from None
        finally:  # whatever it started ends with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - LAST))
            raise ArtifactError(_failure(code, stderr.read(LAST)))


def _failure(code: int, errors: bytes) -> str:
    """What to say of a process that ended so."""
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    last = "".join(filter(str.isprintable, lines[-1]))[:LONGEST_LINE] if lines else ""
    for module, package in TRAINERS.items():
        if last == f"ModuleNotFoundError: No module named {module!r}":
            return f"crosscheck takes {module}, which is not installed: pip install {package}"
    if code < 0:
        last = f"signal {-code} ended it"
    return f"stable_baselines3 failed: {last or f'exit code {code}'}"


def _read(path: Path, spec: SB3Spec, draw: Draw) -> Recording:
    if not path.is_file():
        raise ArtifactError("stable_baselines3 ended without an answer")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        arrays = read_npz(content)
    except CheckpointError as error:
        raise ArtifactError(f"what stable_baselines3 gave {error}") from error
    shapes = _shapes(spec)
    expected = {name: (draw.steps, draw.environments, *shape) for name, shape in shapes.items()}
    got = {name: array.shape for name, array in arrays.items()}
    if got != expected:
        wrong = min(name for name in {**got, **expected} if got.get(name) != expected.get(name))
        raise ArtifactError(
            f"what stable_baselines3 gave as {short(wrong)[1:-1]} is {got.get(wrong)}, expected "
            f"{expected.get(wrong)}"
        )
    for name in ("action_mask", "episode_start"):
        if not np.isin(arrays[name], (0, 1)).all():
            raise ArtifactError(f"what stable_baselines3 gave as {name} is not all 0 or 1")
    for name, array in arrays.items():
        if not (np.abs(array) <= np.finfo(np.float32).max).all():
            raise ArtifactError(f"what stable_baselines3 gave as {name} is not finite")
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    heads = torch.split(tensors["action_mask"], list(spec.head_sizes), -1)
    if not all(head.any(-1).all() for head in heads):
        raise ArtifactError("what stable_baselines3 gave as action_mask allows nothing somewhere")
    action = tensors["action"].long()
    if ((action < 0) | (action >= torch.tensor(spec.head_sizes))).any():
        raise ArtifactError("what stable_baselines3 gave as action is outside its heads")
    return Recording(
        observation=tensors["observation"],
        action_mask=tensors["action_mask"].bool(),
        episode_start=tensors["episode_start"].bool(),
        action=action,
        log_prob=tensors["log_prob"],
        value=tensors["value"],
        states={state.name: tensors[state.name] for state in spec.states},
    )


def _shapes(spec: StepSpec) -> dict[str, tuple[int, ...]]:
    """Of one environment's step."""
    return {
        "observation": (spec.observation_dim,),
        "action_mask": (spec.num_choices,),
        "episode_start": (),
        "action": (len(spec.heads),),
        "log_prob": (spec.num_choices,),
        "value": (),
        **{state.name: state.shape for state in spec.states},
    }
