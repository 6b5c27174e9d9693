"""Train the bundled demo model: a small Llama with its own tokenizer, on instruction data.

Usage: ``python models/train_tiny_chat.py DATA_DIR OUT_DIR [--minutes 60]``

``DATA_DIR`` holds ``alpaca/alpaca_data.jsonl.gz`` (rows with ``instruction``, ``input``,
``output``) and ``long_documents/documents.jsonl.gz`` (rows with ``text``). ``OUT_DIR`` gets the
model in Hugging Face form and ``train_log.jsonl``. Runs on the CPU, or on a GPU where there is one;
there raise ``--tokens-per-step``.

Matrices are trained with Muon, embedding and norms with AdamW, both on fp32 master weights of a
bf16 model. Rows are grouped by width, so that the compiled step sees few shapes.
"""

import argparse
import gzip
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD, BOS, END, USER, ASSISTANT, _SYSTEM = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCAB_SIZE = 8192
MAX_POSITIONS = 8192
WIDTHS = (64, 96, 128, 192, 256, 384, 768)
CHUNKS_PER_EPOCH = 200
CHUNK_TOKENS = 384
PROMPT_WEIGHT, ANSWER_WEIGHT, DOCUMENT_WEIGHT = 0.1, 1.0, 0.5
WARMUP_STEPS = 150
LOG_STEPS, SAVE_STEPS = 100, 800

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Row:
    """Token ids, and how much the loss on each of them counts."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """``ids`` int64 and ``weights`` fp32, both [num_rows, width], right-padded with weight 0."""

    epoch: int
    ids: Tensor
    weights: Tensor


@dataclass(kw_only=True)
class LogEntry:
    """One line of ``train_log.jsonl``; losses in nats a token."""

    step: int
    tokens: int
    minutes: float
    epoch: int | None = None
    loss: float | None = None
    lr: float | None = None
    tok_s: int | None = None
    val_loss: float | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a gzip-compressed JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prompt_of(example: dict[str, Any]) -> str:
    """What the user says: the instruction, and its input where there is one."""
    extra = example["input"].strip()
    return str(example["instruction"]) + (f"\n\n{example['input']}" if extra else "")


def train_tokenizer(examples: list[dict[str, Any]]) -> Tokenizer:
    """A byte-level BPE over prompts and answers; special tokens come first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (f"{prompt_of(example)}\n{example['output']}" for example in examples)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer with its chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=SPECIAL_TOKENS[USER:],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def encode_examples(examples: list[dict[str, Any]], encode: Encode) -> list[Row]:
    """Each example as the chat template writes it, those wider than the widest shape left out."""
    newline = encode("\n")
    rows = []
    for example in examples:
        prompt = [USER, *newline, *encode(prompt_of(example)), END, *newline, ASSISTANT, *newline]
        answer = [*encode(example["output"].strip()), END]
        if len(prompt) + len(answer) <= WIDTHS[-1]:
            weights = [PROMPT_WEIGHT] * len(prompt) + [ANSWER_WEIGHT] * len(answer)
            rows.append(Row(prompt + answer, weights))
    return rows


def encode_documents(documents: list[dict[str, Any]], encode: Encode) -> list[Row]:
    """The documents cut into rows; short ends left out."""
    rows = []
    for document in documents:
        ids = encode(document["text"])
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            if len(chunk) > WIDTHS[0]:
                rows.append(Row(chunk, [DOCUMENT_WEIGHT] * len(chunk)))
    return rows


def collate(rows: list[Row], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and weights of ``rows``, each [num_rows, width], on ``device``."""
    ids = torch.full((len(rows), width), PAD, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, : len(row.ids)] = torch.tensor(row.weights)
    return ids.to(device), weights.to(device)


def batches(
    rows: list[Row], chunks: list[Row], tokens_per_step: int, device: torch.device
) -> Iterator[Batch]:
    """Endless batches of about ``tokens_per_step`` tokens, each of one width.

    An epoch is all rows and a sample of the chunks, in a new order; rows that fill no whole batch
    of their width are left out of it.
    """
    epoch = 0
    while True:
        mixed = rows + random.sample(chunks, min(len(chunks), CHUNKS_PER_EPOCH))
        random.shuffle(mixed)
        full: list[tuple[int, list[Row]]] = []
        filling: dict[int, list[Row]] = {width: [] for width in WIDTHS}
        for row in mixed:
            width = next(width for width in WIDTHS if len(row.ids) <= width)
            filling[width].append(row)
            if len(filling[width]) == max(1, tokens_per_step // width):
                full.append((width, filling[width]))
                filling[width] = []
        random.shuffle(full)
        for width, group in full:
            ids, weights = collate(group, width, device)
            yield Batch(epoch=epoch, ids=ids, weights=weights)
        epoch += 1


def make_model(device: torch.device) -> LlamaForCausalLM:
    """The untrained model, in bf16."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=960,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.02,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.to(device=device, dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    return model


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the next token; causal attention makes right padding harmless.

    ``ids`` and ``weights`` are [num_rows, width]; the result is a scalar in nats a token.
    """
    hidden = model.model(ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).flatten(0, 1).float()
    losses = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: list[Row], device: torch.device) -> float:
    """Mean loss over the answer tokens of ``rows``."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(rows), 40):
        group = rows[start : start + 40]
        width = max(len(row.ids) for row in group)
        ids, weights = collate(group, width, device)
        answers = (weights == ANSWER_WEIGHT).float()
        num_tokens = answers[:, 1:].sum().item()
        total += weighted_loss(model, ids, answers).item() * num_tokens
        count += num_tokens
    model.train()
    return total / count


class MasterWeights:
    """fp32 copies of a bf16 model's parameters, and the optimisers that move them."""

    def __init__(self, model: LlamaForCausalLM, lr: float) -> None:
        self._params = list(model.parameters())
        self._masters = [Parameter(param.detach().float()) for param in self._params]
        embedding = model.get_input_embeddings().weight
        matrices: list[Parameter] = []
        others: list[Parameter] = []
        for param, master in zip(self._params, self._masters, strict=True):
            is_matrix = param.dim() == 2 and param is not embedding
            (matrices if is_matrix else others).append(master)
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=lr,
                weight_decay=0.1,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take over the model's gradients, move the copies, and write them back."""
        for master, param in zip(self._masters, self._params, strict=True):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for master, param in zip(self._masters, self._params, strict=True):
            param.copy_(master)


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up, then a cosine over the share ``done`` of the time down to 5 % of ``peak``."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the model; trained with eager attention, it is to be used with SDPA."""
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(out)
    model.config._attn_implementation = "eager"


def train(
    model: LlamaForCausalLM,
    training: Iterable[Batch],
    validation: list[Row],
    out: Path,
    *,
    minutes: float,
    peak_lr: float,
) -> None:
    """Train for ``minutes``, logging and saving to ``out`` on the way and at the end."""
    device = model.device
    weights = MasterWeights(model, peak_lr)
    loss_of = torch.compile(weighted_loss, dynamic=False)
    began_s, step, tokens = time.monotonic(), 0, 0
    model.train()
    with (out / "train_log.jsonl").open("w") as log:

        def write(entry: LogEntry) -> None:
            line = json.dumps(
                {key: value for key, value in asdict(entry).items() if value is not None}
            )
            print(line, flush=True)
            log.write(f"{line}\n")
            log.flush()

        for batch in training:
            elapsed_s = time.monotonic() - began_s
            done = elapsed_s / (minutes * 60)
            if done >= 1:
                break
            lr = learning_rate(peak_lr, step, done)
            loss = loss_of(model, batch.ids, batch.weights)
            loss.backward()
            weights.step(lr)
            step += 1
            tokens += int((batch.weights > 0).sum())
            if step % LOG_STEPS:
                continue
            elapsed_s = time.monotonic() - began_s
            entry = LogEntry(
                step=step,
                tokens=tokens,
                minutes=round(elapsed_s / 60, 1),
                epoch=batch.epoch,
                loss=round(loss.item(), 3),
                lr=round(lr, 6),
                tok_s=round(tokens / elapsed_s),
            )
            if step % SAVE_STEPS == 0:
                entry.val_loss = round(validation_loss(model, validation, device), 4)
                save(model, out)
            write(entry)
        minutes_taken = round((time.monotonic() - began_s) / 60, 1)
        val_loss = round(validation_loss(model, validation, device), 4)
        write(LogEntry(step=step, tokens=tokens, minutes=minutes_taken, val_loss=val_loss))
    save(model, out)


def main() -> None:
    """Read the data, train the tokenizer, then the model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="directory with alpaca/ and long_documents/")
    parser.add_argument("out", type=Path, help="directory to write the model to")
    parser.add_argument("--minutes", type=float, default=60, help="how long to train")
    parser.add_argument("--tokens-per-step", type=int, default=4608)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--validation-rows", type=int, default=1000, help="rows held out")
    arguments = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)

    examples = [
        example
        for example in read_rows(arguments.data / "alpaca" / "alpaca_data.jsonl.gz")
        if example["output"].strip()
    ]
    documents = read_rows(arguments.data / "long_documents" / "documents.jsonl.gz")
    tokenizer = train_tokenizer(examples)
    save_tokenizer(tokenizer, arguments.out)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    rows = encode_examples(examples, encode)
    random.shuffle(rows)
    held_out = arguments.validation_rows
    validation, training = rows[:held_out], rows[held_out:]
    chunks = encode_documents(documents, encode)
    model = make_model(device)
    num_params = sum(param.numel() for param in model.parameters())
    print(
        f"{len(training)} rows, {len(chunks)} chunks, {num_params / 1e6:.1f} M parameters, {device}"
    )
    train(
        model,
        batches(training, chunks, arguments.tokens_per_step, device),
        validation,
        arguments.out,
        minutes=arguments.minutes,
        peak_lr=arguments.lr,
    )


if __name__ == "__main__":
    main()
