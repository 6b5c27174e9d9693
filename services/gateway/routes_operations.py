"""``/health/*`` and ``/metrics``: for whoever runs the gateway."""

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shared.health import Health, HealthReport
from shared.metrics import Metrics

_EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(health: Health, metrics: Metrics) -> APIRouter:
    """The routes that say how this process is."""
    router = APIRouter(tags=["operations"])

    @router.get("/health/live", summary="Whether this process should be left running")
    async def live() -> Response:
        return _report(health.liveness())

    @router.get("/health/ready", summary="Whether this process takes requests now")
    async def ready() -> Response:
        return _report(health.readiness())

    @router.get("/metrics", summary="Prometheus metrics")
    async def exposition() -> Response:
        return Response(metrics.exposition(), headers={"content-type": _EXPOSITION_TYPE})

    return router


def _report(report: HealthReport) -> Response:
    body = {"ok": report.ok, "phase": report.phase.value, "reasons": report.reasons}
    return Response(
        msgspec.json.encode(body), 200 if report.ok else 503, media_type="application/json"
    )
