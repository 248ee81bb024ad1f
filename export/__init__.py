"""A policy becomes a verified artifact directory: `python -m export`, or `export_policy(...)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.exporter import export_policy

__all__ = ["export_policy"]


def __getattr__(name: str) -> Any:
    """Imports the exporter when it is asked for: the service reads manifests without torch."""
    if name == "export_policy":
        from export.exporter import export_policy

        return export_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
