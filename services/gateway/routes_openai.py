"""``/v1/*``: the OpenAI API."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.body import BodyT, parse_body, read_body
from services.gateway.generation import Generator
from services.gateway.identity import Authenticate
from services.gateway.openai_responses import ModelEntry, ModelList
from services.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from services.gateway.openapi import documented, error_responses
from services.gateway.plan import Caller, Plan, Planner
from services.gateway.response_format import (
    ChatFormat,
    CompletionFormat,
    Envelope,
    ResponseFormat,
)
from services.gateway.served_model import ServedModel
from services.gateway.serving import CompletionRun, EventStream, whole_response
from shared.clock import Clock
from shared.errors import ModelNotFound


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeLimits:
    """What the edge takes from a client before it looks at it."""

    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """What the routes need: see ``services.gateway.api.create_app``."""

    generator: Generator
    models: Mapping[str, ServedModel]
    authenticate: Authenticate
    limits: EdgeLimits
    planner: Planner
    clock: Clock

    def model(self, name: str) -> ServedModel:
        """The model called ``name``; raises ``ModelNotFound``."""
        model = self.models.get(name)
        if model is None:
            raise ModelNotFound(f"the model {name!r} is not served here", field="model")
        return model

    async def caller(self, request: Request, arrived_at_s: float) -> Caller:
        """Who asks; raises ``AuthenticationFailed``."""
        identity = await self.authenticate(_bearer_token(request))
        return Caller(
            request_id=request.state.request_id,
            client_request_id=request.state.client_request_id,
            tenant=identity.tenant,
            key_id=identity.key_id,
            headers=request.headers,
            arrived_at_s=arrived_at_s,
        )

    async def body(self, request: Request, body_type: type[BodyT]) -> BodyT:
        """The checked body; raises ``InvalidRequest``."""
        data = await read_body(
            request,
            max_bytes=self.limits.max_body_bytes,
            timeout_s=self.limits.body_timeout_s,
        )
        return parse_body(body_type, data)

    async def respond(
        self, request: Request, plan: Plan, response_format: ResponseFormat
    ) -> Response:
        """Generate what ``plan`` says, streamed or whole."""
        run = CompletionRun(plan, self.generator)
        if plan.is_stream:
            return EventStream(run, response_format, request.state.request_id)
        return await whole_response(run, response_format, request.receive)


def openai_router(edge: Edge) -> APIRouter:
    """The routes over ``edge``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post(
        "/chat/completions",
        summary="Answer a chat",
        responses=error_responses(),
        openapi_extra=documented("ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk"),
    )
    async def create_chat_completion(request: Request) -> Response:
        arrived_at_s = edge.clock.now_s()
        caller = await edge.caller(request, arrived_at_s)
        body = await edge.body(request, ChatCompletionRequest)
        model = edge.model(body.model)
        plan = await edge.planner.chat(body, model, caller)
        envelope = _envelope("chatcmpl", caller, model)
        response_format = ChatFormat(envelope, model.tokenizer, has_logprobs=body.logprobs is True)
        return await edge.respond(request, plan, response_format)

    @router.post(
        "/completions",
        summary="Complete a text",
        responses=error_responses(),
        openapi_extra=documented("CompletionRequest", "Completion", "Completion"),
    )
    async def create_completion(request: Request) -> Response:
        arrived_at_s = edge.clock.now_s()
        caller = await edge.caller(request, arrived_at_s)
        body = await edge.body(request, CompletionRequest)
        model = edge.model(body.model)
        plan = await edge.planner.completion(body, model, caller)
        envelope = _envelope("cmpl", caller, model)
        response_format = CompletionFormat(envelope, model.tokenizer, num_logprobs=body.logprobs)
        return await edge.respond(request, plan, response_format)

    @router.get("/models", summary="The models served", openapi_extra=documented(None, "ModelList"))
    async def list_models(request: Request) -> Response:
        await edge.authenticate(_bearer_token(request))
        return _json(ModelList(data=[_entry(model) for model in edge.models.values()]))

    @router.get(
        "/models/{model:path}",
        summary="One model",
        responses=error_responses(),
        openapi_extra=documented(None, "ModelEntry"),
    )
    async def get_model(request: Request, model: str) -> Response:
        await edge.authenticate(_bearer_token(request))
        return _json(_entry(edge.model(model)))

    return router


def _bearer_token(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _envelope(prefix: str, caller: Caller, model: ServedModel) -> Envelope:
    return Envelope(
        completion_id=f"{prefix}-{caller.request_id}",
        created=int(time.time()),
        model=model.name,
        system_fingerprint=model.fingerprint,
    )


def _entry(model: ServedModel) -> ModelEntry:
    return ModelEntry(id=model.name, created=model.created_s, max_model_len=model.max_model_len)


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
