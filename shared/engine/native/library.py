"""Loads the compiled kernels and calls them with tensors."""

import ctypes
import platform
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.kvcache.storage import make_storage

# Best first: the instructions a build needs, as torch names them, and the build's name.
BUILDS = (
    (("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), "avx512"),
    (("avx2", "fma3"), "avx2"),
    ((), "generic"),
)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class Epilogue(IntEnum):
    """What a packed linear layer does with its result, as in ``kernels.h``."""

    STORE = 0
    SILU_MUL = 1
    GELU_TANH_MUL = 2


class LinearStruct(ctypes.Structure):
    """``linear_t`` of ``kernels.h``."""

    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("epilogue", c_int32),
    )


class BatchStruct(ctypes.Structure):
    """``batch_t`` of ``kernels.h``."""

    _fields_ = (
        ("num_seqs", c_int64),
        ("num_tokens", c_int64),
        ("max_blocks", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("slot_mapping", c_void_p),
    )


class AttentionStruct(ctypes.Structure):
    """``attention_t`` of ``kernels.h``."""

    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("cache_dtype", c_int32),
        ("activation_dtype", c_int32),
        ("scale", c_float),
    )


_P, _N, _I, _F = c_void_p, c_int64, c_int32, c_float
SIGNATURES: dict[str, tuple[type[c_int64] | None, Sequence[type]]] = {
    "panel_width": (c_int64, ()),
    "pack_linear": (None, (_P, _P, _P, _I, _I)),
    "run_linear": (None, (_P, _I, _P, _N, _P, _N, _N, _I)),
    "rms_norm": (None, (_P, _P, _P, _P, _N, _N, _N, _F, _I, _I)),
    "rope": (None, (_P, _N, _P, _N, _N, _N, _N, _P, _F, _I, _I)),
    "gate_mul": (None, (_P, _P, _N, _N, _I, _I, _I)),
    "argmax": (None, (_P, _N, _N, _N, _P, _P, _I)),
    "attention": (None, (_P, _P, _P, _N, _P, _P, _N, _P, _P, _N, _P, _N, _I)),
    "run_calls": (None, (_P, _N, _N)),
}


class Operation(IntEnum):
    """The kernels that can be recorded, as in ``kernels.h``."""

    RUN_LINEAR = 0
    RMS_NORM = 1
    ROPE = 2
    ATTENTION = 3


class Recording(Protocol):
    """Notes calls while they are made (``shared.engine.native.recording``)."""

    def note(self, operation: Operation, arguments: Sequence[int | float | None]) -> None:
        """One call."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that stays where it is as long as the recording is used."""
        ...


class NativeLibrary:
    """The build of the kernels for this CPU, for one thread to call.

    ``functions`` are those of ``kernels.h``. While there is a ``recording``, it is told of every
    ``call``, and what ``empty`` gives is its.
    """

    def __init__(self, name: str, functions: ctypes.CDLL) -> None:
        self.name = name
        self.functions = functions
        self.panel_width: int = functions.panel_width()
        self.recording: Recording | None = None
        self._operations = {
            operation: getattr(functions, operation.name.lower()) for operation in Operation
        }

    @property
    def vector_width(self) -> int:
        """Floats in a vector."""
        return self.panel_width // 2

    def call(self, operation: Operation, *arguments: int | float | None) -> None:
        """One of the kernels with the arguments that ``kernels.h`` gives it."""
        self._operations[operation](*arguments)
        if self.recording is not None:
            self.recording.note(operation, arguments)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a kernel writes its result to."""
        if self.recording is not None:
            return self.recording.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype)


def load_library(names: Sequence[str] | None = None) -> NativeLibrary | None:
    """The first of ``names`` that was compiled, by default the best build for this CPU.

    ``None`` where there is none: no compiler was found when Banyan was installed.
    """
    for name in runnable_builds() if names is None else names:
        # Next to this file, with the ending that Python gives to its extensions.
        for path in sorted(Path(__file__).parent.glob(f"_kernels_{name}.*")):
            if path.suffix in (".so", ".dylib"):
                functions = ctypes.CDLL(str(path))
                for function, (result, arguments) in SIGNATURES.items():
                    getattr(functions, function).restype = result
                    getattr(functions, function).argtypes = arguments
                return NativeLibrary(name, functions)
    return None


def runnable_builds() -> list[str]:
    """Names of the builds that this CPU can run, best first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["generic"]
    capabilities = torch.cpu.get_capabilities()
    return [name for needs, name in BUILDS if all(capabilities.get(need, False) for need in needs)]


class PackedLinear:
    """A linear layer with its weights packed for the kernels; fp32 in, fp32 out.

    ``weight`` is ``[out_features, in_features]`` fp32 or bf16 on the CPU and not kept. With a
    gated epilogue its upper half of rows is the gate and the result has ``out_features / 2``
    columns.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weight: Tensor,
        bias: Tensor | None = None,
        epilogue: Epilogue = Epilogue.STORE,
    ) -> None:
        if bias is not None and epilogue in (Epilogue.SILU_MUL, Epilogue.GELU_TANH_MUL):
            raise ValueError("a gated layer with a bias is not packed")
        weight = weight.detach().contiguous()
        out_features, in_features = weight.shape
        is_gated = epilogue >= Epilogue.SILU_MUL
        self.out_features = out_features // 2 if is_gated else out_features
        width = library.panel_width
        num_panels = -(-self.out_features // (library.vector_width if is_gated else width))
        num_bytes = num_panels * in_features * width * weight.dtype.itemsize
        # Mapped memory comes in huge pages, which matters for what is read once a step.
        self._storage = make_storage(weight.device, num_bytes)
        self._packed = self._storage.resize(num_bytes).view(weight.dtype)
        self._bias: Tensor | None = None
        if bias is not None:
            self._bias = torch.zeros(num_panels * width)
            self._bias[:out_features] = bias.float()
        self._struct = LinearStruct(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            in_features,
            out_features,
            DTYPE_CODES[weight.dtype],
            int(epilogue),
        )
        self._address = ctypes.addressof(self._struct)
        self._library = library
        library.functions.pack_linear(
            self._address,
            self._packed.data_ptr(),
            weight.data_ptr(),
            DTYPE_CODES[weight.dtype],
            torch.get_num_threads(),
        )

    def __call__(self, x: Tensor, out: Tensor | None = None, *, is_added: bool = False) -> Tensor:
        """``x`` ``[num_rows, in_features]`` fp32, rows contiguous; into ``out`` if it is given.

        With ``is_added`` the product is added to ``out``.
        """
        num_rows = x.shape[0]
        if out is None:
            out = self._library.empty(num_rows, self.out_features)
        self._library.call(
            Operation.RUN_LINEAR,
            self._address,
            is_added,
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            num_rows,
            torch.get_num_threads(),
        )
        return out
