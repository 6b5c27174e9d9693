"""Models of a named geometry with random weights: speed depends on shapes, not on what is learnt.

    python -m bench.geometry llama-160m DIR [--dtype bf16|fp32] [--seed N]

Writes a transformers directory (Llama, safetensors) with a byte-level tokenizer that exists only
for loaders that insist on one. Values are slices of one block of normal numbers, so that tens of
gigabytes take no longer than the disk.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

POOL_SIZE = 16_777_213
"""A prime, so that no row of a matrix is the same as another."""
WEIGHT_STD = 0.02
SHARD_BYTES = 4 << 30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Shape of a Llama model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int

    def config(self) -> LlamaConfig:
        """As transformers has it."""
        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_positions,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


GEOMETRIES = {
    "llama-160m": Geometry(
        num_layers=12,
        hidden_size=768,
        intermediate_size=3072,
        num_heads=12,
        num_kv_heads=12,
        vocab_size=32000,
        max_positions=4096,
    ),
    "llama-8b": Geometry(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128256,
        max_positions=8192,
    ),
    "llama-13b": Geometry(
        num_layers=40,
        hidden_size=5120,
        intermediate_size=13824,
        num_heads=40,
        num_kv_heads=40,
        vocab_size=32000,
        max_positions=4096,
    ),
}


def write_model(
    geometry: Geometry, path: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> None:
    """Write the model to ``path``, the same for the same ``seed``.

    Raises ``FileExistsError`` if there is a model already.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (path / "config.json").exists():
        raise FileExistsError(f"{path} has a config.json already")
    config = geometry.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weight_map: dict[str, str] = {}
    shards = list(_shards(shapes, dtype.itemsize))
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(POOL_SIZE, generator=generator) * WEIGHT_STD).to(dtype)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _weights(shapes[name], pool, generator) for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    _write_tokenizer(geometry.vocab_size, path)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)


def _shards(shapes: dict[str, torch.Size], itemsize: int) -> Iterator[list[str]]:
    """Names in order, cut into files of about ``SHARD_BYTES``."""
    names: list[str] = []
    size_bytes = 0
    for name, shape in shapes.items():
        if names and size_bytes + shape.numel() * itemsize > SHARD_BYTES:
            yield names
            names, size_bytes = [], 0
        names.append(name)
        size_bytes += shape.numel() * itemsize
    yield names


def _weights(shape: torch.Size, pool: Tensor, generator: torch.Generator) -> Tensor:
    """Ones for a norm's vector, else numbers out of ``pool`` from a random place on, cyclically."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    start = int(torch.randint(POOL_SIZE, (1,), generator=generator))
    values = torch.empty(shape.numel(), dtype=pool.dtype)
    done = 0
    while done < values.numel():
        part = pool[start : start + values.numel() - done]
        values[done : done + part.numel()] = part
        done, start = done + part.numel(), 0
    return values.view(shape)


def _write_tokenizer(vocab_size: int, path: Path) -> None:
    """Bytes, and after them tokens without a meaning up to the size of the vocabulary."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size)]
    vocab = {token: index for index, token in enumerate(tokens[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(prog="bench.geometry", description=__doc__.split("\n")[0])
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_model(GEOMETRIES[args.geometry], args.path, dtype=DTYPES[args.dtype], seed=args.seed)


if __name__ == "__main__":
    main()
