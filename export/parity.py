"""Does an exported file do what the policy does? The gate every format must pass.

Both sides run the same carried episodes (`export.episodes`), each on its own state. The policy is
the judge of every decision: an artifact's action is right where the policy scores it as high as its
own best, so that two choices closer than the tolerance are a tie, not a fault.

A bf16 artifact is compared with the policy in bf16, near bf16's rounding (`export.rounding`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from export.carried_step import CarriedStep, StepFault
from export.comparison import ParityError, ParityRun, Tolerance
from export.episodes import ROWS, Episode, EpisodeMaker, Moment
from export.judge import CarriedJudge, Judge, scaled
from export.loaders.protocol import LoadedStep
from export.manifest import Parity, Precision
from export.rounded_policy import RoundedLinear
from export.rounding import Rounding
from model.step_spec import StepSpec

TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=2e-5, rtol=1e-5, min_greedy_agreement=0.0),
    "bf16": Tolerance(atol=0.1, rtol=0.02, min_greedy_agreement=0.998),
}


class Verdict(NamedTuple):
    """Every step passed: how close each came, what judging it took, and what bf16 costs."""

    runs: dict[str, ParityRun]
    seconds: dict[str, float]
    parity: Parity


class Gate:
    """Compares steps with one policy, rebuilt from its weights: nothing is shared with them.

    `judge` is what they are compared with, and `exact` the policy in float32: the same, but for
    bf16.
    """

    def __init__(
        self,
        weights: bytes,
        spec: StepSpec,
        *,
        precision: Precision,
        max_batch_size: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.precision = precision
        self.max_batch_size = max_batch_size
        self.exact = Judge(weights, spec, device)
        self.judge = self.exact
        if precision == "bf16":
            self.judge = Judge(weights, spec, device, linear=RoundedLinear)
        self._weights = weights

    def check(self, steps: Mapping[str, LoadedStep]) -> Verdict:
        """Runs every step through the same episodes, each on its own states.

        Raises ParityError at the first difference, naming step, array, row, expected and got.
        """
        tolerance = TOLERANCES[self.precision]
        rounding = None
        if self.precision == "bf16":
            rounding = Rounding(self._weights, self.spec, self.judge, self.exact, tolerance)
        maker = EpisodeMaker(self.exact.rebuilt, self.max_batch_size)
        runs = {name: ParityRun(self.judge, tolerance) for name in steps}
        seconds = dict.fromkeys(steps, 0.0)
        with torch.inference_mode():
            for episode in maker.episodes:
                self._run(maker, episode, steps, runs, rounding, seconds)
        for name, run in runs.items():
            with _told_of(name):
                run.finish()
                if rounding is not None:
                    rounding.check(run)
        if rounding is not None:
            with _told_of(self.precision):
                rounding.loss.finish()
        parity = Parity(
            **tolerance._asdict(),
            batch_sizes=maker.batch_sizes,
            steps=max(len(run.error_by_step) for run in runs.values()),
            formats={name: run.summary() for name, run in runs.items()},
            precision_loss=None if rounding is None else rounding.loss.record(),
        )
        return Verdict(runs, seconds, parity)

    def _run(
        self,
        maker: EpisodeMaker,
        episode: Episode,
        steps: Mapping[str, LoadedStep],
        runs: Mapping[str, ParityRun],
        rounding: Rounding | None,
        seconds: dict[str, float],
    ) -> None:
        num_rows, largest = episode.num_rows, max(episode.sizes)
        carried = {
            name: CarriedStep(step, self.spec, num_rows=num_rows, largest=largest)
            for name, step in steps.items()
        }
        judge = CarriedJudge(self.judge, num_rows)
        if rounding is not None:
            rounding.begin(num_rows)
        for moment in maker.moments(episode):
            outputs = {}
            for name, step in carried.items():
                with _told_of(name, seconds):
                    outputs[name] = scaled(step.run(moment), self.spec)
            for part in _parts(moment, self.judge.device):
                answer = judge.answer(part)
                for name, run in runs.items():
                    with _told_of(name, seconds):
                        run.compare(_rows(outputs[name], part), part, answer)
                if rounding is not None:
                    rounding.compare(part, answer)
            if rounding is not None:
                for name, run in runs.items():
                    with _told_of(name):
                        rounding.check_early(run)


@contextmanager
def _told_of(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Errors inside name the side they are of, and its seconds are counted."""
    start = time.perf_counter()
    try:
        yield
    except (ParityError, StepFault) as error:
        raise ParityError(f"{name} differs from the policy: {error}") from error
    finally:
        if seconds is not None:
            seconds[name] += time.perf_counter() - start


def _parts(moment: Moment, device: torch.device) -> Iterator[Moment]:
    """As many rows at a time as a judge's memory is meant for, where it is."""
    for start in range(0, len(moment.row), ROWS):
        yield moment.part(slice(start, start + ROWS)).to(device)


def _rows(outputs: Mapping[str, Tensor], part: Moment) -> dict[str, Tensor]:
    """A step's outputs of these rows, where the judge is."""
    rows = part.row.to("cpu")
    return {name: output[rows].to(part.row.device) for name, output in outputs.items()}
