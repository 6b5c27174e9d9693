"""Decodes without Python between the kernels: the calls of a segment, recorded once, repeated.

What CUDA graphs are on a GPU. A decode of a small model makes a hundred calls of kernels that take
microseconds, and Python takes as long again to make each.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.engine.attention import AttentionBatch
from shared.engine.fused import FusedSegment
from shared.engine.native.attention import NativeAttention
from shared.engine.native.library import BatchStruct, NativeLibrary, Operation

if TYPE_CHECKING:
    from shared.engine.chain import ModelChain

MAX_ROWS = 64
"""Requests of a batch that is run from a recording; with more the kernels take the time."""


class _Argument(ctypes.Union):
    """``argument_t`` of ``kernels.h``."""

    _fields_ = (("integer", ctypes.c_int64), ("number", ctypes.c_float))


class _Call(ctypes.Structure):
    """``call_t`` of ``kernels.h``."""

    _fields_ = (("operation", ctypes.c_int64), ("arguments", _Argument * 13))


class Recorder:
    """Notes calls of kernels and owns the tensors between them, each with room for ``MAX_ROWS``.

    A layer needs nothing of the one before it but the hidden states: from ``rewind`` on the same
    tensors are handed out again.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._tensors: list[Tensor] = []
        self._num_taken = 0

    def rewind(self) -> None:
        """Another layer begins."""
        self._num_taken = 0

    def note(self, operation: Operation, arguments: Sequence[int | float | None]) -> None:
        """See ``Recording``."""
        call = _Call(operation=int(operation))
        for argument, value in zip(call.arguments, arguments, strict=False):
            if isinstance(value, float):
                argument.number = value
            else:
                argument.integer = value or 0
        self.calls.append(call)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Recording``; the first dimension is the rows."""
        whole = (MAX_ROWS, *shape[1:])
        if self._num_taken == len(self._tensors):
            self._tensors.append(torch.empty(whole, dtype=dtype))
        tensor = self._tensors[self._num_taken]
        if tensor.shape != whole or tensor.dtype is not dtype:
            tensor = self._tensors[self._num_taken] = torch.empty(whole, dtype=dtype)
        self._num_taken += 1
        return tensor[: shape[0]]


class _Program:
    """A segment as a list of calls, with the memory in which they find their inputs."""

    def __init__(self, segment: FusedSegment, hidden_size: int, library: NativeLibrary) -> None:
        self.num_threads = torch.get_num_threads()
        self._segment = segment
        self._library = library
        self._hidden = torch.empty(MAX_ROWS, hidden_size)
        self._cos_sin = torch.empty(MAX_ROWS, segment.rotary.rotary_dim)
        self._struct = BatchStruct()
        self._seqs = torch.arange(MAX_ROWS, dtype=torch.int32)
        self._recorder: Recorder | None = None  # owns what is between the calls
        self._calls: ctypes.Array[_Call] | None = None

    def run(self, hidden: Tensor, batch: AttentionBatch) -> Tensor:
        """Record if that has not been done, else repeat."""
        num_rows = hidden.shape[0]
        own = self._hidden[:num_rows]
        own.copy_(hidden)
        cos_sin = self._cos_sin[:num_rows]
        self._segment.rotary.lookup(batch.positions, out=cos_sin)
        ctypes.memmove(
            ctypes.addressof(self._struct), batch.state.address, ctypes.sizeof(BatchStruct)
        )
        if self._calls is None:
            self._record(own, cos_sin, batch)
        else:
            self._library.functions.run_calls(
                ctypes.addressof(self._calls), len(self._calls), num_rows
            )
        return own

    def _record(self, hidden: Tensor, cos_sin: Tensor, batch: AttentionBatch) -> None:
        state = batch.state
        batch.state = state._replace(
            address=ctypes.addressof(self._struct), seqs=self._seqs[: len(hidden)]
        )
        recorder = self._library.recording = Recorder()
        try:
            for layer in self._segment.layers:
                recorder.rewind()
                output = layer(hidden, batch, cos_sin)
                if output.data_ptr() != hidden.data_ptr():
                    raise RuntimeError("a layer that does not work in place cannot be recorded")
        finally:
            self._library.recording = None
            batch.state = state
        self._recorder = recorder
        self._calls = (_Call * len(recorder.calls))(*recorder.calls)


class RecordedLayers:
    """``ModelChain.run_layers`` that repeats pure decodes from recordings.

    A segment ``[lo, hi)`` is recorded when it first decodes, and again after a layer's cache has
    moved. The result is valid until the next call. Everything else runs as it would without.
    """

    def __init__(self, chain: "ModelChain", attention: NativeAttention) -> None:
        self._chain = chain
        self._attention = attention
        self._version = attention.pool.version
        self._programs: dict[tuple[int, int], _Program] = {}

    @torch.inference_mode()
    def __call__(
        self,
        lo: int,
        hi: int,
        hidden: Tensor,
        batch: AttentionBatch,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """See ``ModelChain.run_layers``."""
        num_rows = hidden.shape[0]
        is_decode = num_rows == len(batch.context_lens) == batch.state.seqs.shape[0]
        program = None
        if is_decode and 0 < num_rows <= MAX_ROWS and on_layer is None:
            program = self._program(lo, hi)
        if program is None:
            return self._chain.run_layers(lo, hi, hidden, batch, on_layer=on_layer)
        return program.run(hidden, batch)

    def _program(self, lo: int, hi: int) -> _Program | None:
        """The program of a segment; ``None`` if not all of it runs in the kernels."""
        if self._version != self._attention.pool.version:
            self._programs.clear()
            self._version = self._attention.pool.version
        program = self._programs.get((lo, hi))
        if program is None or program.num_threads != torch.get_num_threads():
            segment = self._chain.fused_segment(lo, hi)
            if segment is None:
                return None
            hidden_size = self._chain.spec.hidden_size
            program = _Program(segment, hidden_size, self._attention.library)
            self._programs[lo, hi] = program
        return program
