"""A server whose steps take as long as the test wants: a program, over the fake policy.

`python -m tests.service.gated_server MODE FLAGS` is `python -m service FLAGS`, but a step says on
stdout `step N settled`, for N rows and where the garbage of the start is, and waits for a line
on stdin: in MODE `gated` the steps of requests do, beside the event loop, in `held` they hold it,
in `warm-up` those of the warm-up wait. In `free` none does; nor in `broken`, where all fail; in
`asked` the server has been asked to stop before it runs.
"""

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic_settings import CliApp

from export.manifest import Manifest
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.artifact import find_artifact
from service.engine import stepper
from service.http.keys import Keys
from service.server import serve
from service.settings import Settings
from tests.running_server import RunningServer, running
from tests.service.fakes import Arrays, SummingRuntime, manifest_of


class GatedRuntime(SummingRuntime):
    def __init__(self, spec: StepSpec, mode: str) -> None:
        super().__init__(spec)
        self.waits_in_warm_up = mode == "warm-up"
        self.is_free = mode == "free"
        if mode == "broken":
            self.failure = RuntimeError("broken")

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        step = super().bind(inputs, outputs)

        def run() -> None:
            is_warm_up = threading.current_thread().name == "warm-up"
            if is_warm_up == self.waits_in_warm_up and not self.is_free:
                settled = "settled" if gc.get_freeze_count() else "unsettled"
                sys.stdout.write(f"step {len(inputs['observation'])} {settled}\n")
                sys.stdout.flush()
                sys.stdin.readline()
            step()

        return run


@contextmanager
def serving(spec: PolicySpec | SB3Spec, directory: Path) -> Iterator[RunningServer]:
    """The fake policy of a spec, whose steps do not wait; of an artifact made in `directory`."""
    manifest_of(spec).write(directory)
    command = [sys.executable, "-m", "tests.service.gated_server", "free"]
    with running([*command, "--artifact", str(directory), "--port", "0"]) as server:
        yield server


def main() -> int:
    mode = sys.argv.pop(1)
    if mode != "held":  # the warm-up does not show how long they are
        stepper.SHORT_STEP_S = stepper.LONG_STEP_S = 0.0
    settings = CliApp.run(Settings)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    manifest = Manifest.read(find_artifact(settings.artifact))
    asked_to_stop = [signal.SIGTERM] if mode == "asked" else []
    return serve(settings, manifest, GatedRuntime(manifest.spec, mode), Keys(), asked_to_stop)


if __name__ == "__main__":
    raise SystemExit(main())
