"""Whatever is wrong with a request, the answer is a 4xx in OpenAI's shape that names the field."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from services.gateway.routes_openai import EdgeLimits
from tests.gateway_app import MAX_MODEL_LEN, app_over, client_of, served_model
from tests.scripted_generator import ScriptedGenerator, tokens

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}
HUGE = 10**400

# (field at fault, what to change in a good chat body); ... takes a field away
CHAT_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": ...}),
    ("model", {"model": None}),
    ("model", {"model": 5}),
    ("model", {"model": ""}),
    ("model", {"model": "x" * 1000}),
    ("messages", {"messages": ...}),
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages", {"messages": [USER] * 3000}),
    ("messages[0]", {"messages": ["hi"]}),
    ("messages[0].role", {"messages": [{"content": "hi"}]}),
    ("messages[0].role", {"messages": [{"role": "king", "content": "hi"}]}),
    ("messages[0].role", {"messages": [{"role": ["user"], "content": "hi"}]}),
    ("messages[1].role", {"messages": [USER, {"role": "tool", "content": "4"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [5]}]}),
    (
        "messages[1].content[0].type",
        {
            "messages": [
                USER,
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            ]
        },
    ),
    (
        "messages[0].content[0].text",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
    ),
    ("messages[0].name", {"messages": [{**USER, "name": 5}]}),
    (
        "messages[1].tool_calls",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
    ),
    ("messages", {"messages": [{"role": "user", "content": "many words " * 1000}]}),
    ("messages", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("temperature", {"temperature": [1]}),
    ("top_p", {"top_p": -0.5}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("top_k", {"top_k": HUGE}),
    ("n", {"n": 0}),
    ("n", {"n": 17}),
    ("n", {"n": True}),
    ("n", {"n": "2"}),
    ("n", {"n": 2.0}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -5}),
    ("max_tokens", {"max_tokens": HUGE}),
    ("max_tokens", {"max_tokens": MAX_MODEL_LEN}),
    ("max_tokens", {"max_tokens": 10, "max_completion_tokens": 11}),
    ("max_completion_tokens", {"max_completion_tokens": MAX_MODEL_LEN}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 6, "max_tokens": 5}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": "1"}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": 5}),
    ("stop[1]", {"stop": ["a", ""]}),
    ("stop[1]", {"stop": ["a", "a"]}),
    ("stop[0]", {"stop": [5]}),
    ("stop", {"stop": [str(i) for i in range(17)]}),
    ("stop", {"stop": "x" * 2000}),
    ("stop_token_ids", {"stop_token_ids": 2}),
    ("stop_token_ids[0]", {"stop_token_ids": [-1]}),
    ("stop_token_ids[1]", {"stop_token_ids": [2, 8192]}),
    ("stop_token_ids[0]", {"stop_token_ids": [True]}),
    ("stop_token_ids", {"stop_token_ids": list(range(300))}),
    ("ignore_eos", {"ignore_eos": 1}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream": True, "stream_options": []}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("logprobs", {"logprobs": 1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
    ("user", {"user": 5}),
    ("priority", {"priority": 10**9}),
    ("priority", {"priority": 0.5}),
    ("slo", {"slo": 100}),
    ("slo.ttft_ms", {"slo": {"ttft_ms": -1}}),
    ("slo.tpot_ms", {"slo": {"tpot_ms": 0}}),
    ("slo.e2e_ms", {"slo": {"e2e_ms": "fast"}}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("presence_penalty", {"presence_penalty": False}),
    ("presence_penalty", {"presence_penalty": float("nan")}),
    ("frequency_penalty", {"frequency_penalty": "x"}),
    ("frequency_penalty", {"frequency_penalty": -2.01}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": -1.5}),
    ("repetition_penalty", {"repetition_penalty": 1e9}),
    ("repetition_penalty", {"repetition_penalty": True}),
    ("min_p", {"min_p": -0.1}),
    ("min_p", {"min_p": 1.1}),
    ("min_p", {"min_p": "0.1"}),
    ("logit_bias", {"logit_bias": 5}),
    ("logit_bias", {"logit_bias": [[5, 1]]}),
    ("logit_bias", {"logit_bias": {"five": 1}}),
    ("logit_bias", {"logit_bias": {"-5": 1}}),
    ("logit_bias", {"logit_bias": {"05": 1}}),
    ("logit_bias", {"logit_bias": {"9" * 10_000: 1}}),
    ("logit_bias", {"logit_bias": {"8192": 1}}),
    ("logit_bias", {"logit_bias": {"5": 100.5}}),
    ("logit_bias", {"logit_bias": {"5": -HUGE}}),
    ("logit_bias", {"logit_bias": {"5": True}}),
    ("logit_bias", {"logit_bias": {"5": None}}),
    ("logit_bias", {"logit_bias": {"5": float("inf")}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
    ("length_penalty", {"length_penalty": 1.1}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": [{}]}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("audio", {"audio": {"voice": "x"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("echo", {"echo": True}),
    ("add_generation_prompt", {"add_generation_prompt": 0}),
    ("chat_template_kwargs", {"chat_template_kwargs": []}),
    ("chat_template_kwargs.messages", {"chat_template_kwargs": {"messages": []}}),
]

TEXT_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ...}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": {}}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt[1]", {"prompt": ["a", ""]}),
    ("prompt[1]", {"prompt": ["a", 5]}),
    ("prompt[1]", {"prompt": [5, "a"]}),
    ("prompt[0]", {"prompt": [-5]}),
    ("prompt[0]", {"prompt": [True]}),
    ("prompt[0]", {"prompt": [1.5]}),
    ("prompt[2]", {"prompt": [5, 6, 8192]}),
    ("prompt[1][1]", {"prompt": [[5, 6], [5, 10**9]]}),
    ("prompt[1]", {"prompt": [[5], []]}),
    ("prompt[0]", {"prompt": [[]]}),
    ("prompt[1]", {"prompt": [[5], "a"]}),
    ("prompt", {"prompt": ["a"] * 200}),
    ("prompt", {"prompt": [5] * MAX_MODEL_LEN}),
    ("prompt", {"prompt": [5] * 100_000}),
    ("prompt", {"prompt": "word " * MAX_MODEL_LEN}),
    ("prompt[1]", {"prompt": ["a", "word " * MAX_MODEL_LEN]}),
    ("n", {"prompt": ["a"] * 100, "n": 2}),
    ("logprobs", {"logprobs": True}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": -1}),
    ("best_of", {"best_of": 2}),
    ("best_of", {"best_of": 0}),
    ("echo", {"echo": True}),
    ("suffix", {"suffix": "end"}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": MAX_MODEL_LEN}),
    ("stop[1]", {"stop": ["a", "a"]}),
]

# (status, code, headers, body)
RAW_FAULTS: list[tuple[int, str, dict[str, str], bytes]] = [
    (400, "invalid_json", {}, b""),
    (400, "invalid_json", {}, b"{"),
    (400, "invalid_json", {}, b"hello"),
    (400, "invalid_json", {}, b'{"model": "tiny"} x'),
    (400, "invalid_json", {}, b'{"model": "\xff\xfe"}'),
    (400, "invalid_json", {}, '{"model": "tiny"}'.encode("utf-16")),
    (400, "invalid_json", {}, b'{"model": "tiny", "messages": "\\ud800"}'),
    (400, "invalid_json", {}, b'{"user": "a\x00b"}'),
    (400, "invalid_json", {}, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    (400, "invalid_json", {}, b'{"n": ' + b"9" * 10_000 + b"}"),
    (400, "invalid_type", {}, b"[]"),
    (400, "invalid_type", {}, b"null"),
    (400, "invalid_type", {}, b'"text"'),
    (415, "unsupported_media_type", {"content-type": "text/plain"}, b"{}"),
    (415, "unsupported_media_type", {"content-type": "multipart/form-data; boundary=x"}, b"{}"),
    (415, "unsupported_media_type", {"content-type": "application/json; charset=latin-1"}, b"{}"),
    (415, "unsupported_media_type", {"content-encoding": "gzip"}, b"{}"),
]


@pytest.fixture
def generator() -> ScriptedGenerator:
    return ScriptedGenerator(lambda _: tokens([100]))


@pytest.fixture
async def client(generator: ScriptedGenerator) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_over(generator)) as client:
        yield client


def changed(body: dict[str, Any], changes: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in (body | changes).items() if v is not ...})


def check(response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["param"] == param, body
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(("param", "changes"), CHAT_FAULTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_faulty_chat_is_refused(
    client: httpx.AsyncClient,
    generator: ScriptedGenerator,
    param: str,
    changes: dict[str, Any],
    stream: bool,
) -> None:
    if stream and not changes.keys() & {"stream", "stream_options"}:
        changes = {**changes, "stream": True}
    body = changed({"model": "tiny", "messages": [USER]}, changes)
    error = check(await client.post(CHAT, content=body), 400, param)
    assert error["type"] == "invalid_request_error"
    assert generator.requests == []


@pytest.mark.parametrize(("param", "changes"), TEXT_FAULTS)
async def test_a_faulty_completion_is_refused(
    client: httpx.AsyncClient, generator: ScriptedGenerator, param: str, changes: dict[str, Any]
) -> None:
    body = changed({"model": "tiny", "prompt": "hi"}, changes)
    check(await client.post(TEXT, content=body), 400, param)
    assert generator.requests == []


@pytest.mark.parametrize(("status", "code", "headers", "body"), RAW_FAULTS)
async def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.AsyncClient, status: int, code: str, headers: dict[str, str], body: bytes
) -> None:
    for path in (CHAT, TEXT):
        error = check(await client.post(path, content=body, headers=headers), status, None)
        assert error["code"] == code


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a b " * 999}]},
         "messages"),
        (TEXT, {"model": "tiny", "prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        (TEXT, {"model": "tiny", "prompt": "hi", "max_tokens": MAX_MODEL_LEN}, "max_tokens"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_the_context_says_so(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    error = check(await client.post(path, json=body), 400, param)
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in error["message"]


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms"])
@pytest.mark.parametrize("value", ["", "soon", "-5", "0", "nan", "inf", "1e300"])
async def test_a_faulty_slo_header_is_refused(
    client: httpx.AsyncClient, name: str, value: str
) -> None:
    body = {"model": "tiny", "messages": [USER]}
    check(await client.post(CHAT, json=body, headers={name: value}), 400, name)


async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "hi"})):
        error = check(await client.post(path, json={"model": "gpt-9", **body}), 404, "model")
        assert error["code"] == "model_not_found"
    check(await client.get("/v1/models/gpt-9"), 404, "model")


async def test_unknown_routes_and_wrong_methods_have_the_same_shape(
    client: httpx.AsyncClient,
) -> None:
    check(await client.get("/v1/nothing"), 404, None)
    check(await client.get("/../etc/passwd"), 404, None)
    response = await client.get(CHAT)
    check(response, 405, None)
    assert response.headers["allow"] == "POST"
    check(await client.delete("/v1/models"), 405, None)


async def test_a_body_over_the_limit_is_refused_before_it_is_all_there() -> None:
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1000
            yield b" " * 1000

    app = app_over(ScriptedGenerator(lambda _: []), limits=EdgeLimits(max_body_bytes=10_000))
    async with client_of(app) as client:
        response = await client.post(CHAT, content=endless())
        check(response, 413, None)
        assert response.headers["connection"] == "close"
        assert num_sent <= 12_000
        declared = await client.post(CHAT, content=b" " * 10_001)
        check(declared, 413, None)
        fitting = await client.post(CHAT, content=b"{}" + b" " * 9_998)
        check(fitting, 400, "model")


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    app = app_over(ScriptedGenerator(lambda _: []), limits=EdgeLimits(body_timeout_s=0.01))
    async with client_of(app) as client:
        check(await client.post(CHAT, content=stuck()), 408, None)


async def test_a_model_without_a_chat_template_says_so() -> None:
    bare = replace(served_model(), chat_template=None)
    app = app_over(ScriptedGenerator(lambda _: tokens([100])), models={"bare": bare, "tiny": bare})
    async with client_of(app) as client:
        response = await client.post(CHAT, json={"model": "bare", "messages": [USER]})
        error = check(response, 400, "messages")
        assert "no chat template" in error["message"]
        assert (await client.post(TEXT, json={"model": "bare", "prompt": "a"})).is_success


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"logit_bias": {}, "tools": [], "tool_choice": "none", "store": False},
        {"response_format": {"type": "text"}, "logit_bias": None, "tools": None},
        {"temperature": None, "n": None, "stop": None, "stream": None, "slo": None},
        {"stop": [], "stop_token_ids": [], "metadata": {"a": "b"}, "unheard_of": [1, {}]},
        {"temperature": 0, "top_p": 0, "top_k": -1, "seed": -5},
        {"min_p": None, "presence_penalty": None, "repetition_penalty": None},
        {"top_k": 2**31 - 1, "seed": 2**63 - 1, "temperature": 1e-300},
    ],
)
async def test_neutral_and_unknown_fields_are_accepted(
    client: httpx.AsyncClient, changes: dict[str, Any]
) -> None:
    response = await client.post(CHAT, json={"model": "tiny", "messages": [USER], **changes})
    assert response.status_code == 200, response.text
