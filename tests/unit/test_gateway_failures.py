"""Refusals, failures, request ids, keys, and what operators see."""

import asyncio
import json

import pytest

from services.gateway.errors import AuthenticationFailed
from services.gateway.generation import GenerationRequest, Unserved
from services.gateway.identity import Identity
from shared.errors import BusTimeout, InvalidRequest, Refused, RequestFailed
from shared.health import Health, Phase
from shared.metrics import Metrics
from tests.gateway_app import (
    CHAT,
    HELLO,
    MAX_MODEL_LEN,
    answer,
    app_over,
    client_of,
    events_of,
    post,
    token_ids,
)
from tests.scripted_generator import ScriptedGenerator, Step, tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Refused("queue full", retry_after_s=2.3), 429, "3"),
        (Refused("queue full", retry_after_s=0.0), 429, "1"),
        (Refused("queue full", retry_after_s=float("inf")), 429, "3600"),
        (Unserved("no instance is up", retry_after_s=5), 503, "5"),
        (BusTimeout("no answer"), 503, "1"),
        (RequestFailed("worker said no"), 500, None),
        (InvalidRequest("too long", field="messages"), 400, None),
        (ZeroDivisionError("a defect of ours"), 500, None),
    ],
)
async def test_what_is_not_accepted_is_an_http_error(
    error: Exception, status: int, retry_after: str | None, stream: bool
) -> None:
    generator = answer()
    generator.refuse = lambda _: error
    response = await post(app_over(generator), CHAT, {**HELLO, "stream": stream})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-request-id"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "defect" not in response.text


async def test_one_refused_choice_cancels_the_others() -> None:
    generator = answer()
    generator.refuse = lambda r: Refused("full", retry_after_s=1) if r.index == 2 else None
    response = await post(app_over(generator), CHAT, {**HELLO, "n": 4})
    assert response.status_code == 429
    assert set(generator.closed.values()) == {None}
    assert generator.closed.keys() == {r.request_id for r in generator.requests}


async def test_a_failure_is_an_error_or_in_a_stream_its_last_event() -> None:
    failure = RequestFailed("every attempt was lost")
    generator = ScriptedGenerator(lambda _: [*tokens(token_ids("one two"))[:2], failure])
    app = app_over(generator)
    response = await post(app, CHAT, HELLO)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "every attempt was lost"
    *chunks, last = events_of(await post(app, CHAT, {**HELLO, "stream": True}))
    assert len(chunks) >= 2
    assert json.loads(last)["error"]["message"] == "every attempt was lost"


async def test_a_stream_that_just_ends_is_a_failure() -> None:
    generator = ScriptedGenerator(lambda _: tokens(token_ids("one two"))[:1])
    assert (await post(app_over(generator), CHAT, HELLO)).status_code == 500


async def test_a_failed_choice_cancels_the_others() -> None:
    never = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        return [RequestFailed("lost")] if request.index == 1 else [*tokens([100])[:1], never]

    generator = ScriptedGenerator(script)
    response = await post(app_over(generator), CHAT, {**HELLO, "n": 3})
    assert response.status_code == 500
    assert set(generator.closed.values()) == {None}
    assert len(generator.closed) == 2


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/health/live", "/nowhere"])
async def test_every_response_carries_the_request_id(path: str) -> None:
    app = app_over(answer())
    async with client_of(app) as client:
        for method in ("GET", "POST"):
            own = await client.request(method, path)
            assert len(own.headers["x-request-id"]) == 32
            theirs = await client.request(method, path, headers={"x-request-id": "abc-1/2"})
            assert theirs.headers["x-request-id"] == "abc-1/2"
            for bad in ("x" * 129, "a b", ""):
                other = await client.request(method, path, headers={"x-request-id": bad})
                assert len(other.headers["x-request-id"]) == 32


async def test_a_repeated_request_id_names_two_requests() -> None:
    generator = answer()
    app = app_over(generator)
    for _ in range(2):
        await post(app, CHAT, HELLO, headers={"x-request-id": "same"})
    first, second = generator.requests
    assert first.client_request_id == second.client_request_id == "same"
    assert first.request_id != second.request_id


async def test_keys_are_checked_before_anything_else() -> None:
    async def authenticate(token: str | None) -> Identity:
        if token != "secret":
            raise AuthenticationFailed("wrong API key", field=None)
        return Identity(tenant="acme", key_id="0123456789ab")

    generator = answer()
    app = app_over(generator, authenticate=authenticate)
    async with client_of(app) as client:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic secret"}):
            response = await client.post(CHAT, content=b"{", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        good = {"authorization": "Bearer secret"}
        assert (await client.post(CHAT, json=HELLO, headers=good)).status_code == 200
        assert (await client.get("/health/live")).status_code == 200
    asked = [(request.tenant, request.key_id) for request in generator.requests]
    assert asked == [("acme", "0123456789ab")]


async def test_models_health_and_metrics() -> None:
    health, metrics = Health(), Metrics()
    metrics.counter("gateway", "test", "requests", "For the test").inc(3)
    app = app_over(answer(), health=health, metrics=metrics)
    async with client_of(app) as client:
        [entry] = (await client.get("/v1/models")).json()["data"]
        assert (entry["id"], entry["max_model_len"]) == ("tiny", MAX_MODEL_LEN)
        assert (await client.get("/v1/models/tiny")).json() == entry
        assert (await client.get("/health/live")).status_code == 200
        waiting = await client.get("/health/ready")
        assert (waiting.status_code, waiting.json()["ok"]) == (503, False)
        health.phase = Phase.READY
        health.add_readiness_check("scheduler", lambda: "nobody leads")
        reasons = (await client.get("/health/ready")).json()["reasons"]
        assert reasons == {"scheduler": "nobody leads"}
        assert "banyan_gateway_test_requests_total 3.0" in (await client.get("/metrics")).text


async def test_the_document_describes_requests_and_responses() -> None:
    async with client_of(app_over(answer())) as client:
        assert (await client.get("/docs")).status_code == 200
        text = (await client.get("/openapi.json")).text
    document = json.loads(text)
    operation = document["paths"][CHAT]["post"]
    schemas = document["components"]["schemas"]
    for reference in text.split('"$ref":"')[1:]:
        assert reference.split('"')[0].removeprefix("#/components/schemas/") in schemas
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert "messages" in schemas["ChatCompletionRequest"]["properties"]
    assert "choices" in schemas["ChatCompletion"]["properties"]
