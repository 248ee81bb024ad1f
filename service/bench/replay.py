"""Were the answers right? Every trajectory again, on the artifact itself, one session at a time.

The server batched these sessions as they came and kept their states; here each starts from zeros
and steps alone. The same seed and observations must give the same answers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from export.loaders.protocol import LoadedStep
from model.spec import PolicySpec
from service.bench.load import Pool, Session
from service.engine.noise import gumbel_noise
from service.runtime.protocol import StepInputs, StepOutputs


class Differences(NamedTuple):
    """`answers` were compared, `differing` were not bit for bit the artifact's own.

    `other_actions` of them decided otherwise; `largest` is the largest difference of a number.
    """

    answers: int
    differing: int
    other_actions: int
    largest: float


def replay(
    sessions: list[Session], pool: Pool, runtime: LoadedStep, spec: PolicySpec
) -> Differences:
    """Compares every answer with the runtime's own, stepping each session by itself."""
    answers = differing = other_actions = 0
    largest = 0.0
    inputs, decided = StepInputs.allocate(spec, 1), StepOutputs.allocate(spec, 1)
    step_once = runtime.bind(inputs.by_name(), decided.by_name())
    for session in sessions:
        inputs.h[:] = inputs.c[:] = 0.0
        seeds = np.full(len(session.answers), session.seed, dtype=np.uint64)
        steps = np.arange(len(session.answers), dtype=np.uint64)
        noise = gumbel_noise(seeds, steps, spec.num_choices)
        for step, (index, content) in enumerate(
            zip(session.pool_index, session.answers, strict=True)
        ):
            answer = from_json(content)
            inputs.observation[0] = pool.observations[index]
            inputs.action_mask[0] = pool.action_masks[index]
            if inputs.blueprint_index is not None and pool.blueprint_indices is not None:
                inputs.blueprint_index[0] = pool.blueprint_indices[index]
            if inputs.slot_by_op_mask is not None and pool.slot_by_op_masks is not None:
                inputs.slot_by_op_mask[0] = pool.slot_by_op_masks[index]
            inputs.noise[0] = noise[step]
            step_once()
            inputs.h[:], inputs.c[:] = decided.h, decided.c
            expected = np.hstack([decided.log_prob[0], decided.value, *_extra(decided)])
            extra = [answer[name] for name in decided.extra]
            got = np.hstack([[*answer["log_prob"].values(), answer["value"]], *extra])
            is_other = list(answer["action"].values()) != decided.action[0].tolist()
            answers += 1
            other_actions += is_other
            differing += is_other or not np.array_equal(got, expected)
            largest = max(largest, float(np.abs(got - expected).max()))
    return Differences(answers, differing, other_actions, largest)


def _extra(decided: StepOutputs) -> list[NDArray[np.float32]]:
    return [array.reshape(-1) for array in decided.extra.values()]
