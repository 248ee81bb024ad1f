"""Were the answers right? Every trajectory again on the artifact itself, each environment alone.

The server batched these rows as they came and kept their states; here each starts from zeros and
steps alone. The same seed and observations must give the same answers, of the version that each
answer names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from export.loaders.protocol import LoadedStep
from export.manifest import step_inputs, step_outputs
from model.step_spec import StepSpec
from service.bench.load import Session
from service.bench.pool import POOL_SIZE, Pool
from service.bench.wire import Arrays, Wire
from service.runtime.arrays import allocate, decisions
from tamiyo_client.noise import gumbel_noise, row_seed


class Differences(NamedTuple):
    """`answers` to single environments were compared, `differing` were not the artifact's own.

    Bit for bit, that is. `other_actions` of them decided otherwise; `largest` is the largest
    difference of a number.
    """

    answers: int
    differing: int
    other_actions: int
    largest: float


def replay(
    sessions: Sequence[Session],
    pool: Pool,
    wire: Wire,
    loaded: Mapping[str, LoadedStep],
    spec: StepSpec,
) -> Differences:
    """Compares every answer with that of the step loaded for its version, each environment alone.

    Raises KeyError for a version that none was loaded for.
    """
    alone = _Alone(loaded, pool, spec)
    answers = differing = other_actions = 0
    largest = 0.0
    for session in sessions:
        got = [wire.answer(content) for content in session.answers]
        versions = [wire.version(content) for content in session.answers]
        for row in range(session.num_rows or 1):
            for answer, expected in zip(got, alone.steps(session, row, versions), strict=True):
                is_other = not np.array_equal(answer["action"][row], expected["action"][0])
                errors = [
                    float(np.abs(answer[name][row] - array[0]).max())
                    for name, array in expected.items()
                    if name != "action"
                ]
                answers += 1
                other_actions += is_other
                differing += is_other or max(errors) > 0
                largest = max(largest, *errors)
    return Differences(answers, differing, other_actions, largest)


class _Alone:
    """One environment on the artifact, in batches of one."""

    def __init__(self, loaded: Mapping[str, LoadedStep], pool: Pool, spec: StepSpec) -> None:
        self._pool = pool.by_name()
        self._num_choices = spec.num_choices
        self._states = {state.input: state.output for state in spec.states}
        self._decided = [array.name for array in decisions(spec)]
        self._inputs = allocate(step_inputs(spec), 1)
        self._outputs = allocate(step_outputs(spec), 1)
        self._steps = {
            version: step.bind(self._inputs, self._outputs) for version, step in loaded.items()
        }

    def steps(self, session: Session, row: int, versions: Sequence[str]) -> Iterator[Arrays]:
        """What each of the session's steps gives for the row; good until the next."""
        num_steps = len(session.answers)
        starts = np.zeros(num_steps, dtype=np.bool_)
        starts[:1] = True
        for step in range(num_steps):
            of_rows = session.starts(step)
            starts[step] |= of_rows is not None and of_rows[row]
        episodes = np.cumsum(starts) - 1
        steps = np.arange(num_steps) - np.flatnonzero(starts)[episodes]
        seeds = np.full(num_steps, session.seed, dtype=np.uint64)
        if session.num_rows is not None:
            seeds = row_seed(session.seed, np.full(num_steps, row), episodes)
        noise = gumbel_noise(seeds, steps.astype(np.uint64), self._num_choices)
        decided = {name: self._outputs[name] for name in self._decided}
        for step, index in enumerate(session.pool_index):
            for name, array in self._pool.items():
                self._inputs[name][0] = array[(index + row) % POOL_SIZE]
            for given, carried in self._states.items():
                self._inputs[given][:] = 0.0 if starts[step] else self._outputs[carried]
            self._inputs["noise"][0] = noise[step]
            self._steps[versions[step]]()
            yield decided
