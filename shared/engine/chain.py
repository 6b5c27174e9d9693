"""A model as a chain: embedding, layers one by one, head."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.core.device_group import DeviceGroup
from shared.engine import probe
from shared.engine.attention import AttentionBackend, AttentionBatch
from shared.engine.experts import ExpertLoad
from shared.engine.families import ModelParts
from shared.engine.fused import FusedHead, FusedLayer, FusedSegment, RotaryTable, fusable_layers
from shared.engine.kernels import LayerKernels
from shared.engine.spec import ModelSpec
from shared.kvcache.pool import KVPool

logger = logging.getLogger(__name__)

PROBE_BLOCK_SIZE = 64  # holds all tokens of the probe


class ModelChain:
    """A loaded model, run in segments ``[lo, hi)`` of its layers by whoever holds it.

    Tokens of all requests are flattened into one dimension. Every method runs without gradients
    and changes nothing but the KV cache behind ``batch.backend`` and the counts in
    ``expert_load``. A run of layers on a device group is a stage; this one's ``group`` has size 1.
    """

    def __init__(
        self, parts: ModelParts, spec: ModelSpec, device: torch.device, kernels: LayerKernels
    ) -> None:
        self.spec = spec
        self.device = device
        self.group = DeviceGroup((str(device),))
        self.expert_load = ExpertLoad(parts.layers, device)
        self.kernels = kernels
        self._parts = parts
        self._rotary: RotaryTable | None = None
        self._fused: list[FusedLayer | None] = [None] * spec.num_layers

    @property
    def num_fused_layers(self) -> int:
        """How many layers run in their fused form."""
        return sum(layer is not None for layer in self._fused)

    def attention(self, pool: KVPool) -> AttentionBackend:
        """The best attention there is for this model, device and pool."""
        return self.kernels.attention(pool, self.spec)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` of token ids at positions.

        Both are ``[num_tokens]`` int64 on the device.
        """
        hidden = self._parts.embed(token_ids.unsqueeze(0), positions.unsqueeze(0))[0]
        return hidden.to(self.kernels.activation_dtype)

    @torch.inference_mode()
    def run_layers(
        self,
        lo: int,
        hi: int,
        hidden: Tensor,
        batch: AttentionBatch,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Layers ``[lo, hi)`` on ``hidden`` ``[num_tokens, hidden_size]``; same shape out.

        Each layer writes the KV of the batch's tokens. ``on_layer`` is called right after each
        layer (its KV may still be on its way on an asynchronous device).
        """
        cos_sin = None if self._rotary is None else self._rotary.lookup(batch.positions)
        embeddings: Sequence[Any] | None = None
        for index in range(lo, hi):
            fused = self._fused[index]
            if fused is not None and cos_sin is not None:
                hidden = fused(hidden, batch, cos_sin)
            else:
                if embeddings is None:
                    positions = batch.positions.unsqueeze(0)
                    embeddings = self._parts.position_embeddings(hidden[None], positions, lo, hi)
                hidden = self._run_module(index, hidden, batch, embeddings[index - lo])
            if on_layer is not None:
                on_layer(index)
        return hidden

    def fused_segment(self, lo: int, hi: int) -> FusedSegment | None:
        """Layers ``[lo, hi)``; ``None`` unless all of them are fused, and wholly."""
        layers = [layer for layer in self._fused[lo:hi] if layer is not None and layer.is_whole]
        if self._rotary is None or len(layers) < hi - lo:
            return None
        return FusedSegment(layers, self._rotary)

    def _run_module(
        self, index: int, hidden: Tensor, batch: AttentionBatch, position_embeddings: Any
    ) -> Tensor:
        output: Tensor = self._parts.layers[index](
            hidden.unsqueeze(0),
            attention_mask=None,
            position_ids=batch.positions.unsqueeze(0),
            past_key_values=None,
            use_cache=False,
            banyan_batch=batch,
            position_embeddings=position_embeddings,
        )
        return output[0]

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[num_rows, vocab_size]`` fp32 of rows of hidden states behind the last layer."""
        return self._parts.head(hidden).float()

    def fuse(self, expected: probe.Trace, dtype: str) -> None:
        """Replace the pieces that have a fused form by it, if it does what they did.

        ``expected`` is what went into and out of each. The modules of replaced layers are let go.
        """
        rotary = self._parts.rotary
        fusable = fusable_layers(list(self._parts.layers))
        # Without one there is no use for a table, and not every rotary embedding makes cosines.
        if rotary is None or self._parts.rotary_kinds or not any(fusable):
            return
        self._rotary = RotaryTable(rotary, self.device)
        self._rotary.reserve(self.spec.max_model_len)
        layers = self._parts.layers
        for index, is_fusable in enumerate(fusable):
            if not is_fusable:
                continue
            self._fused[index] = FusedLayer(layers[index], self.kernels)
            given, output = expected.hidden[index : index + 2]
            error = probe.piece_error(given, output, self._run_alone(index, given))
            if error <= probe.TOLERANCE[dtype]:
                layers[index] = nn.Identity()
            else:
                logger.warning(
                    "fused layer differs from its module, which stays",
                    extra={"layer": index, "relative_error": error},
                )
                self._fused[index] = None
        if self.num_fused_layers == self.spec.num_layers and self._parts.plain_head is not None:
            norm, output_layer = self._parts.plain_head
            self._parts = replace(self._parts, head=FusedHead(norm, output_layer, self.kernels))

    @torch.inference_mode()
    def trace(self, token_ids: Tensor, expected: probe.Trace) -> probe.Trace:
        """What each piece makes of its input in ``expected``; ``token_ids`` ``[num_tokens]``."""
        positions = torch.arange(len(token_ids), device=self.device)
        hidden = [self.embed(token_ids, positions)]
        hidden += [
            self._run_alone(index, expected.hidden[index]) for index in range(self.spec.num_layers)
        ]
        last = expected.hidden[-1].to(self.kernels.activation_dtype)
        return probe.Trace(tuple(hidden), self.head(last))

    def _run_alone(self, index: int, given: Tensor) -> Tensor:
        """Layer ``index`` on ``given``, in two chunks of tokens, so that the cache is read too."""
        num_tokens = len(given)
        backend = self.attention(KVPool(self.spec.kv_layout(PROBE_BLOCK_SIZE), 1, self.device))
        outputs = []
        for start, end in ((0, num_tokens // 2), (num_tokens // 2, num_tokens)):
            positions = torch.arange(start, end, device=self.device)
            batch = AttentionBatch(positions, positions, [0, end - start], [end], [[0]], backend)
            chunk = given[start:end].to(self.kernels.activation_dtype, copy=True)
            outputs.append(self.run_layers(index, index + 1, chunk, batch))
        return torch.cat(outputs)
