"""Settings of a worker (``BANYAN_PREFILL_…``, ``BANYAN_DECODE_…``)."""

from typing import ClassVar, Literal

from pydantic import Field, FilePath

from shared.config import BUNDLED_MODEL, ModelDirectory, ServiceSettings
from shared.core.iteration import Batching
from shared.engine.config import EngineConfig


class WorkerSettings(ServiceSettings):
    """What a prefill or decode worker can be told; ``role`` is the service's name."""

    service: ClassVar[str] = "worker"
    model: ModelDirectory = str(BUNDLED_MODEL)

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    quantization: Literal["int8", "int4"] | None = None
    """Of the weights, when they are loaded; needs the extra ``quant``."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Keys and values in eight bits with scales, or like ``dtype``. Workers that exchange KV must
    have the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """On a machine with several GPUs ``CUDA_VISIBLE_DEVICES`` says which of them is meant."""
    memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the device's memory for weights and KV; workers on one device share by this."""
    kv_cache_bytes: int | None = Field(default=None, gt=0)
    num_blocks: int | None = Field(default=None, gt=0)
    block_size: int = Field(default=64, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)
    max_num_seqs: int = Field(default=64, gt=0)
    max_num_batched_tokens: int = Field(default=2048, gt=0)
    num_threads: int | None = Field(default=None, gt=0)
    """Torch threads; with two workers on two cores one each is five times faster than two each."""

    latency_profile: FilePath | None = None
    """What ``banyan profile`` wrote for this model on this machine; without one the latency model
    is learnt from the first steps."""

    batching: Batching = "continuous"
    """``static`` runs padded batches to their end, for comparisons only."""
    swap_bytes: int = Field(default=0, ge=0)
    """Host memory for the KV of preempted requests, used when that is cheaper than recomputing."""
    migration_reserve: float = Field(default=0.0, ge=0, lt=1)
    """Share of the KV pool kept unallocated for what migrates in."""

    transport: Literal["auto", "ucx", "tcp"] = "auto"
    transport_host: str = "127.0.0.1"
    transport_pull: bool = False
    """Let workers on one host read KV from each other's memory instead of sending it."""
    transfer_timeout_s: float = Field(default=10.0, gt=0)
    """Deadline of one piece of a KV transfer."""
    use_kvstore: bool = True
    kvstore_timeout_s: float = Field(default=1.0, gt=0)
    """A store that has not delivered by then is not waited for: the prompt is computed."""

    output_ttl_s: float = Field(default=60.0, gt=0)
    """How long an output is kept for a gateway that has not acknowledged it."""
    report_period_s: float = Field(default=0.1, gt=0)
    expert_load_period_s: float = Field(default=10.0, gt=0)
    """How often the load of experts is asked for, which on a GPU waits for the device."""
    instance_ttl_s: float = Field(default=2.0, gt=0)

    def engine_config(self) -> EngineConfig:
        """The part that is the engine's."""
        return EngineConfig(
            model_path=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            device=self.device,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_blocks=self.num_blocks,
            kv_cache_bytes=self.kv_cache_bytes,
            memory_fraction=self.memory_fraction,
            num_threads=self.num_threads,
            batching=self.batching,
            swap_bytes=self.swap_bytes,
            migration_reserve=self.migration_reserve,
        )
