"""Why a JSON body is not what was to be sent, in a sentence instead of pydantic's list."""

from typing import Any

from pydantic import ValidationError

from service.errors import Invalid, Malformed, short

WRONG_LENGTH = ("too_short", "too_long")


def refusal(error: ValidationError) -> Malformed | Invalid:
    """Of another form than the documented one; or of that form, with a length not the policy's."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((found for found in errors if found["type"] not in WRONG_LENGTH), errors[0])
    where = _path(first["loc"])
    if first["type"] in WRONG_LENGTH:
        of = first["ctx"]
        length = of.get("min_length", of.get("max_length"))
        return Invalid(f"`{where}` has {of['actual_length']} values, the policy reads {length}")
    if first["type"] == "json_invalid":
        return Malformed(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    return Malformed(f"`{where}`: {first['msg']}" if where else f"the body: {first['msg']}")


def unknown_field(parent: str, given: dict[str, Any]) -> Malformed:
    return Malformed(f"`{parent}{short(next(iter(given)))}` is not a field of the request")


def _path(location: tuple[int | str, ...]) -> str:
    """As JavaScript and Python write it: `state.h[0]`."""
    return "".join(
        f"[{name}]" if isinstance(name, int) else f".{name}" for name in location
    ).removeprefix(".")
