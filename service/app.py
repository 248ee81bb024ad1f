"""The FastAPI application: routes, and the one place where errors become responses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from model.spec import PolicySpec
from service.act import CONTENT_TYPE
from service.endpoint import PATH, ActEndpoint
from service.errors import ServiceError
from service.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from service.policy_service import PolicyService
from service.schemas import ErrorResponse, PolicyResponse, act_request, act_response


class App(FastAPI):
    """FastAPI, but for `POST /act`, which is answered before any middleware or routing."""

    act_endpoint: ActEndpoint
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix:  # which a proxy may have taken off the path, or not: both find their route
            scope["root_path"] = self.prefix
        paths = (PATH, self.prefix + PATH)
        if scope["type"] == "http" and scope["path"] in paths and scope["method"] == "POST":
            await self.act_endpoint(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(service: PolicyService) -> App:
    """The HTTP face of `service`; warm-up runs while the socket already answers `/healthz`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = App(
        title="tamiyo-serve",
        description="Actions of a recurrent, factored, action-masked policy, one step at a time.",
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"default": {"model": ErrorResponse, "description": "Any error"}},
    )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unknown_error)

    app.act_endpoint = ActEndpoint(service)
    app.prefix = service.settings.root_path

    spec = service.manifest.spec

    @app.post(PATH, response_model=act_response(spec), openapi_extra=_act_body(spec))
    async def act() -> Response:
        """Takes one step of one environment."""
        raise AssertionError("ActEndpoint has answered already; this is its documentation")

    @app.delete("/sessions/{session_id:path}", status_code=204)
    async def end_session(session_id: str) -> None:
        """Ends a session and frees its state."""
        service.sessions.end(session_id)

    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        """The process is alive."""
        return {"alive": True}

    @app.get("/readyz")
    async def readyz() -> dict[str, bool]:
        """Every batch size has run once: `/act` answers at full speed."""
        service.check_ready()
        return {"ready": True}

    @app.get("/policy")
    async def policy() -> PolicyResponse:
        """What is served, and within which limits."""
        settings, manifest = service.settings, service.manifest
        return PolicyResponse(
            name=manifest.name,
            policy_version=manifest.policy_version,
            spec=manifest.spec.model_dump(mode="json"),
            runtime=service.runtime.name,
            device=service.runtime.device,
            limits={
                "max_batch_size": service.max_batch_size,
                "max_waiting": settings.max_waiting,
                "max_sessions": settings.max_sessions,
                "session_idle_s": settings.session_idle_s,
                "timeout_ms": settings.timeout_ms,
                "max_body_bytes": settings.max_body_bytes,
            },
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=METRICS_CONTENT_TYPE)

    return app


def _act_body(spec: PolicySpec) -> dict[str, Any]:
    schema = act_request(spec).model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")  # HiddenStateBody is a component already, by way of ActResponse
    return {"requestBody": {"required": True, "content": {CONTENT_TYPE: {"schema": schema}}}}


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    error_type = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed")
    sentence = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": sentence, "error_type": error_type}
    return JSONResponse(body, error.status_code, error.headers)


async def _unknown_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again once this is sent, so the server's log has it all.
    return await _service_error(request, ServiceError("internal error"))
