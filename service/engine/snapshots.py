"""When sessions are written to a file, and when a server goes on from it.

While it serves, one piece at a time: the event loop copies a frame, and a thread writes it before
the next. At the end all at once, as by then nobody is answered any more.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

from service.engine.kept_sessions import KeptSessions, Restored
from service.engine.snapshot_file import Draft, NotSynced, Snapshot, SnapshotError, check_place

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Snapshots:
    """Keeps what `kept` has in the file `path`: every `every_s`, where it is given, and at the end.

    `failed` is told why one could not be written. Raises SnapshotError where none can be there.
    """

    def __init__(
        self,
        path: Path,
        kept: KeptSessions,
        *,
        every_s: float | None,
        failed: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        self.path = check_place(path)
        self.refused_path = _free_name(self.path)
        """Where a file goes that was not gone on from; one that went before is not replaced."""
        self.every_s = every_s
        self.has_failed = False
        """Whether the last one of all could not be written, or not synced."""
        self.has_ended = False
        """Whether that was tried: a server that is made to end at once does not."""
        self.by_result = {"written": 0, "failed": 0}
        self.last_s: float | None = None
        """How long it took to write the last one."""
        self._written_at_s = time.time()
        self._kept = kept
        self._failed = failed
        self._found: Snapshot | None = None
        self._is_refused = False
        self._beside = ThreadPoolExecutor(1, "snapshot")
        self._writing: asyncio.Task[None] | None = None
        self._ends = asyncio.Event()

    def restore(self) -> Restored | None:
        """Goes on from the file, or begins without one where there is none.

        Raises SnapshotError where that is damaged, of another schema or of another policy. Then
        the next snapshot does not replace it, but sets it aside.
        """
        try:
            self._found = snapshot = Snapshot(self.path)
            restored = self._restored(snapshot)
        except FileNotFoundError:
            logger.info("%s: there is no snapshot yet; no session goes on", self.path)
            return None
        except SnapshotError:
            self._is_refused = True
            raise
        self._written_at_s = restored.written_at_s
        logger.info(
            "%s: written %s, %.0f s ago; %d sessions go on%s, %d are lost",
            self.path,
            "at a server's end" if snapshot.is_final else "while a server ran",
            self.age_s(),
            restored.num_sessions,
            "" if snapshot.is_final else " whose clients have not",
            restored.num_lost,
        )
        return restored

    def _restored(self, snapshot: Snapshot) -> Restored:
        try:
            return self._kept.restore(snapshot)
        except (LookupError, TypeError, ValueError) as error:
            raise SnapshotError(
                f"{self.path}: is whole, and holds something else than a snapshot ({error!r})"
            ) from error

    def outdate(self) -> None:
        """Clients are about to move on from what was found there, also where it was refused, and
        whoever reads it later is to know. Raises OSError.
        """
        if self._found is not None:
            self._found.mark_not_final()
            self._found.close()
            self._found = None

    def start(self, opened: "asyncio.Future[None]") -> None:
        """Writes one every so often, once `/act` has opened. On the event loop."""
        if self.every_s is not None:
            self._writing = asyncio.create_task(self._write_often(opened, self.every_s))

    async def stop(self) -> None:
        """Ends that; one that is half written is discarded."""
        self._ends.set()
        if self._writing is not None:
            await self._writing

    def write_last(self) -> None:
        """Writes the sessions as they are for good; `has_failed` where that fails, which is logged.

        Holds the event loop, so that nothing moves meanwhile.
        """
        self.has_ended = True
        began_s = time.perf_counter()
        try:
            with Draft(self.path) as draft:
                for frame in self._kept.frames(is_final=True):
                    draft.add(frame)
                self._publish(draft, is_final=True)
        except Exception as error:  # whatever it is, it is told by the exit code
            self.has_failed = True
            self._note_failure(error, "sessions that moved since the last one are lost")
        else:
            self._note(began_s)
            logger.info("%s: written in %.2f s", self.path, self.last_s)

    async def write(self) -> None:
        """Writes them while they move, unless it is ended meanwhile. Raises OSError."""
        began_s = time.perf_counter()
        draft = await self._run(lambda: Draft(self.path))
        try:
            for frame in self._kept.frames(is_final=False):
                await self._run(partial(draft.add, frame))
                if self._ends.is_set():
                    return
            await self._run(lambda: self._publish(draft, is_final=False))
        finally:
            await self._run(draft.discard)
        self._note(began_s)

    def age_s(self) -> float:
        """Of what lies there and can be gone on from; where there is nothing, of this object."""
        return max(0.0, time.time() - self._written_at_s)

    async def _write_often(self, opened: "asyncio.Future[None]", every_s: float) -> None:
        await asyncio.wait([opened])
        if opened.cancelled() or opened.exception():
            return
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ends.wait(), every_s)
                return
            try:
                await self.write()
            except Exception as error:  # whatever it is, clients are answered still
                self._note_failure(error, "serving goes on")
                self._failed(error)

    async def _run(self, write: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._beside, write)

    def _publish(self, draft: Draft, *, is_final: bool) -> None:
        aside = self.refused_path if self._is_refused else None
        try:
            draft.publish(is_final=is_final, set_aside=aside)
        finally:
            self._is_refused = self._is_refused and not draft.has_set_aside

    def _note(self, began_s: float) -> None:
        self.by_result["written"] += 1
        self.last_s = time.perf_counter() - began_s
        self._written_at_s = time.time()

    def _note_failure(self, error: Exception, consequence: str) -> None:
        self.by_result["failed"] += 1
        is_known = isinstance(error, OSError)
        what = "no snapshot could be written"
        if isinstance(error, NotSynced):
            what = "the snapshot is in place, and could not be synced"
            consequence = "a crash of the machine may undo it"
        logger.error(
            "%s: %s (%s); %s",
            self.path,
            what,
            error.strerror if isinstance(error, OSError) else error,
            consequence,
            exc_info=None if is_known else error,
        )


def _free_name(path: Path) -> Path:
    """`path` with `.refused`, or with `.refused.2` and so on where there is one."""
    first = path.with_name(f"{path.name}.refused")
    later = (first.with_name(f"{first.name}.{number}") for number in count(2))
    return next(free for free in chain([first], later) if not os.path.lexists(free))
