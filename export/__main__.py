"""`python -m export`: a trainer's checkpoint becomes a verified artifact directory.

`python -m export verify DIR` checks an artifact again, anywhere; `inspect DIR` says what it is;
`push --checkpoint FILE --to URL` has a running service take newer weights; `triton DIR --repository
REPOSITORY` writes what Triton loads; `crosscheck MODEL.zip --artifact DIR` compares an artifact
with Stable-Baselines3 itself.

Exit codes: 0 every requested format passed its parity check, or the weights serve; 1 one did not,
and there is no artifact, or the service refused; 2 bad input; 130 interrupted, 143 terminated. One
clear line on stderr says why.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from export.console import fail
from export.inspection import show_artifact
from export.manifest import ArtifactError
from export.options import (
    crosscheck_parser,
    export_parser,
    inspect_parser,
    push_parser,
    triton_parser,
    verify_parser,
)

PARSERS = {
    "export": export_parser,
    "verify": verify_parser,
    "inspect": inspect_parser,
    "push": push_parser,
    "triton": triton_parser,
    "crosscheck": crosscheck_parser,
}
EXTRA = "torch"
BROUGHT_BY_EXTRA = {"jinja2", "onnx", "onnxscript", "torch"}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    has_command = bool(arguments) and arguments[0] in PARSERS.keys() - {"export"}
    command, options = (arguments[0], arguments[1:]) if has_command else ("export", arguments)
    try:
        return _run(command, options)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def _run(command: str, arguments: Sequence[str]) -> int:
    options = PARSERS[command]().parse_args(arguments)
    if command == "inspect":
        try:
            show_artifact(options.directory, as_json=options.json)
        except ArtifactError as error:
            fail(str(error))
        return 0
    with _extra_named(command):
        if command == "triton":
            from export.triton.command import run as run_triton

            return run_triton(options)
        if command == "crosscheck":
            from export.crosscheck.command import run as run_crosscheck

            return run_crosscheck(options)
        from export.commands import run

        return run(command, options)


@contextmanager
def _extra_named(command: str) -> Iterator[None]:
    """What is not installed, and which extra brings it, in a sentence instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in BROUGHT_BY_EXTRA:
            raise
        fail(
            f"{command} takes {module}, which is not installed; the extra {EXTRA!r} brings it: "
            f"pip install 'tamiyo-serve[{EXTRA}]'"
        )


if __name__ == "__main__":
    raise SystemExit(main())
