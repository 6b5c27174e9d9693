"""Runs the choices of one call and writes them to the client, until it is done or gone."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.choice import Choice, ChoiceDelta
from services.gateway.errors import api_error, log_if_unexpected
from services.gateway.generation import GenerationStream, Generator
from services.gateway.openai_responses import (
    PromptTokensDetails,
    ResponseStruct,
    Usage,
)
from services.gateway.plan import Plan
from services.gateway.response_format import ResponseFormat, WholeChoice
from shared.errors import RequestFailed

ResultT = TypeVar("ResultT")
Emit = Callable[[ChoiceDelta], Awaitable[None]]

_DONE = b"data: [DONE]\n\n"
_EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect the events
]


class CompletionRun:
    """The choices of one plan while they are generated."""

    def __init__(self, plan: Plan, generator: Generator) -> None:
        self.plan = plan
        self._generator = generator
        tokenizer = plan.model.tokenizer
        self.choices = [
            Choice(
                index=request.index,
                detokenizer=tokenizer.detokenizer(),
                stop_strings=plan.stop_strings,
                min_tokens=request.sampling.min_tokens,
                has_logprobs=request.sampling.logprobs is not None,
            )
            for request in plan.requests
        ]
        self._streams: list[GenerationStream] = []

    async def submit(self) -> None:
        """Have every choice accepted, or none: raises the first error after closing the others."""
        submissions = [
            asyncio.create_task(self._generator.submit(request)) for request in self.plan.requests
        ]
        try:
            await asyncio.gather(*submissions)
        except BaseException:
            for submission in submissions:
                submission.cancel()
            results = await asyncio.gather(*submissions, return_exceptions=True)
            await _close_all([r for r in results if not isinstance(r, BaseException)])
            raise
        self._streams = [submission.result() for submission in submissions]

    async def run(self, emit: Emit) -> None:
        """Give every delta to ``emit``, one choice's in order and the choices' interleaved.

        Calls of ``emit`` do not overlap. Raises ``RequestFailed``; the other choices are cancelled
        then.
        """
        if len(self._streams) == 1:
            await self._pump(self._streams[0], self.choices[0], emit)
            return
        turn = asyncio.Lock()

        async def emit_in_turn(delta: ChoiceDelta) -> None:
            async with turn:
                await emit(delta)

        try:
            async with asyncio.TaskGroup() as group:
                for stream, choice in zip(self._streams, self.choices, strict=True):
                    group.create_task(self._pump(stream, choice, emit_in_turn))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def close(self) -> None:
        """Give up what still runs; everything that was submitted must end here."""
        await _close_all(self._streams)

    def usage(self) -> Usage:
        """Tokens so far."""
        first_choices = self.choices[:: self.plan.num_choices_per_prompt]
        num_prompt_tokens = self.plan.num_prompt_tokens
        num_output_tokens = sum(choice.num_output_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(choice.num_cached_tokens for choice in first_choices)
            ),
        )

    async def _pump(self, stream: GenerationStream, choice: Choice, emit: Emit) -> None:
        async for event in stream:
            delta = choice.feed(event)
            if delta.finish_reason is not None:
                # Before anything is written: a slow client must not keep a finished request going.
                await stream.aclose(delta.finish_reason)
                await emit(delta)
                return
            await emit(delta)
        raise RequestFailed("the token stream ended without a finish reason")


class EventStream(Response):
    """A streamed call as server-sent events.

    The requests are submitted before the status line is sent, so that a refusal is an HTTP error;
    a failure after it is a last event with the error, and no ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, run: CompletionRun, response_format: ResponseFormat, request_id: str):
        super().__init__()
        self._run = run
        self._format = response_format
        self._request_id = request_id
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response; a client that goes away cancels what it asked for."""
        try:
            await until_disconnect(receive, self._respond(send))
        except ClientDisconnect:
            return

    async def _respond(self, send: Send) -> None:
        try:
            await self._run.submit()
            start = {
                "type": "http.response.start",
                "status": 200,
                "headers": list(_EVENT_STREAM_HEADERS),
            }
            await send(start)
            await _write(send, await self._events(send), more_body=False)
        finally:
            await self._run.close()

    async def _events(self, send: Send) -> bytes:
        """Write the deltas as they come; returns the end of the body."""

        async def emit(delta: ChoiceDelta) -> None:
            data = b"".join(_event(chunk) for chunk in self._chunks(delta))
            if data:
                await _write(send, data)

        try:
            await self._run.run(emit)
        except Exception as error:  # the status is sent, so the error has to go into the body
            log_if_unexpected(error, self._request_id)
            return b"data: " + api_error(error).body() + b"\n\n"
        if not self._run.plan.has_usage_chunk:
            return _DONE
        return _event(self._format.usage_chunk(self._run.usage())) + _DONE

    def _chunks(self, delta: ChoiceDelta) -> list[ResponseStruct]:
        usage = self._usage_field()
        chunks: list[ResponseStruct] = []
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            opening = self._format.opening(delta.index, usage)
            if opening is not None:
                chunks.append(opening)
        if delta.text or delta.logprobs:
            chunks.append(self._format.piece(delta, usage))
        if delta.finish_reason is not None:
            chunks.append(self._format.closing(delta.index, delta.finish_reason, usage))
        return chunks

    def _usage_field(self) -> Usage | UnsetType | None:
        plan = self._run.plan
        if plan.has_usage_in_every_chunk:
            return self._run.usage()
        return None if plan.has_usage_chunk else UNSET


async def whole_response(
    run: CompletionRun, response_format: ResponseFormat, receive: Receive
) -> Response:
    """The response of a call that is not streamed; raises starlette's ``ClientDisconnect``."""
    wholes = [WholeChoice(choice.index) for choice in run.choices]

    async def collect(delta: ChoiceDelta) -> None:
        wholes[delta.index].add(delta)

    async def generate() -> None:
        try:
            await run.submit()
            await run.run(collect)
        finally:
            await run.close()

    await until_disconnect(receive, generate())
    body = response_format.whole(wholes, run.usage())
    return Response(msgspec.json.encode(body), media_type="application/json")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of ``work``, which is cancelled when the client goes away.

    The request's body must have been read. Raises starlette's ``ClientDisconnect``.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _close_all(streams: Sequence[GenerationStream]) -> None:
    await asyncio.gather(*(stream.aclose() for stream in streams))


async def _write(send: Send, data: bytes, *, more_body: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more_body})


def _event(chunk: ResponseStruct) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
