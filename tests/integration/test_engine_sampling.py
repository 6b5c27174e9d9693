"""Penalties and cuts inside an engine: a request that was interrupted sees what it would have."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.core.request import Request
from shared.errors import InvalidRequest
from tests.engines import Reference, make_engine, make_request, random_prompt, run
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
