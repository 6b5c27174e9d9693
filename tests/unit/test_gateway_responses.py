"""What the OpenAI API of the gateway answers, whole and streamed."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.gateway.generation import GenerationRequest, TokenEvent
from shared.clock import ManualClock
from shared.core.request import FinishReason, Slo
from tests.gateway_app import (
    ANSWER,
    CHAT,
    HELLO,
    MAX_MODEL_LEN,
    TEXT,
    answer,
    app_over,
    chunks_of,
    client_of,
    post,
    served_model,
    token_ids,
)
from tests.scripted_generator import ScriptedGenerator, Step, tokens


def by_index(texts: Sequence[str]) -> ScriptedGenerator:
    return ScriptedGenerator(lambda request: tokens(token_ids(texts[request.index])))


async def test_a_chat_answer_has_text_reason_and_usage() -> None:
    generator = answer(num_cached_tokens=4)
    response = await post(app_over(generator), CHAT, HELLO)
    assert response.status_code == 200
    body = response.json()
    [request] = generator.requests
    num_prompt, num_output = len(request.prompt_token_ids), len(token_ids(ANSWER)) + 1
    assert body == {
        "id": f"chatcmpl-{request.request_id}",
        "object": "chat.completion",
        "created": body["created"],
        "model": "tiny",
        "system_fingerprint": "fp_test",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    assert generator.closed == {}


async def test_the_generator_gets_the_templated_prompt_and_every_parameter() -> None:
    generator = answer()
    clock = ManualClock(start_s=7.0)
    body = {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 11,
        "max_completion_tokens": 9,
        "min_tokens": 3,
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 0,
        "min_p": 0.05,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "repetition_penalty": 1.2,
        "logit_bias": {"70": -100, "7": 1.5, "8": 0},
        "priority": -3,
        "slo": {"ttft_ms": 250},
    }
    app = app_over(generator, clock=clock)
    headers = {"x-slo-ttft-ms": "1", "x-slo-e2e-ms": "1500", "x-request-id": "mine"}
    generator.script = lambda _: tokens([100], num_top=0)
    assert (await post(app, CHAT, body, headers=headers)).is_success
    [request] = generator.requests
    prompt = "<|system|>\nBe brief.<|end|>\n<|user|>\na\nb<|end|>\n<|assistant|>\n"
    assert list(request.prompt_token_ids) == token_ids(prompt)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (11, 9, 3)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((5, 6), True)
    assert sampling.logprobs == 0
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 2.0)
    assert sampling.logit_bias == ((7, 1.5), (70, -100.0))
    assert request.slo == Slo(ttft_s=0.25, e2e_s=1.5)
    assert (request.priority, request.model, request.arrived_at_s) == (-3, "tiny", 7.0)
    assert (request.client_request_id, request.group_id) == ("mine", None)


async def test_defaults_fill_the_context_and_draw_a_seed() -> None:
    generator = answer()
    app = app_over(generator, random_seed=lambda: 1234)
    await post(app, TEXT, {"model": "tiny", "prompt": [7, 8, 9]})
    [request] = generator.requests
    assert request.prompt_token_ids == (7, 8, 9)
    assert request.sampling.max_tokens == MAX_MODEL_LEN - 3
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert (request.sampling.top_k, request.sampling.seed) == (None, 1234)
    assert not request.sampling.has_penalties
    assert (request.sampling.min_p, request.sampling.logit_bias) == (0.0, ())


async def test_what_is_almost_greedy_is_greedy() -> None:
    generator = answer()
    await post(app_over(generator), CHAT, {**HELLO, "temperature": 1e-9})
    await post(app_over(generator), CHAT, {**HELLO, "top_p": 0})
    first, second = (request.sampling for request in generator.requests)
    assert first.is_greedy
    assert (second.top_k, second.top_p) == (1, 1.0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", [token_ids("one")]),
        (["one", "two"], [token_ids("one"), token_ids("two")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_prompts_come_in_four_forms(prompt: Any, expected: list[list[int]]) -> None:
    generator = by_index(["first", "second"])
    response = await post(app_over(generator), TEXT, {"model": "tiny", "prompt": prompt})
    assert [list(r.prompt_token_ids) for r in generator.requests] == expected
    choices = response.json()["choices"]
    assert [c["text"] for c in choices] == ["first", "second"][: len(expected)]
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_of_one_prompt_share_a_group_and_differ_in_seed() -> None:
    generator = by_index(["a", "b", "c", "d"])
    body = {"model": "tiny", "prompt": ["x", "y"], "n": 2, "seed": 5}
    response = await post(app_over(generator), TEXT, body)
    assert [c["text"] for c in response.json()["choices"]] == ["a", "b", "c", "d"]
    requests = sorted(generator.requests, key=lambda r: r.index)
    assert len({r.request_id for r in requests}) == 4
    groups = [r.group_id for r in requests]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    seeds = [r.sampling.seed for r in requests]
    assert seeds[0] == seeds[2] == 5
    assert seeds[1] == seeds[3] != 5
    assert response.json()["usage"]["prompt_tokens"] == 2


async def test_a_stop_string_ends_the_answer_and_the_request() -> None:
    generator = answer("one two three four")
    for stream in (False, True):
        body = {**HELLO, "stop": ["three", "nine"], "stream": stream}
        response = await post(app_over(generator), CHAT, body)
        if stream:
            chunks = chunks_of(response)
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == ("one two ", "stop")
    assert list(generator.closed.values()) == [FinishReason.STOP] * 2


async def test_chat_logprobs_spell_the_answer() -> None:
    generator = answer(num_top=2)
    body = {**HELLO, "logprobs": True, "top_logprobs": 2}
    content = (await post(app_over(generator), CHAT, body)).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == ANSWER
    assert [entry["logprob"] for entry in content] == [-float(i) for i in range(len(content))]
    for entry in content:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert len(entry["top_logprobs"]) == 2
    assert any(entry["token"].startswith("bytes:\\x") for entry in content)


async def test_completion_logprobs_have_parallel_lists_and_offsets() -> None:
    generator = answer("one two", num_top=2)
    body = {"model": "tiny", "prompt": "x", "logprobs": 2}
    logprobs = (await post(app_over(generator), TEXT, body)).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "one two"
    text = "one two"
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    assert logprobs["token_logprobs"] == [-float(i) for i in range(len(logprobs["tokens"]))]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


async def test_an_impossible_token_has_a_logprob_that_json_can_hold() -> None:
    step = tokens([100], num_top=0)[0]
    assert step.logprobs is not None
    lowest = replace(step.logprobs[0], logprob=float("-inf"))
    event = TokenEvent(token_ids=(100,), logprobs=(lowest,), finish_reason=FinishReason.LENGTH)
    generator = ScriptedGenerator(lambda _: [event])
    response = await post(app_over(generator), CHAT, {**HELLO, "logprobs": True})
    [entry] = response.json()["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999.0


async def test_a_long_chat_is_tokenised_as_a_short_one() -> None:
    generator = answer()
    roomy = replace(served_model(), max_model_len=8192)
    text = "A line of the text.\n" * 200
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    assert (await post(app_over(generator, models={"tiny": roomy}), CHAT, body)).is_success
    prompt = f"<|user|>\n{text}<|end|>\n<|assistant|>\n"
    assert list(generator.requests[-1].prompt_token_ids) == token_ids(prompt)


async def test_a_chat_stream_has_role_pieces_reason_usage_and_done() -> None:
    generator = answer(num_cached_tokens=2)
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    first, *pieces, closing, usage = chunks_of(await post(app_over(generator), CHAT, body))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == ANSWER
    assert all(p["choices"][0]["finish_reason"] is None for p in pieces)
    assert all(c["object"] == "chat.completion.chunk" for c in [first, *pieces, closing, usage])
    assert (closing["choices"][0]["delta"], closing["choices"][0]["finish_reason"]) == ({}, "stop")
    assert [c["usage"] for c in [first, *pieces, closing]] == [None] * (len(pieces) + 2)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(token_ids(ANSWER)) + 1
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len({c["id"] for c in [first, *pieces, closing, usage]}) == 1


async def test_without_the_option_no_chunk_speaks_of_usage() -> None:
    chunks = chunks_of(await post(app_over(answer()), CHAT, {**HELLO, "stream": True}))
    assert not any("usage" in chunk for chunk in chunks)


async def test_continuous_usage_counts_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "prompt": "x", "stream": True, "stream_options": options}
    chunks = chunks_of(await post(app_over(answer("one two three")), TEXT, body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1


async def test_a_completion_stream_has_text_and_a_closing_chunk() -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True, "logprobs": 0}
    generator = answer("one two", num_top=0, finish_reason=FinishReason.LENGTH)
    *pieces, closing = chunks_of(await post(app_over(generator), TEXT, body))
    assert "".join(p["choices"][0]["text"] for p in pieces) == "one two"
    names = [token for p in pieces for token in p["choices"][0]["logprobs"]["tokens"]]
    assert "".join(names) == "one two"
    assert all(chunk["object"] == "text_completion" for chunk in pieces)
    assert (closing["choices"][0]["text"], closing["choices"][0]["finish_reason"]) == ("", "length")


async def test_the_choices_of_a_stream_are_interleaved_and_each_is_whole() -> None:
    gate = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        events: list[Step] = list(tokens(token_ids(f"choice {request.index} speaks")))
        return events if request.index else [*events[:2], gate, *events[2:]]

    generator = ScriptedGenerator(script)
    app = app_over(generator)
    async with client_of(app) as client, asyncio.TaskGroup() as group:
        posting = group.create_task(client.post(CHAT, json={**HELLO, "stream": True, "n": 3}))
        await generator.until(lambda: len(generator.requests) == 3)
        gate.set()
    texts = {0: "", 1: "", 2: ""}
    roles = []
    for chunk in chunks_of(posting.result()):
        [choice] = chunk["choices"]
        roles += [choice["index"]] if "role" in choice["delta"] else []
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert sorted(roles) == [0, 1, 2]
    assert texts == {i: f"choice {i} speaks" for i in range(3)}
