"""Iterations that have been launched and whose results are still on their way to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.core.batch_plan import Chunk, Plan
from shared.core.request import RequestKey, TokenLogprobs
from shared.core.step_work import StepWork
from shared.engine.sampler import NOTHING_TO_SAMPLE, SampledBatch, SampledColumns
from shared.errors import EngineError


class Landed(NamedTuple):
    """What an iteration came to, by request: new tokens, their log-probabilities, or an error.

    ``logprobs`` has those that asked for them, one entry a token.
    """

    token_ids: dict[RequestKey, tuple[int, ...]]
    logprobs: dict[RequestKey, tuple[TokenLogprobs, ...]]
    errors: dict[RequestKey, str]


class HostCopy:
    """What was sampled on its way to the host, which need not wait for what is launched later."""

    def __init__(self, sampled: SampledBatch) -> None:
        self._event: Any = None
        if sampled.token_ids.is_cuda:
            sampled = replace(
                sampled,
                token_ids=_to_host(sampled.token_ids),
                is_valid=_to_host(sampled.is_valid),
                logprobs=None if sampled.logprobs is None else _to_host(sampled.logprobs),
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._sampled = sampled

    def wait(self) -> SampledColumns:
        """What was sampled, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._sampled.fetch()


class Part(NamedTuple):
    """One batch: the chunks that sample in it, their tokens on the device and to the host."""

    chunks: Sequence[Chunk]
    token_ids: Tensor
    copy: HostCopy


@dataclass(slots=True)
class Flight:
    """Batches that have been launched: mostly one, none if nothing was to be sampled.

    ``errors`` says by request what went wrong before anything was sampled.
    """

    parts: list[Part] = field(default_factory=list)
    errors: dict[RequestKey, str] = field(default_factory=dict)

    def land(self) -> Landed:
        """What has come of it; waits for the device.

        Raises ``EngineError`` if that has failed.
        """
        landed = Landed({}, {}, dict(self.errors))
        for part in self.parts:
            try:
                sampled = part.copy.wait()
            except torch.AcceleratorError as exc:
                raise EngineError(f"the device failed: {exc}") from exc
            keys = [chunk.request.key for chunk in part.chunks]
            if not landed.errors and all(sampled.is_valid):  # as nearly always
                landed.token_ids.update(zip(keys, zip(sampled.token_ids), strict=True))
            else:
                for key, token_id, is_valid in zip(
                    keys, sampled.token_ids, sampled.is_valid, strict=True
                ):
                    if not is_valid:
                        landed.errors[key] = NOTHING_TO_SAMPLE
                    elif key not in landed.errors:
                        landed.token_ids[key] = (token_id,)
            for row, logprobs in sampled.logprobs.items():
                landed.logprobs[keys[row]] = (logprobs,)
        return landed

    def rows_of(self, chunks: Sequence[Chunk]) -> Sequence[int] | None:
        """Rows of ``parts[0].token_ids`` with the tokens that the requests of ``chunks`` get.

        ``None`` unless all of them come out of one batch that nothing went wrong with.
        """
        if len(self.parts) != 1 or self.errors:
            return None
        rows = {id(chunk.request): row for row, chunk in enumerate(self.parts[0].chunks)}
        return [rows[id(chunk.request)] for chunk in chunks]


class Iteration(NamedTuple):
    """A plan under way, and the work that it is; ``started_s`` by ``time.perf_counter``."""

    plan: Plan
    work: StepWork
    flight: Flight
    started_s: float


def _to_host(values: Tensor) -> Tensor:
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return copy.copy_(values, non_blocking=True)
