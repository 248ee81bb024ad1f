"""The figures of a report: how fast each format is here, and whether rows depend on their batch."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from export.formats import LoadedStep, StepInput, native_call
from export.manifest import bucket_sizes
from export.parity import Reference
from export.report import Latency
from export.timing import Call, latencies

EAGER = "eager"
SECONDS_PER_BATCH_SIZE = 0.5


def measure_latency(
    reference: Reference, steps: Mapping[str, LoadedStep]
) -> dict[str, tuple[Latency, ...]]:
    """Every format's latency by batch size, and under `eager` the policy's own `get_action`."""
    tables: dict[str, list[Latency]] = {name: [] for name in (EAGER, *steps)}
    with torch.inference_mode():
        for batch_size in bucket_sizes(max(reference.batch_sizes)):
            inputs = _second_step(reference, batch_size)
            calls: dict[str, Call] = {EAGER: _eager_call(reference, inputs)}
            calls |= {name: native_call(loaded, inputs) for name, loaded in steps.items()}
            timed = latencies(
                calls,
                batch_size=batch_size,
                seconds=SECONDS_PER_BATCH_SIZE,
                device=inputs[0].device,
            )
            for name, latency in timed.items():
                tables[name].append(latency)
    return {name: tuple(table) for name, table in tables.items()}


def row_difference(reference: Reference, step: LoadedStep) -> dict[int, float]:
    """By batch size: how far rows come out from what they are in the largest batch.

    The same rows, in batches of each bucket's size; the largest difference of any output, 0 where
    every bit is the same.
    """
    largest = max(reference.batch_sizes)
    inputs = _second_step(reference, largest)
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


def _second_step(reference: Reference, batch_size: int) -> StepInput:
    """What the exported step takes at an episode's second step: with noise, a state carried."""
    first, second = reference.episodes[reference.batch_sizes.index(batch_size)][:2]
    h, c = first.scores.state
    return (second.observation, second.action_mask, second.noise, h, c)


def _eager_call(reference: Reference, inputs: StepInput) -> Call:
    policy, heads = reference.policy, reference.policy.heads
    observation, action_mask, noise, h, c = inputs
    masks = dict(zip(heads.names, torch.split(action_mask, heads.sizes, -1), strict=True))
    normalizer = reference.normalizer
    if normalizer is None:
        return partial(policy.get_action, observation, (h, c), masks, noise)
    return lambda: policy.get_action(normalizer(observation), (h, c), masks, noise)


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())
