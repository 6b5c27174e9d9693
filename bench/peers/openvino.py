"""OpenVINO GenAI's continuous batching. The model is converted the first time (minutes).

Settings (``--set``): ``weights=fp16|fp32|…`` (of the conversion), ``precision=f32|bf16|…``
(INFERENCE_PRECISION_HINT), ``kv=u8|bf16|f16|f32`` (KV_CACHE_PRECISION), ``batched_tokens=N``,
``cache_gb=N``. What is not set is left to OpenVINO.
"""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from bench.peers import runner
from bench.serving import Emit
from bench.workload import OfflineRequest

PRECISIONS = {"auto": "", "bf16": "", "fp32": "f32"}
"""It takes bf16 by itself where that is fast."""
DEFAULT_CACHE_GB = "4"


class PipelineServing:
    """A pipeline whose iterations are run one by one."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._num_added = 0
        self._running: dict[int, Any] = {}

    def add(self, index: int, request: OfflineRequest) -> None:
        """Queue it, greedy."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request.output_len
        config.ignore_eos = True
        config.do_sample = False
        self._num_added += 1
        prompt = openvino.Tensor(np.array([request.prompt_token_ids], dtype=np.int64))
        self._running[index] = self._pipeline.add_request(self._num_added, prompt, config)

    def step(self, emit: Emit) -> None:
        """One iteration."""
        self._pipeline.step()
        counts = []
        for index, handle in list(self._running.items()):
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if count:
                counts.append((index, count))
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                del self._running[index]
        emit(counts)


def converted_model(settings: runner.PeerSettings) -> Path:
    """The converted model's directory; converts what is not there yet."""
    weights = settings.option("weights", "fp16")
    source = Path(settings.model).resolve()
    digest = hashlib.sha256(f"{source} {(source / 'config.json').stat().st_mtime_ns}".encode())
    target = (
        Path(settings.cache_dir) / f"{source.name}-{digest.hexdigest()[:12]}-openvino-{weights}"
    )
    if not (target / "openvino_model.xml").exists():
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
        command += ["--model", str(source), "--task", "text-generation-with-past"]
        command += ["--weight-format", weights, str(target)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return target


def make(settings: runner.PeerSettings) -> tuple[PipelineServing, dict[str, Any]]:
    """Convert if need be, and load."""
    properties: dict[str, Any] = {}
    if settings.num_threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.num_threads
    if precision := settings.option("precision", PRECISIONS[settings.dtype]):
        properties["INFERENCE_PRECISION_HINT"] = precision
    if kv_precision := settings.option("kv", ""):
        properties["KV_CACHE_PRECISION"] = kv_precision
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = int(settings.option("cache_gb", DEFAULT_CACHE_GB))
    scheduler.max_num_seqs = max(settings.max_batch, scheduler.max_num_seqs)
    if batched_tokens := settings.option("batched_tokens", ""):
        scheduler.max_num_batched_tokens = int(batched_tokens)
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        converted_model(settings), scheduler, "CPU", properties
    )
    return PipelineServing(pipeline), {
        "dtype": precision or _default_precision(),
        "device": "cpu",
        "num_threads": settings.num_threads,
        "settings": {
            **properties,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "weights": settings.option("weights", "fp16"),
        },
        "versions": {"openvino_genai": openvino_genai.get_version()},
    }


def _default_precision() -> str:
    precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return str(precision.get_type_name())


if __name__ == "__main__":
    runner.run("openvino", make)
