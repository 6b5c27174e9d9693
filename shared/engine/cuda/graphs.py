"""CUDA graphs of decodes: hundreds of launches become one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from shared.engine.attention import AttentionBatch
from shared.engine.cuda.attention import CudaAttention
from shared.engine.cuda.batch import packed_size, padded_batch_size, static_decodes

if TYPE_CHECKING:
    from shared.engine.chain import ModelChain

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 2
"""Runs before a capture: in the first, kernels are compiled and cuBLAS takes its memory."""

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where the graphs of one size find their inputs."""

    hidden: Tensor  # [size, hidden_size]
    positions: Tensor  # [size] int64
    slots: Tensor  # [size] int64
    packed: Tensor  # int32, as in ``DeviceBatch``


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured segment, its inputs, and its output ``[size, hidden_size]``."""

    replay: Callable[[], object]
    inputs: _Inputs
    output: Tensor


class Recorder(Protocol):
    """Makes something that is done once into something that can be done again and again."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """What repeats ``run``, and the tensor that has its result after each repetition."""
        ...

    def forget(self) -> None:
        """Nothing that was recorded is used any more."""
        ...


class GraphRecorder:
    """Captures CUDA graphs, which share memory for what is between their kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See ``Recorder``; raises ``RuntimeError`` for what cannot be captured."""
        with torch.cuda.device(self._device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                output = run()
        return graph.replay, output

    def forget(self) -> None:
        """See ``Recorder``."""
        self._memory = None


class GraphedLayers:
    """``ModelChain.run_layers`` that replays pure decodes from graphs.

    A graph is captured when a segment ``[lo, hi)`` first decodes a padded number of requests. It
    works on tensors of its own, into which the inputs are copied, and is captured again after a
    layer's cache has moved. Rows that pad a batch write nothing (they have no slot) and attend to
    nothing. The result is valid until the next call. Everything else, also what could not be
    captured, runs as it would without graphs.

    Mixtures of experts are not captured: how much each expert has to do is known on the device
    only, and rows of padding would be counted as their load.
    """

    def __init__(
        self, chain: "ModelChain", attention: CudaAttention, recorder: Recorder | None = None
    ) -> None:
        self._chain = chain
        self._attention = attention
        self._recorder = recorder or GraphRecorder(chain.device)
        self._version = attention.pool.version
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._inputs: dict[int, _Inputs] = {}
        self._is_usable = not chain.expert_load.tokens_per_expert()

    @property
    def num_graphs(self) -> int:
        """How many graphs there are now."""
        return len(self._graphs)

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
        if not self._is_usable or on_layer is not None or not batch.state.is_pure_decode:
            return self._chain.run_layers(lo, hi, hidden, batch, on_layer=on_layer)
        graph = self._graph(lo, hi, padded_batch_size(hidden.shape[0]))
        packed: Tensor = batch.state.packed
        if graph is None or packed.numel() > graph.inputs.packed.numel():
            return self._chain.run_layers(lo, hi, hidden, batch)
        _fill(graph.inputs, hidden, batch)
        graph.replay()
        return graph.output[: hidden.shape[0]]

    def _graph(self, lo: int, hi: int, size: int) -> _Graph | None:
        """The graph for ``size`` requests; ``None`` if it cannot be had."""
        if self._version != self._attention.pool.version:
            self._drop()
        graph = self._graphs.get((lo, hi, size))
        if graph is None:
            try:
                graph = self._graphs[lo, hi, size] = self._capture(lo, hi, size)
            except RuntimeError as exc:
                self._is_usable = False
                self._drop()
                logger.warning(
                    "decodes run without CUDA graphs: they cannot be captured",
                    extra={"error": str(exc)},
                )
        return graph

    def _drop(self) -> None:
        self._graphs.clear()
        self._inputs.clear()
        self._recorder.forget()
        self._version = self._attention.pool.version

    def _make_inputs(self, size: int) -> _Inputs:
        chain, pool = self._chain, self._attention.pool
        # A request has no more blocks than its positions, or than there are.
        blocks_a_seq = min(pool.layout.blocks_for(chain.spec.max_model_len), pool.num_blocks)
        numbers = packed_size(size, size * blocks_a_seq)
        return _Inputs(
            hidden=torch.zeros(
                size,
                chain.spec.hidden_size,
                dtype=chain.kernels.activation_dtype,
                device=chain.device,
            ),
            positions=torch.zeros(size, dtype=torch.int64, device=chain.device),
            slots=torch.full((size,), NO_SLOT, dtype=torch.int64, device=chain.device),
            packed=torch.zeros(numbers, dtype=torch.int32, device=chain.device),
        )

    def _capture(self, lo: int, hi: int, size: int) -> _Graph:
        """Record the segment for ``size`` rows. Nothing is written: all rows are padding."""
        inputs = self._inputs.get(size) or self._make_inputs(size)
        self._inputs[size] = inputs
        inputs.slots.fill_(NO_SLOT)
        inputs.packed.zero_()
        batch = AttentionBatch(
            positions=inputs.positions,
            slot_mapping=inputs.slots,
            cu_seqlens_q=range(size + 1),
            context_lens=[0] * size,
            block_tables=[()] * size,
            backend=self._attention,
        )
        batch.state = static_decodes(inputs.packed, size)
        # Layers may work in place; then output and input are the same memory.
        replay, output = self._recorder.record(
            lambda: self._chain.run_layers(lo, hi, inputs.hidden, batch)
        )
        return _Graph(replay, inputs, output)


def _fill(inputs: _Inputs, hidden: Tensor, batch: AttentionBatch) -> None:
    """Copy a batch to where the graphs look for it."""
    num_seqs = hidden.shape[0]
    inputs.hidden[:num_seqs].copy_(hidden)
    inputs.positions[:num_seqs].copy_(batch.positions)
    inputs.slots[:num_seqs].copy_(batch.slot_mapping)
    if inputs.slots.shape[0] > num_seqs:
        inputs.slots[num_seqs:].fill_(NO_SLOT)
    packed: Tensor = batch.state.packed
    inputs.packed[: packed.numel()].copy_(packed)
