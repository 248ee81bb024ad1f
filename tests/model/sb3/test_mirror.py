"""`data`: JSON and text mirrors, of which nothing is unpickled, or a sentence."""

import json

import pytest

from model.checkpoint_file import CheckpointError
from model.sb3.mirror import MOST_VALUES, Mirror, read_attributes
from tests.model.sb3.saved_models import pickled


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_attributes(data)
    return str(caught.value)


def test_json_is_as_it_is_and_what_was_pickled_is_its_text() -> None:
    written = {
        "gamma": 0.99,
        "target_kl": float("nan"),
        "policy_kwargs": {"net_arch": [1, {"pi": []}], ":type:": "no pickle"},
        "observation_space": pickled("gym.Box", dtype="float32", _shape=[6]),
    }
    read = read_attributes(json.dumps(written, indent=4).encode())
    assert read.pop("target_kl") != read.get("target_kl")
    assert read == {
        "gamma": 0.99,
        "policy_kwargs": {"net_arch": [1, {"pi": []}], ":type:": "no pickle"},
        "observation_space": Mirror("<class 'gym.Box'>", {"dtype": "float32", "_shape": [6]}),
    }
    assert "serialized" not in repr(read)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "its data cannot be read as JSON"),
        (b'{"a": 1', "its data cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "its data cannot be read as JSON"),
        (b"\xff\xfe{}", "its data is not UTF-8"),
        (b"[1]", "its data is no mapping of attributes"),
        (b"3", "its data is no mapping of attributes"),
        (b'{"a": 1, "a": 2}', "its data says 'a' twice"),
        (b'{"x": {"a": 1, "a": 2}}', "its data says 'a' twice"),
        (b'{"x": {":serialized:": "", ":type:": 3}}', "its data does not say what type 'x' is of"),
        (b'{"x": {":serialized:": ""}}', "its data does not say what type 'x' is of"),
        (b"[" * 100_000, "its data is nested too deeply"),
        (b'{"a":' * 100_000, "its data is nested too deeply"),
        (b"[" + b"0," * MOST_VALUES + b"0]", "its data has more than 1000000 values"),
    ],
    ids=[
        *("empty", "cut", "a number beyond", "UTF-16", "a list", "a number", "twice"),
        *("twice within", "type of another kind", "no type", "lists", "mappings", "values"),
    ],
)
def test_other_data_is_refused(data: bytes, said: str) -> None:
    assert refusal(data) == said
