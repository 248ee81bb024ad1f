"""JSON bodies that the fake policy reads, and what an error looks like."""

from collections.abc import Sequence
from typing import Any

import httpx

from model.step_spec import StepSpec

Json = dict[str, Any]


def observation(spec: StepSpec, x: float = 1.0) -> list[float]:
    return [x] + [0.0] * (spec.observation_dim - 1)


def body(spec: StepSpec, x: float = 1.0, **fields: Any) -> Json:
    return {"observation": observation(spec, x)} | fields


def vector_body(spec: StepSpec, xs: Sequence[float], **fields: Any) -> Json:
    return {"observation": [observation(spec, x) for x in xs]} | fields


def raw(spec: StepSpec, first: str) -> bytes:
    """A body whose first observed value is written as `first`, JSON or not."""
    return f'{{"observation": [{first}{", 0" * (spec.observation_dim - 1)}]}}'.encode()


def error_of(response: httpx.Response, status: int, error_type: str) -> str:
    """The sentence of an error whose status, type and form are right."""
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert (response.status_code, answer.get("error_type")) == (status, error_type), answer
    assert answer.keys() == {"error", "error_type"}
    sentence = answer["error"]
    assert isinstance(sentence, str)
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence
