"""What Stable-Baselines3 makes of spaces: a flat observation, and heads that choose an action.

Facts: 2.9.2's `preprocess_obs`, `FlattenExtractor` and `CombinedExtractor`.
"""

import math

from model.checkpoint_file import CheckpointError, short
from model.sb3.space_text import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
from model.sb3.spec import ObservationPart
from model.step_spec import HeadSpec

NO_ONE_HOT = "and the trainer makes no one-hot of what does not"


def flat_observation(space: Space) -> tuple[int, tuple[ObservationPart, ...]]:
    """How many numbers the network reads, and of which parts.

    A Dict's parts are in its own order, which is that of its sorted keys unless it was made of an
    OrderedDict. Raises CheckpointError for images, and for choices that do not start at 0, which
    the trainer makes no one-hot of.
    """
    if not isinstance(space, Dict):
        part = _part(None, space)
        return part.size, (part,)
    if not space.spaces:
        raise CheckpointError("its observation space is a Dict of nothing")
    seen: set[str] = set()
    for key, _ in space.spaces:
        if key in seen:
            raise CheckpointError(f"its observation space has {short(key)} twice")
        seen.add(key)
    parts = tuple(_part(key, inner) for key, inner in space.spaces)
    return sum(part.size for part in parts), parts


def choices(space: Space) -> int:
    """Of all heads side by side.

    Raises CheckpointError for a Box, a Dict and a MultiBinary of more than one dimension.
    """
    match space:
        case Discrete(n):
            return n
        case MultiDiscrete(nvec):
            return sum(nvec)
        case MultiBinary((n,)):
            return 2 * n
        case MultiBinary(shape):
            raise CheckpointError(
                f"its action space is a MultiBinary of shape {shape}, and no trainer has actions "
                "of one"
            )
        case Box():
            raise CheckpointError(
                "its action space is a Box, and continuous actions are not exported"
            )
        case Dict():
            raise CheckpointError("its action space is a Dict, and no trainer has actions of one")


def heads(space: Space) -> tuple[HeadSpec, ...]:
    """One head a choice, in order, of a space that has `choices`; a MultiBinary's are of two each.

    Where choices start makes no difference: the trainer chooses among them by index.
    """
    match space:
        case Discrete(n):
            return (HeadSpec(name="action", size=n),)
        case MultiDiscrete(nvec):
            return _numbered(nvec)
        case MultiBinary((n,)):
            return _numbered((2,) * n)
    raise AssertionError(f"{space} has no choices")


def _numbered(sizes: tuple[int, ...]) -> tuple[HeadSpec, ...]:
    return tuple(HeadSpec(name=f"action_{index}", size=size) for index, size in enumerate(sizes))


def _part(key: str | None, space: Space) -> ObservationPart:
    where = "its observation space" if key is None else f"its observation space's {short(key)}"
    match space:
        case Box(shape, dtype):
            if dtype == "uint8" and len(shape) == 3:
                raise CheckpointError(
                    f"{where} is of images, which the trainer scales or reads by a CNN, and "
                    "vectors are read"
                )
            return ObservationPart(key=key, kind="box", size=math.prod(shape))
        case MultiBinary(shape):
            return ObservationPart(key=key, kind="bits", size=math.prod(shape))
        case Discrete(start=start) if start:
            raise CheckpointError(f"{where} does not start at 0, {NO_ONE_HOT}")
        case Discrete(n):
            return ObservationPart(key=key, kind="one_hot", size=n)
        case MultiDiscrete(start=starts) if any(starts):
            raise CheckpointError(f"{where} does not start at 0, {NO_ONE_HOT}")
        case MultiDiscrete(nvec):
            return ObservationPart(key=key, kind="one_hot", size=sum(nvec))
    raise AssertionError(f"{space} is refused where it is read, within a Dict")
