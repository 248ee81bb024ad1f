"""An artifact's steps beside what its trainer's own code made of the same observations.

Each environment is stepped as it is, and beside it in copies whose noise points at one choice of
each head, another in every copy: so the log-probs of all of them show.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from export.carried_step import CarriedStep, StepFault
from export.comparison import ParityError, ParityRun, Tolerance, first
from export.crosscheck.recording import Recording
from export.episodes import LIFT, Moment
from export.float_error import Slack
from export.judge import Answer, Judge
from export.loaders.protocol import LoadedStep
from export.manifest import FormatParity
from model.actor_critic import Scores
from model.recurrence import State

TOLERANCE = Tolerance(atol=1e-5, rtol=1e-5, min_greedy_agreement=0.0)
"""Beside what float32 explains, in the policy of the artifact's own weights."""


MOST_COPIES = 256
"""Of an environment; where a head has more choices, later steps see the others."""


def compare(
    steps: Mapping[str, LoadedStep], recording: Recording, judge: Judge, max_batch_size: int
) -> dict[str, FormatParity]:
    """By format, how close each comes, carrying its own states.

    Raises ParityError at the first difference, naming format, array, row, expected, got and step,
    and where the trainer's `predict()` does not take what it says is most likely.
    """
    environments = recording.observation.shape[1]
    _check_predicted(recording, judge)
    num_rows = environments * (1 + min(judge.heads.width, MOST_COPIES))
    largest = min(max_batch_size, num_rows)
    parity = {}
    for name, step in steps.items():
        run = ParityRun(judge, TOLERANCE)
        carried = CarriedStep(step, judge.spec, num_rows=num_rows, largest=largest)
        with _told_of(name):
            for moment, answer in _answered(recording, judge, num_rows, largest):
                run.compare(carried.run(moment), moment, answer)
            run.finish()
        parity[name] = run.summary()
    return parity


def _answered(
    recording: Recording, judge: Judge, num_rows: int, largest: int
) -> Iterator[tuple[Moment, Answer]]:
    """Each step of all rows, which are numbered by their environment, and the trainer's answer."""
    steps, environments = recording.episode_start.shape
    copies = num_rows // environments
    row = torch.arange(environments).repeat_interleave(copies)
    batches = list(torch.split(torch.arange(num_rows), largest))
    batch_size = torch.cat([torch.full_like(rows, len(rows)) for rows in batches])
    is_greedy = torch.arange(num_rows) % copies == 0
    zeros = judge.initial_state(environments)
    state, error = zeros, zeros
    for number in range(steps):
        begins = recording.episode_start[number]
        state, error = (_restarted(arrays, begins) for arrays in (state, error))
        observation = recording.observation[number]
        slack = judge.float_error(observation, state, error)
        state = tuple(array[number] for array in recording.states.values())
        error = slack.states
        mask = recording.action_mask[number]
        moment = Moment(
            number=number,
            row=row,
            batch_size=batch_size,
            batches=batches,
            observation=observation[row],
            action_mask=mask[row],
            noise=_noise(judge, copies, number).repeat(environments, 1),
            blueprint_index=None,
            slot_by_op_mask=None,
            begins=begins[row],
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
        yield moment, Answer(scores, _slack_of(slack, row))


def _noise(judge: Judge, copies: int, number: int) -> Tensor:
    """Of one environment's copies: none, then what points at one choice of each head."""
    pointed = torch.arange(copies - 1) + number * (copies - 1)
    heads = [nn.functional.one_hot(pointed % size, size) for size in judge.heads.sizes]
    return torch.cat([torch.zeros(1, sum(judge.heads.sizes)), LIFT * torch.cat(heads, dim=1)])


def _check_predicted(recording: Recording, judge: Judge) -> None:
    """Its own distribution scores what `predict()` takes as high as anything."""
    log_probs = judge.heads.spread(recording.log_prob)
    allowed = judge.heads.spread(recording.action_mask)
    scores = judge.heads.log_probs(log_probs, allowed)
    taken = scores.gather(-1, recording.action.unsqueeze(-1)).squeeze(-1)
    wrong = ~(scores.amax(-1) - taken <= TOLERANCE.atol)  # True for NaN
    if wrong.any():
        step, row, head = first(wrong)
        raise ParityError(
            f"stable_baselines3's predict() takes {int(recording.action[step, row, head])} for "
            f"head {judge.heads.names[head]!r}, row {row}, and its own distribution "
            f"{int(scores[step, row, head].argmax())} (step {step})"
        )


def _restarted(state: State, begins: Tensor) -> State:
    return tuple(torch.where(begins[:, None, None], 0.0, array) for array in state)


def _rows(state: State, row: Tensor) -> State:
    return tuple(array[row] for array in state)


def _slack_of(slack: Slack, row: Tensor) -> Slack:
    logits, value = (None if of is None else of[row] for of in (slack.logits, slack.value))
    return Slack(_rows(slack.states, row), logits, value)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except (ParityError, StepFault) as error:
        raise ParityError(f"{name} does not do what stable_baselines3 does: {error}") from error
