"""What `data` says in JSON and text: a model's attributes, without the pickles among them."""

import json
from typing import NamedTuple

from model.checkpoint_file import CheckpointError, short

TYPE = ":type:"
PICKLED = ":serialized:"
MOST_VALUES = 1_000_000
"""Of lists, mappings and what is in them: each takes tens of bytes, whatever it takes here."""


class Mirror(NamedTuple):
    """An attribute that is no JSON: its type as text, and its own attributes as JSON or text."""

    type: str
    attributes: dict[str, object]


def read_attributes(data: bytes) -> dict[str, object]:
    """The model's attributes by name: a Mirror where it was pickled, and else plain JSON.

    No pickle is decoded or kept. Raises CheckpointError for what is no JSON of a mapping, too deep
    or too long, or names a key twice.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError("its data is not UTF-8") from error
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise CheckpointError(f"its data has more than {MOST_VALUES} values")
    try:
        read = json.loads(text, object_pairs_hook=_mapping)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError("its data is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError("its data cannot be read as JSON") from error
    if not isinstance(read, dict):
        raise CheckpointError("its data is no mapping of attributes")
    return {name: _attribute(name, value) for name, value in read.items()}


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key, value in pairs:
        if key in mapping:
            raise CheckpointError(f"its data says {short(key)} twice")
        mapping[key] = value
    return mapping


def _attribute(name: str, value: object) -> object:
    if not isinstance(value, dict) or PICKLED not in value:
        return value
    kind = value.pop(TYPE, None)
    del value[PICKLED]
    if not isinstance(kind, str):
        raise CheckpointError(f"its data does not say what type {short(name)} is of")
    return Mirror(kind, value)
