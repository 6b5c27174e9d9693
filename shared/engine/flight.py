"""Iterations that have been launched and whose results are still on their way to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.core.batch_plan import Chunk, Plan
from shared.core.request import RequestKey, TokenLogprobs
from shared.engine.sampler import SampledBatch, SampledRow
from shared.errors import EngineError


class Sampled(NamedTuple):
    """New tokens of one request; ``logprobs`` has one entry a token, or none was asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class HostCopy:
    """What was sampled on its way to the host, which need not wait for what is launched later."""

    def __init__(self, sampled: SampledBatch) -> None:
        self._event: Any = None
        if sampled.token_ids.device.type == "cuda":
            sampled = replace(
                sampled,
                token_ids=_to_host(sampled.token_ids),
                is_valid=_to_host(sampled.is_valid),
                logprobs=None if sampled.logprobs is None else _to_host(sampled.logprobs),
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._sampled = sampled

    def wait(self) -> list[SampledRow]:
        """The rows, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._sampled.fetch()


@dataclass(frozen=True, slots=True)
class Part:
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

    def land(self) -> tuple[dict[RequestKey, Sampled], dict[RequestKey, str]]:
        """The tokens and the errors by request; waits for the device.

        Raises ``EngineError`` if that has failed.
        """
        results: dict[RequestKey, Sampled] = {}
        errors = dict(self.errors)
        for part in self.parts:
            try:
                rows = part.copy.wait()
            except torch.AcceleratorError as exc:
                raise EngineError(f"the device failed: {exc}") from exc
            for chunk, row in zip(part.chunks, rows, strict=True):
                if row.error is not None:
                    errors[chunk.key] = row.error
                elif chunk.key not in errors:
                    logprobs = () if row.logprobs is None else (row.logprobs,)
                    results[chunk.key] = Sampled((row.token_id,), logprobs)
        return results, errors

    def rows_of(self, chunks: Sequence[Chunk]) -> Sequence[int] | None:
        """Rows of ``parts[0].token_ids`` with the tokens that the requests of ``chunks`` get.

        ``None`` unless all of them come out of one batch that nothing went wrong with.
        """
        if len(self.parts) != 1 or self.errors:
            return None
        rows = {id(chunk.request): row for row, chunk in enumerate(self.parts[0].chunks)}
        return [rows[id(chunk.request)] for chunk in chunks]


@dataclass(frozen=True, slots=True)
class Iteration:
    """A plan under way; ``started_s`` by ``time.perf_counter``."""

    plan: Plan
    flight: Flight
    started_s: float


def _to_host(values: Tensor) -> Tensor:
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return copy.copy_(values, non_blocking=True)
