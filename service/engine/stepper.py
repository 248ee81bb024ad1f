"""Parts of blocks -> a batch -> what became of each block: the recurrent half of the service.

Fills the batch, makes the noise, names the rows where states are and will be, and has the runtime
step it. Knows nothing of HTTP or of how batches form.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.step_spec import StepSpec
from service.engine.block import Answer, Batch, Block
from service.engine.noise_ahead import FEW, NoiseAhead
from service.engine.rows import ONE, RowTable
from service.engine.sessions import Session, SessionTable, Turn, derived_seed, first_seeds
from service.errors import Invalid, ServiceError
from service.runtime.arrays import are_all
from service.runtime.protocol import MOST_UNDER_WAY, Rows, Runtime, State

SHORT_STEP_S = 0.00025
"""Of less, the fifth that it takes for another thread to begin a step and to tell its end costs
more than what can be done meanwhile."""
BLOCK_S = 0.00005
"""What it takes to read and to answer a request: with as many requests as take longer than their
step, the clients need the other core."""
LONG_STEP_S = 0.002
"""Nobody waits so long for the event loop."""


class Part(NamedTuple):
    """Rows `start` to `stop` of a turn's block, that ride in one batch."""

    turn: Turn
    start: int
    stop: int


class _Batch(NamedTuple):
    """A batch that was launched: of each row where it will be, and what it draws with."""

    parts: Sequence[Part]
    rows: Rows
    seeds: NDArray[np.uint64]
    steps: NDArray[np.uint64]
    began_s: float


class Stepper:
    """Steps batches in order; blocks are admitted before and settled after.

    `observe` is told the rows and seconds of each batch in which the policy ran, or failed to.
    """

    def __init__(
        self,
        runtime: Runtime,
        rows: RowTable,
        sessions: SessionTable,
        spec: StepSpec,
        *,
        policy_version: str,
        seed: int,
        observe: Callable[[int, float], None],
    ) -> None:
        self._runtime = runtime
        self._rows = rows
        self._sessions = sessions
        self._noise_ahead = NoiseAhead(spec.num_choices, rows.zero_row + 1)
        self._zero_row = np.array(rows.zero_row)  # an int would be made one of, each time
        self.policy_version = policy_version
        """Of what `runtime` runs: it changes while no batch is under way."""
        self._seed = seed
        self._observe = observe
        self._num_stateless = 0
        self._ended_s = 0.0
        self._given = [name for name in runtime.inputs if name != "noise"]
        self._alone: str | None = None  # whose block was all of the last batch
        self._launched: deque[_Batch] = deque()
        self._collected: deque[_Batch] = deque(maxlen=MOST_UNDER_WAY)

    def hold(self, block: Block) -> None:
        """The block waits from now on: its session is kept."""
        if block.session_id is not None:
            self._sessions.hold(block.session_id)

    def release(self, block: Block) -> None:
        """The block waits no more."""
        if block.session_id is not None:
            self._sessions.release(block.session_id)

    def admit(self, block: Block) -> Turn | Answer:
        """The turn to take, with rows reserved for it, or the answer there is without one.

        Raises what the session table does.
        """
        if block.session_id is None:
            return self._stateless(block)
        admitted = self._sessions.admit(block)
        if isinstance(admitted, Turn):
            return admitted
        self._sessions.touch(block.session_id)
        return self._replay(admitted)

    def launch(self, parts: Sequence[Part], *, is_followed: bool = False) -> None:
        """Begins to step the parts, one of a block at most, side by side in this order.

        `is_followed`: there are rows enough for another batch, to be launched before this is done.
        """
        began_s = time.perf_counter()
        is_lone = len(parts) == 1
        num = sum([stop - start for _, start, stop in parts])
        if num == sum([turn.block.num_rows for turn, _, _ in parts]):  # whole blocks, as a rule
            given = [turn.block.given for turn, _, _ in parts]
            read = [turn.read_rows for turn, _, _ in parts]
            write = [turn.write_rows for turn, _, _ in parts]
        else:
            given = [tuple([x[a:b] for x in turn.block.given]) for turn, a, b in parts]
            read = [turn.read_rows[a:b] for turn, a, b in parts]
            write = [turn.write_rows[a:b] for turn, a, b in parts]
        inputs = self._runtime.inputs
        for name, of_blocks in zip(self._given, zip(*given, strict=True), strict=True):
            if is_lone:  # in half the time
                inputs[name][:num] = of_blocks[0]
            else:
                np.concatenate(of_blocks, out=inputs[name][:num])
        read_rows = read[0] if is_lone else np.concatenate(read)
        write_rows = write[0] if is_lone else np.concatenate(write)
        seeds, steps = self._rows.seed[read_rows], self._rows.step[read_rows]
        goes_on = read_rows != self._zero_row
        if not are_all(goes_on):
            starts = np.flatnonzero(~goes_on)
            seeds[starts] = self._rows.seed[write_rows[starts]]
        self._make_noise(parts, read_rows, seeds, steps, inputs["noise"][:num])
        try:
            self._runtime.launch(read_rows, write_rows, beside_s=self._beside_s(parts, is_followed))
        except Exception:  # it was tried, and is counted; the batcher says what becomes of it
            self._observe_since(began_s, num)
            raise
        self._launched.append(_Batch(parts, write_rows, seeds, steps, began_s))

    def _beside_s(self, parts: Sequence[Part], is_followed: bool) -> float:
        """How long a step is not to hold the event loop."""
        alone = parts[0].turn.block.session_id if len(parts) == 1 else None
        is_still_alone, self._alone = alone is not None and alone == self._alone, alone
        if is_still_alone:  # its client waits for this answer, and no other session is there
            return LONG_STEP_S
        if is_followed:  # the model goes on at once, and the loop has answers to write meanwhile
            return SHORT_STEP_S
        return min(max(BLOCK_S * len(parts), SHORT_STEP_S), LONG_STEP_S)

    def is_done(self) -> bool:
        """Whether the first batch that is not collected yet has ended."""
        return self._runtime.is_done()

    def collect(self) -> list[Answer | ServiceError | None]:
        """For each part of that batch its block's answer, the error in its stead, or None: more
        to run.

        A block is answered, and its session moved, with its last part.
        """
        launched = self._launched.popleft()
        parts, rows, seeds, steps, began_s = launched
        try:
            decided, is_finite = self._runtime.collect()
        finally:
            self._observe_since(began_s, len(rows))
        self._rows.keep(rows, seeds, steps, decided)
        states = self._states(parts)  # before anything moves: it may fail
        if is_finite is not None:
            _note_faults(parts, is_finite)
        batch, first = Batch(decided), 0
        settled: list[Answer | ServiceError | None] = []
        for turn, start, stop in parts:
            block = turn.block
            if stop < block.num_rows:
                settled.append(None)
            elif turn.fault is not None:
                self.abandon(turn)
                settled.append(_not_finite(turn))
            else:
                if block.session_id is None:
                    self._give_back(turn)
                else:
                    self._sessions.commit(turn, self.policy_version)
                of, at = (batch, first) if start == 0 else (self._rows.last(turn.write_rows), 0)
                state = states.get(first)
                version, num_rows = self.policy_version, block.num_rows
                settled.append(Answer(of, at, num_rows, turn.step, version, state))
            first += stop - start
        if len(parts) < len(rows):  # where they are not all single environments
            self._collected.append(launched)
        return settled

    def _observe_since(self, began_s: float, num_rows: int) -> None:
        """Time is not counted twice where a batch was launched behind another."""
        began_s, self._ended_s = max(began_s, self._ended_s), time.perf_counter()
        self._observe(num_rows, self._ended_s - began_s)

    def look_ahead(self) -> None:
        """Makes the noise that the vectors collected last will draw with next."""
        for parts, rows, seeds, steps, _ in self._collected:
            num_rows = [stop - start for _, start, stop in parts]
            goes_on = [
                turn.block.is_vector
                and turn.block.session_id is not None
                and not turn.block.deterministic
                for turn, _, _ in parts
            ]
            of = np.repeat(goes_on, num_rows)
            if of.any():
                self._noise_ahead.look_ahead(rows[of], seeds[of], steps[of] + ONE)
        self._collected.clear()

    def abandon(self, turn: Turn) -> None:
        """The turn will not be taken, or not to its end: nothing has moved."""
        if turn.block.session_id is None:
            self._give_back(turn)
        else:
            self._sessions.abandon(turn)

    def _states(self, parts: Sequence[Part]) -> dict[int, State]:
        """What stateless blocks go on from, by the place of the part that is their last."""
        rows, first = {}, 0
        for turn, start, stop in parts:
            if turn.block.session_id is None and stop == turn.block.num_rows:
                rows[first] = turn.write_rows
            first += stop - start
        if not rows:
            return {}
        # Read at once: on a device each time is several copies, and a wait for them.
        of_all = self._runtime.read(np.concatenate([*rows.values()]))
        states, stop = {}, 0
        for place, of_block in rows.items():
            start, stop = stop, stop + len(of_block)
            states[place] = tuple([array[start:stop] for array in of_all])
        return states

    def _replay(self, session: Session) -> Answer:
        return Answer(
            self._rows.last(session.rows),
            0,
            len(session.rows),
            session.next_step - 1,
            session.policy_version,
            is_replay=True,
        )

    def _stateless(self, block: Block) -> Turn:
        """A turn of rows that live as long as it does."""
        seed = block.seed
        if seed is None:
            self._num_stateless += 1
            seed = derived_seed(self._seed, "", None, self._num_stateless)
        step, num_rows = block.step or 0, block.num_rows
        seeds = first_seeds(block, seed)
        carries = block.state is not None or step > 0
        write_rows, read_rows = self._rows.reserve(num_rows), self._rows.zeros(num_rows)
        self._rows.seed[write_rows] = seeds
        turn = Turn(
            block,
            session=None,
            begins=False,
            step=step,
            seed=seed,
            read_rows=read_rows,
            write_rows=write_rows,
        )
        if carries:
            try:
                turn.read_rows = self._rows.reserve(num_rows)
                self._carry(turn.read_rows, block.state, seeds, step)
            except BaseException:
                self._give_back(turn)
                raise
        return turn

    def _carry(
        self, rows: Rows, state: State | None, seeds: int | NDArray[np.uint64], step: int
    ) -> None:
        """Puts what a stateless block brings where a step reads it."""
        self._rows.seed[rows] = seeds
        self._rows.step[rows] = step
        if state is None:
            state = self._runtime.read(self._rows.zeros(len(rows)))
        self._runtime.write(rows, state)

    def _give_back(self, turn: Turn) -> None:
        """The rows of a stateless turn."""
        self._rows.give_back(turn.write_rows)
        if turn.read_rows[0] != self._rows.zero_row:
            self._rows.give_back(turn.read_rows)

    def _make_noise(
        self,
        parts: Sequence[Part],
        rows: Rows,
        seeds: NDArray[np.uint64],
        steps: NDArray[np.uint64],
        noise: NDArray[np.float32],
    ) -> None:
        deterministic = [turn.block.deterministic for turn, _, _ in parts]
        if any(deterministic):
            noise[:] = 0.0
            num_rows = [stop - start for _, start, stop in parts]
            sampled = np.flatnonzero(~np.repeat(deterministic, num_rows))
            if len(sampled):
                drawn = np.empty((len(sampled), noise.shape[1]), dtype=np.float32)
                self._noise_ahead.take(rows[sampled], seeds[sampled], steps[sampled], drawn)
                noise[sampled] = drawn
        elif len(parts) == len(rows) <= FEW:
            self._noise_ahead.take_each(seeds, steps, noise)
        else:
            self._noise_ahead.take(rows, seeds, steps, noise)


def _note_faults(parts: Sequence[Part], is_finite: NDArray[np.bool_]) -> None:
    first = 0
    for turn, start, stop in parts:
        faults = np.flatnonzero(~is_finite[first : first + stop - start])
        if turn.fault is None and len(faults):
            turn.fault = start + int(faults[0])
        first += stop - start


def _not_finite(turn: Turn) -> Invalid:
    what = f"`observation[{turn.fault}]`" if turn.block.is_vector else "this observation"
    return Invalid(f"the policy's output for {what} is not finite; the session has not moved")
