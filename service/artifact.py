"""Which artifact a path means: itself, or the only one in it."""

import logging
from pathlib import Path

from export.manifest import MANIFEST_FILE, ArtifactError

logger = logging.getLogger(__name__)


def find_artifact(path: Path) -> Path:
    """`path`, or the artifact in it where it is no artifact itself and holds exactly one.

    Raises ArtifactError, naming them, where it holds several. Of a path that holds none, reading
    its manifest says what is wrong.
    """
    try:
        if (path / MANIFEST_FILE).exists():
            return path
        inside = sorted(file.parent for file in path.glob(f"[!.]*/{MANIFEST_FILE}"))
    except PermissionError:
        return path
    if len(inside) > 1:
        raise ArtifactError(
            f"{path}: holds several artifacts; --artifact or TAMIYO_ARTIFACT names one of "
            f"{', '.join(map(str, inside))}"
        )
    if inside:
        logger.info("%s holds one artifact, %s", path, inside[0].name)
    return inside[0] if inside else path
