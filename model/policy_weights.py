"""Where in a file the policy's weights lie, and under which names.

Trainers put a state_dict beside other entries, under a name of their own, and what wraps a module
(torch.compile, DataParallel, an agent with a policy) puts a prefix before each of its names.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.checkpoint_file import CheckpointError, names, short

FIRST_WEIGHT = "feature_net.0.weight"
"""What a policy is recognised by: every Tamiyo has it."""
COMPILED = "_orig_mod"
"""What torch.compile puts into the names of what it wraps, be it the policy or a part of it."""


class PolicyWeights(NamedTuple):
    """The weights under the policy's own names, and what the file holds beside and around them.

    `entry` is the keys that lead to them, none where the file is a state_dict itself.
    """

    entry: tuple[str, ...]
    weights: dict[str, Tensor]
    beside: Mapping[str, Any]


class _Place(NamedTuple):
    """A mapping in the file, and the one that holds it."""

    mapping: Mapping[Any, Any]
    key: object = None
    outer: "_Place | None" = None


def find_weights(path: Path, content: Mapping[str, Any]) -> PolicyWeights:
    """The one mapping of the file, however deep, that is a policy's state_dict.

    A prefix comes off where every name has it, and `_orig_mod` wherever it stands in a name. Raises
    CheckpointError where there is no such mapping or more than one, where a name has no prefix that
    others have, where two names become one, and where a value is no plain tensor.
    """
    found = list(_state_dicts(content))
    if not found:
        raise CheckpointError(
            f"{path}: has no {FIRST_WEIGHT!r} anywhere, so it holds no Tamiyo policy; its entries "
            f"are {names(list(content)) or 'none'}"
        )
    chains = [list(_chain(place)) for place in found]
    entries = [tuple(str(place.key) for place in chain[-2::-1]) for chain in chains]
    if len(found) > 1:
        under = names([".".join(entry) or "its top" for entry in sorted(entries)])
        raise CheckpointError(
            f"{path}: holds {len(found)} policies, under {under}; save the one to export alone"
        )
    weights = _tensors(path, _without_prefix(path, found[0].mapping))
    around = [place.mapping for place in chains[0] if isinstance(place.mapping, MutableMapping)]
    return PolicyWeights(entries[0], weights, ChainMap(*around))


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[_Place]:
    waiting, seen = [_Place(content)], {id(content)}
    while waiting:
        place = waiting.pop()
        if any(_is_first_weight(*item) for item in place.mapping.items()):
            yield place
        for key, value in place.mapping.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(_Place(value, key, place))


def _is_first_weight(name: object, value: object) -> bool:
    is_named_so = isinstance(name, str) and f".{uncompiled(name)}".endswith(f".{FIRST_WEIGHT}")
    return is_named_so and isinstance(value, Tensor | np.ndarray)


def _chain(place: _Place | None) -> Iterator[_Place]:
    """The place and all that are around it, the file's own mapping last."""
    while place is not None:
        yield place
        place = place.outer


def _without_prefix(path: Path, state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    first, *others = [name for name, value in state_dict.items() if _is_first_weight(name, value)]
    if others:
        raise _two_of_one(path, first, others[0])
    prefix = uncompiled(first).removesuffix(FIRST_WEIGHT)
    given: dict[str, str] = {}
    for name in state_dict:
        if not isinstance(name, str) or not uncompiled(name).startswith(prefix):
            raise CheckpointError(
                f"{path}: its weights are not all of one module: {short(first)} has the prefix "
                f"{short(prefix)} and {short(name)} has not"
            )
        plain = uncompiled(name).removeprefix(prefix)
        if plain in given:
            raise _two_of_one(path, given[plain], name)
        given[plain] = name
    return {plain: state_dict[name] for plain, name in given.items()}


def uncompiled(name: str) -> str:
    """A weight's own name, without what torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _two_of_one(path: Path, one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds both {short(one)} and {short(other)}; save one policy alone"
    )


def _tensors(path: Path, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in state_dict.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {short(name)} is a {type(value).__name__}, and weights are tensors"
            )
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            raise CheckpointError(
                f"{path}: {short(name)} is no plain tensor: {value.layout} on {value.device}"
            )
        tensors[name] = value
    return tensors
