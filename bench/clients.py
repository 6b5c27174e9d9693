"""Concurrent streaming clients that check every token they get."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.reference import Expected
from services.gateway.tokenizer import Tokenizer

REQUEST_TIMEOUT_S = 180.0


@dataclass(kw_only=True)
class Answer:
    """One request as its client saw it. ``pauses_s`` are the times between two chunks."""

    verdict: str = "failed"
    error: str = ""
    ttft_s: float = 0.0
    pauses_s: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    finish_reason: str | None = None


class CheckedClients:
    """``concurrency`` clients share a list of expected answers and ask for each in turn."""

    def __init__(self, url: str, model_dir: Path, expected: Sequence[Expected]) -> None:
        self._url = url
        tokenizer = Tokenizer.from_model_dir(model_dir)
        self._model = model_dir.name
        self._expected = expected
        self._texts = [[tokenizer.token_text(t) for t in e.visible_token_ids] for e in expected]
        self.answers: list[Answer] = []

    async def run(
        self,
        *,
        num_requests: int,
        concurrency: int,
        max_tokens: int,
        at: int | None = None,
        action: Callable[[], Awaitable[None]] | None = None,
    ) -> list[Answer]:
        """Ask ``num_requests`` times; run ``action`` once ``at`` answers are complete."""
        self.answers = []
        numbers = iter(range(num_requests))
        acting: asyncio.Task[None] | None = None
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=REQUEST_TIMEOUT_S, limits=limits
        ) as http:

            async def client() -> None:
                nonlocal acting
                for number in numbers:
                    index = number % len(self._expected)
                    self.answers.append(await self._ask(http, index, max_tokens))
                    if action is not None and acting is None and len(self.answers) >= (at or 0):
                        acting = asyncio.ensure_future(action())

            await asyncio.gather(*(client() for _ in range(concurrency)))
        if acting is not None:
            await acting
        return self.answers

    async def _ask(self, http: httpx.AsyncClient, index: int, max_tokens: int) -> Answer:
        expected = self._expected[index]
        answer = Answer()
        body = {
            "model": self._model,
            "prompt": list(expected.prompt_token_ids),
            "temperature": 0,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "stream": True,
        }
        began_s = last_s = time.monotonic()
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    answer.error = f"{response.status_code}: {(await response.aread()).decode()}"
                    return answer
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    now_s = time.monotonic()
                    if answer.tokens:
                        answer.pauses_s.append(now_s - last_s)
                    else:
                        answer.ttft_s = now_s - began_s
                    last_s = now_s
                    self._take(answer, json.loads(line[6:]))
        except httpx.HTTPError as error:
            answer.error = repr(error)
        if not answer.error and answer.finish_reason is None:
            answer.error = "the stream ended without a finish reason"
        if not answer.error:
            answer.verdict = expected.verdict(answer.tokens, self._texts[index])
        return answer

    @staticmethod
    def _take(answer: Answer, chunk: dict[str, object]) -> None:
        if "error" in chunk:
            answer.error = str(chunk["error"])
            return
        choices = chunk["choices"]
        assert isinstance(choices, list)
        for choice in choices:
            if choice.get("logprobs"):
                answer.tokens += choice["logprobs"]["tokens"]
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
