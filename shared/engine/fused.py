"""Decoder layers of the Llama shape in few, larger operations.

Query, key and value come out of one product, gate and up out of another, sums go into the
residual where they are made. What the layers mean is still transformers': each is checked at load
against the module it replaces, which stays where they differ (``shared.engine.model``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.engine.attention import AttentionBatch
from shared.engine.kernels import LayerKernels

FUSED_LAYERS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Phi3DecoderLayer",
        "GemmaDecoderLayer",
    }
)
# The attention of these is Llama's; what follows it is a module of its own, which is kept.
FUSED_ATTENTION = frozenset({"MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"})
# ``model_type`` of the models all of whose layers have a fused form.
FUSED_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"})
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Weights ``[width]`` fp32 and epsilon of an RMS norm."""

    weight: Tensor
    eps: float


class RotaryTable:
    """Cosines and sines of every position, as transformers' rotary module gives them."""

    def __init__(self, rotary: nn.Module, device: torch.device) -> None:
        self._rotary = rotary
        self._device = device
        self._table = torch.empty(0)

    @torch.inference_mode()
    def reserve(self, num_positions: int) -> None:
        """Have positions ``[0, num_positions)`` ready."""
        if num_positions <= self._table.shape[0]:
            return
        positions = torch.arange(num_positions, device=self._device)[None]
        probe = torch.empty(1, dtype=torch.float32, device=self._device)
        cosines, sines = self._rotary(probe, position_ids=positions)
        half = cosines.shape[-1] // 2
        self._table = torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1).contiguous()

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return self._table.shape[1]

    def lookup(self, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """``[num_tokens, rotary_dim]`` fp32, cosines before sines, of reserved positions."""
        return torch.index_select(self._table, 0, positions, out=out)


class FusedLayer:
    """One layer; the weights of the module it is made of are copied and can go."""

    def __init__(self, module: Any, kernels: LayerKernels) -> None:
        attention = module.self_attn
        self._index: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._kernels = kernels
        self._norm = _norm(module.input_layernorm)
        self._post_norm = _norm(module.post_attention_layernorm)
        weight, bias = _stacked(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        self._qkv = kernels.linear(weight, bias)
        output = attention.o_proj
        self._output = kernels.linear(output.weight, output.bias)
        self._num_heads: int = output.in_features // self._head_dim
        self._num_kv_heads: int = (weight.shape[0] // self._head_dim - self._num_heads) // 2
        self._query_norm = _optional_norm(attention, "q_norm")
        self._key_norm = _optional_norm(attention, "k_norm")
        self._mlp: nn.Module | None = None
        if type(module).__name__ in FUSED_ATTENTION:
            self._mlp = module.mlp
            return
        weight, _ = _stacked(module.mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        activation = ACTIVATIONS[module.mlp.config.hidden_act]
        self._gate_up = kernels.gated(weight, activation)
        self._down = kernels.linear(module.mlp.down_proj.weight, module.mlp.down_proj.bias)

    @property
    def is_whole(self) -> bool:
        """Whether all of it runs in ``LayerKernels``, without a module of transformers'."""
        return self._mlp is None

    def __call__(self, hidden: Tensor, batch: AttentionBatch, cos_sin: Tensor) -> Tensor:
        """``hidden`` ``[num_tokens, hidden_size]`` to the same behind this layer.

        ``hidden`` is not to be used afterwards.
        """
        kernels = self._kernels
        x = kernels.rms_norm(hidden, self._norm.weight, self._norm.eps)
        qkv = self._qkv(x).view(hidden.shape[0], -1, self._head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        query, key = qkv[:, : self._num_heads], qkv[:, self._num_heads : num_rotated]
        if self._query_norm is None or self._key_norm is None:
            kernels.rope(qkv[:, :num_rotated], cos_sin)
        else:
            kernels.rope(query, cos_sin, self._query_norm.weight, self._query_norm.eps)
            kernels.rope(key, cos_sin, self._key_norm.weight, self._key_norm.eps)
        attended = batch.backend.forward(
            self._index, query, key, qkv[:, num_rotated:], scaling=self._scaling, batch=batch
        )
        hidden = self._output.add_to(hidden, attended.view(hidden.shape[0], -1))
        x = kernels.rms_norm(hidden, self._post_norm.weight, self._post_norm.eps)
        if self._mlp is not None:
            mixed: Tensor = self._mlp(x.unsqueeze(0))
            return hidden.add_(mixed[0])
        return self._down.add_to(hidden, self._gate_up(x))


@dataclass(frozen=True, slots=True)
class FusedSegment:
    """Layers that follow each other, all of them whole."""

    layers: Sequence[FusedLayer]
    rotary: RotaryTable


class FusedHead:
    """Final norm and output layer: hidden states to logits."""

    def __init__(self, norm: Any, output: nn.Linear, kernels: LayerKernels) -> None:
        self._norm = _norm(norm)
        self._output = kernels.linear(output.weight, output.bias)
        self._kernels = kernels

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[num_rows, hidden_size]`` to ``[num_rows, vocab_size]``."""
        return self._output(self._kernels.rms_norm(hidden, self._norm.weight, self._norm.eps))


def fusable_layers(layers: Sequence[nn.Module]) -> list[bool]:
    """Which of ``layers`` have a fused form."""
    return [_has_known_form(layer) and _has_plain_weights(layer) for layer in layers]


def _has_known_form(layer: Any) -> bool:
    name = type(layer).__name__
    if name in FUSED_ATTENTION:
        return True
    if name not in FUSED_LAYERS or layer.mlp.config.hidden_act not in ACTIVATIONS:
        return False
    gates = [getattr(layer.mlp, name, None) for name in ("gate_up_proj", "gate_proj", "up_proj")]
    return all(gate is None or gate.bias is None for gate in gates)


def _has_plain_weights(layer: nn.Module) -> bool:
    """Whether all weights are just numbers; quantised layers compute by themselves."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return all(type(module) is nn.Linear for module in linears) and all(
        type(parameter) is nn.Parameter and parameter.dtype in (torch.float32, torch.bfloat16)
        for parameter in layer.parameters()
    )


def _norm(module: Any) -> RmsNorm:
    weight = module.weight.detach().float()
    if type(module).__name__.startswith("Gemma"):
        weight = weight + 1.0
    eps = getattr(module, "variance_epsilon", None)
    return RmsNorm(weight.contiguous(), module.eps if eps is None else eps)


def _optional_norm(attention: Any, name: str) -> RmsNorm | None:
    module = getattr(attention, name, None)
    return None if module is None else _norm(module)


def _stacked(parent: Any, whole: str, parts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that is one already, or of several on top of each other."""
    if hasattr(parent, whole):
        layer = getattr(parent, whole)
        return layer.weight.detach(), layer.bias
    layers = [getattr(parent, name) for name in parts]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [
        weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return weight, torch.cat(biases)
