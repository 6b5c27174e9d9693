"""The HTTP application over a scripted generator and the bundled model's tokenizer."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from services.gateway.api import create_app
from services.gateway.generation import Generator
from services.gateway.served_model import ServedModel
from shared.health import Health, Phase
from shared.metrics import Metrics
from tests.scripted_generator import ScriptedGenerator, tokens

MODEL_DIR = Path(__file__).resolve().parents[1] / "models" / "tiny-chat"
MAX_MODEL_LEN = 512
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = "Héllo 😀, how are you?\n"


@cache
def served_model() -> ServedModel:
    return ServedModel.from_model_dir(
        MODEL_DIR, name="tiny", max_model_len=MAX_MODEL_LEN, fingerprint="fp_test"
    )


def token_ids(text: str) -> list[int]:
    return served_model().tokenizer.encode_now(text, add_special_tokens=False)


def app_over(generator: Generator, **kwargs: Any) -> FastAPI:
    health = Health()
    health.phase = Phase.READY
    arguments: dict[str, Any] = {
        "models": {"tiny": served_model()},
        "health": health,
        "metrics": Metrics(),
        **kwargs,
    }
    return create_app(generator=generator, **arguments)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def answer(text: str = ANSWER, **kwargs: Any) -> ScriptedGenerator:
    return ScriptedGenerator(lambda _: tokens(token_ids(text), **kwargs))


async def post(app: FastAPI, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
    async with client_of(app) as client:
        return await client.post(path, json=body, **kwargs)


def events_of(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]
