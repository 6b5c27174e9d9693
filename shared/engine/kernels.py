"""The operations that fused layers are made of, and their plainest implementation."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shared.engine.attention import AttentionBackend, TorchAttention
from shared.engine.spec import ModelSpec
from shared.kvcache.pool import KVPool

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Linear(Protocol):
    """``x W^T + b`` for ``x`` ``[num_rows, in_features]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product, ``[num_rows, out_features]``."""
        ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` plus the product; ``residual`` is not to be used afterwards."""
        ...


class LayerKernels(Protocol):
    """Makes the operations of a layer for one device.

    Activations are ``activation_dtype``, which may be wider than the weights.
    """

    activation_dtype: torch.dtype

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A linear layer; ``weight`` is ``[out_features, in_features]``."""
        ...

    def gated(self, weight: Tensor, activation: str) -> Callable[[Tensor], Tensor]:
        """``act(x G^T) * (x U^T)``; ``weight`` is G above U, ``[2 * width, in_features]``.

        ``activation`` is a key of ``ACTIVATIONS``.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension; ``weight`` fp32, sums in fp32."""
        ...

    def rope(
        self, heads: Tensor, cos_sin: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
    ) -> None:
        """Rotate ``heads`` ``[num_tokens, num_heads, head_dim]`` in place.

        Of each head the first ``rotary_dim`` numbers, the two halves paired as in Llama;
        ``cos_sin`` is ``[num_tokens, rotary_dim]`` fp32, cosines before sines. With
        ``norm_weight`` each head is RMS-normed first (Qwen3).
        """
        ...

    def argmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row of ``[num_rows, num_columns]`` fp32 is highest first, int64, and how high.

        A row with a NaN has one as its highest.
        """
        ...

    def attention(self, pool: KVPool, spec: ModelSpec) -> AttentionBackend:
        """The attention that goes with them, over ``pool``."""
        ...


class TorchLinear:
    """``Linear`` by torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return functional.linear(x, self._weight, self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See ``Linear``."""
        if self._bias is not None:
            residual += self._bias
        return torch.addmm(residual, x, self._weight.t())


class TorchKernels:
    """``LayerKernels`` in plain torch, on any device."""

    def __init__(self, activation_dtype: torch.dtype) -> None:
        self.activation_dtype = activation_dtype

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See ``LayerKernels``."""
        return TorchLinear(weight, bias)

    def gated(self, weight: Tensor, activation: str) -> Callable[[Tensor], Tensor]:
        """See ``LayerKernels``."""
        act = ACTIVATIONS[activation]

        def run(x: Tensor) -> Tensor:
            gate, up = functional.linear(x, weight).chunk(2, dim=-1)
            return act(gate) * up

        return run

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``LayerKernels``."""
        wide = x.float()
        factor = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (wide * factor * weight).to(x.dtype)

    def rope(
        self, heads: Tensor, cos_sin: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
    ) -> None:
        """See ``LayerKernels``."""
        if norm_weight is not None:
            heads.copy_(self.rms_norm(heads, norm_weight, eps))
        half = cos_sin.shape[-1] // 2
        cosines, sines = cos_sin[:, None, :half], cos_sin[:, None, half:]
        left, right = heads[..., :half].float(), heads[..., half : 2 * half].float()
        rotated = left * cosines - right * sines, right * cosines + left * sines
        heads[..., :half], heads[..., half : 2 * half] = rotated

    def argmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LayerKernels``."""
        return argmax(scores)

    def attention(self, pool: KVPool, spec: ModelSpec) -> AttentionBackend:
        """See ``LayerKernels``."""
        return TorchAttention(pool, spec.sliding_windows)


def argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``LayerKernels.argmax`` in torch; on a CPU by numpy, which uses vector instructions."""
    if scores.device.type == "cpu":
        indices = torch.from_numpy(scores.numpy().argmax(axis=-1))
    else:
        indices = scores.argmax(dim=-1)
    return indices, scores.gather(1, indices[:, None])[:, 0]
