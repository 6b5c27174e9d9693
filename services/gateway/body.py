"""From the bytes of an HTTP request to a checked body; every fault names the field."""

import asyncio
import re
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from services.gateway.errors import BodyTimeout, PayloadTooLarge, UnsupportedMediaType
from services.gateway.openai_types import TAG_MARK, Body
from shared.errors import InvalidRequest

BodyT = TypeVar("BodyT", bound=Body)

_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")
_MISSING_CODE = "missing_required_parameter"


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body, refused as soon as it is known to be longer than ``max_bytes``.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, ``BodyTimeout`` when it has not arrived
    after ``timeout_s``, and starlette's ``ClientDisconnect``.
    """
    _require_json(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    pieces, num_bytes = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                pieces.append(piece)
    except TimeoutError as error:
        raise BodyTimeout(
            f"the request body did not arrive within {timeout_s:g} s", field=None
        ) from error
    return b"".join(pieces)


def parse_body(body_type: type[BodyT], data: bytes) -> BodyT:
    """``data`` as ``body_type``; raises ``InvalidRequest`` with the path of the first fault."""
    try:
        return body_type.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = field_path(first["loc"])
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        raise InvalidRequest(message, field=None, code="invalid_json")
    if kind == "missing":
        raise InvalidRequest(f"{field!r} is missing", field=field, code=_MISSING_CODE)
    if not field:
        raise InvalidRequest("the body is not a JSON object", field=None, code="invalid_type")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    raise InvalidRequest(f"invalid {field!r}: {message}", field=field, code=code)


def field_path(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(TAG_MARK):
            path += f".{part}" if path else part
    return path


def _require_json(request: Request) -> None:
    """A body that names no type is taken as JSON; one that names another is not."""
    content_type = request.headers.get("content-type")
    if content_type is not None:
        kind, *parameters = [part.strip().lower() for part in content_type.split(";")]
        charsets = [p.split("=", 1)[1].strip('"') for p in parameters if p.startswith("charset=")]
        if not _JSON_TYPE.fullmatch(kind) or any(c not in ("utf-8", "utf8") for c in charsets):
            raise UnsupportedMediaType(
                f"content-type {content_type!r}: send application/json in UTF-8", field=None
            )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"content-encoding {encoding!r} is not supported", field=None)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body is larger than {max_bytes} bytes", field=None)
