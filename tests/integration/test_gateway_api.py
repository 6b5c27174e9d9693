"""The gateway over a real socket with OpenAI's own client, and clients that go away."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from services.gateway.generation import GenerationRequest, Unserved
from services.gateway.routes_openai import EdgeLimits
from shared.core.request import SamplingParams
from shared.errors import Refused, RequestFailed
from tests.gateway_app import (
    ANSWER,
    CHAT,
    HELLO,
    answer,
    app_over,
    token_ids,
)
from tests.scripted_generator import ScriptedGenerator, tokens


class RawClient:
    """Speaks ASGI itself, so that it can leave at a chosen moment."""

    def __init__(self, app: FastAPI, body: dict[str, Any]) -> None:
        self._app = app
        self._body = json.dumps(body).encode()
        self._left = asyncio.Event()
        self._is_sent = False
        self.received: list[bytes] = []
        self.first_piece = asyncio.Event()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
        }
        await self._app(scope, self._receive, self._send)

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            self.received.append(message["body"])
            self.first_piece.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_its_requests(stream: bool, n: int) -> None:
    never = asyncio.Event()
    generator = ScriptedGenerator(lambda _: [*tokens(token_ids("one two"))[:2], never])
    client = RawClient(app_over(generator), {**HELLO, "stream": stream, "n": n})
    async with asyncio.TaskGroup() as group:
        group.create_task(client.run())
        await generator.until(lambda: len(generator.requests) == n)
        if stream:
            await client.first_piece.wait()
        client.leave()
    assert generator.closed == {r.request_id: None for r in generator.requests}


async def test_a_client_that_leaves_while_its_request_waits_for_acceptance_cancels_it() -> None:
    class Waiting(ScriptedGenerator):
        is_cancelled = False

        async def submit(self, request: GenerationRequest) -> Any:
            self.requests.append(request)
            self._notify()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.is_cancelled = True
                raise

    generator = Waiting(lambda _: [])
    client = RawClient(app_over(generator), {**HELLO, "stream": True})
    async with asyncio.TaskGroup() as group:
        group.create_task(client.run())
        await generator.until(lambda: len(generator.requests) == 1)
        client.leave()
    assert generator.is_cancelled


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """``app`` in uvicorn on a free port of this machine; gives its base URL."""
    config = uvicorn.Config(app, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def test_the_openai_client_gets_what_it_expects() -> None:
    generator = answer(num_top=1)
    async with (
        served(app_over(generator)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = await client.chat.completions.create(
            model="tiny", messages=messages, n=2, logprobs=True, top_logprobs=1, seed=3
        )
        assert [choice.message.content for choice in chat.choices] == [ANSWER, ANSWER]
        assert chat.choices[0].logprobs is not None
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 2 * (len(token_ids(ANSWER)) + 1)

        stream = await client.chat.completions.create(
            model="tiny",
            messages=messages,
            stream=True,
            stop=["how"],
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == ANSWER.split("how")[0]
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage is not None

        text = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
        assert [choice.text for choice in text.choices] == [ANSWER, ANSWER]
        text_stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join([c.choices[0].text async for c in text_stream]) == ANSWER

        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_the_openai_client_can_set_every_sampling_parameter() -> None:
    generator = answer()
    async with (
        served(app_over(generator)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            presence_penalty=0.5,
            frequency_penalty=-1,
            logit_bias={"7": -100},
            extra_body={"repetition_penalty": 1.3, "min_p": 0.1, "top_k": 9},
        )
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="a", logit_bias={"7": 101})
    assert (bad.value.param, bad.value.type) == ("logit_bias", "invalid_request_error")
    [request] = generator.requests
    assert request.sampling == SamplingParams(
        max_tokens=request.sampling.max_tokens,
        seed=request.sampling.seed,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        logit_bias=((7, -100.0),),
        repetition_penalty=1.3,
        min_p=0.1,
        top_k=9,
    )


async def test_the_openai_client_gets_the_errors_it_knows() -> None:
    generator = answer()
    messages: Any = [{"role": "user", "content": "hi"}]
    async with (
        served(app_over(generator)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="tiny", messages=messages, temperature=-1)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="gpt-9", messages=messages)
        assert unknown.value.code == "model_not_found"

        generator.refuse = lambda _: Refused("full", retry_after_s=1)
        with pytest.raises(openai.RateLimitError):
            await create(model="tiny", messages=messages)
        generator.refuse = lambda _: Unserved("nobody", retry_after_s=1)
        with pytest.raises(openai.InternalServerError) as unserved:
            await create(model="tiny", messages=messages)
        assert unserved.value.status_code == 503

        generator.refuse = lambda _: None
        generator.script = lambda _: [*tokens(token_ids("one"))[:1], RequestFailed("all lost")]
        stream = await create(model="tiny", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="all lost"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_cancels_the_request(stream: bool) -> None:
    never = asyncio.Event()
    generator = ScriptedGenerator(lambda _: [*tokens(token_ids("one two"))[:2], never])
    async with served(app_over(generator)) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({**HELLO, "stream": stream}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await generator.until(lambda: len(generator.requests) == 1)
        if stream:
            assert b"one" in await reader.readuntil(b"one")
        writer.close()
        await writer.wait_closed()
        await generator.until(lambda: len(generator.closed) == 1)
    assert list(generator.closed.values()) == [None]


async def test_a_body_without_end_is_refused_and_the_connection_closed() -> None:
    async with served(app_over(answer(), limits=EdgeLimits(max_body_bytes=1000))) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        writer.write(b"400\r\n" + b" " * 0x400 + b"\r\n")
        response = await reader.read()  # returns when the server has closed
        assert response.startswith(b"HTTP/1.1 413 ")
        assert b"payload_too_large" in response
        writer.close()
        await writer.wait_closed()
