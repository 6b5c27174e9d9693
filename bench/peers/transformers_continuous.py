"""transformers' continuous batching, driven through its manager's thread.

Settings (``--set``): ``attention=sdpa|…``, ``max_batch_tokens=N`` (default: its own choice).
"""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig

from bench.peers import runner
from bench.peers.transformers import DTYPES
from bench.serving import Emit
from bench.workload import OfflineRequest

PAGE_SIZE = 256
"""Its default, under a name that depends on the version."""
RESULT_TIMEOUT_S = 120.0


class ContinuousServing:
    """A running manager; its thread computes, this one waits for results.

    Unless it ``is_streaming`` tokens come when their request is done, which costs the manager less.
    """

    def __init__(self, manager: Any, *, is_streaming: bool = True) -> None:
        self._manager = manager
        self._is_streaming = is_streaming
        self._num_added = 0
        self._running: dict[str, tuple[int, int]] = {}
        """Index of a request and its tokens so far, by the manager's name for it."""

    def add(self, index: int, request: OfflineRequest) -> None:
        """Hand it over."""
        self._num_added += 1
        name = str(self._num_added)
        self._running[name] = (index, 0)
        self._manager.add_request(
            list(request.prompt_token_ids),
            request_id=name,
            max_new_tokens=request.output_len,
            streaming=self._is_streaming,
            eos_token_id=-1,
        )

    def step(self, emit: Emit) -> None:
        """Wait for a result and take all that are there."""
        first = self._manager.get_result(timeout=RESULT_TIMEOUT_S)
        if first is None:
            raise SystemExit(f"no result within {RESULT_TIMEOUT_S} s")
        counts: dict[int, int] = {}
        while first is not None:
            if first.error is not None:
                raise SystemExit(first.error)
            index, num_before = self._running[first.request_id]
            num_tokens = len(first.generated_tokens)
            counts[index] = counts.get(index, 0) + num_tokens - num_before
            self._running[first.request_id] = (index, num_tokens)
            if first.is_finished():
                del self._running[first.request_id]
            queue = self._manager.output_router.output_queue
            first = None if queue.empty() else self._manager.get_result()
        emit((index, count) for index, count in counts.items() if count)

    def stop(self) -> None:
        """End the manager's thread."""
        self._manager.stop(block=True, timeout=RESULT_TIMEOUT_S)


def start_serving(
    model: Any,
    *,
    max_model_len: int,
    max_batch: int,
    max_batch_tokens: int | None = None,
    is_streaming: bool = True,
) -> ContinuousServing:
    """A manager for ``model``, running."""
    # On a CPU its own choice is nearly the whole memory, and its masks are as wide as the cache.
    num_blocks = max_batch * (max_model_len // PAGE_SIZE + 2)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_model_len, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            max_batch_tokens=max_batch_tokens,
            allow_block_sharing=False,
            num_blocks=num_blocks if model.device.type == "cpu" else None,
        ),
    )
    manager.start()
    return ContinuousServing(manager, is_streaming=is_streaming)


def make(settings: runner.PeerSettings) -> tuple[ContinuousServing, dict[str, Any]]:
    """Load, and start the manager's thread."""
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
    max_batch_tokens = settings.option("max_batch_tokens", "")
    serving = start_serving(
        model,
        max_model_len=settings.max_model_len,
        max_batch=settings.max_batch,
        max_batch_tokens=int(max_batch_tokens) if max_batch_tokens else None,
    )
    return serving, {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "num_threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    runner.run("transformers_continuous", make)
