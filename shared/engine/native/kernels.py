"""``LayerKernels`` for CPUs: C kernels between the products, the fastest product there is."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shared.engine.attention import AttentionBackend, TorchAttention
from shared.engine.kernels import LayerKernels, Linear, TorchKernels, TorchLinear
from shared.engine.native.attention import NativeAttention
from shared.engine.native.library import (
    DTYPE_CODES,
    Epilogue,
    NativeLibrary,
    Operation,
    PackedLinear,
    load_library,
)
from shared.engine.spec import ModelSpec
from shared.kvcache.pool import KVPool

# Rows of a decode step and of a prefill: what candidates are timed with.
TIMED_ROWS = (16, 256)
TIMED_REPEATS = 5
# Larger weights are timed by their first rows.
TIMED_ITEMS = 1 << 22

GATES = {"silu": Epilogue.SILU_MUL, "gelu_tanh": Epilogue.GELU_TANH_MUL}

LinearFactory = Callable[[Tensor, Tensor | None], Linear]


def make_kernels(device: torch.device, activation_dtype: torch.dtype) -> LayerKernels:
    """The fastest kernels for ``device``; torch's own where ours were not compiled."""
    library = load_library() if device.type == "cpu" else None
    if library is None or activation_dtype not in DTYPE_CODES:
        return TorchKernels(activation_dtype)
    return NativeKernels(library, activation_dtype)


class NativeLinear:
    """``Linear`` by the C kernels: fp32 activations, weights fp32 or bf16."""

    def __init__(self, library: NativeLibrary, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = PackedLinear(library, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return self._packed(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See ``Linear``; ``residual`` is the result."""
        return self._packed(x, residual, is_added=True)


class OneDnnLinear:
    """``Linear`` by oneDNN over weights in the layout it likes best, made once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TIMED_ROWS[0])
        self._bias = bias
        self._run: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._run_binary: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return self._run(x, self._weight, self._bias, "none", [], "")

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return self._run_binary(x, residual, self._weight, self._bias, "add")


class NativeKernels:
    """``LayerKernels`` on the CPU.

    Activations are those of the weights, but fp32 where the CPU has no bf16 instructions: then
    bf16 weights are widened in registers, which reads half of what fp32 weights would.
    """

    def __init__(self, library: NativeLibrary, activation_dtype: torch.dtype) -> None:
        self.activation_dtype = activation_dtype
        self._code = DTYPE_CODES[activation_dtype]
        self._library = library
        self._gate_mul = library.functions.gate_mul
        self._fastest: dict[tuple[int, int], LinearFactory] = {}

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """The fastest of what can compute it, as timed here for the first weight of a shape."""
        factories = self._candidates(weight.dtype)
        if len(factories) == 1:
            return factories[0](weight, bias)
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self._fastest:
            self._fastest[shape] = _fastest(factories, weight, self.activation_dtype)
        return self._fastest[shape](weight, bias)

    def gated(self, weight: Tensor, activation: str) -> Callable[[Tensor], Tensor]:
        """See ``LayerKernels``."""
        epilogue = GATES[activation]
        if self._is_native(weight):
            return PackedLinear(self._library, weight, epilogue=epilogue)
        linear = self.linear(weight, None)

        def run(x: Tensor) -> Tensor:
            both = linear(x)
            num_rows, width = both.shape[0], both.shape[1] // 2
            out = torch.empty(num_rows, width, dtype=both.dtype)
            self._gate_mul(
                both.data_ptr(),
                out.data_ptr(),
                num_rows,
                width,
                int(epilogue),
                self._code,
                torch.get_num_threads(),
            )
            return out

        return run

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``LayerKernels``."""
        out = self._library.empty(*x.shape, dtype=x.dtype)
        self._library.call(
            Operation.RMS_NORM,
            x.data_ptr(),
            None,
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            x.stride(0),
            eps,
            self._code,
            torch.get_num_threads(),
        )
        return out

    def rope(
        self, heads: Tensor, cos_sin: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
    ) -> None:
        """See ``LayerKernels``."""
        num_tokens, num_heads, head_dim = heads.shape
        self._library.call(
            Operation.ROPE,
            heads.data_ptr(),
            heads.stride(0),
            cos_sin.data_ptr(),
            num_tokens,
            num_heads,
            head_dim,
            cos_sin.shape[1],
            None if norm_weight is None else norm_weight.data_ptr(),
            eps,
            self._code,
            torch.get_num_threads(),
        )

    def argmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LayerKernels``."""
        num_rows, num_columns = scores.shape
        indices, values = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
        self._library.functions.argmax(
            scores.data_ptr(),
            scores.stride(0),
            num_rows,
            num_columns,
            indices.data_ptr(),
            values.data_ptr(),
            torch.get_num_threads(),
        )
        return indices, values

    def attention(self, pool: KVPool, spec: ModelSpec) -> AttentionBackend:
        """See ``LayerKernels``; torch's where the kernels cannot work on ``pool``."""
        if spec.attention_features or not NativeAttention.supports(self._library, pool):
            return TorchAttention(pool, spec.sliding_windows)
        return NativeAttention(self._library, pool, spec.sliding_windows, self.activation_dtype)

    def _is_native(self, weight: Tensor) -> bool:
        return self._candidates(weight.dtype)[0] == self._native

    def _native(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return NativeLinear(self._library, weight, bias)

    def _candidates(self, weight_dtype: torch.dtype) -> list[LinearFactory]:
        if self.activation_dtype is torch.float32:
            # torch has nothing for bf16 weights here, and for fp32 ones it is slower in a decode
            # by more than it is faster in a prefill.
            return [self._native]
        return [TorchLinear, OneDnnLinear] if torch._C._has_mkldnn else [TorchLinear]


def _fastest(factories: list[LinearFactory], weight: Tensor, dtype: torch.dtype) -> LinearFactory:
    """The factory whose product of ``weight`` takes least time, decodes and prefills alike."""
    sample = weight[: max(1, TIMED_ITEMS // weight.shape[1])]
    timed = [factory(sample, None) for factory in factories]
    scores = [0.0] * len(timed)
    for num_rows in TIMED_ROWS:
        x = torch.zeros(num_rows, weight.shape[1], dtype=dtype)
        seconds: list[list[float]] = [[] for _ in timed]
        for _ in range(1 + TIMED_REPEATS):
            for linear, taken in zip(timed, seconds, strict=True):
                started_s = time.perf_counter()
                linear(x)
                taken.append(time.perf_counter() - started_s)
        medians = [statistics.median(taken[1:]) for taken in seconds]
        scores = [score + t / min(medians) for score, t in zip(scores, medians, strict=True)]
    return factories[scores.index(min(scores))]
