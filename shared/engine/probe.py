"""What a model's attention does, found by running it; and proof that our loop runs it alike.

Model classes differ in small ways no list of names keeps up with: windows in some layers, another
number of heads, a factor somewhere. So the model's own forward pass is run once on a few tokens
with an attention function that takes notes, and its logits are compared with those of our chain.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from shared.errors import UnsupportedModel
from shared.kvcache.layout import LayerKV

PAGED_ATTENTION = "banyan_paged"
NUM_PROBE_TOKENS = 24
# Relative error of the logits in the Euclidean norm. Rounding differs with the attention kernel;
# a factor or a layer that is missing is off by tens of percent.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}

# Arguments of an attention function that change nothing for us.
IGNORED = frozenset(
    {"dropout", "position_ids", "use_cache", "sliding_window", "is_causal", "output_attentions",
     "output_router_logits", "cache_position", "return_dict"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MaskNote:
    """Stands for an attention mask: causal, and no further back than ``window`` tokens."""

    window: int | None


@dataclass(slots=True)
class AttentionNotes:
    """What the layers asked of attention, in the order of their calls."""

    layers: list[LayerKV] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


def register_attention() -> None:
    """Make our attention known to transformers under ``PAGED_ATTENTION``; harmless if repeated."""
    AttentionInterface.register(PAGED_ATTENTION, _attention)
    AttentionMaskInterface.register(PAGED_ATTENTION, _note_mask)


@torch.inference_mode()
def observe(model: PreTrainedModel, token_ids: Tensor) -> AttentionNotes:
    """Run the whole model on ``token_ids`` ``[1, num_tokens]`` and note what attention was asked.

    Raises ``UnsupportedModel`` for anything our attention does not do.
    """
    notes = AttentionNotes()
    model(input_ids=token_ids, use_cache=False, banyan_notes=notes)
    if not notes.layers:
        raise UnsupportedModel(f"{type(model).__name__} does not call the attention it is given")
    return notes


@torch.inference_mode()
def compare(model: PreTrainedModel, token_ids: Tensor, logits: Tensor, dtype: str) -> None:
    """Check ``logits`` ``[num_tokens, vocab_size]`` of our chain against the model's own.

    Leaves the model set to our attention. Raises ``UnsupportedModel`` if they differ by more than
    rounding.
    """
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    expected = model(input_ids=token_ids, use_cache=False).logits[0].float()
    model.set_attn_implementation(PAGED_ATTENTION)
    error = (logits - expected).norm() / expected.norm().clamp_min(1e-30)
    if not error <= TOLERANCE[dtype]:
        raise UnsupportedModel(
            f"run layer by layer, {type(model).__name__} gives other logits than as a whole "
            f"(relative error {error:.2g})"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    banyan_batch: Any = None,
    banyan_notes: AttentionNotes | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call.

    ``[1, num_heads, num_tokens, head_dim]`` in, ``[1, num_tokens, num_heads, head_dim]`` out.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if banyan_batch is not None:
        output: Tensor = banyan_batch.backend.forward(
            module.layer_idx,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            scaling=scaling,
            batch=banyan_batch,
        )
        return output.unsqueeze(0), None
    if banyan_notes is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass extra arguments on")
    window = _check_call(module, key, value, attention_mask, kwargs, len(banyan_notes.layers))
    banyan_notes.layers.append(LayerKV(num_kv_heads=key.shape[1], head_dim=key.shape[3]))
    banyan_notes.windows.append(window)
    output = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


def _check_call(
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    expected_layer: int,
) -> int | None:
    """The sliding window of a call, if our attention can do what is asked for."""
    name = type(module).__name__
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in IGNORED)
    if unknown:
        raise UnsupportedModel(f"{name} needs attention with {', '.join(unknown)}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{name} is not causal")
    if key.shape != value.shape:
        raise UnsupportedModel(
            f"{name} has keys {tuple(key.shape)} and values {tuple(value.shape)} of unequal shape"
        )
    if getattr(module, "layer_idx", None) != expected_layer:
        raise UnsupportedModel(f"{name} does not attend once a layer, in order")
    if not isinstance(mask, MaskNote):
        raise UnsupportedModel(f"{name} makes an attention mask of its own")
    return mask.window


def _note_mask(
    *, mask_function: Callable[..., Any], config: Any, device: Any = "cpu", **kwargs: Any
) -> MaskNote:
    """Stands in for transformers' mask making: reads what the mask function lets through.

    Checked for some rows ``q`` far apart: either all ``[0, q]`` or all ``(q - window, q]``.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    last = 4 * max(int(getattr(config, "sliding_window", None) or 0), 1024) + 1
    columns = torch.arange(last + 8, device=device)

    def visible(row: int) -> list[int]:
        rows = torch.full_like(columns, row)
        seen: Tensor = mask_function(zero, zero, rows, columns)
        return seen.nonzero().flatten().tolist()

    at_last = visible(last)
    window = None if len(at_last) == last + 1 else len(at_last)
    for row in (0, 1, last // 7, last // 3, last // 2, last - 1, last):
        lo = 0 if window is None else max(0, row - window + 1)
        if visible(row) != list(range(lo, row + 1)):
            raise UnsupportedModel("the attention mask is neither causal nor a sliding window")
    return MaskNote(window)
