"""The figures of a report: how fast each format is here, and whether rows depend on their batch."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from export.manifest import bucket_sizes
from export.parity import Reference, Step, TensorStep
from export.report import Latency
from export.timing import Call, latencies
from model.recurrence import State

EAGER = "eager"
SECONDS_PER_BATCH_SIZE = 0.5


def measure_latency(
    reference: Reference, steps: Mapping[str, TensorStep]
) -> dict[str, tuple[Latency, ...]]:
    """Every format's latency by batch size, and under `eager` the policy's own `get_action`."""
    tables: dict[str, list[Latency]] = {name: [] for name in (EAGER, *steps)}
    with torch.inference_mode():
        for batch_size in bucket_sizes(max(reference.batch_sizes)):
            step, state = _second_step(reference, batch_size)
            inputs = step.inputs(state)
            calls: dict[str, Call] = {EAGER: _eager_call(reference, step, state)}
            calls |= {name: partial(loaded, *inputs) for name, loaded in steps.items()}
            timed = latencies(
                calls,
                batch_size=batch_size,
                seconds=SECONDS_PER_BATCH_SIZE,
                device=inputs[0].device,
            )
            for name, latency in timed.items():
                tables[name].append(latency)
    return {name: tuple(table) for name, table in tables.items()}


def row_difference(reference: Reference, step: TensorStep) -> dict[int, float]:
    """By batch size: how far rows come out from what they are in the largest batch.

    The same rows, in batches of each bucket's size; the largest difference of any output, 0 where
    every bit is the same.
    """
    largest = max(reference.batch_sizes)
    moment, state = _second_step(reference, largest)
    inputs = moment.inputs(state)
    with torch.inference_mode():
        together = step(*inputs)
        return {
            batch_size: max(
                _distance(part, whole[start : start + batch_size])
                for start in range(0, largest - batch_size + 1, batch_size)
                for part, whole in zip(
                    step(*(array[start : start + batch_size] for array in inputs)),
                    together,
                    strict=True,
                )
            )
            for batch_size in bucket_sizes(largest)
        }


def _second_step(reference: Reference, batch_size: int) -> tuple[Step, State]:
    """An episode's second step, with noise, and the state that is carried into it."""
    first, second = reference.episodes[reference.batch_sizes.index(batch_size)][:2]
    return second, first.scores.state


def _eager_call(reference: Reference, step: Step, state: State) -> Call:
    act = partial(
        reference.policy.get_action,
        state=state,
        masks=step.masks,
        noise=step.noise,
        blueprint_index=step.blueprint_index,
    )
    normalizer = reference.normalizer
    if normalizer is None:
        return partial(act, step.observation)
    return lambda: act(normalizer(step.observation))


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())
