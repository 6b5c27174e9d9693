"""Where the parts of a transformers model are: embedding, layers, positions, head."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.errors import UnsupportedModel

# What the parts are called; no family has two of one line.
LAYERS = ("layers", "h")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "ln_f")
LEARNED_POSITIONS = ("wpe", "embed_positions")
# Kinds of layers, as configurations name them, whose only memory is the KV of single tokens.
SERVED_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A causal language model in pieces that run one after the other.

    ``embed`` takes token ids and positions, both ``[1, num_tokens]``, and gives hidden states
    ``[1, num_tokens, hidden_size]``. ``head`` turns hidden states behind the last layer
    ``[num_rows, hidden_size]`` into logits ``[num_rows, vocab_size]``. ``rotary`` ``None`` means
    that positions are in the embedding; ``rotary_kinds`` names each layer's kind of rotary
    embedding and is empty where all layers share one. ``plain_head`` has the final norm and the
    output layer where ``head`` is nothing else.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    layers: nn.ModuleList
    rotary: nn.Module | None
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    rotary_kinds: tuple[str, ...] = ()
    plain_head: tuple[nn.Module, nn.Linear] | None = None

    def position_embeddings(
        self, hidden: Tensor, positions: Tensor, lo: int, hi: int
    ) -> Sequence[Any]:
        """What layers ``[lo, hi)`` are given for positions ``[1, num_tokens]``, one entry each.

        Layers of one kind share an entry; all are ``None`` where positions are in the embedding.
        """
        if self.rotary is None:
            return [None] * (hi - lo)
        if not self.rotary_kinds:
            return [self.rotary(hidden, position_ids=positions)] * (hi - lo)
        kinds = self.rotary_kinds[lo:hi]
        made = {
            kind: self.rotary(hidden, position_ids=positions, layer_type=kind)
            for kind in dict.fromkeys(kinds)
        }
        return [made[kind] for kind in kinds]


def find_parts(model: PreTrainedModel) -> ModelParts:
    """Take a model apart; ``UnsupportedModel`` if it is no decoder or not one of a known layout.

    Of a model that sees or hears too, its text decoder is taken. A match in shape is no proof:
    ``probe`` compares the pieces with the whole.
    """
    name = type(model).__name__
    output: nn.Linear | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None:
        raise UnsupportedModel(f"{name} has no output embeddings")
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModel(
            f"{name} has no decoder, but a {type(decoder).__name__} of that name"
        )
    _check_kind(model, decoder)
    layers = _first(decoder, LAYERS)
    rotary = _first(decoder, ("rotary_emb",))
    learned = _first(decoder, LEARNED_POSITIONS)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or (rotary or learned) is None:
        raise UnsupportedModel(
            f"the layout of {name} is not known: {type(decoder).__name__} has no list of layers "
            f"({' or '.join(LAYERS)}) beside rotary_emb or {' or '.join(LEARNED_POSITIONS)}"
        )
    head, plain_head = _head(decoder, output)
    return ModelParts(
        embed=_embedding(decoder, learned),
        layers=layers,
        rotary=rotary,
        head=head,
        vocab_size=output.out_features,
        rotary_kinds=_rotary_kinds(rotary, decoder, len(layers)),
        plain_head=plain_head,
    )


def _check_kind(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Refuse encoders and models that remember more than the KV of single tokens."""
    name = type(model).__name__
    kinds = set(getattr(decoder.config, "layer_types", None) or ()) - set(SERVED_KINDS)
    if kinds:
        raise UnsupportedModel(
            f"{name} has layers of kind {', '.join(sorted(kinds))}; served are those of kind "
            f"{' and '.join(SERVED_KINDS)}, which keep the KV of each token and nothing else"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            f"{name} keeps a recurrent state, as Mamba does; served are models that keep the KV of "
            "each token and nothing else"
        )
    attentions = [module for module in decoder.modules() if hasattr(module, "is_causal")]
    if attentions and not any(module.is_causal for module in attentions):
        raise UnsupportedModel(f"{name} is an encoder: its attention is not causal")


def _embedding(decoder: nn.Module, learned: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Token embedding, with positions where they are learned and OPT's projection before them."""
    embed_tokens: nn.Module = decoder.get_input_embeddings()  # type: ignore[operator]
    project_in = getattr(decoder, "project_in", None)
    # Granite scales behind the embedding, unlike Gemma, whose embedding does it itself.
    multiplier = getattr(decoder.config, "embedding_multiplier", None)
    takes_positions = learned is not None and "position_ids" in _parameters(learned)
    if learned is not None and not takes_positions and not isinstance(learned, nn.Embedding):
        raise UnsupportedModel(f"{type(learned).__name__} takes no position_ids")

    def embed(token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = embed_tokens(token_ids)
        if multiplier is not None:
            hidden = hidden * multiplier
        if project_in is not None:
            hidden = project_in(hidden)
        if learned is None:
            return hidden
        where: Tensor = (
            learned(None, position_ids=positions) if takes_positions else learned(positions)
        )
        return hidden + where

    return embed


def _head(
    decoder: nn.Module, output: nn.Linear
) -> tuple[Callable[[Tensor], Tensor], tuple[nn.Module, nn.Linear] | None]:
    """Final norm, OPT's projection, output embedding, and what is done to logits after it.

    And the first and the third of them, if there is nothing else.
    """
    norm, project_out = _first(decoder, FINAL_NORMS), getattr(decoder, "project_out", None)
    config = decoder.config
    before = [module for module in (norm, project_out) if module is not None]
    # Cohere, Granite and Gemma change the logits.
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = (getattr(config, "logit_scale", None) or 1.0) / divisor
    softcap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        for module in before:
            hidden = module(hidden)
        logits: Tensor = output(hidden)
        logits = logits if factor == 1.0 else logits * factor
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    is_plain = project_out is None and factor == 1.0 and softcap is None
    return head, (norm, output) if is_plain and norm is not None else None


def _rotary_kinds(rotary: nn.Module | None, decoder: nn.Module, num_layers: int) -> tuple[str, ...]:
    """Each layer's kind where the rotary embedding is told one, as in Gemma 3; else nothing."""
    if rotary is None or (parameters := _parameters(rotary)) == ["x", "position_ids"]:
        return ()
    kinds = tuple(getattr(decoder.config, "layer_types", None) or ())
    if parameters != ["x", "position_ids", "layer_type"] or len(kinds) != num_layers:
        raise UnsupportedModel(
            f"{type(rotary).__name__} takes {', '.join(parameters)}, not x, position_ids and "
            "maybe the type of a layer"
        )
    return kinds


def _first(base: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The first submodule that ``base`` has under one of ``names``."""
    found = (getattr(base, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
