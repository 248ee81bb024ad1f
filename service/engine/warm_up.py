"""The policy's first runs, off the event loop: `/act` opens when all batch sizes have run."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from service.errors import NotReady


class WarmUp:
    """Runs `run` in a thread of its own. It is told by a question whether it is wanted still."""

    def __init__(self, run: Callable[[Callable[[], bool]], None]) -> None:
        self._run = run
        self._thread: threading.Thread | None = None
        self.done: asyncio.Future[None] | None = None
        """Has its end, or what went wrong, once it was started."""

    def start(self) -> None:
        self.done = asyncio.get_running_loop().create_future()
        # Not the loop's executor: the loop's end would wait for it, be it a minute.
        self._thread = threading.Thread(
            target=self._work, args=(self.done,), name="warm-up", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """It is not wanted any more; a step under way goes on to its end."""
        if self.done is not None:
            self.done.cancel()

    def is_running(self) -> bool:
        """Whether a step of it runs still, wanted or not."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises NotReady until it has ended well."""
        done = self.done
        if done is None or not done.done() or done.cancelled() or done.exception():
            raise NotReady("the policy is still warming up")

    def _work(self, done: "asyncio.Future[None]") -> None:
        error: Exception | None = None
        try:
            self._run(lambda: not done.done())
        except Exception as failure:  # whoever waits for `done` is told
            error = failure

        def settle() -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        with suppress(RuntimeError):  # the loop has ended meanwhile, and nobody waits
            done.get_loop().call_soon_threadsafe(settle)
