"""What users do with a running suite, through the real HTTP port."""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest

from bench.clients import CheckedClients
from bench.reference import Expected
from bench.suite import ROOT, Suite
from tests.e2e.conftest import MAX_TOKENS

pytestmark = pytest.mark.timeout(240)

LONG_PROMPT = "I walk to the big shop on the corner of the street and buy a lot of bread. " * 20


@pytest.fixture(scope="module")
def client(suite: Suite) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{suite.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, text: str, **more: object) -> openai.types.chat.ChatCompletion:
    arguments: dict[str, object] = {"model": "tiny-chat", "max_tokens": 24, "temperature": 0}
    messages = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(messages=messages, **(arguments | more))  # type: ignore[call-overload]
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    return answer


def test_prefill_and_decode_are_apart(suite: Suite, client: openai.OpenAI) -> None:
    before = {w["instance"]: w for w in suite.workers()}
    assert sorted(w["role"] for w in before.values()) == ["decode", "decode", "prefill"]
    answer = ask(client, "What is the capital of France?")
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    whole = ask(client, "Describe a sunset in one sentence.").choices[0].message.content
    stream = client.chat.completions.create(
        model="tiny-chat",
        messages=[{"role": "user", "content": "Describe a sunset in one sentence."}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 1


def test_n_choices_with_a_seed_repeat_themselves(client: openai.OpenAI) -> None:
    first = ask(client, "Name a colour.", n=3, seed=5, temperature=1.0)
    again = ask(client, "Name a colour.", n=3, seed=5, temperature=1.0)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-chat", prompt="Once upon a time", max_tokens=40, temperature=0, stop=["."]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "." not in answer.choices[0].text


def test_logprobs_come_with_each_token(client: openai.OpenAI) -> None:
    answer = ask(client, "What is the capital of France?", logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(item.token for item in logprobs.content) == answer.choices[0].message.content
    for item in logprobs.content:
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob == pytest.approx(item.logprob)  # greedy took the best


def test_ignore_eos_runs_to_the_length(client: openai.OpenAI) -> None:
    answer = ask(client, "What is the capital of France?", extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 24


def test_errors_are_those_of_the_client_library(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        ask(client, "hello", model="gpt-9")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hello", temperature=-1)
    assert caught.value.param == "temperature"


def test_a_shared_prefix_is_fetched_and_changes_nothing(
    suite: Suite, client: openai.OpenAI
) -> None:
    arguments = {"model": "tiny-chat", "prompt": LONG_PROMPT, "max_tokens": 16, "temperature": 0}
    first = client.completions.create(**arguments)  # type: ignore[call-overload]
    second = client.completions.create(**arguments)  # type: ignore[call-overload]
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 256
    assert second.choices[0].text == first.choices[0].text


def test_a_client_that_leaves_frees_its_blocks(suite: Suite) -> None:
    body = {
        "model": "tiny-chat",
        "prompt": "Once upon a time",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{suite.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        assert any(worker["num_running"] for worker in suite.workers())
    suite.wait_until_blocks_are_free(timeout_s=15)


MALFORMED: list[tuple[str, object, str | None]] = [
    ("chat", {"model": "tiny-chat"}, "messages"),
    ("chat", {"model": "tiny-chat", "messages": []}, "messages"),
    ("chat", {"model": "tiny-chat", "messages": "hello"}, "messages"),
    ("chat", {"model": "tiny-chat", "messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"model": "tiny-chat", "messages": [{"role": "king", "content": "x"}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "x"}]}, "model"),
    ("completions", {"model": "tiny-chat"}, "prompt"),
    ("completions", {"model": "tiny-chat", "prompt": []}, "prompt"),
    ("completions", {"model": "tiny-chat", "prompt": {"a": 1}}, "prompt"),
    ("completions", {"model": "tiny-chat", "prompt": [99999999]}, "prompt"),
    ("completions", {"model": "tiny-chat", "prompt": [-1]}, "prompt"),
    ("completions", {"model": "tiny-chat", "prompt": "x " * 20000}, "prompt"),
    ("completions", {"model": 7, "prompt": "x"}, "model"),
    ("completions", {"model": "nobody", "prompt": "x"}, "model"),
    *[
        ("completions", {"model": "tiny-chat", "prompt": "x", field: value}, field)
        for field, value in [
            ("temperature", -0.1),
            ("temperature", "hot"),
            ("temperature", 1e9),
            ("top_p", 1.5),
            ("top_p", -1),
            ("top_k", -5),
            ("top_k", 1.5),
            ("max_tokens", 10**12),
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", "many"),
            ("max_tokens", True),
            ("n", 0),
            ("n", 10**6),
            ("n", "two"),
            ("stop", [""]),
            ("stop", 5),
            ("stop", ["a"] * 100),
            ("seed", "seed"),
            ("seed", 2**200),
            ("logprobs", 1000),
            ("logprobs", -1),
            ("stream", "perhaps"),
            ("stream_options", {"include_usage": 3}),
            ("slo", {"ttft_ms": -5}),
            ("slo", "fast"),
            ("priority", "high"),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -3),
            ("repetition_penalty", 0),
            ("min_p", 2),
            ("logit_bias", {"word": 10}),
            ("logit_bias", {"99999999": 10}),
            ("best_of", 4),
            ("echo", True),
            ("suffix", "end"),
            ("min_tokens", -1),
            ("stop_token_ids", ["a"]),
            ("ignore_eos", "yes"),
        ]
    ],
]


@pytest.mark.parametrize(("endpoint", "body", "field"), MALFORMED)
def test_malformed_requests_are_refused_with_their_field(
    suite: Suite, endpoint: str, body: object, field: str | None
) -> None:
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    response = suite.client.post(path, json=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"]
    assert (error["param"] or "").startswith(field or ""), error


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe\x00",
        b'{"model": "tiny-chat", "prompt": "\xff\xff"}',
        b'{"model": "tiny-chat", "prompt": "\\ud800"}',
        b'{"model": "tiny-chat", "prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
        b'{"model": "tiny-chat", "prompt": "' + b"x" * 10_000_000 + b'"}',
    ],
    ids=lambda data: repr(bytes(data[:24])),
)
def test_bodies_that_are_no_requests_are_refused(suite: Suite, data: bytes) -> None:
    response = suite.client.post(
        "/v1/completions", content=data, headers={"content-type": "application/json"}
    )
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


def test_banyan_chat_answers_on_the_terminal(suite: Suite) -> None:
    done = run_cli("chat", "-m", "What is the capital of France?", "--url", suite.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_banyan_status_lists_every_instance(suite: Suite) -> None:
    roles = sorted(report["role"] for report in suite.status()["instances"])
    assert roles == [
        *("decode", "decode", "gateway", "kvstore", "placer", "predictor", "prefill", "scheduler")
    ]


def test_banyan_status_shows_where_the_layers_and_the_kv_are(suite: Suite) -> None:
    data = suite.status()
    for worker in suite.workers():
        assert worker["layers"] == [[0, worker["num_layers"]]]
        assert worker["kv"]["capacity_bytes"] > 0
        assert worker["kv"]["capacity_blocks"] == worker["num_blocks"]
    (leader,) = data["leaders"]
    assert leader["instance"] == data["leader"] and leader["epoch"] > 0
    text = run_cli("status", "--url", suite.url).stdout
    assert f"tiny-chat: {leader['instance']} leads, epoch {leader['epoch']}" in text
    for report in data["instances"]:
        assert report["instance"] in text


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_answers_from_two_decode_workers_equal_those_of_transformers(
    suite: Suite, expected: list[Expected], model_dir: Path
) -> None:
    clients = CheckedClients(suite.url, model_dir, expected)
    answers = asyncio.run(clients.run(num_requests=40, concurrency=8, max_tokens=MAX_TOKENS))
    assert [answer.error for answer in answers if answer.error] == []
    verdicts = Counter(answer.verdict for answer in answers)
    assert verdicts["different"] == 0 and verdicts["equal"] >= 38, verdicts


def test_a_crashed_worker_is_replaced(suite: Suite, client: openai.OpenAI) -> None:
    victim = suite.processes("decode")[0]
    suite.kill(victim)
    suite.wait_until(
        lambda: len({p.instance for p in suite.processes("decode")} - {victim.instance}) == 2,
        "a new decode worker",
    )
    began_s = time.monotonic()
    assert ask(client, "What is the capital of France?").choices[0].message.content
    assert time.monotonic() - began_s < 30
    suite.wait_until(lambda: len(suite.workers()) == 3, "the report of the new worker", 60)


def test_the_models_are_listed(suite: Suite) -> None:
    body = suite.client.get("/v1/models").json()
    assert [model["id"] for model in body["data"]] == ["tiny-chat"]
