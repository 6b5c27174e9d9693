"""Which implementation of a seam is taken on which device; those for GPUs are imported there only.

They are written in Triton, which comes with torch's builds for CUDA. Without it torch does the
same work in plain operations.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from shared.engine.attention import AttentionBackend, AttentionBatch
from shared.engine.kernels import LayerKernels, TorchKernels
from shared.engine.native import kernels as native
from shared.engine.native.attention import NativeAttention
from shared.engine.native.recording import RecordedLayers

if TYPE_CHECKING:
    from shared.engine.chain import ModelChain

logger = logging.getLogger(__name__)


class LayerRunner(Protocol):
    """Runs layers as ``ModelChain.run_layers`` does."""

    def __call__(
        self,
        lo: int,
        hi: int,
        hidden: Tensor,
        batch: AttentionBatch,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Layers ``[lo, hi)`` on ``hidden`` ``[num_tokens, hidden_size]``; same shape out."""
        ...


def make_kernels(device: torch.device, activation_dtype: torch.dtype) -> LayerKernels:
    """The fastest kernels for ``device``."""
    if device.type != "cuda":
        return native.make_kernels(device, activation_dtype)
    if importlib.util.find_spec("triton") is None:
        logger.warning("there is no Triton: the GPU is driven by torch's own operations, slower")
        return TorchKernels(activation_dtype)
    from shared.engine.cuda.kernels import CudaKernels

    return CudaKernels(activation_dtype)


def make_layer_runner(chain: "ModelChain", backend: AttentionBackend) -> LayerRunner:
    """The fastest way to run the layers of ``chain`` on batches whose attention is ``backend``."""
    if chain.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from shared.engine.cuda.attention import CudaAttention
        from shared.engine.cuda.graphs import GraphedLayers

        if isinstance(backend, CudaAttention):
            return GraphedLayers(chain, backend)
    if isinstance(backend, NativeAttention) and chain.kernels.activation_dtype is torch.float32:
        return RecordedLayers(chain, backend)
    return chain.run_layers
