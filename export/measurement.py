"""The figures of a report: how fast each format is here, and whether rows depend on their batch."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from export.carried_step import CarriedStep, allocated
from export.episodes import EpisodeMaker, Moment
from export.judge import Judge
from export.loaders.protocol import LoadedStep
from export.manifest import step_inputs, step_outputs, timed_sizes
from export.report import Latency
from export.timing import Call, latencies
from model.recurrence import State

EAGER = "eager"
SECONDS_PER_BATCH_SIZE = 0.5


def measure_latency(
    judge: Judge, steps: Mapping[str, LoadedStep], max_batch_size: int
) -> dict[str, tuple[Latency, ...]]:
    """Every format's latency by batch size, and under `eager` the policy's own `get_action`.

    A format's is that of a bound call, as the service makes it: from arrays on the host to arrays
    on the host.
    """
    tables: dict[str, list[Latency]] = {name: [] for name in (EAGER, *steps)}
    maker = EpisodeMaker(judge.rebuilt, max_batch_size)
    with torch.inference_mode():
        for batch_size in timed_sizes(max_batch_size):
            first, second = (maker.moment(batch_size).to(judge.device) for _ in range(2))
            state = judge.scores(first, judge.initial_state(batch_size)).state
            calls: dict[str, Call] = {EAGER: _eager_call(judge, second, state)}
            calls |= {name: _bound(step, judge, second, state) for name, step in steps.items()}
            timed = latencies(
                calls,
                batch_size=batch_size,
                seconds=SECONDS_PER_BATCH_SIZE,
                device=judge.device,
            )
            for name, latency in timed.items():
                tables[name].append(latency)
    return {name: tuple(table) for name, table in tables.items()}


def row_difference(judge: Judge, step: LoadedStep, max_batch_size: int) -> dict[int, float]:
    """By batch size: how far rows come out from what they are in the largest batch.

    The same rows, in batches of each timed size; the largest difference of any output, 0 where
    every bit is the same.
    """
    moment = EpisodeMaker(judge.rebuilt, max_batch_size).moment(max_batch_size)
    together = _outputs(judge, step, moment)
    differences = {}
    for batch_size in timed_sizes(max_batch_size):
        # All of that size: the last may have some of the rows before it once more.
        starts = (
            min(at, max_batch_size - batch_size) for at in range(0, max_batch_size, batch_size)
        )
        batches = [moment.row[start : start + batch_size] for start in starts]
        outputs = _outputs(judge, step, replace(moment, batches=batches))
        differences[batch_size] = max(
            _distance(outputs[name], array) for name, array in together.items()
        )
    return differences


def _outputs(judge: Judge, step: LoadedStep, moment: Moment) -> dict[str, Tensor]:
    """From zeros, but for the rows that begin elsewhere."""
    num_rows = len(moment.row)
    return CarriedStep(step, judge.spec, num_rows=num_rows, largest=num_rows).run(moment)


def _eager_call(judge: Judge, moment: Moment, state: State) -> Call:
    act = partial(
        judge.policy.get_action,
        state=state,
        masks=moment.masks(judge.heads),
        noise=moment.noise,
        blueprint_index=moment.blueprint_index,
    )
    normalizer = judge.normalizer
    if normalizer is None:
        return partial(act, moment.observation)
    return lambda: act(normalizer(moment.observation))


def _bound(step: LoadedStep, judge: Judge, moment: Moment, state: State) -> Call:
    num_rows = len(moment.row)
    inputs = allocated(step_inputs(judge.spec), num_rows)
    for name, array in moment.inputs(judge.spec, state).items():
        inputs[name][...] = array.cpu().numpy()
    return step.bind(inputs, allocated(step_outputs(judge.spec), num_rows))


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())
