"""What an engine is started with."""

from dataclasses import dataclass

from shared.core.iteration import BATCHINGS, Batching
from shared.errors import ConfigError

DTYPES = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = (None, "int8", "int4")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine; validated when made (``ConfigError`` names the key and value).

    The KV pool is sized by the first that is set of ``num_blocks``, ``kv_cache_bytes`` and
    ``memory_fraction`` (share of the device's whole memory for weights and KV together; never of
    what happens to be free, so that two workers can share a device by agreement). With none set
    the fraction is 0.9 on a GPU and 0.3 on a CPU. ``max_model_len`` ``None`` means the model's
    own limit; either is cut to what the pool can hold. ``num_threads`` ``None`` leaves torch's
    default alone.

    ``migration_reserve`` is the share of the pool that is kept unallocated, for layers and blocks
    that migrate in. ``swap_bytes`` of host memory keep the KV of preempted requests. ``batching``
    ``static`` runs padded batches to their end, for comparisons only.

    ``quantization`` (``int8`` or ``int4``) is that of the weights, done by torchao when the model
    is loaded; ``int4`` computes in bf16 only, which ``auto`` then means. ``kv_cache_dtype``
    ``int8`` or ``fp8`` stores keys and values in eight bits with scales; ``auto`` is ``dtype``.

    ``tp`` is the size of the ``DeviceGroup`` that every layer is split over: 1, for nothing but a
    group's arithmetic is there yet.
    """

    model_path: str
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    enable_prefix_cache: bool = True
    num_threads: int | None = None
    batching: Batching = "continuous"
    swap_bytes: int = 0
    migration_reserve: float = 0.0
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tp: int = 1

    def __post_init__(self) -> None:
        """Check every value."""
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        _require(self.batching in BATCHINGS, "batching", self.batching, " or ".join(BATCHINGS))
        _require(self.swap_bytes >= 0, "swap_bytes", self.swap_bytes, "at least 0")
        for key in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"at least max_num_seqs ({self.max_num_seqs}), or running requests would starve",
        )
        for key in ("max_model_len", "num_blocks", "kv_cache_bytes", "num_threads"):
            value = getattr(self, key)
            _require(value is None or value >= 1, key, value, "at least 1")
        _require(self.tp == 1, "tp", self.tp, "1, as layers are not split over several devices yet")
        fraction = self.memory_fraction
        _require(
            fraction is None or 0.0 < fraction <= 1.0, "memory_fraction", fraction, "in (0, 1]"
        )
        reserve = self.migration_reserve
        _require(0.0 <= reserve < 1.0, "migration_reserve", reserve, "in [0, 1)")
        kinds, kind = KV_CACHE_DTYPES, self.kv_cache_dtype
        _require(kind in kinds, "kv_cache_dtype", kind, f"one of {', '.join(kinds)}")
        method = self.quantization
        _require(method in QUANTIZATIONS, "quantization", method, "none, int8 or int4")
        _require(
            method != "int4" or self.dtype != "fp32",
            "dtype",
            self.dtype,
            "bf16 or auto with quantization='int4', whose kernels compute in bf16",
        )


def _require(is_valid: bool, key: str, value: object, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"{key}={value!r}: must be {expected}")
