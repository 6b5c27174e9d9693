"""Products with weights: cuBLAS, or for a single row a kernel of ours where that is faster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shared.engine.cuda.gemv_kernels import gemv_kernel
from shared.engine.cuda.pointwise_kernels import gate_mul_kernel
from shared.engine.cuda.shapes import ceil_div, next_power_of_2
from shared.engine.cuda.timing import fastest

NO_ACTIVATION = "none"
GATE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How many rows and columns of a matrix a program takes at a time."""

    rows: int
    inputs: int
    num_warps: int


GEMV_CONFIGS = (GemvConfig(8, 1024, 4), GemvConfig(4, 1024, 4), GemvConfig(16, 512, 4))


def gemv(
    config: GemvConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = NO_ACTIVATION,
) -> Tensor:
    """``x`` ``[1, num_inputs]`` times ``weight``, contiguous; the residual is not changed."""
    num_outputs, num_inputs = weight.shape
    if activation != NO_ACTIVATION:
        num_outputs //= 2
    out = torch.empty(1, num_outputs, dtype=x.dtype, device=x.device)
    gemv_kernel[(ceil_div(num_outputs, config.rows),)](
        x,
        weight,
        weight if bias is None else bias,
        weight if residual is None else residual,
        out,
        num_outputs,
        num_inputs,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=config.rows,
        INPUTS=config.inputs,
        EVEN=num_inputs % config.inputs == 0,
        num_warps=config.num_warps,
    )
    return out


class GemvChoice:
    """Whether and how products of one row are our kernel's, timed for the first of each shape."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[int, int, torch.dtype, str], GemvConfig | None] = {}

    def of(self, weight: Tensor, activation: str = NO_ACTIVATION) -> GemvConfig | None:
        """The best configuration for ``weight``, ``None`` if cuBLAS is faster."""
        key = (*weight.shape, weight.dtype, activation)
        if weight.device.type != "cuda":
            return GEMV_CONFIGS[0]
        if key not in self._chosen:
            x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            candidates: Sequence[Callable[[], object]] = [
                *(_timed(config, x, weight, activation) for config in GEMV_CONFIGS),
                lambda: _by_cublas(x, weight, activation),
            ]
            best = fastest(candidates, weight.device)
            self._chosen[key] = GEMV_CONFIGS[best] if best < len(GEMV_CONFIGS) else None
        return self._chosen[key]


class CudaLinear:
    """``Linear`` on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, config: GemvConfig | None) -> None:
        self._weight = weight
        self._transposed = weight.t()
        self._bias = bias
        self._config = config

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        if self._config is not None and x.shape[0] == 1:
            return gemv(self._config, x, self._weight, self._bias)
        return functional.linear(x, self._weight, self._bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See ``Linear``."""
        if self._config is not None and x.shape[0] == 1:
            return gemv(self._config, x, self._weight, self._bias, residual)
        if self._bias is not None:
            residual += self._bias
        return residual.addmm_(x, self._transposed)


class CudaGated:
    """``LayerKernels.gated`` on a GPU."""

    def __init__(self, weight: Tensor, activation: str, config: GemvConfig | None) -> None:
        self._weight = weight
        self._activation = activation
        self._config = config

    def __call__(self, x: Tensor) -> Tensor:
        """``[num_rows, in_features]`` to ``[num_rows, width]``."""
        if self._config is not None and x.shape[0] == 1:
            return gemv(self._config, x, self._weight, activation=self._activation)
        return gate_mul(functional.linear(x, self._weight), self._activation)


def gate_mul(both: Tensor, activation: str) -> Tensor:
    """``act`` of the left half of each row times its right half."""
    num_rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=both.dtype, device=both.device)
    block = min(GATE_BLOCK, next_power_of_2(width))
    gate_mul_kernel[(num_rows, ceil_div(width, block))](
        both,
        out,
        both.stride(0),
        width,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _timed(config: GemvConfig, x: Tensor, weight: Tensor, activation: str) -> Callable[[], object]:
    return lambda: gemv(config, x, weight, activation=activation)


def _by_cublas(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    product = functional.linear(x, weight)
    return product if activation == NO_ACTIVATION else gate_mul(product, activation)
