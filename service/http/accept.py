"""What a client would rather be answered in (RFC 9110, 12.5.1)."""

from math import isfinite


def quality(accept: str, media_type: str) -> float:
    """How welcome `media_type` is, from 0 to 1: what the most specific range says."""
    ranges = ("*/*", media_type.partition("/")[0] + "/*", media_type)
    specificity, welcome = -1, 0.0
    for given in accept.lower().split(","):
        name, *parameters = (part.strip() for part in given.split(";"))
        if name in ranges and ranges.index(name) > specificity:
            specificity, welcome = ranges.index(name), _q(parameters)
    return welcome


def _q(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                welcome = float(parameter.removeprefix("q="))
                return welcome if isfinite(welcome) else 0.0
            except ValueError:
                return 0.0
    return 1.0
