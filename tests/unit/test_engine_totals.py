from typing import Any

from shared.engine.outputs import EngineStats
from shared.metrics import Metrics
from shared.worker.engine_totals import EngineTotals


def _stats(**totals: int) -> EngineStats:
    zeros: dict[str, Any] = dict.fromkeys(
        (
            "num_running",
            "num_waiting",
            "num_held",
            "num_reserved",
            "num_blocks",
            "num_free_blocks",
            "num_cached_blocks",
            "num_batched_tokens",
            "step_s",
            "total_prefill_tokens",
            "total_decode_tokens",
            "total_cached_tokens",
            "total_preemptions",
            "total_failed",
        ),
        0,
    )
    return EngineStats(**(zeros | totals))


def test_counters_follow_what_the_engine_has_counted() -> None:
    metrics = Metrics()
    totals = EngineTotals(metrics, "decode")

    def value(name: str, **labels: str) -> float | None:
        return metrics.value(f"banyan_decode_{name}_total", labels)

    assert value("preempted_requests", kind="swap") == 0
    totals.follow(_stats(total_preemptions=3, total_swap_preemptions=2, total_swapped_out_bytes=70))
    totals.follow(
        _stats(
            total_preemptions=5,
            total_swap_preemptions=3,
            total_swapped_out_bytes=100,
            total_swapped_in_bytes=60,
            total_prefill_pad_tokens=8,
            total_decode_pad_tokens=9,
        )
    )
    assert value("preempted_requests", kind="recompute") == 2
    assert value("preempted_requests", kind="swap") == 3
    assert value("swapped_bytes", direction="out") == 100
    assert value("swapped_bytes", direction="in") == 60
    assert value("padding_tokens", phase="prefill") == 8
    assert value("padding_tokens", phase="decode") == 9
