"""One side's answers against a judge's: array by array, decision by decision."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from export.episodes import Moment
from export.float_error import LARGEST_SLACK
from export.judge import Answer, Judge, states_out
from export.manifest import FormatParity


class Tolerance(NamedTuple):
    """How far two sides may be apart: `atol + rtol * |expected|`, and in how many of the free
    decisions, and of the greedy among them.

    An action is within it where the policy's score of it is `atol` short of its best, or less.
    Where floors jump, scores and log-probs have bounds (`export.log_prob_bounds`), not one number.
    float32 has no other limit: where it differs from eager's, the two are a tie to float32.
    """

    atol: float
    rtol: float
    min_greedy_agreement: float


class ParityError(Exception):
    """An exported file does not do what the policy does; the message says where first."""


class ParityRun:
    """What the comparison of one side with a judge adds up to.

    Errors are weighed: `|got - expected| / (1 + rtol / atol * |expected|)`, of which `atol` is the
    limit. Decisions count where they are free: a head that matters, with a choice, and noise as in
    serving, which neither points at one nor is alike for all.
    """

    def __init__(self, judge: Judge, tolerance: Tolerance) -> None:
        self.judge = judge
        self.tolerance = tolerance
        self.rows = 0
        self.free = 0
        self.equal = 0
        self.worse = 0  # by however little: ties are not
        self.greedy_free = 0
        self.greedy_equal = 0
        self.max_error: dict[str, float] = {}
        self.error_by_step: list[float] = []
        self.judged = 0
        self.uncertain = 0
        self._sums: dict[str, Tensor] = {}

    def compare(self, outputs: Mapping[str, Tensor], moment: Moment, answer: Answer) -> None:
        """One moment's rows, value and Q in the network's units. Raises ParityError, at the first
        array beyond the tolerance, naming array, row, expected and got."""
        heads, tolerance, scores = self.judge.heads, self.tolerance, answer.scores
        states = states_out(self.judge.spec, scores.state)
        for (name, expected), slack in zip(states.items(), answer.slack.states, strict=True):
            self._compare(name, outputs[name], expected, moment, slack)
        self.judged += len(outputs["value"])
        self.uncertain += int(answer.slack.is_large(scores.value).sum())
        of_value = 0.0 if answer.slack.value is None else answer.slack.value
        self._compare("value", outputs["value"], scores.value, moment, of_value)
        action = outputs["action"]
        outside = (action < 0) | (action >= torch.tensor(heads.sizes, device=action.device))
        if outside.any():
            self._fault(f"action is outside its head{_where(moment, first(outside)[0])}")
        op = action[..., heads.op_index]
        for name, expected in self.judge.extras(scores, op).items():
            self._compare(name, outputs[name], expected, moment)
        noise = heads.spread(moment.noise)
        best = scores.choices.choose(noise).action
        bounds = self.judge.log_prob_bounds(
            moment, answer, op, atol=tolerance.atol, rtol=tolerance.rtol
        )
        _, allowed = scores.choices.given(op)
        matters = heads.relevant(op)
        short = _short(bounds.lower + noise, bounds.upper + noise, action)
        is_best = short <= tolerance.atol  # False for NaN
        wrong = ~torch.where(matters, is_best, action == heads.forced(allowed))
        if wrong.any():
            row, head = first(wrong)
            self._fault(
                f"action of head {heads.names[head]!r}, row {int(moment.row[row])} is "
                f"{int(action[row, head])}, expected {int(best[row, head])}{_where(moment, row)}"
            )
        log_prob = outputs["log_prob"]
        lower, upper = (heads.log_prob_of(bound, action) for bound in bounds)
        if heads.has_floors:  # which jump: all between is as right
            expected, slack = log_prob.nan_to_num().clamp(lower, upper), torch.zeros(())
        else:
            expected, slack = (lower + upper) / 2, (upper - lower) / 2
            middle = (bounds.lower + bounds.upper) / 2 + noise
            short = _short(middle, middle, action)
        self._compare("log_prob", log_prob, expected, moment, slack)
        uncertain = ~matters & (log_prob != 0)
        if uncertain.any():
            row, head = first(uncertain)
            self._fault(
                f"{_cell('log_prob', moment, (row, head))} is {log_prob[row, head].item():.9g}, "
                f"expected exactly 0: head {heads.names[head]!r} does not matter for its op"
                f"{_where(moment, row)}"
            )
        has_choice = matters & (allowed.sum(-1) > 1)
        self.worse += int((has_choice & (short > 0)).sum())
        self._count(has_choice & moment.is_free[:, None], action == best, moment)

    def finish(self) -> None:
        """Raises ParityError where too few free decisions, or greedy ones, are the policy's own,
        and where no more can be said of most rows than that they may be anything."""
        self._refuse_chaos()
        least = self.tolerance.min_greedy_agreement
        for share, which in (
            (self.greedy_agreement, "free greedy decisions"),
            (self.action_agreement, "free decisions"),
        ):
            if share < least:
                raise ParityError(
                    f"{share:.3%} of the {which} are the policy's own, at least {least:.1%} must be"
                )

    @property
    def action_agreement(self) -> float:
        return self.equal / max(self.free, 1)

    @property
    def greedy_agreement(self) -> float:
        return self.greedy_equal / max(self.greedy_free, 1)

    def mean_error(self, name: str) -> Tensor:
        """Of an output, signed, by column: float64 `[columns]`, a value's one."""
        return self._sums[name][0] / self.rows

    def mean_distance(self, name: str) -> Tensor:
        """The same of its absolute."""
        return self._sums[name][1] / self.rows

    def summary(self) -> FormatParity:
        return FormatParity(
            rows=self.rows,
            action_agreement=self.action_agreement,
            greedy_agreement=self.greedy_agreement,
            max_error=self.max_error,
        )

    def _fault(self, sentence: str) -> None:
        self._refuse_chaos()
        raise ParityError(sentence)

    def _refuse_chaos(self) -> None:
        if self.tolerance.atol < LARGEST_SLACK and self.uncertain > self.judged / 2:
            raise ParityError(
                f"rounding in float32 alone moves most of the policy's answers by more than "
                f"{LARGEST_SLACK:g}, as in a chaotic network; no artifact can be told from another"
            )

    def _compare(
        self,
        name: str,
        got: Tensor,
        expected: Tensor,
        moment: Moment,
        slack: Tensor | float = 0.0,
    ) -> None:
        tolerance = self.tolerance
        allowed = tolerance.atol + tolerance.rtol * expected.abs() + slack
        error = (got - expected) * (tolerance.atol / allowed)
        beyond = ~(error.abs() <= tolerance.atol)  # True for NaN
        if beyond.any():
            index = first(beyond)
            self._fault(
                f"{_cell(name, moment, index)} is {got[index].item():.9g}, expected "
                f"{expected[index].item():.9g}{_where(moment, index[0])}"
            )
        largest = error.abs().max().item()
        self.max_error[name] = max(self.max_error.get(name, 0.0), largest)
        while len(self.error_by_step) <= moment.number:
            self.error_by_step.append(0.0)
        self.error_by_step[moment.number] = max(self.error_by_step[moment.number], largest)
        by_row = error.double().view(len(error), -1)
        sums = torch.stack([by_row.sum(0), by_row.abs().sum(0)]).cpu()
        self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums

    def _count(self, free: Tensor, equal: Tensor, moment: Moment) -> None:
        greedy = free & moment.is_greedy[:, None]
        self.rows += len(equal)
        self.free += int(free.sum())
        self.equal += int((free & equal).sum())
        self.greedy_free += int(greedy.sum())
        self.greedy_equal += int((greedy & equal).sum())


def _short(best: Tensor, taken: Tensor, action: Tensor) -> Tensor:
    """By how much the score of what was taken is less than the best, `[rows, heads]`."""
    return best.amax(-1) - taken.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def _cell(name: str, moment: Moment, index: tuple[int, ...]) -> str:
    """An output's cell as the message has it: by the row's own number."""
    return f"{name}[{', '.join(map(str, (int(moment.row[index[0]]), *index[1:])))}]"


def _where(moment: Moment, row: int) -> str:
    return f" (batch size {int(moment.batch_size[row])}, step {moment.number})"


def first(wrong: Tensor) -> tuple[int, ...]:
    """The index of the first that is."""
    return tuple(wrong.nonzero()[0].tolist())
