"""The Open Inference Protocol, version 2: routes below `/v2`, for one model, the policy."""

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version as version_of
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive

from export.manifest import Manifest
from service.engine.engine import Engine
from service.errors import Malformed
from service.http.act import OF_TWO_SESSIONS, Act, Headers
from service.http.body import LONGEST_LENGTH, check_announced, check_encoding, read_body
from service.http.codec import JSON
from service.http.compression import compressed, decompressed, preferred
from service.http.documentation import (
    OF_SESSIONS,
    OF_WEIGHTS,
    REPLAYED,
    Json,
    Responses,
    bearer,
    error_responses,
    every_error,
    infer_answer,
    infer_examples,
    json_content,
)
from service.http.endpoint import AsgiExchange
from service.http.inference_codec import BINARY, InferenceCall, InferenceCodec
from service.http.inference_schemas import (
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
)
from service.http.keys import Keys
from service.http.schemas import Ready
from service.metrics import Metrics

MANY_BYTES = 1 << 14
PROJECT = "tamiyo-serve"
EXTENSIONS = ["binary_tensor_data", "parameters", "sequence", "sequence(string_id)"]
JSON_BYTES = "inference-header-content-length"
HEADERS = [
    {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "How many of the body's bytes are JSON, where tensors follow it; with 0 the "
        "body is the bytes of `observation`.",
        "schema": {"type": "integer", "minimum": 0},
    },
    {
        "name": "Content-Encoding",
        "in": "header",
        "description": "Of the body; `Accept-Encoding` is heeded as well.",
        "schema": {"enum": ["gzip", "deflate", "identity"]},
    },
    {
        "name": "X-Session-Id",
        "in": "header",
        "description": "For load balancers; equal to `sequence_id` of the body.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 256},
    },
]
OF_ANSWERS = REPLAYED | {
    "Inference-Header-Content-Length": {
        "description": "How many of the answer's bytes are JSON, where tensors follow it.",
        "schema": {"type": "integer"},
    },
    "Content-Encoding": {
        "description": "As `Accept-Encoding` would have it.",
        "schema": {"enum": ["gzip", "deflate"]},
    },
}
BINARY_REQUEST = {
    BINARY: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "The JSON, of the length that `Inference-Header-Content-Length` says, "
            "and behind it the tensors that have a `binary_data_size`, little-endian.",
        }
    }
}
BINARY_ANSWER = {
    BINARY: {
        "schema": {"type": "string", "format": "binary", "description": "The same of an answer."}
    }
}


class InferExchange(AsgiExchange):
    """Answers in the request's own form."""

    __slots__ = ("_call",)

    def __init__(
        self,
        metrics: Metrics,
        receive: Receive,
        call: InferenceCall,
    ) -> None:
        super().__init__(metrics, receive)
        self.reads = self.writes = self._call = call

    def respond(
        self, status: int, headers: Headers, content: bytes, content_type: str = JSON
    ) -> None:
        if self._call.answer_json_bytes is not None and status == 200:
            headers.append((JSON_BYTES.encode(), b"%d" % self._call.answer_json_bytes))
        super().respond(status, headers, content, content_type)


class InferEndpoint:
    """`POST .../infer`, of which every byte is read here."""

    def __init__(
        self, act: Act, engine: Engine, codec: InferenceCodec, metrics: Metrics, keys: Keys
    ) -> None:
        self._act = act
        self._engine = engine
        self._codec = codec
        self._metrics = metrics
        self._keys = keys

    async def __call__(self, request: Request) -> Response:
        call = InferenceCall(self._codec)
        exchange = InferExchange(self._metrics, request.receive, call)
        read = self._read(request, exchange, call)
        status, headers, content = await exchange.answered(self._act, read)
        if status == 200:
            content = await _encoded(content, headers, request)
        answered = Response(content, status)
        answered.raw_headers = headers
        return answered

    async def _read(
        self, request: Request, exchange: InferExchange, call: InferenceCall
    ) -> bytes | bytearray:
        """The body, out of its encoding. Raises why the request is not let in."""
        await self._keys.may_act(request)
        self._codec.check_model(**request.path_params)
        exchange.session_header = _session_header(request)
        call.json_bytes = _json_bytes(request)
        limit = call.max_body_bytes
        for length in request.headers.getlist("content-length"):
            check_announced(length.encode("latin-1"), limit)
        for transfer in request.headers.getlist("transfer-encoding"):
            check_encoding(b"transfer-encoding", transfer.encode("latin-1"))
        self._engine.check_open()
        encoding = ", ".join(request.headers.getlist("content-encoding"))
        body = await read_body(request.receive, limit)
        return await asyncio.to_thread(decompressed, body, encoding, limit) if encoding else body


def inference_routes(
    manifest: Manifest,
    infer_endpoint: InferEndpoint,
    engine: Engine,
    codec: InferenceCodec,
    keys: Keys,
) -> APIRouter:
    """Routes below `/v2`, of which those of health need no key."""
    name = manifest.name

    def check_model(request: Request) -> None:
        codec.check_model(**request.path_params)

    class InferRoute(APIRoute):
        """Decodes nothing: the body may be binary, and is validated once."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            return infer_endpoint

    router = APIRouter(prefix="/v2")
    model = {"name": "model", "in": "path", "required": True, "schema": {"enum": [name]}}
    may_act, of_model = Depends(keys.may_act), Depends(check_model)
    to_act = bearer(is_needed=keys.are_needed_to_act)
    of_one = {**to_act, "parameters": [model]}

    server = ServerMetadata(name=PROJECT, version=version_of(PROJECT), extensions=EXTENSIONS)
    absent = error_responses(401, 404, but=OF_SESSIONS)
    answered = infer_answer(manifest)

    @router.get(
        "",
        responses=error_responses(401) | shown(server.model_dump()),
        dependencies=[may_act],
        openapi_extra=to_act,
    )
    async def describe_server() -> ServerMetadata:
        """Which server this is, and what it speaks of the Open Inference Protocol."""
        return server

    @router.get("/health/live", responses=shown({"live": True}))
    async def is_live() -> Live:
        """The process is alive."""
        return Live()

    @router.get("/health/ready", responses=error_responses(503) | shown({"ready": True}))
    async def is_ready() -> Ready:
        """Every batch size has run once."""
        engine.check_ready()
        return Ready()

    def route(suffix: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A route of the model's, and the same of its one version."""

        def add(endpoint: Callable[..., Any]) -> Callable[..., Any]:
            for version, is_shown in (("", True), ("/versions/{version}", False)):
                path = f"/models/{{model}}{version}{suffix}"
                router.add_api_route(path, endpoint, include_in_schema=is_shown, **options)
            return endpoint

        return add

    @route(
        "",
        responses=absent | shown(codec.metadata.model_dump()),
        dependencies=[may_act, of_model],
        openapi_extra=of_one,
    )
    async def describe_model() -> ModelMetadata:
        """What the policy reads and gives."""
        return codec.metadata

    @route(
        "/ready",
        responses=absent | error_responses(503) | shown({"name": name, "ready": True}),
        dependencies=[may_act, of_model],
        openapi_extra=of_one,
    )
    async def is_model_ready() -> ModelReady:
        """The policy answers at full speed."""
        engine.check_ready()
        return ModelReady(name=name)

    @route(
        "/infer",
        methods=["POST"],
        route_class_override=InferRoute,
        responses=every_error(but=OF_WEIGHTS)
        | {200: {"content": json_content(answered) | BINARY_ANSWER, "headers": OF_ANSWERS}},
        openapi_extra={
            **to_act,
            "parameters": [model, *HEADERS],
            "requestBody": {"content": BINARY_REQUEST},
        },
    )
    async def infer(
        body: Annotated[InferRequest, Body(openapi_examples=infer_examples(manifest.spec))],
    ) -> InferResponse:
        """Takes one step of as many environments as the tensors have rows.

        With a `sequence_id` they are a vector that steps together, whose states are kept here.
        """
        raise AssertionError("InferRoute has answered already; this is its documentation")

    return router


def shown(example: Json) -> Responses:
    """A success, by what it looks like."""
    return {200: {"content": json_content(example)}}


async def _encoded(content: bytes, headers: Headers, request: Request) -> bytes:
    """An answer as its client would have it, and the headers that say so.

    A thread compresses a large one: a thousand rows and their states take a third of a second.
    """
    encoding = preferred(", ".join(request.headers.getlist("accept-encoding")))
    headers.append((b"vary", b"accept-encoding"))
    if encoding is None:
        return content
    if len(content) < MANY_BYTES:
        content = compressed(content, encoding)
    else:
        content = await asyncio.to_thread(compressed, content, encoding)
    of_plain = [header for header in headers if header[0] != b"content-length"]
    headers[:] = (
        *of_plain,
        (b"content-encoding", encoding.encode()),
        (b"content-length", b"%d" % len(content)),
    )
    return content


def _session_header(request: Request) -> bytes | None:
    given = {value for name, value in request.headers.raw if name == b"x-session-id"}
    if len(given) > 1:
        raise Malformed(OF_TWO_SESSIONS)
    return given.pop() if given else None


def _json_bytes(request: Request) -> int | None:
    """How much of the body is JSON; None is all of it."""
    all_given = request.headers.getlist(JSON_BYTES)
    if not all_given:
        return None
    given = ", ".join(all_given)
    if not (given.isascii() and given.isdigit() and len(given) <= LONGEST_LENGTH):
        raise Malformed("the Inference-Header-Content-Length is not a number")
    return int(given)
