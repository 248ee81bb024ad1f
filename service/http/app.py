"""The FastAPI application: routes, and the one place where errors become responses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from export.manifest import Array, Manifest
from service.engine.engine import Engine
from service.errors import ServiceError
from service.http.act import Act
from service.http.body import read_ignored
from service.http.codec import JSON, SAFETENSORS
from service.http.documentation import (
    ANYWHERE,
    REPLAYED,
    act_answer,
    act_examples,
    bearer,
    error_responses,
    every_error,
    json_content,
    safetensors_answer,
    safetensors_request,
    text_content,
    with_bearer,
    with_whole_bounds,
)
from service.http.endpoint import PATH, ActEndpoint
from service.http.front_page import as_html, front_page, respond
from service.http.inference_codec import InferenceCodec
from service.http.inference_routes import InferEndpoint, inference_routes
from service.http.keys import Keys
from service.http.policy_routes import policy_routes
from service.http.schemas import (
    Alive,
    FrontPage,
    Identifier,
    Limits,
    PolicyResponse,
    Ready,
    act_request,
    act_response,
    policy_response,
    vector_act_request,
    vector_act_response,
)
from service.http.weights_codec import WeightsCodec
from service.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from service.metrics import Metrics
from service.settings import Settings

DESCRIPTION = """
Actions of a recurrent, factored, action-masked policy, one step at a time.

Every error is `{"error": sentence, "error_type": word}`. A request to `POST /act` that has a `step`
may be sent again after any network error: it counts once. `HEAD` works wherever `GET` does.
"""
SESSION_ID = {
    "name": "session_id",
    "in": "path",
    "required": True,
    "description": "Percent-encoded; it may have slashes.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 256},
    "example": "env-17",
}


class _AnyConvertor(Convertor[str]):
    """Any name to its end; Starlette's `path` stops at a line's."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _AnyConvertor())


class App(FastAPI):
    """FastAPI, but for `POST /act`, which is answered before any middleware or routing."""

    act: Act
    act_endpoint: ActEndpoint
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix:  # which a proxy may have taken off the path, or not: both find their route
            scope["root_path"] = self.prefix
        paths = (PATH, scope.get("root_path", "") + PATH)
        if scope["type"] == "http" and scope["path"] in paths and scope["method"] == "POST":
            await self.act_endpoint(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # Routed as GET; the server, which has the other scope, leaves the body out.
            scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The document of `/openapi.json`; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = with_bearer(with_whole_bounds(super().openapi()))
        return self.openapi_schema


def create_app(
    engine: Engine,
    manifest: Manifest,
    settings: Settings,
    metrics: Metrics,
    keys: Keys,
    *,
    kind: type[App] = App,
) -> App:
    """The HTTP face of `engine`; warm-up runs while the socket already answers `/healthz`.

    `kind` is an app that knows its ASGI server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = kind(
        title="tamiyo-serve",
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        responses=error_responses(*ANYWHERE),
    )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unknown_error)

    metrics.watch_engine(engine.sessions, lambda: len(engine.batcher))
    metrics.watch_version(manifest.name, lambda: engine.versions.current.policy_version)
    app.act = Act(engine, manifest, settings, keys)
    app.act_endpoint = ActEndpoint(app.act, metrics)
    app.prefix = settings.root_path

    inference = InferenceCodec(
        manifest, max_rows=engine.max_rows, max_body_bytes=settings.max_body_bytes
    )
    spec = manifest.spec
    act_body: Any = act_request(spec) | vector_act_request(spec)
    act_answers: Any = act_response(spec) | vector_act_response(spec)
    answers = json_content(act_answer(spec, manifest.policy_version)) | safetensors_answer(spec)
    to_act = bearer(is_needed=keys.are_needed_to_act)

    @app.post(
        PATH,
        response_model=act_answers,
        responses={200: {"content": answers, "headers": REPLAYED}, **every_error()},
        openapi_extra={"requestBody": {"content": safetensors_request(spec)}, **to_act},
    )
    async def act(
        body: Annotated[act_body, Body(openapi_examples=act_examples(spec))],
        x_session_id: Annotated[
            Identifier | None,
            Header(description="For load balancers; equal to `session_id` of the body."),
        ] = None,
    ) -> Response:
        """Takes one step of one environment, or of a vector of them that step together.

        The answer comes in the form of `Accept`, by default in that of the request.
        """
        raise AssertionError("ActEndpoint has answered already; this is its documentation")

    @app.delete(
        "/sessions/{session_id:any}",
        status_code=204,
        dependencies=[Depends(keys.may_act)],
        responses=error_responses(401, 404, 410, 413),
        openapi_extra={"parameters": [SESSION_ID], **to_act},
    )
    async def end_session(request: Request) -> None:
        """Ends a session and frees its state."""
        await read_ignored(request.receive)
        engine.sessions.end(request.path_params["session_id"])

    @app.get("/healthz", responses={200: {"content": json_content({"alive": True})}})
    async def healthz() -> Alive:
        """The process is alive."""
        return Alive()

    @app.get(
        "/readyz",
        responses={200: {"content": json_content({"ready": True})}, **error_responses(503)},
    )
    async def readyz() -> Ready:
        """Every batch size has run once, and the end is not near: `/act` answers at full speed."""
        engine.check_ready()
        return Ready()

    infer = InferEndpoint(app.act, engine, inference, metrics, keys)
    app.include_router(inference_routes(manifest, infer, engine, inference, keys))

    weights = WeightsCodec(manifest)
    app.include_router(policy_routes(engine, weights, keys))

    policy_answer = policy_response(spec)

    def describe_policy() -> PolicyResponse:
        return policy_answer(
            name=manifest.name,
            policy_version=engine.versions.current.policy_version,
            spec=spec,
            states=[Array.of_state(of.name, of) for of in spec.states],
            runtime=engine.runtime.name,
            device=engine.runtime.device,
            precision=manifest.precision,
            has_normalizer=manifest.has_normalizer,
            parameters=list(manifest.parameters),
            limits=Limits(
                max_batch_size=engine.max_batch_size,
                max_rows=engine.max_rows,
                max_waiting=settings.max_waiting,
                max_sessions=settings.max_sessions,
                session_idle_s=settings.session_idle_s,
                timeout_ms=settings.timeout_ms,
                max_body_bytes=app.act.max_body_bytes[JSON],
                max_safetensors_bytes=app.act.max_body_bytes[SAFETENSORS],
                max_weights_bytes=weights.max_body_bytes,
            ),
        )

    served = json_content(describe_policy().model_dump(mode="json"))

    @app.get("/policy", response_model=policy_answer, responses={200: {"content": served}})
    async def policy() -> PolicyResponse:
        """What is served, and within which limits."""
        return describe_policy()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": text_content("text/plain", "tamiyo_sessions 1.0\n")}},
    )
    async def render_metrics() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type=METRICS_CONTENT_TYPE)

    def page(prefix: str) -> FrontPage:
        return front_page(manifest.name, engine.versions.current.policy_version, prefix)

    either = json_content(page("").model_dump()) | text_content("text/html", as_html(page("")))

    @app.get("/", response_model=FrontPage, responses={200: {"content": either}})
    async def index(request: Request) -> Response:
        """What this is and where to go, as JSON or, where `Accept` would rather have it, HTML."""
        return respond(page(request.scope.get("root_path", "")), request)

    return app


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    error_type = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed")
    sentence = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": sentence, "error_type": error_type}
    headers = dict(error.headers or {})
    methods = headers.get("Allow", "").split(", ")
    if "GET" in methods:
        headers["Allow"] = ", ".join(sorted({*methods, "HEAD"}))
    return JSONResponse(body, error.status_code, headers)


async def _unknown_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again once this is sent, so the server's log has it all.
    return await _service_error(request, ServiceError("internal error"))
