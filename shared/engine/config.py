"""What an engine is started with."""

from dataclasses import dataclass

from shared.errors import ConfigError

DTYPES = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine; validated when made (``ConfigError`` names the key and value).

    The KV pool is sized by the first that is set of ``num_blocks``, ``kv_cache_bytes`` and
    ``memory_fraction`` (share of the device's whole memory for weights and KV together; never of
    what happens to be free, so that two workers can share a device by agreement). With none set
    the fraction is 0.9 on a GPU and 0.3 on a CPU. ``max_model_len`` ``None`` means the model's
    own limit; either is cut to what the pool can hold. ``num_threads`` ``None`` leaves torch's
    default alone.
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

    def __post_init__(self) -> None:
        """Check every value."""
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
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
        fraction = self.memory_fraction
        _require(
            fraction is None or 0.0 < fraction <= 1.0, "memory_fraction", fraction, "in (0, 1]"
        )


def _require(is_valid: bool, key: str, value: object, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"{key}={value!r}: must be {expected}")
