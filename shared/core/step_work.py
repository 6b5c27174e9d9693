"""What one iteration computes, as the latency model counts it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from shared.core.batch_plan import Chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What one iteration computes; ``a + b`` is both in one batch.

    ``chunks`` are the prefilled token ranges ``[start, end)`` of their requests, tokens before
    ``start`` have their KV already. ``num_sampled_chunks`` of them reach the end of their prompt
    and sample a token, as every decode does. ``decode_context_tokens`` sums up the context lengths
    of the ``num_decode`` decoding requests, the token being computed included.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    num_sampled_chunks: int = 0
    num_decode: int = 0
    decode_context_tokens: int = 0

    @classmethod
    def prefill(cls, start: int, end: int, *, is_sampling: bool = True) -> Self:
        """Tokens ``[start, end)`` of one prompt."""
        return cls(chunks=((start, end),), num_sampled_chunks=int(is_sampling))

    @classmethod
    def decode(cls, batch: int, context_tokens_total: int) -> Self:
        """One token each of ``batch`` requests."""
        return cls(num_decode=batch, decode_context_tokens=context_tokens_total)

    def __add__(self, other: "StepWork") -> "StepWork":
        return StepWork(
            chunks=self.chunks + other.chunks,
            num_sampled_chunks=self.num_sampled_chunks + other.num_sampled_chunks,
            num_decode=self.num_decode + other.num_decode,
            decode_context_tokens=self.decode_context_tokens + other.decode_context_tokens,
        )

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens computed."""
        return sum(end - start for start, end in self.chunks)

    @property
    def num_batched_tokens(self) -> int:
        """All tokens computed."""
        return self.num_prefill_tokens + self.num_decode


def work_of(chunks: Iterable[Chunk]) -> StepWork:
    """The work of a planned batch; to be asked before it is committed."""
    ranges = []
    num_sampled_chunks = num_decode = decode_context_tokens = 0
    for request, start, end, is_sampling, _ in chunks:
        if end - start == 1 and len(request.token_ids) > request.num_prompt_tokens:
            num_decode += 1
            decode_context_tokens += end
        else:
            ranges.append((start, end))
            num_sampled_chunks += is_sampling
    return StepWork(
        chunks=tuple(ranges),
        num_sampled_chunks=num_sampled_chunks,
        num_decode=num_decode,
        decode_context_tokens=decode_context_tokens,
    )
