"""Engines on small models, and the reference that they are held against."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shared.core.request import Request, RequestKey, SamplingParams
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.outputs import KVSink, RequestOutput
from shared.engine.runner import MaskSource
from tests.models import VOCAB_SIZE

MAX_EXCUSED_GAP = 1e-4


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Token ids that are the same for the same seed, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def make_engine(
    path: Path,
    *,
    kv_sink: KVSink | None = None,
    is_pipelined: bool | None = None,
    mask_source: MaskSource | None = None,
    **settings: Any,
) -> Engine:
    """An fp32 engine with small blocks and small batches, unless ``settings`` say otherwise."""
    defaults: dict[str, Any] = {
        "dtype": "fp32",
        "device": "cpu",
        "block_size": 8,
        "num_blocks": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
    }
    config = EngineConfig(model_path=str(path), **(defaults | settings))
    return build_engine(config, kv_sink=kv_sink, is_pipelined=is_pipelined, mask_source=mask_source)


def make_request(
    name: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 16,
    output: Sequence[int] = (),
    attempt: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = True,
    priority: int = 0,
    logprobs: int | None = None,
    tenant: str = "",
    group: str | None = None,
) -> Request:
    """A request, greedy unless a temperature is given."""
    return Request(
        request_id=name,
        attempt=attempt,
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(output),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        ),
        priority=priority,
        tenant=tenant,
        group_id=group,
    )


class Collector:
    """Puts outputs together; every token must come at its place and nothing after the end."""

    def __init__(self) -> None:
        self.tokens: dict[RequestKey, list[int]] = {}
        self.ends: dict[RequestKey, RequestOutput] = {}

    def take(self, outputs: Iterable[RequestOutput], *, first_offset: int = 0) -> None:
        """Add one step's outputs; a request's first one is at ``first_offset``."""
        for output in outputs:
            assert output.key not in self.ends, "an output behind the last one"
            tokens = self.tokens.setdefault(output.key, [])
            assert output.offset == first_offset + len(tokens), "a token is missing or twice"
            tokens += output.token_ids
            if output.finish_reason is not None or output.error is not None:
                self.ends[output.key] = output


def run(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    """Serve ``requests`` to their ends: the tokens by request id."""
    collector = Collector()
    for request in requests:
        engine.add(request)
        collector.tokens[request.key] = []
    offsets = {len(request.output_token_ids) for request in requests} or {0}
    assert len(offsets) == 1
    while (step := engine.step()) is not None:
        collector.take(step.outputs, first_offset=min(offsets))
    engine.check_integrity()
    errors = [end.error for end in collector.ends.values() if end.error is not None]
    assert not errors
    return {key.request_id: tokens for key, tokens in collector.tokens.items()}


class Reference:
    """transformers itself, in fp32."""

    def __init__(self, path: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, attn_implementation="eager"
        )

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits ``[num_tokens, vocab_size]``."""
        logits: torch.Tensor = self._model(torch.tensor([list(token_ids)])).logits[0]
        return logits

    @torch.inference_mode()
    def greedy(
        self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = True
    ) -> list[int]:
        """What ``generate`` gives, the end-of-sequence token included."""
        limits: dict[str, Any] = {"eos_token_id": None} if ignore_eos else {}
        output = self._model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            **limits,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def assert_same(
        self, prompt: Sequence[int], tokens: Sequence[int], *, ignore_eos: bool = True
    ) -> None:
        """Fail unless ``tokens`` are the greedy ones, or first differ where two are as likely."""
        expected = self.greedy(prompt, len(tokens), ignore_eos=ignore_eos)
        if list(tokens) == expected:
            return
        pairs = enumerate(zip(tokens, expected, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(expected)))
        best = self.logits([*prompt, *expected[:first]])[-1].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < MAX_EXCUSED_GAP, (
            f"token {first} differs with a logit gap of {gap}: {tokens} instead of {expected}"
        )
        print(f"excused: token {first} differs with a logit gap of {gap:.2g}")
