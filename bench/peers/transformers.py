"""transformers' ``generate``: whatever has arrived is padded to one batch and runs to its end.

Settings (``--set``): ``cache=dynamic|static``, ``compile=0|1`` (the model's forward pass; a static
cache on a GPU compiles by itself), ``attention=sdpa|…``.
"""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peers import runner
from bench.serving import Emit
from bench.workload import OfflineRequest

DTYPES: dict[str, Any] = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


class _TokenCounter(BaseStreamer):
    """Emits a token for each request that still wants one, whenever ``generate`` has a new row."""

    def __init__(self, wanted: list[tuple[int, int]], emit: Emit) -> None:
        self._wanted = wanted
        self._emit = emit
        self._num_steps = -1

    def put(self, value: Any) -> None:
        """A row of new tokens; the prompts come first."""
        self._num_steps += 1
        if self._num_steps:
            self._emit([(index, 1) for index, n in self._wanted if self._num_steps <= n])

    def end(self) -> None:
        """Nothing is left to do."""


class PaddedServing:
    """Static batches, padded on the left."""

    def __init__(self, model: Any, **generate: Any) -> None:
        self._model = model
        self._generate = generate
        self._waiting: list[tuple[int, OfflineRequest]] = []

    def add(self, index: int, request: OfflineRequest) -> None:
        """Keep it for the next batch."""
        self._waiting.append((index, request))

    @torch.inference_mode()
    def step(self, emit: Emit) -> None:
        """Run everything that waits to the end of the longest output."""
        batch, self._waiting = self._waiting, []
        width = max(len(request.prompt_token_ids) for _, request in batch)
        prompts = [request.prompt_token_ids for _, request in batch]
        pads = [width - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        num_tokens = max(request.output_len for _, request in batch)
        self._model.generate(
            torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=_TokenCounter([(i, request.output_len) for i, request in batch], emit),
            **self._generate,
        )


def make(settings: runner.PeerSettings) -> tuple[PaddedServing, dict[str, Any]]:
    """Load with PyTorch's own attention."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=DTYPES[settings.dtype],
        attn_implementation=settings.option("attention", "sdpa"),
    )
    model.to(device)
    model.eval()
    generate = {}
    if settings.option("cache", "dynamic") == "static":
        generate["cache_implementation"] = "static"
    if settings.option("compile", "0") == "1":
        model.forward = torch.compile(model.forward, dynamic=True)
    return PaddedServing(model, **generate), {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "num_threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    runner.run("transformers", make)
