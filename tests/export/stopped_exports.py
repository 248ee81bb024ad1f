"""Exports that a signal comes to, each before another step of publishing: what they leave, as JSON.

    python -m tests.export.stopped_exports DIRECTORY SIGNAL

Each is a process of its own, forked, so that there is one for every system call (as Python audits
them) and for every line of the modules that publish. What they write is small files: the steps are
those of an export of any size.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from export import directory, stopping
from export.directory import check_output, staged
from export.stopping import Stopped, deferred, stoppable

OLD = {"manifest.json": '{"schema_version": 1, "formats": {"onnx": {"file": "policy.onnx"}}}'}
OLD |= {"policy.onnx": "old"}
OWN = {"notes.txt": "precious", "plots/one.png": "precious"}
NEW = {"manifest.json": '{"schema_version": 1, "formats": {"pt2": {"file": "policy.pt2"}}}'}
NEW |= {"policy.pt2": "new"}
NEVER_CAME = 99
TRACED = {directory.__file__, stopping.__file__}

Watch = Callable[[Callable[[], None]], None]


def write(into: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(content)


def tree(root: Path) -> dict[str, str]:
    """Every file's content and, for directories without one, their bare names."""
    paths = sorted(root.rglob("*"))
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() else ""
        for path in paths
        if path.is_file() or not any(path.iterdir())
    }


def export_new(output: Path) -> None:
    with deferred() as heeded, staged(output, overwrite=True) as staging, heeded():
        write(staging, NEW)


def before_each_call(step: Callable[[], None]) -> None:
    sys.addaudithook(
        lambda event, _: step() if event.startswith(("os.", "open", "shutil")) else None
    )


def before_each_line(step: Callable[[], None]) -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            step()
        return trace

    sys.settrace(trace)


def stopped_child(output: Path, number: int, watch: Watch, at: int) -> int:
    """In the forked process: its exit code, where a signal came before step `at`."""
    seen, is_done = 0, False

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == at + 1 and not is_done:
            os.kill(os.getpid(), number)

    try:
        with stoppable():
            watch(step)
            export_new(output)
            is_done = True
            sys.settrace(None)
    except Stopped as stopped:
        return stopped.code
    return NEVER_CAME if seen <= at else 0


def stopped_at_each(root: Path, number: int, watch: Watch, *, exists: bool) -> Iterator[Any]:
    at = 0
    while True:
        sandbox = root / f"{watch.__name__}-{exists}-{at}"
        output = sandbox / "made" / "tiny"
        if exists:
            write(output, OLD | OWN)
        else:
            sandbox.mkdir()
        child = os.fork()
        if child == 0:
            os._exit(stopped_child(output, number, watch, at))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == NEVER_CAME:
            return
        left = tree(sandbox)
        check_output(output, overwrite=True)
        then = tree(sandbox)
        export_new(output)
        yield {"exists": exists, "code": code, "left": left, "then": then, "again": tree(sandbox)}
        shutil.rmtree(sandbox)
        at += 1


def main() -> None:
    root, number = Path(sys.argv[1]), int(sys.argv[2])
    ends = [
        end
        for watch in (before_each_call, before_each_line)
        for exists in (False, True)
        for end in stopped_at_each(root, number, watch, exists=exists)
    ]
    print(json.dumps(ends))  # noqa: T201


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
