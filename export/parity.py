"""Does an exported file do what the policy does? The gate every format must pass.

Both sides run the same carried episodes (`export.episodes`), each on its own state. The policy is
the judge of every decision: an artifact's action is right where the policy scores it as high as its
own best, so that two choices closer than the tolerance are a tie, not a fault.

A bf16 artifact is compared with the policy in bf16, near bf16's rounding. How far bf16 itself is
from float32 is another question, of the weights and not of the artifact: it is measured apart, over
the same episodes, and bounded.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from export.carried_step import CarriedStep, StepFault
from export.episodes import ROWS, EpisodeMaker, Moment
from export.judge import CarriedJudge, Judge, scaled
from export.loaders.protocol import LoadedStep
from export.manifest import FormatParity, Parity, Precision, PrecisionLoss
from model.policy import Scores
from model.spec import PolicySpec


class Tolerance(NamedTuple):
    """How far two sides may be apart: `atol + rtol * |expected|`, and in how many free greedy
    decisions.

    An action is within it where the policy's score of it is `atol` short of its best, or less.
    Where floors jump, scores and log-probs have bounds (`export.floor_bounds`), not one number.
    float32 has no other limit: where it differs from eager's, the two are a tie to float32.
    """

    atol: float
    rtol: float
    min_greedy_agreement: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=2e-5, rtol=1e-5, min_greedy_agreement=0.0),
    "bf16": Tolerance(atol=0.05, rtol=0.02, min_greedy_agreement=0.99),
}
PRECISION_LOSS = Tolerance(atol=0.1, rtol=0.02, min_greedy_agreement=0.98)
LARGEST_MEAN_LOSS = 0.02
"""In the mean over all rows, of any output."""
LARGEST_SHARE_OF_LOSS = 0.25
"""A bf16 artifact is, in the mean, this much closer to bf16 than bf16 is to float32."""
SMALLEST_DISTANCE = 1e-7
"""In the mean, of arrays that bf16 leaves as they are."""


class ParityError(Exception):
    """An exported file does not do what the policy does; the message says where first."""


class ParityRun:
    """What the comparison of one side with a judge adds up to.

    Errors are weighed: `|got - expected| / (1 + rtol / atol * |expected|)`, of which `atol` is the
    limit. Decisions count where they are free: a head that matters, with a choice, and no noise
    that points at one.
    """

    def __init__(self, judge: Judge, tolerance: Tolerance) -> None:
        self.judge = judge
        self.tolerance = tolerance
        self.rows = 0
        self.free = 0
        self.equal = 0
        self.greedy_free = 0
        self.greedy_equal = 0
        self.max_error: dict[str, float] = {}
        self.error_by_step: list[float] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def compare(self, outputs: Mapping[str, Tensor], moment: Moment, scores: Scores) -> None:
        """One moment's rows, value and Q in the network's units. Raises ParityError, at the first
        array beyond the tolerance, naming array, row, expected and got."""
        heads, tolerance = self.judge.heads, self.tolerance
        for name, expected in (
            ("state_h_out", scores.state[0]),
            ("state_c_out", scores.state[1]),
            ("value", scores.value),
        ):
            self._compare(name, outputs[name], expected, moment)
        action = outputs["action"]
        outside = (action < 0) | (action >= torch.tensor(heads.sizes, device=action.device))
        if outside.any():
            self._fault(f"action is outside its head{_where(moment, _first(outside)[0])}")
        op = action[..., heads.op_index]
        for name, expected in self.judge.extra(scores, op).items():
            self._compare(name, outputs[name], expected, moment)
        noise = heads.spread(moment.noise)
        best = scores.choices.choose(noise).action
        lower, upper = self.judge.log_prob_bounds(
            moment, scores, op, atol=tolerance.atol, rtol=tolerance.rtol
        )
        _, allowed = scores.choices.given(op)
        matters = heads.relevant(op)
        taken = (upper + noise).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        is_best = (lower + noise).amax(-1) - taken <= tolerance.atol  # False for NaN
        wrong = ~torch.where(matters, is_best, action == heads.forced(allowed))
        if wrong.any():
            row, head = _first(wrong)
            self._fault(
                f"action of head {heads.names[head]!r}, row {row} is {int(action[row, head])}, "
                f"expected {int(best[row, head])}{_where(moment, row)}"
            )
        log_prob = outputs["log_prob"]
        bounds = [heads.log_prob_of(bound, action) for bound in (lower, upper)]
        self._compare("log_prob", log_prob, log_prob.nan_to_num().clamp(*bounds), moment)
        uncertain = ~matters & (log_prob != 0)
        if uncertain.any():
            row, head = _first(uncertain)
            self._fault(
                f"log_prob[{row}, {head}] is {log_prob[row, head].item():.9g}, expected exactly 0: "
                f"head {heads.names[head]!r} does not matter for its op{_where(moment, row)}"
            )
        self._count(action == best, matters & (allowed.sum(-1) > 1), moment)

    def finish(self) -> None:
        """Raises ParityError where too few free greedy decisions are the policy's own."""
        least = self.tolerance.min_greedy_agreement
        if self.greedy_agreement < least:
            raise ParityError(
                f"{self.greedy_agreement:.3%} of the free greedy decisions are the policy's own, "
                f"at least {least:.1%} must be"
            )

    @property
    def greedy_agreement(self) -> float:
        return self.greedy_equal / max(self.greedy_free, 1)

    @property
    def mean_error(self) -> dict[str, float]:
        """Signed, by output."""
        return {name: float(sums[0]) / self._counts[name] for name, sums in self._sums.items()}

    @property
    def mean_distance(self) -> dict[str, float]:
        """Absolute, by output."""
        return {name: float(sums[1]) / self._counts[name] for name, sums in self._sums.items()}

    def check_distance(self, loss: "PrecisionLossRun", share: float) -> None:
        """Raises ParityError where an output is off, in the mean, by that `share` of `loss`."""
        for name, most in loss.mean_distance.items():
            mean = self.mean_distance[name]
            if mean > share * most + SMALLEST_DISTANCE:
                raise ParityError(
                    f"{name} is {mean:.3g} off in the mean, and bf16 from float32 {most:.3g}: at "
                    f"most {share:.0%} of that is rounding"
                )

    def summary(self) -> FormatParity:
        return FormatParity(
            rows=self.rows,
            action_agreement=self.equal / max(self.free, 1),
            greedy_agreement=self.greedy_agreement,
            max_error=self.max_error,
        )

    def _fault(self, sentence: str) -> None:
        raise ParityError(sentence)

    def _compare(self, name: str, got: Tensor, expected: Tensor, moment: Moment) -> None:
        tolerance = self.tolerance
        error = (got - expected) / (1.0 + tolerance.rtol / tolerance.atol * expected.abs())
        beyond = ~(error.abs() <= tolerance.atol)  # True for NaN
        if beyond.any():
            index = _first(beyond)
            self._fault(
                f"{name}[{', '.join(map(str, index))}] is {got[index].item():.9g}, expected "
                f"{expected[index].item():.9g}{_where(moment, index[0])}"
            )
        largest = error.abs().max().item()
        self.max_error[name] = max(self.max_error.get(name, 0.0), largest)
        while len(self.error_by_step) <= moment.number:
            self.error_by_step.append(0.0)
        self.error_by_step[moment.number] = max(self.error_by_step[moment.number], largest)
        sums = torch.stack([error.double().sum(), error.double().abs().sum()]).cpu()
        self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums
        self._counts[name] = self._counts.get(name, 0) + error.numel()

    def _count(self, equal: Tensor, has_choice: Tensor, moment: Moment) -> None:
        free = has_choice & moment.is_free[:, None]
        greedy = free & moment.is_greedy[:, None]
        self.rows += len(equal)
        self.free += int(free.sum())
        self.equal += int((free & equal).sum())
        self.greedy_free += int(greedy.sum())
        self.greedy_equal += int((greedy & equal).sum())


class PrecisionLossRun(ParityRun):
    """How far the policy in bf16 is from itself in float32: what is far off counts, and is no
    fault, since states and observations beyond any policy's are among the rows."""

    def finish(self) -> None:
        """Raises ParityError where bf16 is not for this policy: its answers are others."""
        super().finish()
        for name, mean in self.mean_distance.items():
            if mean > LARGEST_MEAN_LOSS:
                raise ParityError(
                    f"{name} is {mean:.3g} off in the mean, and at most {LARGEST_MEAN_LOSS:g} is "
                    "rounding"
                )

    def record(self) -> PrecisionLoss:
        return PrecisionLoss(**self.summary().model_dump(), mean_error=self.mean_error)

    def _fault(self, sentence: str) -> None:
        pass


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
        spec: PolicySpec,
        *,
        precision: Precision,
        max_batch_size: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.precision = precision
        self.max_batch_size = max_batch_size
        self.tolerance = TOLERANCES[precision]
        self.exact = Judge(weights, spec, "fp32", device)
        self.judge = self.exact
        if precision != "fp32":
            self.judge = Judge(weights, spec, precision, device)

    def check(self, steps: Mapping[str, LoadedStep]) -> Verdict:
        """Runs every step through the same episodes, each on its own states.

        Raises ParityError at the first difference, naming step, array, row, expected and got.
        """
        maker = EpisodeMaker(self.exact.rebuilt, self.max_batch_size)
        runs = {name: ParityRun(self.judge, self.tolerance) for name in steps}
        loss = PrecisionLossRun(self.exact, PRECISION_LOSS)
        seconds = dict.fromkeys(steps, 0.0)
        with torch.inference_mode():
            for episode in maker.episodes:
                num_rows, largest = episode.num_rows, max(episode.sizes)
                carried = {
                    name: CarriedStep(step, self.spec, num_rows=num_rows, largest=largest)
                    for name, step in steps.items()
                }
                judge = CarriedJudge(self.judge, num_rows)
                exact = CarriedJudge(self.exact, num_rows)
                for moment in maker.moments(episode):
                    outputs = {}
                    for name, step in carried.items():
                        with _told_of(name, seconds):
                            outputs[name] = scaled(step.run(moment), self.spec)
                    for part in _parts(moment):
                        on_device = part.to(self.judge.device)
                        scores = judge.scores(on_device)
                        for name, run in runs.items():
                            with _told_of(name, seconds):
                                rows = _rows(outputs[name], part.row, self.judge.device)
                                run.compare(rows, on_device, scores)
                        if self.precision != "fp32":
                            with _told_of(self.precision):
                                rows = self.judge.outputs(on_device, scores)
                                loss.compare(rows, on_device, exact.scores(on_device))
        return self._verdict(maker, runs, loss, seconds)

    def _verdict(
        self,
        maker: EpisodeMaker,
        runs: dict[str, ParityRun],
        loss: PrecisionLossRun,
        seconds: dict[str, float],
    ) -> Verdict:
        if self.precision != "fp32":
            with _told_of(self.precision):
                loss.finish()
        for name, run in runs.items():
            with _told_of(name):
                run.finish()
                if self.precision != "fp32":
                    run.check_distance(loss, LARGEST_SHARE_OF_LOSS)
        parity = Parity(
            **self.tolerance._asdict(),
            batch_sizes=maker.batch_sizes,
            steps=max(len(run.error_by_step) for run in runs.values()),
            formats={name: run.summary() for name, run in runs.items()},
            precision_loss=None if self.precision == "fp32" else loss.record(),
        )
        return Verdict(runs, seconds, parity)


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


def _parts(moment: Moment) -> Iterator[Moment]:
    """As many rows at a time as a judge's memory is meant for."""
    for start in range(0, len(moment.row), ROWS):
        yield moment.part(slice(start, start + ROWS))


def _rows(outputs: Mapping[str, Tensor], rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    return {name: output[rows].to(device) for name, output in outputs.items()}


def _where(moment: Moment, row: int) -> str:
    return f" (batch size {int(moment.batch_size[row])}, step {moment.number})"


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())
