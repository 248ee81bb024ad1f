"""An artifact's steps beside what its trainer's own code made of the same observations.

Each environment is stepped once as it is and once for each choice, which noise then points at: so
the log-prob of every choice shows, of each head at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from export.carried_step import CarriedStep, StepFault
from export.comparison import ParityError, ParityRun, Tolerance, first
from export.crosscheck.recording import Recording
from export.episodes import LIFT, Moment
from export.judge import Answer, Judge
from export.loaders.protocol import LoadedStep
from export.manifest import FormatParity
from model.actor_critic import Scores
from model.recurrence import State

TOLERANCE = Tolerance(atol=1e-5, rtol=1e-5, min_greedy_agreement=0.0)
"""Beside what float32 explains, in the policy of the artifact's own weights."""


class Expected(NamedTuple):
    """One step of all rows, what the trainer makes of it, and its own actions `[rows, heads]`."""

    moment: Moment
    answer: Answer
    action: Tensor


def compare(
    steps: Mapping[str, LoadedStep], recording: Recording, judge: Judge, max_batch_size: int
) -> dict[str, FormatParity]:
    """By format, how close each comes, carrying its own states.

    Raises ParityError at the first difference, naming format, array, row, expected, got and step.
    """
    copies = 1 + judge.heads.width
    num_rows = recording.observation.shape[1] * copies
    batches = list(torch.split(torch.arange(num_rows), max_batch_size))
    expected = list(_expected(recording, judge, copies, batches))
    parity = {}
    for name, step in steps.items():
        run = ParityRun(judge, TOLERANCE)
        carried = CarriedStep(
            step, judge.spec, num_rows=num_rows, largest=min(max_batch_size, num_rows)
        )
        with _told_of(name):
            for of in expected:
                outputs = carried.run(of.moment)
                run.compare(outputs, of.moment, of.answer)
                _check_actions(outputs["action"], of)
            run.finish()
        parity[name] = run.summary()
    return parity


def _expected(
    recording: Recording, judge: Judge, copies: int, batches: Sequence[Tensor]
) -> Iterator[Expected]:
    steps, environments = recording.episode_start.shape
    row = torch.arange(environments).repeat_interleave(copies)
    batch_size = torch.cat([torch.full_like(rows, len(rows)) for rows in batches])
    noise, is_greedy = _noise(judge, environments)
    zeros = judge.initial_state(environments)
    state, error = zeros, zeros
    for number in range(steps):
        starts = recording.episode_start[number][:, None, None]
        state, error = (
            tuple(torch.where(starts, 0.0, array) for array in arrays) for arrays in (state, error)
        )
        observation = recording.observation[number]
        slack = judge.float_error(observation, state, error)
        state = tuple(array[number] for array in recording.states.values())
        error = slack.states
        mask = recording.action_mask[number]
        moment = Moment(
            number=number,
            row=row,
            batch_size=batch_size,
            batches=list(batches),
            observation=observation[row],
            action_mask=mask[row],
            noise=noise,
            blueprint_index=None,
            slot_by_op_mask=None,
            begins=recording.episode_start[number][row],
            begin_state=_rows(zeros, row),
            is_free=is_greedy,
            is_greedy=is_greedy,
        )
        log_probs, allowed = (judge.heads.spread(of) for of in (recording.log_prob[number], mask))
        scores = Scores(
            judge.heads.choices(log_probs[row], allowed[row], None),
            recording.value[number][row],
            _rows(state, row),
            observation[row],
        )
        slack = slack._replace(
            states=_rows(error, row),
            logits=None if slack.logits is None else slack.logits[row],
            value=None if slack.value is None else slack.value[row],
        )
        yield Expected(moment, Answer(scores, slack), recording.action[number][row])


def _noise(judge: Judge, environments: int) -> tuple[Tensor, Tensor]:
    """Of each environment's copies: none, then what points at one choice. And which have none."""
    pointed = [torch.eye(judge.heads.width)[:, :size] for size in judge.heads.sizes]
    noise = torch.cat([torch.zeros(1, sum(judge.heads.sizes)), LIFT * torch.cat(pointed, dim=1)])
    is_greedy = torch.arange(len(noise)) == 0
    return noise.repeat(environments, 1), is_greedy.repeat(environments)


def _check_actions(action: Tensor, expected: Expected) -> None:
    """The most likely, as predict() has them: the trainer's score of both is the same."""
    moment, choices = expected.moment, expected.answer.scores.choices
    both = torch.stack([action, expected.action], dim=-1)
    got, wanted = choices.log_probs.gather(-1, both).unbind(-1)
    is_tie = (got - wanted).abs() <= TOLERANCE.atol
    wrong = moment.is_greedy[:, None] & (action != expected.action) & ~is_tie
    if wrong.any():
        row, head = first(wrong)
        raise ParityError(
            f"action of head {choices.heads.names[head]!r}, row {int(moment.row[row])} is "
            f"{int(action[row, head])}, and predict() takes {int(expected.action[row, head])} "
            f"(step {moment.number})"
        )


def _rows(state: State, row: Tensor) -> State:
    return tuple(array[row] for array in state)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except (ParityError, StepFault) as error:
        raise ParityError(f"{name} does not do what stable_baselines3 does: {error}") from error
