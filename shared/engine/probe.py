"""What a model's attention does, found by running it; and proof that our loop runs it alike.

Model classes differ in small ways no list of names keeps up with: windows in some layers, another
number of heads, a factor somewhere. So the model's own forward pass is run on a few tokens, once
with an attention function that takes notes and once with transformers' own, and what goes into
and out of each layer then is compared with what the pieces of our chain make of the same input.
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
# Error of what a piece adds for one token, in the Euclidean norm. Rounding differs with the
# attention kernel; a factor or a part that is missing is off by tens of percent.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
# Share of the tokens that must be within the tolerance. In bf16 rounding makes a few go to another
# expert; what is really wrong is so for all tokens, or at least for those that read the cache.
QUORUM = 0.7
# Of the size of a token's hidden state; what a piece adds is not measured finer.
RESOLUTION = 1e-3

CHANGED_MASK = "the model works on attention masks itself instead of handing them on"

# Arguments of an attention function that change nothing for us.
IGNORED = frozenset(
    {"dropout", "position_ids", "use_cache", "sliding_window", "is_causal", "output_attentions",
     "output_router_logits", "cache_position", "return_dict"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MaskNote:
    """Stands for an attention mask: causal, and no further back than ``window`` tokens."""

    window: int | None

    def __getattr__(self, name: str) -> Any:
        """What a mask of numbers would have had; nobody but the model asks for it."""
        raise UnsupportedModel(CHANGED_MASK)

    def __getitem__(self, index: Any) -> Any:
        """See ``__getattr__``."""
        raise UnsupportedModel(CHANGED_MASK)


@dataclass(slots=True)
class AttentionNotes:
    """What the layers asked of attention, in the order of their calls.

    ``features`` are those that only some attention backends have: ``softcap`` and ``sinks``.
    """

    layers: list[LayerKV] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    features: set[str] = field(default_factory=set)


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
    model.set_attn_implementation(PAGED_ATTENTION)
    model(input_ids=token_ids, use_cache=False, banyan_notes=notes)
    if not notes.layers:
        raise UnsupportedModel(f"{type(model).__name__} does not call the attention it is given")
    return notes


@dataclass(frozen=True, slots=True)
class Trace:
    """What is between the pieces of a model for some tokens.

    ``hidden[0]`` is behind the embedding, ``hidden[i + 1]`` behind layer ``i``, each
    ``[num_tokens, hidden_size]``; ``logits`` are ``[num_tokens, vocab_size]``.
    """

    hidden: tuple[Tensor, ...]
    logits: Tensor


@torch.inference_mode()
def trace(
    model: PreTrainedModel, layers: nn.ModuleList, notes: AttentionNotes, token_ids: Tensor
) -> Trace:
    """Run the whole model with transformers' own attention on ``token_ids`` ``[1, num_tokens]``.

    Leaves the model set to our attention.
    """
    hidden: list[Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def behind(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(behind))
    try:
        model.set_attn_implementation("eager" if notes.features else "sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    try:
        logits = model(input_ids=token_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(PAGED_ATTENTION)
    return Trace(tuple(states[0] for states in hidden), logits[0])


@torch.inference_mode()
def piece_error(given: Tensor | None, output: Tensor, ours: Tensor) -> float:
    """How far ``ours`` is from ``output``, relative to what the piece adds to ``given``.

    All are ``[num_tokens, width]``; ``given`` ``None`` where what comes out is all new.
    """
    size = output.float().norm(dim=-1)
    added = size if given is None else (output.float() - given.float()).norm(dim=-1)
    errors = (ours.float() - output.float()).norm(dim=-1)
    return float((errors / (added + RESOLUTION * size).clamp_min(1e-30)).quantile(QUORUM))


@torch.inference_mode()
def compare(name: str, expected: Trace, ours: Trace, dtype: str) -> None:
    """Check what our pieces made of the inputs in ``expected`` against their outputs there.

    Raises ``UnsupportedModel`` naming the first piece that differs by more than rounding.
    """
    pieces = [
        ("the embedding", None, expected.hidden[0], ours.hidden[0]),
        *(
            (f"layer {index}", expected.hidden[index], output, ours.hidden[index + 1])
            for index, output in enumerate(expected.hidden[1:])
        ),
        ("the head", None, expected.logits, ours.logits),
    ]
    for piece, given, output, our_output in pieces:
        error = piece_error(given, output, our_output)
        if not error <= TOLERANCE[dtype]:
            raise UnsupportedModel(
                f"run by itself, {piece} of {name} does not do what it does in the whole model "
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    banyan_batch: Any = None,
    banyan_notes: AttentionNotes | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call.

    ``[1, num_heads, num_tokens, head_dim]`` in, ``[1, num_tokens, num_heads, value_dim]`` out.
    Values narrower than keys (multi-head latent attention, whose KV is cached as the layer hands
    it over: expanded, not as latents) are padded with zeros to the keys' ``head_dim``.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    value_dim = value.shape[-1]
    features: dict[str, Any] = {}
    if softcap is not None:
        features["softcap"] = softcap
    if s_aux is not None:
        features["sinks"] = s_aux
    if banyan_batch is not None:
        if value_dim != key.shape[-1]:
            value = functional.pad(value, (0, key.shape[-1] - value_dim))
        output: Tensor = banyan_batch.backend.forward(
            module.layer_idx,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            scaling=scaling,
            batch=banyan_batch,
            **features,
        )
        return output[..., :value_dim].unsqueeze(0), None
    if banyan_notes is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass extra arguments on")
    window = _check_call(module, key, value, attention_mask, kwargs, len(banyan_notes.layers))
    banyan_notes.layers.append(LayerKV(num_kv_heads=key.shape[1], head_dim=key.shape[3]))
    banyan_notes.windows.append(window)
    banyan_notes.features.update(features)
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
    if key.shape[:3] != value.shape[:3] or key.shape[3] < value.shape[3]:
        raise UnsupportedModel(
            f"{name} has keys {tuple(key.shape)} and values {tuple(value.shape)}: as many heads "
            "are needed, and values no wider than keys"
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
