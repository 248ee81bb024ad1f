"""The routes that change the weights which serve, and that say which do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from service.engine.engine import Engine
from service.engine.policy_versions import Change
from service.errors import (
    Malformed,
    NoPreviousVersion,
    PushConflict,
    UnsupportedContentType,
    short,
)
from service.http.body import check_announced, check_encoding, read_body, read_ignored
from service.http.codec import SAFETENSORS
from service.http.documentation import (
    OF_SESSIONS,
    Responses,
    bearer,
    error_responses,
    json_content,
)
from service.http.keys import Keys
from service.http.weights_codec import WeightsCodec

MOST_BODIES = 4
"""That are read at once. One is taken at a time, and each may be as large as a push gets."""
SESSIONS = {
    "name": "sessions",
    "in": "query",
    "description": "`restart` gives up every session (410), whose states other weights made.",
    "schema": {"enum": ["keep", "restart"], "default": "keep"},
}
IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "The version that is to be replaced; another serves: 412.",
    "schema": {"type": "string"},
}
EXAMPLE_VERSION, EXAMPLE_BEFORE = "sha256:" + "ab12" * 16, "sha256:" + "cd34" * 16


class WeightsResponse(BaseModel):
    """Which weights serve now, which did before, and how near they came to their probe."""

    policy_version: str
    previous_version: str | None
    probe_error: float | None


class ServedVersion(BaseModel):
    """Weights, and since when they served. The artifact's own have no probe error."""

    policy_version: str
    since: datetime
    probe_error: float | None


class VersionsResponse(BaseModel):
    """The weights that served last, the newest first, of which the first serve."""

    policy_version: str
    previous_version: str | None
    versions: list[ServedVersion]


def policy_routes(engine: Engine, codec: WeightsCodec, keys: Keys) -> APIRouter:
    """Routes below `/policy`."""
    router = APIRouter(prefix="/policy")
    versions = engine.versions
    bodies = asyncio.Semaphore(MOST_BODIES)
    By = Annotated[str, Depends(keys.may_administer)]
    serving = {"policy_version": EXAMPLE_VERSION, "previous_version": EXAMPLE_BEFORE}
    changed = {**serving, "probe_error": 3e-7}
    answers: Responses = {200: {"content": json_content(changed)}}
    of_push = error_responses(
        *(400, 401, 403, 409, 412, 413, 415, 422, 503), but=(*OF_SESSIONS, NoPreviousVersion)
    )

    @router.put(
        "/weights",
        responses={**answers, **of_push},
        openapi_extra={
            **bearer(is_needed=keys.are_needed_to_administer),
            "parameters": [SESSIONS, IF_MATCH],
            "requestBody": {"required": True, "content": _weights_file()},
        },
    )
    async def put_weights(request: Request, by: By) -> WeightsResponse:
        """Has other weights serve, between two batches, once they do what their probe says."""
        engine.check_ready()
        versions.check_idle()
        restarts, if_match = _restarts_sessions(request), _if_match(request)
        async with _room(bodies):
            body = await _read(request, codec.max_body_bytes)
        change = await versions.push(
            lambda: codec.parse(body), if_match=if_match, restarts_sessions=restarts, by=by
        )
        return _response(change)

    @router.post(
        "/rollback",
        responses={
            **answers,
            **error_responses(400, 401, 403, 409, 412, 413, 503, but=OF_SESSIONS),
        },
        openapi_extra={
            **bearer(is_needed=keys.are_needed_to_administer),
            "parameters": [SESSIONS, IF_MATCH],
        },
    )
    async def roll_back(request: Request, by: By) -> WeightsResponse:
        """Has the version before the last push serve again; the way back leads once."""
        engine.check_ready()
        restarts, if_match = _restarts_sessions(request), _if_match(request)
        await read_ignored(request.receive)
        return _response(
            await versions.rollback(if_match=if_match, restarts_sessions=restarts, by=by)
        )

    shown = [
        {"policy_version": version, "since": since, "probe_error": 3e-7}
        for version, since in (
            (EXAMPLE_VERSION, "2027-01-01T00:00:10Z"),
            (EXAMPLE_BEFORE, "2027-01-01T00:00:00Z"),
        )
    ]
    listed = {**serving, "versions": shown}

    @router.get("/versions", responses={200: {"content": json_content(listed)}})
    async def list_versions() -> VersionsResponse:
        """The weights that served last, with times and probe errors."""
        previous = versions.previous
        return VersionsResponse(
            policy_version=versions.current.policy_version,
            previous_version=None if previous is None else previous.policy_version,
            versions=[
                ServedVersion(
                    policy_version=version.policy_version,
                    since=version.since,
                    probe_error=version.probe_error,
                )
                for version in versions.listed
            ],
        )

    return router


def _response(change: Change) -> WeightsResponse:
    return WeightsResponse(**change._asdict())


def _restarts_sessions(request: Request) -> bool:
    for name in request.query_params:
        if name != "sessions":
            raise Malformed(f"`{short(name)}` is no parameter of this route; `sessions` is")
    given = request.query_params.getlist("sessions")
    if len(given) > 1:
        raise Malformed("`sessions` is given twice")
    what = given[0] if given else "keep"
    if what not in ("keep", "restart"):
        raise Malformed(f"`sessions` is {short(what)!r}, not 'keep' or 'restart'")
    return what == "restart"


def _if_match(request: Request) -> list[str] | None:
    """Versions as RFC 9110 writes them, within quotes, or bare."""
    given = request.headers.getlist("if-match")
    if not given:
        return None
    return [version.strip().strip('"') for line in given for version in line.split(",")]


@asynccontextmanager
async def _room(bodies: asyncio.Semaphore) -> AsyncIterator[None]:
    """Raises PushConflict where as many are being read as there is memory for."""
    if bodies.locked():
        raise PushConflict(f"{MOST_BODIES} pushes are being read just now; try again")
    async with bodies:
        yield


async def _read(request: Request, limit: int) -> bytearray:
    """Raises UnsupportedContentType, TooLarge before anything is read beyond the limit, and
    Disconnected where the rest never came."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != SAFETENSORS:
        raise UnsupportedContentType(
            f"the content type is {short(content_type)!r}; send {SAFETENSORS}"
        )
    for name, value in request.headers.raw:
        if name in (b"content-encoding", b"transfer-encoding"):
            check_encoding(name, value)
        elif name == b"content-length":
            check_announced(value, limit)
    return await read_body(request.receive, limit)


def _weights_file() -> dict[str, Any]:
    return {
        SAFETENSORS: {
            "schema": {
                "type": "string",
                "format": "binary",
                "description": "One safetensors file: every one of the policy's parameters, by the "
                "names in `GET /policy`, and a probe of what the learner's policy does with them: "
                "`probe.NAME` for each input and output of the step, [steps, rows, ...], the "
                "states that went in [rows, ...].",
            }
        }
    }
