"""Metrics of the load of experts."""

import pytest

from shared.metrics import Metrics
from shared.worker.expert_load import ExpertLoadMeter


def test_metrics_follow_what_the_engine_has_counted() -> None:
    metrics = Metrics()
    meter = ExpertLoadMeter(metrics, "decode")
    meter.follow({1: (6, 2), 3: (0, 0)})
    meter.follow({1: (9, 3), 3: (0, 4)})

    def tokens(layer: int, expert: int) -> float | None:
        labels = {"layer": str(layer), "expert": str(expert)}
        return metrics.value("banyan_decode_expert_tokens_total", labels)

    assert (tokens(1, 0), tokens(1, 1), tokens(3, 0), tokens(3, 1)) == (9, 3, None, 4)
    name = "banyan_decode_expert_imbalance_ratio"
    assert metrics.value(name, {"layer": "1"}) == pytest.approx(9 / 6)
    assert metrics.value(name, {"layer": "3"}) == pytest.approx(2.0)


def test_a_dense_model_has_no_such_metrics() -> None:
    metrics = Metrics()
    ExpertLoadMeter(metrics, "decode").follow({})
    assert b"expert_tokens_total{" not in metrics.exposition()
