"""What a worker makes of its profile and its steps, and what it says about them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.core.latency_model import LatencyConstants, LatencyModel, ModelFacts
from shared.core.step_work import StepWork
from shared.engine.outputs import EngineStats
from shared.errors import ConfigError
from shared.messages import CODEC
from shared.messages.load import InstanceState, WorkerReport
from shared.metrics import Metrics
from shared.worker.config import WorkerSettings
from shared.worker.latency import MIN_STEPS, LatencyMeter, read_profile
from tests.unit.test_latency_model import MODEL

SMALL = LatencyModel(
    facts=ModelFacts(
        num_layers=1,
        layer_param_bytes=2,
        head_param_bytes=2,
        layer_flops_per_token=2.0,
        head_flops_per_token=2.0,
        attention_flops_per_pair=4.0,
        kv_bytes_per_token=8,
    ),
    constants=LatencyConstants(
        base_s=0.5,
        rows=((1, 0.0), (8, 0.25)),
        chunk_s=0.0,
        decode_request_s=0.0,
        causal_s_per_flop=0.0,
        prefix_s_per_flop=0.0,
        prefix_kv_s_per_byte=0.0,
        decode_kv_s_per_byte=0.0,
    ),
    max_num_batched_tokens=8,
)


def report(**changes: Any) -> WorkerReport:
    plain = WorkerReport(
        role="decode",
        instance="d",
        sequence=1,
        state=InstanceState.READY,
        model="m",
        kv_layout="k",
        max_model_len=1,
        block_size=1,
        num_blocks=1,
        num_free_blocks=1,
        num_running=0,
        num_waiting=0,
        num_held=0,
        num_reserved=0,
        compute_utilisation=0.0,
        tokens_per_s=0.0,
        step_s=0.0,
        layer_s=0.0,
    )
    return msgspec.structs.replace(plain, **changes)


def engine_stats(work: StepWork, step_s: float) -> EngineStats:
    return EngineStats(
        num_running=1,
        num_waiting=0,
        num_held=0,
        num_reserved=0,
        num_blocks=8,
        num_free_blocks=4,
        num_cached_blocks=0,
        num_batched_tokens=work.num_batched_tokens,
        step_s=step_s,
        total_prefill_tokens=0,
        total_decode_tokens=0,
        total_cached_tokens=0,
        total_preemptions=0,
        total_failed=0,
        work=work,
    )


def profile_file(path: Path, model: LatencyModel) -> Path:
    path.write_text(json.dumps({"latency_model": model.to_dict(), "points": []}))
    return path


# On the wire


def test_a_report_with_a_model_has_these_bytes() -> None:
    message = report(latency=SMALL, latency_error=0.25)
    data = CODEC.encode(message)
    golden = bytes.fromhex(
        "a76c6174656e637989a5666163747388aa6e756d5f6c617965727301b16c617965725f706172616d5f62797465"
        "7302b0686561645f706172616d5f627974657302b56c617965725f666c6f70735f7065725f746f6b656ecb4000"
        "000000000000b4686561645f666c6f70735f7065725f746f6b656ecb4000000000000000b8617474656e74696f"
        "6e5f666c6f70735f7065725f70616972cb4010000000000000b26b765f62797465735f7065725f746f6b656e08"
        "a777696e646f77739182aa6e756d5f746f6b656e73c0a57368617265cb3ff0000000000000a9636f6e7374616e"
        "747388a6626173655f73cb3fe0000000000000a4726f7773929201cb00000000000000009208cb3fd000000000"
        "0000a76368756e6b5f73cb0000000000000000b06465636f64655f726571756573745f73cb0000000000000000"
        "b163617573616c5f735f7065725f666c6f70cb0000000000000000b17072656669785f735f7065725f666c6f70"
        "cb0000000000000000b47072656669785f6b765f735f7065725f62797465cb0000000000000000b46465636f64"
        "655f6b765f735f7065725f62797465cb0000000000000000b66d61785f6e756d5f626174636865645f746f6b65"
        "6e7308a86861726477617265a0a6646576696365a0ab6e756d5f7468726561647300a56474797065a0ab66696e"
        "6765727072696e74a0a776657273696f6e01ad6c6174656e63795f6572726f72cb3fd0000000000000"
    )
    assert data.endswith(golden)
    assert CODEC.decode(data) == message


def test_a_report_of_before_has_none() -> None:
    data = CODEC.encode(report())
    assert b"latency" not in data
    decoded = CODEC.decode(data)
    assert isinstance(decoded, WorkerReport)
    assert decoded.latency is None and decoded.latency_error is None


def test_who_hears_a_report_can_ask_it() -> None:
    decoded = CODEC.decode(CODEC.encode(report(latency=MODEL)))
    assert isinstance(decoded, WorkerReport) and decoded.latency is not None
    assert decoded.latency.decode_step_s(4, 2000) == MODEL.decode_step_s(4, 2000)
    assert decoded.latency.prefill_s(3000, 100) == MODEL.prefill_s(3000, 100)


# From a file


def test_the_file_of_a_profile_is_read(tmp_path: Path) -> None:
    path = profile_file(tmp_path / "p.json", MODEL)
    assert read_profile(path) == MODEL


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"latency_model": 3}', '{"latency_model": {"facts": {}}}', "\x00"]
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"latency_profile=.*p\.json"):
        read_profile(path)


def test_a_profile_that_is_not_there_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANYAN_WORKER_LATENCY_PROFILE", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="BANYAN_WORKER_LATENCY_PROFILE"):
        WorkerSettings.load()


# From steps


def test_a_guess_is_not_reported_before_it_is_a_model() -> None:
    metrics = Metrics()
    meter = LatencyMeter(MODEL, is_profiled=False, metrics=metrics, role="decode")
    for number in range(MIN_STEPS):
        assert meter.model() is None
        work = StepWork.decode(number % 8 + 1, 3000)
        meter.on_step(engine_stats(work, MODEL.step_s(work) * 2.0))
    model = meter.model()
    assert model is not None
    assert model.decode_step_s(4, 3000) == pytest.approx(MODEL.decode_step_s(4, 3000) * 2, rel=0.05)
    shown = metrics.value("banyan_decode_predicted_decode_seconds")
    assert shown == model.decode_step_s(1, 1024)
    assert metrics.value("banyan_decode_predicted_prefill_seconds") == model.prefill_s(1024)
    error = metrics.value("banyan_decode_latency_error_ratio")
    assert error is not None and error == meter.error and error > 0.0


def test_a_profile_is_reported_from_the_first_moment_on() -> None:
    meter = LatencyMeter(MODEL, is_profiled=True, metrics=Metrics(), role="prefill")
    assert meter.model() == MODEL
    assert meter.error is None
