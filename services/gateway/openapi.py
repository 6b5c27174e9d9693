"""The OpenAPI document: the routes read and write bodies themselves, so it is put together here."""

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from services.gateway.errors import ErrorBody
from services.gateway.openai_responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ModelList,
)
from services.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from services.gateway.unsupported import CHAT, COMPLETION

_REF = "#/components/schemas/"


class DocumentedApi(FastAPI):
    """A FastAPI whose document also has the bodies of ``services.gateway``."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(_schemas())
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return super().openapi()


def documented(request: str | None, response: str, event: str | None = None) -> dict[str, Any]:
    """The part of a route's documentation that names its bodies by their schema."""
    content = {"application/json": {"schema": {"$ref": _REF + response}}}
    if event is not None:
        content["text/event-stream"] = {"schema": {"$ref": _REF + event}}
    extra: dict[str, Any] = {
        "responses": {"200": {"description": "Success", "content": content}},
        "security": [{"key": []}, {}],  # whether a key is needed is not known here
    }
    if request is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REF + request}}},
        }
    return extra


def error_responses() -> dict[int | str, dict[str, Any]]:
    """The documentation of every response that is not a success."""
    content = {"application/json": {"schema": {"$ref": _REF + "ErrorBody"}}}
    return {
        "4XX": {"description": "The request is at fault, or refused for now", "content": content},
        "5XX": {"description": "The request could not be finished", "content": content},
    }


def _schemas() -> dict[str, Any]:
    _, requests = models_json_schema(
        [(ChatCompletionRequest, "validation"), (CompletionRequest, "validation")],
        ref_template=_REF + "{model}",
    )
    schemas: dict[str, Any] = requests["$defs"]
    for name, fields in (("ChatCompletionRequest", CHAT), ("CompletionRequest", COMPLETION)):
        schemas[name]["description"] += (
            "\n\nFields that this server only takes at a value that asks for nothing: "
            + ", ".join(f"`{field}`" for field in fields)
            + "."
        )
    _, responses = msgspec.json.schema_components(
        [ChatCompletion, ChatCompletionChunk, Completion, ModelList, ErrorBody],
        ref_template=_REF + "{name}",
    )
    return schemas | responses
