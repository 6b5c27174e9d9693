"""Engines and transformers models of random weights that are made on the device itself.

Nothing is read from a disk or carried there, so that a model of tens of gigabytes is ready within
seconds. A seed gives the same weights again and again on the same device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.geometry import WEIGHT_STD, Geometry
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.model import cpu_has_bf16, verified_chain
from shared.engine.native.library import load_library
from shared.engine.select import make_kernels
from shared.kvcache.pool import KVPool

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A Llama of some shape; ``path`` has its ``config.json`` and nothing else."""

    geometry: Geometry
    path: Path
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def write_config(self) -> None:
        """Put ``config.json`` where the counting of weights and the fingerprint look for it."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.geometry.config()
        config.dtype = self.dtype
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(self.path)

    def load(self) -> Any:
        """The model as transformers has it."""
        config = self.geometry.config()
        config.initializer_range = WEIGHT_STD
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self.dtype, attn_implementation="sdpa"
            )
        return model.eval().requires_grad_(False)

    def engine(self, config: EngineConfig, *, is_pipelined: bool | None = None) -> Engine:
        """Our engine on the same weights; ``config.num_blocks`` must be set."""
        assert config.num_blocks is not None
        model = self.load()
        is_cpu = self.device.type == "cpu"
        # As when a model is loaded: without bf16 instructions our kernels widen what they read.
        is_widened = is_cpu and not cpu_has_bf16() and load_library() is not None
        kernels = make_kernels(self.device, torch.float32 if is_widened else self.dtype)
        chain = verified_chain(self.path, model, NAMES[self.dtype], self.device, None, kernels)
        del model  # it has been taken apart
        layout = chain.spec.kv_layout(config.block_size)
        pool = KVPool(layout, config.num_blocks, self.device)
        return Engine(chain, pool, config, is_pipelined=is_pipelined)

    def engine_config(self, **settings: Any) -> EngineConfig:
        """Settings for ``engine``."""
        return EngineConfig(
            model_path=str(self.path),
            dtype=NAMES[self.dtype],
            device=self.device.type,
            enable_prefix_cache=False,
            **settings,
        )
