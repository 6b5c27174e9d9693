"""Slabs and swapping on a GPU."""

from pathlib import Path

import pytest
import torch

from shared.errors import OutOfMemory
from shared.kvcache.host_pool import HostPool
from shared.kvcache.layout import KVLayout, LayerKV
from shared.kvcache.pool import KVPool
from tests.engines import Reference, make_engine, make_request, random_prompt, run
from tests.models import FAMILIES, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LAYOUT = KVLayout(layers=(LayerKV(8, 128),) * 4, block_size=64, dtype="bf16")


def test_memory_given_back_is_the_device_s_again() -> None:
    device = torch.device("cuda")
    pool = KVPool(LAYOUT, 256, device, capacity_blocks=320)
    pool.layers[3].tensor[:200] = 3.0
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    pool.give_back(128)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert after - before > 100 * LAYOUT.block_bytes_all_layers
    assert bool((pool.layers[3].tensor == 3.0).all())
    pool.grow(192)
    assert bool((pool.layers[3].tensor[:128] == 3.0).all())
    assert not pool.layers[3].tensor[128:].any()
    with pytest.raises(OutOfMemory):
        pool.grow(1)
    pool.release_layer(3)
    pool.attach_layer(3)
    assert not pool.layers[3].tensor.any()


def test_swapped_blocks_come_back_as_they_were() -> None:
    device = torch.device("cuda")
    pool = KVPool(LAYOUT, 16, device)
    for layer in pool.layers:
        layer.tensor.copy_(torch.randn(layer.tensor.shape, dtype=torch.bfloat16, device=device))
    host = HostPool(pool, 8)
    kept = [layer.tensor[[9, 2, 5]].clone() for layer in pool.layers]
    host.copy_out([(9, 0), (2, 1), (5, 6)])
    pool.zero_blocks(range(16))
    host.copy_in([(0, 1), (1, 15), (6, 3)])
    for layer, blocks in zip(pool.layers, kept, strict=True):
        assert torch.equal(layer.tensor[[1, 15, 3]], blocks)


def test_swapped_requests_get_their_reference_tokens(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["llama-gqa"])
    engine = make_engine(
        path,
        device="cuda",
        num_blocks=9,
        max_model_len=64,
        swap_bytes=1 << 20,
        enable_prefix_cache=False,
    )
    requests = [make_request(str(i), random_prompt(20, seed=i), max_tokens=25) for i in range(3)]
    tokens = run(engine, *requests)
    assert engine.stats().total_swapped_in_bytes > 0
    reference = Reference(path)
    for request in requests:
        reference.assert_same(request.prompt_token_ids, tokens[request.request_id])
