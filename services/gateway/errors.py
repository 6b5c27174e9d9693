"""Errors as the OpenAI API shows them: one shape, one table from our tree to HTTP."""

import logging
import math
from dataclasses import dataclass, field

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from services.gateway.generation import Unserved
from shared.api_key import without_secrets
from shared.errors import BanyanError, BusError, InvalidRequest, Refused, RequestFailed

_logger = logging.getLogger(__name__)

_BUS_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 3600.0
_CLIENT_CLOSED_REQUEST = 499


class AuthenticationFailed(InvalidRequest):
    """The API key is missing, wrong, expired or revoked."""

    status = 401
    code = "invalid_api_key"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than this gateway takes."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared to be JSON."""

    status = 415
    code = "unsupported_media_type"


class BodyTimeout(InvalidRequest):
    """The body did not arrive in time."""

    status = 408
    code = "request_timeout"


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; ``param`` is the JSON path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every response that is not a success."""

    error: ErrorDetail


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiError:
    """An error as HTTP sees it."""

    status: int
    detail: ErrorDetail
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON of the error; a key that was sent as something else is not repeated in it."""
        return without_secrets(msgspec.json.encode(ErrorBody(error=self.detail)).decode()).encode()

    def response(self) -> Response:
        """The whole response."""
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


def api_error(error: BaseException) -> ApiError:
    """How ``error`` is told to the caller; what is not on purpose says nothing about itself."""
    match error:
        case InvalidRequest():
            return _invalid(error)
        case Unserved():
            return _unavailable(str(error), "service_unavailable", error.retry_after_s)
        case Refused():
            detail = ErrorDetail(
                message=str(error), type="rate_limit_error", param=None, code="rate_limit_exceeded"
            )
            return ApiError(status=429, detail=detail, headers=_retry_after(error.retry_after_s))
        case BusError():
            return _unavailable(
                "the control plane is not reachable", "service_unavailable", _BUS_RETRY_AFTER_S
            )
        case RequestFailed():
            return _server_error(str(error), "request_failed")
        case HTTPException():
            return _http(error)
        case _:
            return _server_error("internal error", "internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer everything that a route of ``app`` may raise in the one shape."""

    async def answer(_request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def answer_path(_request: Request, error: Exception) -> Response:
        return api_error(InvalidRequest(str(error), field=None)).response()

    async def answer_nobody(_request: Request, _error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(BanyanError, answer)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(RequestValidationError, answer_path)
    app.add_exception_handler(ClientDisconnect, answer_nobody)


def log_if_unexpected(error: BaseException, request_id: str) -> None:
    """Write ``error`` with its traceback to the log if it is none that is raised on purpose."""
    if not isinstance(error, BanyanError | HTTPException):
        _logger.error("request %s: unexpected error", request_id, exc_info=error)


def _invalid(error: InvalidRequest) -> ApiError:
    detail = ErrorDetail(
        message=str(error),
        type="authentication_error" if error.status == 401 else "invalid_request_error",
        param=error.field,
        code=error.code,
    )
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, PayloadTooLarge | BodyTimeout):
        headers["connection"] = "close"  # the rest of the body is still on its way
    return ApiError(status=error.status, detail=detail, headers=headers)


def _http(error: HTTPException) -> ApiError:
    detail = ErrorDetail(
        message=str(error.detail),
        type="invalid_request_error" if error.status_code < 500 else "server_error",
        param=None,
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
    )
    return ApiError(status=error.status_code, detail=detail, headers=dict(error.headers or {}))


def _server_error(message: str, code: str) -> ApiError:
    detail = ErrorDetail(message=message, type="server_error", param=None, code=code)
    return ApiError(status=500, detail=detail)


def _unavailable(message: str, code: str, retry_after_s: float) -> ApiError:
    detail = ErrorDetail(message=message, type="server_error", param=None, code=code)
    return ApiError(status=503, detail=detail, headers=_retry_after(retry_after_s))


def _retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds for HTTP, milliseconds beside them for the clients that read those."""
    seconds = min(max(0.0, seconds), _MAX_RETRY_AFTER_S)
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }
