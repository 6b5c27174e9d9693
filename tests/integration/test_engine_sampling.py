"""Penalties and cuts inside an engine: a request that was interrupted sees what it would have."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.core.batch_plan import Chunk
from shared.core.request import Request
from shared.errors import InvalidRequest
from tests.engines import (
    MAX_EXCUSED_GAP,
    Reference,
    make_engine,
    make_request,
    random_prompt,
    run,
)
from tests.models import FAMILIES, VOCAB_SIZE, write_model

PROMPT = random_prompt(21, seed=3)
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"repetition_penalty": 1.3, "frequency_penalty": -0.1, "logit_bias": ((9, 0.5), (4, -100.0))},
]
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "seed": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", FAMILIES["llama-gqa"])


def _request(name: str, output: Sequence[int] = (), **sampling: Any) -> Request:
    request = make_request(name, PROMPT, output=output, max_tokens=40, attempt=bool(output))
    return replace(request, sampling=replace(request.sampling, **sampling))


def _penalised(logits: torch.Tensor, output: Sequence[int], params: dict[str, Any]) -> torch.Tensor:
    scores = logits.clone()
    for token, bias in params.get("logit_bias", ()):
        scores[token] += bias
    factor = params.get("repetition_penalty", 1.0)
    for token in {*PROMPT, *output}:
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(output).items():
        scores[token] -= params.get("frequency_penalty", 0.0) * count
        scores[token] -= params.get("presence_penalty", 0.0)
    return scores


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_greedy_tokens_are_the_best_of_those_allowed(model: Path, is_pipelined: bool) -> None:
    allowed = {"even": slice(0, None, 2), "low": slice(3, 40)}

    def mask_of(chunks: Sequence[Chunk]) -> torch.Tensor | None:
        mask = torch.ones(len(chunks), VOCAB_SIZE, dtype=torch.bool)
        for row, chunk in zip(mask, chunks, strict=True):
            assert chunk.end == chunk.request.num_tokens  # all that it has is known
            if chunk.key.request_id in allowed:
                row.fill_(False)
                row[allowed[chunk.key.request_id]] = True
        return None if bool(mask.all()) else mask

    engine = make_engine(model, is_pipelined=is_pipelined, mask_source=mask_of)
    requests = [
        make_request(name, random_prompt(10, seed=seed), max_tokens=12 + 4 * seed)
        for seed, name in enumerate(("even", "low", "free"))
    ]
    outputs = run(engine, *requests)
    reference = Reference(model)
    for request in requests:
        prompt, tokens = request.prompt_token_ids, outputs[request.request_id]
        assert len(tokens) == request.sampling.max_tokens
        logits = reference.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        scores = torch.full_like(logits, -torch.inf)
        columns = allowed.get(request.request_id, slice(None))
        scores[:, columns] = logits[:, columns]
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((scores.max(dim=-1).values - chosen).max()) < MAX_EXCUSED_GAP
    assert max(outputs["free"]) >= 40  # without a mask it would not keep to any of these
    assert any(token % 2 for token in outputs["free"])


def test_a_mask_that_is_none_fails_the_request_that_it_is_for(model: Path) -> None:
    def mask_of(chunks: Sequence[Chunk]) -> torch.Tensor | None:
        if all(chunk.key.request_id == "good" for chunk in chunks):
            return None
        if any(chunk.key.request_id == "raises" for chunk in chunks):
            raise KeyError("no such grammar")
        return torch.ones(1, VOCAB_SIZE - 1, dtype=torch.bool)

    engine = make_engine(model, mask_source=mask_of)
    good = make_request("good", PROMPT[:4])
    for request in (good, *(make_request(name, PROMPT[:4]) for name in ("raises", "short"))):
        engine.add(request)
    tokens: list[int] = []
    errors = {}
    while (step := engine.step()) is not None:
        for output in step.outputs:
            tokens += output.token_ids
            if output.error is not None:
                errors[output.key.request_id] = output.error
    assert errors == {
        "raises": "KeyError: 'no such grammar'",
        "short": "ValueError: a mask of torch.bool [1, 255] for logits [1, 256]",
    }
    Reference(model).assert_same(good.prompt_token_ids, tokens)
    engine.check_integrity()


@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_greedy_tokens_are_the_best_after_penalties(model: Path, params: dict[str, Any]) -> None:
    tokens = run(make_engine(model), _request("a", **params))["a"]
    logits = Reference(model).logits([*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    plain = logits.argmax(dim=-1).tolist()
    assert tokens != plain
    for position, token in enumerate(tokens):
        scores = _penalised(logits[position], tokens[:position], params)
        assert float(scores.max() - scores[token]) < 1e-4


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_a_resumed_request_sees_the_same_penalties(
    model: Path, params: dict[str, Any], drawn: dict[str, Any]
) -> None:
    whole = run(make_engine(model), _request("a", **params, **drawn))["a"]
    for num_emitted in (1, 17, 39):
        resumed = _request("a", whole[:num_emitted], **params, **drawn)
        assert run(make_engine(model), resumed)["a"] == whole[num_emitted:]


@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_preemption_and_company_change_no_penalty(model: Path, params: dict[str, Any]) -> None:
    requests = [
        _request("a", **params, **DRAWN),
        _request("b", **(DRAWN | {"seed": 5})),
        _request("c", **params),
        _request("d"),
    ]
    alone = {r.request_id: run(make_engine(model), r)[r.request_id] for r in requests}
    engine = make_engine(model, num_blocks=17, enable_prefix_cache=False)
    assert run(engine, *requests) == alone
    assert engine.stats().total_preemptions > 0


def test_a_token_taken_back_does_not_count(model: Path) -> None:
    params: dict[str, Any] = {"presence_penalty": 2.0, "frequency_penalty": 1.0}
    request = _request("a", **params)
    whole = run(make_engine(model), request)["a"]
    engine = make_engine(model)
    engine.add(request)
    tokens: list[int] = []
    for num_back in (0, 0, 0, 0, 2, 0, 1):
        while len(tokens) < 6 and (step := engine.step()) is not None:
            for output in step.outputs:
                tokens += output.token_ids
        engine.rollback(request.key, num_back)
        del tokens[len(tokens) - num_back :]
    while (step := engine.step()) is not None:
        for output in step.outputs:
            tokens += output.token_ids
    assert tokens == whole


def test_a_bias_can_force_and_forbid_a_token(model: Path) -> None:
    forced = run(make_engine(model), _request("a", logit_bias=((77, 100.0),)))["a"]
    assert set(forced) == {77}
    others = tuple((token, -100.0) for token in range(VOCAB_SIZE) if token not in (8, 9))
    drawn = run(make_engine(model), _request("a", temperature=1.0, seed=1, logit_bias=others))["a"]
    assert set(drawn) == {8, 9}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -math.inf),
        ("logit_bias", ((5, math.inf),)),
        ("logit_bias", ((5, 1.0), (5, 2.0))),
    ],
)
def test_parameters_without_a_meaning_are_refused(model: Path, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make_engine(model).add(_request("a", **{field: value}))
    assert refused.value.field == field
