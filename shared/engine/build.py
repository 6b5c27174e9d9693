"""From settings to a ready engine."""

from collections.abc import Callable
from pathlib import Path

from shared.core.batch_plan import OrderKey, first_come_first_served
from shared.core.preemption import PreemptionCost
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.model import load_model
from shared.engine.outputs import KVSink
from shared.engine.runner import MaskSource
from shared.kvcache.host_pool import HostPool
from shared.kvcache.pool import KVPool
from shared.kvcache.sizing import resolve_pool_size


def build_engine(
    config: EngineConfig,
    *,
    kv_sink: KVSink | None = None,
    order: OrderKey = first_come_first_served,
    preemption_cost: PreemptionCost | None = None,
    is_pipelined: bool | None = None,
    mask_source: MaskSource | None = None,
    on_progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Engine:
    """Load the model and make an engine for it; ``on_progress(what, fraction)`` says how far it is.

    Raises ``UnsupportedModel``, or ``OutOfMemory`` naming the numbers.
    """
    chain = load_model(
        Path(config.model_path),
        dtype=config.dtype,
        device=config.device,
        quantization=config.quantization,
        on_progress=on_progress,
    )
    if config.kv_cache_dtype != "auto":
        chain.spec = chain.spec.with_kv_cache_dtype(config.kv_cache_dtype)
    layout = chain.spec.kv_layout(config.block_size)
    size = resolve_pool_size(
        layout,
        chain.device,
        param_bytes=chain.spec.param_bytes,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        memory_fraction=config.memory_fraction,
        migration_reserve=config.migration_reserve,
        swap_bytes=config.swap_bytes,
    )
    on_progress(f"allocating {size.num_blocks} KV blocks", 0.95)
    pool = KVPool(layout, size.num_blocks, chain.device, capacity_blocks=size.capacity_blocks)
    engine = Engine(
        chain,
        pool,
        config,
        kv_sink=kv_sink,
        order=order,
        host_pool=HostPool(pool, size.num_swap_blocks) if size.num_swap_blocks else None,
        preemption_cost=preemption_cost,
        is_pipelined=is_pipelined,
        mask_source=mask_source,
    )
    on_progress("ready", 1.0)
    return engine
