import pytest

from shared.metrics import Metrics


def test_names_are_made_of_area_what_and_unit() -> None:
    metrics = Metrics()
    metrics.counter("gateway", "finished", "requests", "Ended", ["outcome"]).labels("ok").inc()
    metrics.gauge("decode", "free", "blocks", "Free").set(7)
    metrics.histogram("prefill", "step", "seconds", "A step", buckets=(0.1, 1)).observe(0.5)
    text = metrics.exposition().decode()
    assert 'banyan_gateway_finished_requests_total{outcome="ok"} 1.0\n' in text
    assert "banyan_decode_free_blocks 7.0\n" in text
    assert 'banyan_prefill_step_seconds_bucket{le="0.1"} 0.0\n' in text
    assert 'banyan_prefill_step_seconds_bucket{le="1.0"} 1.0\n' in text
    labels = {"outcome": "ok"}
    assert metrics.value("banyan_gateway_finished_requests_total", labels) == 1
    assert metrics.value("banyan_gateway_nothing") is None


@pytest.mark.parametrize(
    ("area", "what", "unit"),
    [("Gateway", "sent", "bytes"), ("gateway", "sent-bytes", "bytes"), ("gateway", "sent", "ms")],
)
def test_other_names_are_refused(area: str, what: str, unit: str) -> None:
    with pytest.raises(ValueError, match="metric"):
        Metrics().counter(area, what, unit, "Sent")


def test_a_metric_has_one_owner() -> None:
    metrics = Metrics()
    metrics.counter("gateway", "sent", "bytes", "Sent")
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.counter("gateway", "sent", "bytes", "Sent")


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.gauge("decode", "free", "blocks", "Free").set(1)
    assert second.exposition() == b""


def test_process_metrics_are_there_when_asked_for() -> None:
    assert b"process_cpu_seconds_total" in Metrics(process=True).exposition()
