"""What the forms have in common that requests and answers of `POST /act` come in."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.block import Answer, Block
from service.errors import Invalid, TooLarge

JSON = "application/json"
SAFETENSORS = "application/vnd.safetensors"


class Request(NamedTuple):
    """What a body asks: a block to step, and how long it may wait."""

    block: Block
    timeout_ms: float | None


class Codec(Protocol):
    """One form, for one policy."""

    content_type: str
    max_body_bytes: int

    def parse(self, body: bytes | bytearray) -> Request:
        """The request, complete and consistent with the policy.

        Raises Malformed where the body is not of the documented form, Invalid where it is but a
        length, a value or a mask is not the policy's, and TooLarge for too many rows.
        """

    def write(self, block: Block, answer: Answer) -> bytes:
        """The answer's bytes; the same answer always gives the same bytes."""


def check_rows(num_rows: int, max_rows: int, others: Mapping[str, int]) -> None:
    """Raises TooLarge for more rows than the server takes, and Invalid where others have others."""
    if num_rows > max_rows:
        raise TooLarge(f"the request has {num_rows} rows, the server takes {max_rows}")
    for name, number in others.items():
        if number != num_rows:
            raise Invalid(f"`{name}` has {number} rows, `observation` has {num_rows}")


def check_session(
    session_id: str | None,
    has_state: bool,
    starts: bool,
    named: Mapping[str, str | None],
    *,
    session: str = "session_id",
) -> None:
    """Raises Invalid for what a session's request has not, or only a session's has.

    `session` is what the form calls the session's name.
    """
    if session_id is not None:
        if has_state:
            raise Invalid("`state` is for stateless requests; the server keeps a session's state")
        return
    for name, is_given in (
        *((name, value is not None) for name, value in named.items()),
        ("episode_start", starts),
    ):
        if is_given:
            raise Invalid(f"`{name}` needs a `{session}`")


def vector_starts(starts: NDArray[np.bool_], step: int | None) -> bool | NDArray[np.bool_]:
    """Which rows of a vector start, as a block has it.

    Raises Invalid where a run would begin with some of its rows.
    """
    if starts.all():
        return True
    if not starts.any():
        return False
    if step == 0:
        row = int(starts.argmin())
        raise Invalid(f"a run's first step starts every row, and `episode_start[{row}]` is false")
    return starts
