"""Counters that follow what an engine has counted since its start."""

from prometheus_client import Counter

from shared.core.preemption import PreemptionKind
from shared.engine.outputs import EngineStats
from shared.metrics import Metrics


class EngineTotals:
    """Preemptions by kind, bytes swapped by direction and padding by phase, as metrics."""

    def __init__(self, metrics: Metrics, role: str) -> None:
        preempted = metrics.counter(
            role, "preempted", "requests", "Preemptions of requests", labels=("kind",)
        )
        swapped = metrics.counter(
            role, "swapped", "bytes", "KV to and from host memory", labels=("direction",)
        )
        padding = metrics.counter(
            role, "padding", "tokens", "Computed for the shape of static batches", labels=("phase",)
        )
        self._recomputed = preempted.labels(PreemptionKind.RECOMPUTE)
        self._swapped = preempted.labels(PreemptionKind.SWAP)
        self._out, self._in = swapped.labels("out"), swapped.labels("in")
        self._prefill, self._decode = padding.labels("prefill"), padding.labels("decode")
        self._seen: dict[Counter, int] = {}

    def follow(self, stats: EngineStats) -> None:
        """Bring the counters up to ``stats``, which are never older than the last ones."""
        totals = {
            self._recomputed: stats.total_preemptions - stats.total_swap_preemptions,
            self._swapped: stats.total_swap_preemptions,
            self._out: stats.total_swapped_out_bytes,
            self._in: stats.total_swapped_in_bytes,
            self._prefill: stats.total_prefill_pad_tokens,
            self._decode: stats.total_decode_pad_tokens,
        }
        for counter, total in totals.items():
            if grown := total - self._seen.get(counter, 0):
                counter.inc(grown)
                self._seen[counter] = total
