"""``LayerKernels`` for NVIDIA GPUs: Triton between the products, which are cuBLAS's."""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.engine.attention import AttentionBackend, TorchAttention
from shared.engine.cuda.attention import CudaAttention
from shared.engine.cuda.linear import CudaGated, CudaLinear, GemvChoice
from shared.engine.cuda.pointwise_kernels import rms_norm_kernel, rope_kernel
from shared.engine.cuda.shapes import ceil_div, next_power_of_2
from shared.engine.kernels import Linear, argmax
from shared.engine.spec import ModelSpec
from shared.kvcache.pool import KVPool

ROTATED_NUMBERS = 1024
"""Heads of so many pairs are rotated by one program."""
WIDE_ROW = 4096


class CudaKernels:
    """``LayerKernels`` on a GPU (and on CPU tensors in Triton's interpreter)."""

    def __init__(self, activation_dtype: torch.dtype) -> None:
        self.activation_dtype = activation_dtype
        self._gemv = GemvChoice()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See ``LayerKernels``."""
        weight = weight.contiguous()
        return CudaLinear(weight, bias, self._gemv.of(weight))

    def gated(self, weight: Tensor, activation: str) -> Callable[[Tensor], Tensor]:
        """See ``LayerKernels``."""
        weight = weight.contiguous()
        return CudaGated(weight, activation, self._gemv.of(weight, activation))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``LayerKernels``."""
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm_kernel[(rows.shape[0],)](
            rows,
            weight,
            out,
            rows.stride(0),
            width,
            eps,
            BLOCK=next_power_of_2(width),
            num_warps=8 if width >= WIDE_ROW else 4,
        )
        return out

    def rope(
        self, heads: Tensor, cos_sin: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
    ) -> None:
        """See ``LayerKernels``."""
        num_tokens, num_heads, head_dim = heads.shape
        half = cos_sin.shape[1] // 2
        pairs = next_power_of_2(half)
        at_once = min(next_power_of_2(num_heads), max(1, ROTATED_NUMBERS // pairs))
        rest = head_dim - 2 * half
        rope_kernel[(num_tokens, ceil_div(num_heads, at_once))](
            heads,
            cos_sin,
            cos_sin if norm_weight is None else norm_weight,
            heads.stride(0),
            heads.stride(1),
            num_heads,
            eps,
            HEAD_DIM=head_dim,
            ROTARY_HALF=half,
            HEADS=at_once,
            PAIRS=pairs,
            REST=next_power_of_2(rest) if rest else 0,
            HAS_NORM=norm_weight is not None,
            num_warps=4,
        )

    def argmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LayerKernels``."""
        return argmax(scores)

    def attention(self, pool: KVPool, spec: ModelSpec) -> AttentionBackend:
        """See ``LayerKernels``; torch's for a pool whose blocks have scales."""
        if CudaAttention.supports(pool):
            return CudaAttention(pool, spec.sliding_windows)
        return TorchAttention(pool, spec.sliding_windows)
