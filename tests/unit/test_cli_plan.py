"""Which processes ``banyan up`` starts, and what it tells them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli.plan import Hardware, ProcessSpec, UpOptions, plan_suite
from shared.errors import ConfigError

ONE_OF_EACH = dict.fromkeys(
    ("gateway", "scheduler", "predictor", "prefill", "decode", "kvstore", "placer"), 1
)
OPTIONS = UpOptions(model_dir=Path("/m/tiny"), served_model_name="tiny", counts=ONE_OF_EACH)
LAPTOP = Hardware(num_cores=8)


def plan(options: UpOptions, hardware: Hardware = LAPTOP) -> dict[str, ProcessSpec]:
    return {str(spec.slot): spec for spec in plan_suite(options, hardware)}


def with_counts(**counts: int) -> UpOptions:
    return replace(OPTIONS, counts={**ONE_OF_EACH, **counts})


def environments(options: UpOptions, hardware: Hardware = LAPTOP) -> dict[str, dict[str, str]]:
    return {name: spec.environment({}) for name, spec in plan(options, hardware).items()}


def test_every_process_is_a_module_of_its_own_and_knows_the_model() -> None:
    specs = plan(with_counts(decode=2))
    assert sorted(specs) == [
        "decode-0",
        "decode-1",
        "gateway-0",
        "kvstore-0",
        "placer-0",
        "predictor-0",
        "prefill-0",
        "scheduler-0",
    ]
    assert specs["decode-1"].command == (sys.executable, "-m", "services.decode")
    for spec in specs.values():
        assert spec.environ["BANYAN_MODEL"] == "/m/tiny"
        assert spec.environ["BANYAN_SERVED_MODEL_NAME"] == "tiny"


def test_workers_share_cores_and_memory_of_the_host() -> None:
    environs = environments(with_counts(decode=3))
    for name in ("prefill-0", "decode-0", "decode-2"):
        prefix = "BANYAN_PREFILL" if name.startswith("prefill") else "BANYAN_DECODE"
        assert environs[name][f"{prefix}_NUM_THREADS"] == "2"
        assert environs[name]["OMP_NUM_THREADS"] == "2"
        assert environs[name][f"{prefix}_MEMORY_FRACTION"] == "0.1250"
        assert environs[name][f"{prefix}_DEVICE"] == "cpu"
        assert "CUDA_VISIBLE_DEVICES" not in environs[name]


def test_more_workers_than_cores_get_one_thread_each() -> None:
    environs = environments(with_counts(decode=3), Hardware(num_cores=2))
    assert environs["decode-2"]["BANYAN_DECODE_NUM_THREADS"] == "1"


def test_workers_on_one_gpu_share_its_memory() -> None:
    environs = environments(with_counts(decode=2), Hardware(num_cores=8, cuda_devices=("3",)))
    for name in ("prefill-0", "decode-0", "decode-1"):
        assert environs[name]["CUDA_VISIBLE_DEVICES"] == "3"
    assert environs["decode-1"]["BANYAN_DECODE_MEMORY_FRACTION"] == "0.3000"
    assert "BANYAN_DECODE_NUM_THREADS" not in environs["decode-1"]


def test_workers_go_round_several_gpus() -> None:
    hardware = Hardware(num_cores=8, cuda_devices=("0", "1"))
    environs = environments(with_counts(prefill=1, decode=2), hardware)
    devices = {
        name: environs[name]["CUDA_VISIBLE_DEVICES"]
        for name in ("prefill-0", "decode-0", "decode-1")
    }
    assert devices == {"prefill-0": "0", "decode-0": "1", "decode-1": "0"}
    assert environs["prefill-0"]["BANYAN_PREFILL_MEMORY_FRACTION"] == "0.4500"
    assert environs["decode-0"]["BANYAN_DECODE_MEMORY_FRACTION"] == "0.9000"
    assert environs["decode-1"]["BANYAN_DECODE_MEMORY_FRACTION"] == "0.4500"


def test_a_gpu_is_left_alone_on_request() -> None:
    hardware = Hardware(num_cores=4, cuda_devices=("0",))
    environs = environments(replace(OPTIONS, device="cpu"), hardware)
    assert environs["decode-0"]["BANYAN_DECODE_DEVICE"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in environs["decode-0"]


def test_the_memory_fraction_asked_for_is_that_of_all_workers_together() -> None:
    environs = environments(replace(OPTIONS, memory_fraction=0.4))
    assert environs["prefill-0"]["BANYAN_PREFILL_MEMORY_FRACTION"] == "0.2000"
    assert environs["decode-0"]["BANYAN_DECODE_MEMORY_FRACTION"] == "0.2000"


def test_options_reach_those_they_are_meant_for() -> None:
    options = replace(
        with_counts(gateway=2),
        dtype="fp32",
        quantization="int8",
        kv_cache_dtype="fp8",
        max_model_len=2048,
        policy="fifo",
        transport="tcp",
        host="0.0.0.0",
        port=9000,
        json_logs=True,
    )
    environs = environments(options)
    assert environs["decode-0"]["BANYAN_DECODE_DTYPE"] == "fp32"
    assert environs["decode-0"]["BANYAN_DECODE_QUANTIZATION"] == "int8"
    assert environs["prefill-0"]["BANYAN_PREFILL_KV_CACHE_DTYPE"] == "fp8"
    assert environs["prefill-0"]["BANYAN_PREFILL_MAX_MODEL_LEN"] == "2048"
    assert environs["prefill-0"]["BANYAN_PREFILL_TRANSPORT"] == "tcp"
    assert environs["kvstore-0"]["BANYAN_KVSTORE_TRANSPORT"] == "tcp"
    assert environs["gateway-0"]["BANYAN_GATEWAY_MAX_MODEL_LEN"] == "2048"
    assert environs["gateway-0"]["BANYAN_GATEWAY_HOST"] == "0.0.0.0"
    assert environs["gateway-0"]["BANYAN_GATEWAY_PORT"] == "9000"
    assert environs["gateway-1"]["BANYAN_GATEWAY_PORT"] == "9001"
    assert environs["scheduler-0"]["BANYAN_SCHEDULER_POLICY"] == "fifo"
    assert environs["placer-0"]["BANYAN_LOG_JSON"] == "true"


def test_a_variable_of_the_user_stands_between_what_was_asked_for_and_what_follows() -> None:
    decode = plan(replace(OPTIONS, dtype="bf16"))["decode-0"]
    environ = decode.environment(
        {
            "BANYAN_DECODE_NUM_THREADS": "7",
            "BANYAN_DRAIN_TIMEOUT_S": "99",
            "BANYAN_DECODE_DTYPE": "fp32",
            "HOME": "/h",
        }
    )
    assert environ["BANYAN_DECODE_NUM_THREADS"] == "7"
    assert environ["BANYAN_DRAIN_TIMEOUT_S"] == "99"
    assert environ["BANYAN_DECODE_DTYPE"] == "bf16"
    assert environ["HOME"] == "/h"


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (with_counts(gateway=0), "--gateway=0"),
        (with_counts(scheduler=0), "--scheduler=0"),
        (with_counts(prefill=0, decode=0), "--prefill=0 --decode=0"),
        (replace(OPTIONS, device="cuda"), "--device=cuda"),
    ],
)
def test_a_suite_that_could_serve_nobody_is_refused(options: UpOptions, culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        plan(options)


def test_one_role_of_workers_is_enough() -> None:
    assert "prefill-0" not in plan(with_counts(prefill=0))
