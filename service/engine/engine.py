"""One policy being served: blocks in, answers out. What the HTTP side has to do with."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import ref

from export.loaders.protocol import RenewableStep
from export.manifest import Manifest
from service.engine.batcher import Batcher
from service.engine.kept_sessions import KeptSessions, Served
from service.engine.policy_versions import PolicyVersions, Weights
from service.engine.rows import RowTable
from service.engine.sessions import SessionTable
from service.engine.snapshot_file import SnapshotError
from service.engine.snapshots import Snapshots
from service.engine.stepper import Stepper
from service.engine.warm_up import WarmUp
from service.errors import Draining, Invalid
from service.runtime.arrays import decisions
from service.runtime.load import with_states
from service.settings import Settings


class Engine:
    """Steps blocks of at most `max_rows` rows. Made on the event loop it serves.

    `submit` is the batcher's: it has a block answered later.
    `observe` is told the rows and seconds of each batch, `observe_change` the result and seconds of
    each change of weights. Raises SnapshotError where none can be written to `--snapshot`.
    """

    def __init__(
        self,
        manifest: Manifest,
        loaded: RenewableStep,
        settings: Settings,
        observe: Callable[[int, float], None] = lambda num_rows, seconds: None,
        observe_change: Callable[[str, float], None] = lambda result, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        spec = manifest.spec
        self._clock = clock
        self._drain_s = settings.drain_s
        self._stops_at_s: float | None = None
        self.max_rows = min(settings.max_rows, settings.max_sessions, settings.max_waiting)
        batch_sizes = settings.batch_sizes(manifest.max_batch_size)
        self.max_batch_size = batch_sizes[-1]
        # Under way are two batches, and two blocks in parts at most, of which the one's last and
        # the other's first ride in them. A stateless block has rows to read besides those to
        # write. And as many rows may have become a session's before others have given up theirs.
        num_rows = settings.max_sessions + 6 * (self.max_rows + self.max_batch_size)
        self.runtime = with_states(
            loaded, manifest, num_rows=num_rows, batch_sizes=batch_sizes, tf32=settings.tf32
        )
        rows = RowTable(num_rows, decisions(spec), largest=self.max_rows)
        self.sessions = SessionTable(
            rows,
            capacity=settings.max_sessions,
            idle_timeout_s=settings.session_idle_s,
            seed=settings.seed,
            clock=clock,
        )
        stepper = Stepper(
            self.runtime,
            rows,
            self.sessions,
            spec,
            policy_version=manifest.policy_version,
            seed=settings.seed,
            observe=observe,
        )
        self.batcher = Batcher(
            stepper,
            max_batch_size=self.max_batch_size,
            max_waiting=settings.max_waiting,
        )
        self.submit = self.batcher.submit
        self.versions = PolicyVersions(
            manifest,
            Weights(manifest.policy_version, loaded),
            runtime=self.runtime,
            batcher=self.batcher,
            stepper=stepper,
            sessions=self.sessions,
            observe=observe_change,
        )
        self.snapshots: Snapshots | None = None
        if settings.snapshot is not None:
            kept = KeptSessions(
                self.sessions,
                rows,
                self.runtime,
                manifest.outputs,
                spec=spec,
                artifact_version=manifest.policy_version,
                max_rows=self.max_rows,
                served=self._served,
                serve=self._serve,
                clock=clock,
            )
            self.snapshots = Snapshots(
                settings.snapshot,
                kept,
                every_s=settings.snapshot_every_s,
                failed=self.batcher.refusal,
            )
        runtime, snapshots = self.runtime, self.snapshots

        def first_runs(is_wanted: Callable[[], bool]) -> None:
            runtime.warm_up(is_wanted=is_wanted)
            if snapshots is not None and is_wanted():
                snapshots.outdate()

        self.warm_up = WarmUp(first_runs)

    def start(self) -> None:
        """Warms up; blocks are taken once that has ended well. On the event loop."""
        loop, batcher = asyncio.get_running_loop(), ref(self.batcher)

        def wake() -> None:
            # By then the loop may have ended, and the engine be gone: this is not to keep it.
            if (waiting := batcher()) is not None:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(waiting.wake)

        self.runtime.when_done = wake
        self.warm_up.start()
        if self.snapshots is not None:
            assert self.warm_up.done is not None
            self.snapshots.start(self.warm_up.done)

    def _served(self) -> Served:
        """What a snapshot is to serve again."""
        current = self.versions.current
        return Served(current.policy_version, current.parameters, current.probe_error)

    def _serve(self, served: Served) -> None:
        """Serves what a snapshot says. Raises SnapshotError where that cannot be done here."""
        if served.parameters is not None:
            try:
                self.versions.resume(served.policy_version, served.parameters, served.probe_error)
            except Invalid as error:
                raise SnapshotError(f"its weights cannot be served here: {error}") from error
            except Exception as error:  # of a device, whatever it raises: no fault of the file
                raise RuntimeError("its weights cannot be served now") from error

    def is_stepping(self) -> bool:
        """Whether a thread is in the middle of a step, which nothing can stop."""
        is_idle = self.runtime.is_idle() and not self.versions.is_changing()
        return self.warm_up.is_running() or not is_idle

    def stops(self) -> None:
        """From now on the end is waited for."""
        if self._stops_at_s is None:
            self._stops_at_s = self._clock()

    async def stop(self) -> None:
        """Answers what waits, as far as `--drain-s` from `stops` on goes, and takes nothing more.

        Then a last snapshot is written, where there is one to be.
        """
        self.stops()
        self.warm_up.stop()
        assert self._stops_at_s is not None
        left_s = self._stops_at_s + self._drain_s - self._clock()
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):  # with none left, too, nothing more is taken
                await self.batcher.drain()
        if self.snapshots is not None:
            await self.snapshots.stop()
            self.batcher.halt()
            self.snapshots.write_last()

    def check_ready(self) -> None:
        """Raises NotReady before warm-up's end, and Draining once the server stops."""
        self.warm_up.check()
        if self._stops_at_s is not None:
            raise Draining("the server is shutting down")
        self.batcher.check_room(0)

    def check_open(self) -> None:
        """Raises what any block would meet now, whatever is in it: then it need not be read."""
        self.warm_up.check()
        self.batcher.check_room()
