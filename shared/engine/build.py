"""From settings to a ready engine."""

from collections.abc import Callable
from pathlib import Path

from shared.core.batch_plan import OrderKey, first_come_first_served
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.model import load_model
from shared.engine.outputs import KVSink
from shared.kvcache.pool import KVPool
from shared.kvcache.sizing import resolve_num_blocks


def build_engine(
    config: EngineConfig,
    *,
    kv_sink: KVSink | None = None,
    order: OrderKey = first_come_first_served,
    on_progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Engine:
    """Load the model and make an engine for it; ``on_progress(what, fraction)`` says how far it is.

    Raises ``UnsupportedModel``, or ``OutOfMemory`` naming the numbers.
    """
    chain = load_model(
        Path(config.model_path), dtype=config.dtype, device=config.device, on_progress=on_progress
    )
    layout = chain.spec.kv_layout(config.block_size)
    num_blocks = resolve_num_blocks(
        layout,
        chain.device,
        param_bytes=chain.spec.param_bytes,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        memory_fraction=config.memory_fraction,
    )
    on_progress(f"allocating {num_blocks} KV blocks", 0.95)
    engine = Engine(
        chain, KVPool(layout, num_blocks, chain.device), config, kv_sink=kv_sink, order=order
    )
    on_progress("ready", 1.0)
    return engine
