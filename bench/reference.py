"""What ``transformers`` itself generates greedily in fp32, to hold a suite's answers against."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TIE = 1e-4
"""A difference counts unless the reference's two best logits are closer than this there."""

OWN_PROMPTS = (
    "Name three primary colours.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "Give me a recipe for pancakes.",
    "List five animals that live in the forest.",
    "How do plants make food?",
    "Translate 'good morning' into Spanish.",
    "What should I pack for a day of hiking?",
    "Describe a sunset in one sentence.",
    "Suggest a name for a small bakery.",
    "How can I sleep better at night?",
    "What is the difference between a lake and a pond?",
    "Write an email asking for a day off.",
    "Tell me a fact about the moon.",
    "How many days are there in a leap year?",
    "Give two reasons to learn to play an instrument.",
    "Summarise the story of Cinderella.",
    "What is a good way to learn a new language?",
    "Rewrite this sentence in the past tense: I walk to school. " * 6,
)
"""Twenty prompts of our own; the last is longer than a KV block."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One greedy answer: its tokens (an end-of-sequence token included) and, for each, how far the
    second best logit was behind.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]
    is_stopped: bool

    @property
    def visible_token_ids(self) -> tuple[int, ...]:
        """The tokens that belong to the answer."""
        return self.token_ids[:-1] if self.is_stopped else self.token_ids

    def verdict(self, visible: Sequence[int] | Sequence[str], texts: Sequence[str]) -> str:
        """``equal``, ``tie`` or ``different``; ``texts`` are the expected tokens as the API shows
        them, ``visible`` those that came.
        """
        for index, (came, expected) in enumerate(zip(visible, texts, strict=False)):
            if came != expected:
                return "tie" if self.gaps[index] < TIE else "different"
        if len(visible) == len(texts):
            return "equal"
        at = min(len(visible), len(texts))
        return "tie" if at < len(self.gaps) and self.gaps[at] < TIE else "different"


class Reference:
    """A model as transformers runs it, in fp32 on the CPU."""

    def __init__(self, model_dir: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def chat_prompt(self, text: str) -> tuple[int, ...]:
        """The token ids of a conversation that ``text`` opens."""
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        return tuple(ids)

    @torch.inference_mode()
    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Expected:
        """The greedy continuation of a prompt."""
        prompt = torch.tensor([list(prompt_token_ids)])
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        token_ids = tuple(out.sequences[0, prompt.shape[1] :].tolist())
        best = [logits[0].topk(2).values for logits in out.logits]
        eos = self._model.generation_config.eos_token_id
        ends = set(eos) if isinstance(eos, list) else {eos}
        return Expected(
            prompt_token_ids=tuple(prompt_token_ids),
            token_ids=token_ids,
            gaps=tuple(float(pair[0] - pair[1]) for pair in best),
            is_stopped=bool(token_ids) and token_ids[-1] in ends,
        )


def alpaca_prompts(path: Path, count: int) -> list[str]:
    """The first ``count`` prompts of an Alpaca file (``.jsonl`` or ``.jsonl.gz``)."""
    prompts: list[str] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            prompts.append(row["instruction"] + ("\n\n" + row["input"] if row["input"] else ""))
            if len(prompts) == count:
                break
    return prompts
