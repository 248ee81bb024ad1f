"""`python -m service`: serves an artifact until SIGTERM or Ctrl-C.

Exit codes: 0 asked to stop; 1 the policy failed while warming up, or the sessions could not be
written at the end; 2 bad settings, key file, artifact or snapshot.
"""

import signal
from types import FrameType
from typing import NoReturn

EXIT_CODES = {int(signal.SIGTERM): 0, int(signal.SIGINT): 130}
asked_to_stop: list[int] = []


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    asked_to_stop.append(number)
    raise SystemExit(EXIT_CODES[number])


if __name__ == "__main__":
    # First of all, as what follows takes a while to import, and as a container's first process this
    # one has no default for SIGTERM: it would be lost.
    for number in EXIT_CODES:
        signal.signal(number, _stop_at_once)
    # Nothing is read yet that this would have read again.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from service.server import main

    raise SystemExit(main(asked_to_stop))
