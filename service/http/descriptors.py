"""File descriptors, of which each connection takes one."""

import os

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

SPARE = 64
"""For what is opened after the count: the artifact's files, the loop's own, metrics, logs."""


def raise_descriptor_limit() -> int | None:
    """Takes as many descriptors as the system gives; how many connections that is, if it is finite.

    Debian and systemd start a process with 1,024 and let it have a hundred times as many.
    """
    if resource is None:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):  # macOS has a hard limit that it does not allow
        pass
    if soft == resource.RLIM_INFINITY:
        return None
    in_use = sum(_is_open(number) for number in range(min(soft, 4096)))
    return max(1, soft - in_use - SPARE)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
