"""What experts were given, as metrics."""

from collections.abc import Mapping, Sequence

from shared.metrics import Metrics


class ExpertLoadMeter:
    """Follows ``Engine.expert_load`` of a mixture of experts; a dense model has no such metrics."""

    def __init__(self, metrics: Metrics, role: str) -> None:
        self._tokens = metrics.counter(
            role, "expert", "tokens", "Tokens given to an expert", labels=("layer", "expert")
        )
        self._imbalance = metrics.gauge(
            role,
            "expert_imbalance",
            "ratio",
            "Tokens of a layer's busiest expert over those of its average one",
            labels=("layer",),
        )
        self._seen: dict[int, Sequence[int]] = {}

    def follow(self, loads: Mapping[int, Sequence[int]]) -> None:
        """Bring the metrics up to ``loads``, tokens per expert by layer since the engine began."""
        for layer, load in loads.items():
            seen = self._seen.get(layer) or [0] * len(load)
            for expert, (tokens, before) in enumerate(zip(load, seen, strict=True)):
                if tokens > before:
                    self._tokens.labels(layer, expert).inc(tokens - before)
            if total := sum(load):
                self._imbalance.labels(layer).set(max(load) * len(load) / total)
            self._seen[layer] = load
