"""Where the parts of a transformers model are: embedding, layers, rotary embedding, head."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shared.errors import UnsupportedModel

FINAL_NORMS = ("norm", "final_layernorm")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A causal language model in pieces that run one after the other.

    ``embed`` takes token ids and positions, both ``[1, num_tokens]``, and gives hidden states
    ``[1, num_tokens, hidden_size]``. ``head`` turns hidden states behind the last layer
    ``[num_rows, hidden_size]`` into logits ``[num_rows, vocab_size]``. ``rotary`` ``None`` means
    that positions are in the embedding.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    layers: nn.ModuleList
    rotary: nn.Module | None
    head: Callable[[Tensor], Tensor]
    vocab_size: int


def find_parts(model: PreTrainedModel) -> ModelParts:
    """Take a model apart; ``UnsupportedModel`` if its layout is not one we know.

    A match in shape is no proof: ``probe`` compares the pieces with the whole.
    """
    output: nn.Linear | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None:
        raise UnsupportedModel(f"{type(model).__name__} has no output embeddings")
    base = getattr(model, model.base_model_prefix, None)
    decoder = getattr(base, "decoder", None)
    if isinstance(decoder, nn.Module) and hasattr(decoder, "embed_positions"):
        return _learned_positions(decoder, output)
    if isinstance(base, nn.Module) and hasattr(base, "rotary_emb"):
        return _rotary_positions(model.config, base, output)
    raise UnsupportedModel(
        f"the layout of {type(model).__name__} is not known: neither rotary embeddings beside the "
        "layers, as in Llama, nor a decoder with learned positions, as in OPT"
    )


def _rotary_positions(config: PreTrainedConfig, base: nn.Module, output: nn.Linear) -> ModelParts:
    """The Llama shape: ``embed_tokens``, ``rotary_emb``, ``layers``, a final norm."""
    norm = next((getattr(base, name) for name in FINAL_NORMS if hasattr(base, name)), None)
    rotary = _module(base, "rotary_emb")
    embed_tokens = _module(base, "embed_tokens")
    if norm is None:
        raise UnsupportedModel(f"{type(base).__name__} has none of {', '.join(FINAL_NORMS)}")
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        raise UnsupportedModel(f"{type(rotary).__name__} differs between layers")
    # Granite scales behind the embedding and Cohere, Granite and Gemma change the logits.
    embedding_multiplier = getattr(config, "embedding_multiplier", None)
    finish_logits = _logits_finish(config)

    def embed(token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = embed_tokens(token_ids)
        return hidden if embedding_multiplier is None else hidden * embedding_multiplier

    def head(hidden: Tensor) -> Tensor:
        return finish_logits(output(norm(hidden)))

    return ModelParts(embed, _layers(base), rotary, head, output.out_features)


def _learned_positions(decoder: nn.Module, output: nn.Linear) -> ModelParts:
    """The OPT shape: learned positions and maybe projections around the layers."""
    embed_tokens = _module(decoder, "embed_tokens")
    embed_positions = _module(decoder, "embed_positions")
    project_in = getattr(decoder, "project_in", None)
    project_out = getattr(decoder, "project_out", None)
    norm = getattr(decoder, "final_layer_norm", None)
    if "position_ids" not in inspect.signature(embed_positions.forward).parameters:
        raise UnsupportedModel(f"{type(embed_positions).__name__} takes no position_ids")

    def embed(token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = embed_tokens(token_ids)
        if project_in is not None:
            hidden = project_in(hidden)
        where: Tensor = embed_positions(None, position_ids=positions)
        return hidden + where

    def head(hidden: Tensor) -> Tensor:
        for module in (norm, project_out):
            hidden = hidden if module is None else module(hidden)
        logits: Tensor = output(hidden)
        return logits

    return ModelParts(embed, _layers(decoder), None, head, output.out_features)


def _logits_finish(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = (getattr(config, "logit_scale", None) or 1.0) / divisor
    softcap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    return finish


def _layers(base: nn.Module) -> nn.ModuleList:
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModel(f"{type(base).__name__} has no list of layers")
    return layers


def _module(base: nn.Module, name: str) -> nn.Module:
    module = getattr(base, name, None)
    if not isinstance(module, nn.Module):
        raise UnsupportedModel(f"{type(base).__name__} has no {name}")
    return module
