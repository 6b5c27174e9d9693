"""The same engine on a GPU."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.outputs import KVExport
from shared.errors import OutOfMemory
from tests.engines import Reference, make_engine, make_request, random_prompt, run
from tests.integration.test_engine_random import Expected, drive, make_random_engine
from tests.models import FAMILIES, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_reference(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path / family, FAMILIES[family])
    engine = make_engine(path, device="cuda", num_blocks=12)
    requests = [
        make_request(str(i), random_prompt(length, seed=i)) for i, length in enumerate((30, 5, 17))
    ]
    tokens = run(engine, *requests)
    reference = Reference(path)
    for request in requests:
        reference.assert_same(request.prompt_token_ids, tokens[request.request_id])


def test_kv_goes_from_one_device_to_the_other_and_back(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    prompt = random_prompt(35, seed=1)
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        exports: list[KVExport] = []
        first = make_engine(path, device=here, kv_sink=exports.append)
        second = make_engine(path, device=there)
        request = make_request("a", prompt)
        first.add(request, prefill_only=True, export=True)
        tokens: list[int] = []
        while (step := first.step()) is not None:
            tokens += [token for output in step.outputs for token in output.token_ids]
        second.reserve(request.key, request.num_tokens)
        for export in exports:
            second.import_kv(
                export.key, export.layer, export.block_lo, export.block_hi, 0, 2, export.data
            )
            copied = second.export_kv(export.key, export.layer, export.block_lo, export.block_hi)
            assert np.array_equal(copied, export.data)
        handed_over = make_request("a", prompt, output=tokens)
        second.start_reserved(handed_over, num_computed_tokens=len(prompt))
        while (step := second.step()) is not None:
            tokens += [token for output in step.outputs for token in output.token_ids]
        Reference(path).assert_same(prompt, tokens)


def test_bf16_stays_close(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"], dtype=torch.bfloat16)
    engine = make_engine(path, device="auto", dtype="auto")
    assert engine.device.type == "cuda"
    prompt = random_prompt(30, seed=3)
    tokens = run(engine, make_request("a", prompt))["a"]
    logits = Reference(path).logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


def test_the_pool_is_a_fraction_of_the_device(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    engine = make_engine(path, device="cuda", num_blocks=None, memory_fraction=0.01)
    used_bytes = engine.num_blocks * engine.layout.block_bytes_all_layers
    assert 0.009 * total_bytes < used_bytes <= 0.01 * total_bytes
    with pytest.raises(OutOfMemory):
        make_engine(path, device="cuda", num_blocks=10**12)


def test_one_step_in_flight_changes_no_token(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    requests = [
        make_request(str(i), random_prompt(9 + 7 * i, seed=i), max_tokens=20 - i, logprobs=2)
        for i in range(5)
    ]
    stop = run(make_engine(path), requests[1])["1"][4]
    ways: tuple[dict[str, Any], ...] = (
        {"top_p": 0.9, "temperature": 1.0},
        {"stop_token_ids": (stop,)},
        {"min_tokens": 8},
    )
    for index, sampling in enumerate(ways):
        changed = replace(requests[index].sampling, seed=index, **sampling)
        requests[index] = replace(requests[index], sampling=changed)
    plain, pipelined, on_cpu = (
        run(make_engine(path, device=device, is_pipelined=is_pipelined), *requests)
        for device, is_pipelined in (("cuda", False), ("cuda", True), ("cpu", False))
    )
    assert plain == pipelined
    for request in requests[1:]:  # drawn tokens may differ where a probability is rounded
        if plain[request.request_id] != on_cpu[request.request_id]:
            Reference(path).assert_same(request.prompt_token_ids, plain[request.request_id])


@pytest.mark.parametrize("kind", ["recompute", "cheaper"])
def test_random_traffic_gets_its_reference_tokens(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    expected = Expected(path)
    for is_pipelined in (False, True):
        engine = make_random_engine(path, kind, "continuous", is_pipelined, device="cuda")
        drive(engine, expected, random.Random(kind))


def test_the_host_waits_for_nothing_but_the_tokens(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    engine = make_engine(path, device="cuda")
    ways: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20})
    for i, sampling in enumerate(ways):
        request = make_request(str(i), random_prompt(10, seed=i), max_tokens=30, logprobs=3)
        engine.add(replace(request, sampling=replace(request.sampling, **sampling)))
    for _ in range(4):  # until kernels are compiled and graphs captured
        assert engine.step() is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            step = engine.step()
            assert step is not None and len(step.outputs) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
