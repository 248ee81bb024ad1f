"""The eager policy as the judge of an artifact: rebuilt from its weights, sharing nothing else."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from export.episodes import Moment
from export.families import family_of
from export.float_error import Slack
from export.log_prob_bounds import LogProbBounds, floor_bounds, logit_bounds
from export.manifest import Precision
from export.rounded_policy import RoundedLinear, round_products
from export.weights import RebuiltPolicy, rebuild
from model.actor_critic import ActorCritic, Scores
from model.heads import HeadTable
from model.recurrence import State
from model.step_spec import SLOT_BY_OP, StepSpec


class Judge:
    """One policy's answers, on one device: in float32, or with its products rounded to bf16."""

    def __init__(
        self,
        weights: bytes,
        spec: StepSpec,
        device: torch.device,
        *,
        linear: type[RoundedLinear] | None = None,
    ) -> None:
        self.rebuilt: RebuiltPolicy = rebuild(weights, spec, device)
        self.policy: ActorCritic = self.rebuilt.policy
        self.normalizer = self.rebuilt.normalizer
        precision: Precision = "fp32" if linear is None else "bf16"
        self.float_error = family_of(spec).float_error(*self.rebuilt, precision)
        if linear is not None:
            round_products(self.policy, linear)
        self.spec = spec
        self.device = device
        self.heads: HeadTable = self.policy.heads
        self._without_floors = HeadTable(spec.with_probability_floors({})).to(device)

    def initial_state(self, num_rows: int) -> State:
        return self.policy.initial_state(num_rows)

    def scores(self, moment: Moment, state: State) -> Scores:
        """What the policy makes of a moment, from `state`; both are on the device."""
        observation = moment.observation
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        return self.policy.step_scores(
            observation,
            state,
            moment.masks(self.heads),
            blueprint_index=moment.blueprint_index,
        )

    def outputs(self, moment: Moment, scores: Scores) -> dict[str, Tensor]:
        """The policy's own answer, by the manifest's names; the value in the network's units."""
        decision = scores.choices.choose(self.heads.spread(moment.noise))
        op = decision.action[..., self.heads.op_index]
        return {
            "action": decision.action,
            "log_prob": decision.log_prob,
            "value": scores.value,
            **states_out(self.spec, scores.state),
            **self.extras(scores, op),
        }

    def extras(self, scores: Scores, op: Tensor) -> dict[str, Tensor]:
        """What the critic says beyond the value, of the op that was taken."""
        names = self.spec.extra_outputs
        return {name: self.policy.extra_output(name, scores.output, op) for name in names}

    def log_prob_bounds(
        self, moment: Moment, answer: "Answer", op: Tensor, *, atol: float, rtol: float
    ) -> LogProbBounds:
        """What each choice's log-prob may be, given `op`: one number, but for floors' jumps, and
        what the logits may be off."""
        choices = answer.scores.choices
        if not self.heads.has_floors:
            log_probs, allowed = choices.given(op)
            if answer.slack.logits is None:
                return LogProbBounds(log_probs, log_probs)
            return logit_bounds(log_probs, allowed, self.heads.spread(answer.slack.logits))
        slot_by_op = moment.masks(self.heads).get(SLOT_BY_OP)
        plain = self._without_floors.choices(choices.logits, choices.allowed, slot_by_op)
        log_probs, allowed = plain.given(op)
        return floor_bounds(log_probs, allowed, self.heads.floor, atol + rtol * log_probs.abs())


def scaled(outputs: Mapping[str, Tensor], spec: StepSpec) -> dict[str, Tensor]:
    """Outputs with value and Q in the network's own units: rounding grows with their scale."""
    in_returns = {"value", "q_value"}
    return {
        name: output / spec.value_scale if name in in_returns else output
        for name, output in outputs.items()
    }


def states_out(spec: StepSpec, state: State) -> dict[str, Tensor]:
    """By the names of the step's outputs."""
    return {of.output: array for of, array in zip(spec.states, state, strict=True)}


class Answer(NamedTuple):
    """What a judge makes of some rows, and what float32 may have moved of it."""

    scores: Scores
    slack: Slack


class CarriedJudge:
    """A judge's own run of an episode: its answers, row by row, each from the row's own state."""

    def __init__(self, judge: Judge, num_rows: int) -> None:
        self._judge = judge
        self._state = judge.initial_state(num_rows)
        self._error = judge.initial_state(num_rows)

    def answer(self, part: Moment) -> Answer:
        """What the policy makes of these rows, whose states move on."""
        rows = part.row
        state = part.restarted(tuple(array[rows] for array in self._state))
        error = part.exact_where_begun(tuple(array[rows] for array in self._error))
        scores = self._judge.scores(part, state)
        slack = self._judge.float_error(part.observation, state, error)
        for carried, new in ((self._state, scores.state), (self._error, slack.states)):
            for array, of_rows in zip(carried, new, strict=True):
                array[rows] = of_rows
        return Answer(scores, slack)
