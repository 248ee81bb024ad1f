"""What bf16 explains of a difference: the orders of its sums, and what it loses against float32.

Two right bf16 steps differ where sums in another order round to the neighbouring number; that is
rare and small, and in the mean over all rows next to nothing. So a bf16 artifact is held to a small
multiple of it in every column, where a tolerance for the largest difference would let a forgotten
bias pass. What bf16 loses against float32 is the weights' own, and bounded apart.
"""

from export.comparison import ParityError, ParityRun, Tolerance, first
from export.episodes import Moment
from export.judge import Answer, CarriedJudge, Judge
from export.manifest import PrecisionLoss
from export.rounded_policy import BackwardLinear
from model.step_spec import StepSpec

PRECISION_LOSS = Tolerance(atol=0.1, rtol=0.02, min_greedy_agreement=0.98)
LARGEST_MEAN_LOSS = 0.02
"""In the mean over all rows, of any output."""
MEAN_MARGIN = 4.0
"""How much further off, in the mean, a bf16 artifact may be than sums in another order are; and in
how many more decisions."""
FEW = 8
"""Decisions, of thousands, that any two right steps may differ in."""
SHARES_OF_LOSS = (0.01, 0.25)
"""Whatever the orders say, it is that much closer to bf16 than bf16 is to float32: no more need be
shown than the first, and no less will do than the second."""
EARLY_ROWS = 2048
EARLY_MARGIN = 4.0
"""Times the margin: what is far beyond it so soon need not be run to the end."""
SMALLEST_DISTANCE = 1e-7
"""In the mean, of arrays that bf16 leaves as they are."""


class PrecisionLossRun(ParityRun):
    """How far the policy in bf16 is from itself in float32: what is far off counts, and is no
    fault, since states and observations beyond any policy's are among the rows."""

    def finish(self) -> None:
        """Raises ParityError where bf16 is not for this policy: its answers are others."""
        super().finish()
        for name in self.max_error:
            mean = float(self.mean_distance(name).mean())
            if mean > LARGEST_MEAN_LOSS:
                raise ParityError(
                    f"{name} is {mean:.3g} off in the mean, and at most {LARGEST_MEAN_LOSS:g} is "
                    "rounding"
                )

    def record(self) -> PrecisionLoss:
        mean_error = {name: float(self.mean_error(name).mean()) for name in self.max_error}
        return PrecisionLoss(**self.summary().model_dump(), mean_error=mean_error)

    def _fault(self, sentence: str) -> None:
        pass


class Rounding:
    """Two more judges beside the one in bf16, run through the same episodes."""

    def __init__(
        self, weights: bytes, spec: StepSpec, judge: Judge, exact: Judge, tolerance: Tolerance
    ) -> None:
        self._judge = judge
        self._exact = exact
        self._backward = Judge(weights, spec, judge.device, linear=BackwardLinear)
        self.order = ParityRun(judge, tolerance)
        self.loss = PrecisionLossRun(exact, PRECISION_LOSS)

    def begin(self, num_rows: int) -> None:
        """An episode of so many rows."""
        self._states = CarriedJudge(self._exact, num_rows), CarriedJudge(self._backward, num_rows)

    def compare(self, part: Moment, answer: Answer) -> None:
        """The same rows, as the judge in bf16 answers them."""
        exact, backward = self._states
        self.loss.compare(self._judge.outputs(part, answer.scores), part, exact.answer(part))
        other = self._backward.outputs(part, backward.answer(part).scores)
        self.order.compare(other, part, answer)

    def check(self, run: ParityRun) -> None:
        """Raises ParityError where rounding does not explain how many decisions are others, or how
        far a column is off in the mean."""
        most = MEAN_MARGIN * self.order.worse + FEW
        if run.worse > most:
            raise ParityError(
                f"{run.worse} decisions are worse than the policy's own, and at most {most:.0f} of "
                "them are bf16's rounding"
            )
        self._check(run, 1.0)

    def check_early(self, run: ParityRun) -> None:
        """The columns alone, with a wider margin, while there are few rows."""
        if EARLY_ROWS <= run.rows < 2 * EARLY_ROWS:
            self._check(run, EARLY_MARGIN)

    def _check(self, run: ParityRun, margin: float) -> None:
        least, most = SHARES_OF_LOSS
        for name in run.max_error:
            distance = run.mean_distance(name)
            by_order = self.order.mean_distance(name)
            # Of thousands of columns some differ by chance; the mean of all is what is known well.
            by_order = MEAN_MARGIN * (by_order + by_order.mean())
            by_loss = self.loss.mean_distance(name)
            limit = by_order.clamp(least * by_loss, most * by_loss) + SMALLEST_DISTANCE
            limit = margin * limit
            beyond = distance > limit
            if beyond.any():
                (column,) = first(beyond)
                raise ParityError(
                    f"{name}'s column {column} is {float(distance[column]):.3g} off in the mean, "
                    f"and at most {float(limit[column]):.3g} of it is bf16's rounding"
                )
