"""A policy becomes a verified artifact directory: `python -m export`, or `export_policy(...)`.

`push_policy(...)` has a running service take a policy's new weights.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.exporter import export_policy
    from export.push import push_policy

__all__ = ["export_policy", "push_policy"]


def __getattr__(name: str) -> Any:
    """Imports what takes torch when it is asked for: the service reads manifests without."""
    if name == "export_policy":
        from export.exporter import export_policy

        return export_policy
    if name == "push_policy":
        from export.push import push_policy

        return push_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
