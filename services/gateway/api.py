"""The HTTP application of the gateway: everything between JSON and token ids."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI

from services.gateway.errors import install_error_handlers
from services.gateway.generation import Generator
from services.gateway.identity import Authenticate, let_everybody_in
from services.gateway.openapi import DocumentedApi
from services.gateway.plan import Planner
from services.gateway.request_id import RequestIdMiddleware
from services.gateway.routes_openai import Edge, EdgeLimits, openai_router
from services.gateway.routes_operations import operations_router
from services.gateway.served_model import ServedModel
from shared.clock import Clock, MonotonicClock
from shared.health import Health
from shared.metrics import Metrics

TITLE = "Banyan"


def create_app(
    *,
    generator: Generator,
    models: Mapping[str, ServedModel],
    health: Health,
    metrics: Metrics,
    authenticate: Authenticate = let_everybody_in,
    limits: EdgeLimits | None = None,
    random_seed: Callable[[], int] | None = None,
    clock: Clock | None = None,
) -> FastAPI:
    """The application, without any state of its own.

    ``models`` is looked up for each request by the name that clients use, and may change.
    ``authenticate`` says whose the bearer token is or raises ``AuthenticationFailed``; it guards
    ``/v1/*``. ``random_seed`` gives the seed of calls without one. The caller runs it in a
    server, and owns everything it passes in.
    """
    app = DocumentedApi(
        title=TITLE,
        description="Large language models with prefill and decode apart, behind the OpenAI API.",
    )
    edge = Edge(
        generator=generator,
        models=models,
        authenticate=authenticate,
        limits=limits or EdgeLimits(),
        planner=Planner(random_seed),
        clock=clock or MonotonicClock(),
    )
    app.include_router(openai_router(edge))
    app.include_router(operations_router(health, metrics))
    install_error_handlers(app)
    app.add_middleware(RequestIdMiddleware)
    return app
