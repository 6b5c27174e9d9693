"""The least time that a model's arithmetic and memory traffic allow: counted, not measured.

An iteration reads every weight once (the embedding not: it is a look-up; the head is read) and
the keys and values of every context once, and it multiplies and adds. A machine that reads
``read_bytes_per_s`` and computes ``flops_per_s`` needs at least the longer of the two times, even
if it overlaps them perfectly (S. Williams et al., Roofline, CACM 52(4), 2009). Activations,
sampling, norms and what is written are left out, so the floor is one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer's attention costs for each token attended to.

    ``kv_values`` numbers are read of each token of a context; ``flops`` are spent on each pair of
    a new token and one it sees. ``window`` tokens are seen at most, ``None`` for all.
    """

    kv_values: int
    flops: int
    window: int | None = None

    def pairs(self, num_new: int, num_past: int) -> int:
        """Pairs of a new token and one it sees (itself included), after ``num_past`` tokens."""
        if self.window is None:
            return num_new * num_past + num_new * (num_new + 1) // 2
        # New token i, from 1, sees past + i tokens until that is the window.
        num_growing = min(num_new, max(0, self.window - num_past))
        growing = num_growing * num_past + num_growing * (num_growing + 1) // 2
        return growing + (num_new - num_growing) * self.window

    def tokens_read(self, num_new: int, num_past: int) -> int:
        """Tokens whose keys and values are needed at all."""
        if self.window is None:
            return num_past + num_new
        return min(num_past, self.window - 1) + num_new


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Numbers of weights by how often they are used.

    ``num_dense_params`` are read and used for every token; of ``num_expert_params`` a token uses
    ``num_experts_per_token / num_experts``; ``num_head_params`` are used for sampled rows only.
    """

    num_dense_params: int
    num_head_params: int
    layers: tuple[LayerAttention, ...]
    num_expert_params: int = 0
    num_experts: int = 1
    num_experts_per_token: int = 1

    def weight_params(self, num_tokens: int) -> float:
        """Weights an iteration over ``num_tokens`` reads, if tokens choose experts evenly."""
        missed = (1.0 - self.num_experts_per_token / self.num_experts) ** num_tokens
        return self.num_dense_params + self.num_head_params + self.num_expert_params * (1 - missed)

    def flops_per_token(self) -> float:
        """Of the layers' linear maps: a multiplication and an addition a weight."""
        share = self.num_experts_per_token / self.num_experts
        return 2.0 * (self.num_dense_params + self.num_expert_params * share)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an iteration reads and computes at least."""

    read_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What a machine can do."""

    read_bytes_per_s: float
    flops_per_s: float

    def floor_s(self, cost: Cost) -> float:
        """The least time for ``cost``."""
        return max(cost.read_bytes / self.read_bytes_per_s, cost.flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class Floor:
    """The least times of a workload of equal requests that all arrive together."""

    prefill_s: float
    decode_step_s: float
    """Mean over the steps."""
    total_s: float


def iteration_cost(size: ModelSize, chunks: Sequence[tuple[int, int]], itemsize: int) -> Cost:
    """Cost of one iteration over ``chunks``, each of ``(new tokens, tokens before them)``.

    One row of each chunk goes through the head. ``itemsize`` is that of weights and KV, in bytes.
    """
    num_tokens = sum(num_new for num_new, _ in chunks)
    kv_values = attention_flops = 0
    for layer in size.layers:
        for num_new, num_past in chunks:
            kv_values += layer.kv_values * layer.tokens_read(num_new, num_past)
            attention_flops += layer.flops * layer.pairs(num_new, num_past)
    linear_flops = size.flops_per_token() * num_tokens + 2.0 * size.num_head_params * len(chunks)
    return Cost(
        read_bytes=itemsize * (size.weight_params(num_tokens) + kv_values),
        flops=linear_flops + attention_flops,
    )


def uniform_floor(
    size: ModelSize,
    rates: MachineRates,
    *,
    batch: int,
    input_len: int,
    output_len: int,
    itemsize: int,
) -> Floor:
    """The floor of ``batch`` requests prefilled together, then decoded step by step.

    The prefill gives the first token; the decode step for output token k (from the second) sees
    ``input_len + k - 1`` tokens, its own included.
    """
    prefill_s = rates.floor_s(iteration_cost(size, [(input_len, 0)] * batch, itemsize))
    steps_s = [
        rates.floor_s(iteration_cost(size, [(1, input_len + k)] * batch, itemsize))
        for k in range(output_len - 1)
    ]
    return Floor(
        prefill_s=prefill_s,
        decode_step_s=sum(steps_s) / len(steps_s) if steps_s else 0.0,
        total_s=prefill_s + sum(steps_s),
    )


def model_size(path: str) -> ModelSize:
    """Count the weights of a model's directory from its configuration; nothing is loaded."""
    config = AutoConfig.from_pretrained(Path(path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings().weight
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter is not head and id(parameter) not in embeddings
    }
    num_expert_params = sum(count for name, count in rest.items() if ".experts." in name)
    num_experts = _first(config, ("num_local_experts", "num_experts", "n_routed_experts")) or 1
    return ModelSize(
        num_dense_params=sum(rest.values()) - num_expert_params,
        num_head_params=head.numel(),
        layers=tuple(_attention(config)),
        num_expert_params=num_expert_params,
        num_experts=num_experts,
        num_experts_per_token=getattr(config, "num_experts_per_tok", None) or 1,
    )


def _attention(config: PreTrainedConfig) -> Iterable[LayerAttention]:
    num_heads = config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        # DeepSeek's latents: the least that can be read, whatever the engine stores.
        rope_dim = config.qk_rope_head_dim
        kv_values = latent + rope_dim
        flops = 2 * num_heads * (config.qk_nope_head_dim + rope_dim + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        kv_values = 2 * (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim
        flops = 4 * num_heads * head_dim
    window = getattr(config, "sliding_window", None)
    types: list[Any] = list(getattr(config, "layer_types", None) or ())
    for layer in range(config.num_hidden_layers):
        is_sliding = types[layer] == "sliding_attention" if types else window is not None
        yield LayerAttention(kv_values, flops, window if is_sliding else None)


def _first(config: PreTrainedConfig, names: Iterable[str]) -> int | None:
    """The first of these settings that the configuration has."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
