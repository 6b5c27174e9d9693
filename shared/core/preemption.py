"""Taking blocks away from a request: by computing its KV again, or by keeping it in host memory.

Both as in vLLM (Kwon et al., SOSP 2023, section 4.5), which chooses one of them for all; here each
preemption takes the cheaper one, and swapping only while the host has room. Deviation: a shared
block is copied for each request that is swapped out, for whoever shares it may be gone later.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.core.block_manager import BlockManager


class PreemptionKind(StrEnum):
    """How a preempted request gets its KV back."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreemptionCost:
    """Predicted seconds that a preemption costs until the request is where it was.

    ``recompute_s(num_tokens)`` is a prefill of that many tokens; ``swap_s(num_blocks)`` copies
    that many blocks, all layers, to host memory and back. Both must be pure.
    """

    recompute_s: Callable[[int], float]
    swap_s: Callable[[int], float]

    def cheaper(self, num_tokens: int, num_blocks: int) -> PreemptionKind:
        """The kind that costs less; recomputing if they are equal."""
        is_swap_cheaper = self.swap_s(num_blocks) < self.recompute_s(num_tokens)
        return PreemptionKind.SWAP if is_swap_cheaper else PreemptionKind.RECOMPUTE


class SwapSpace:
    """Which host blocks hold the KV of which swapped request: ids, no bytes.

    Host blocks have ids of their own, in ``[0, num_blocks)``. Without a ``cost`` every preemption
    that fits is a swap. What is taken back in a plan stays owned until ``settle``, so that no host
    block is read and written in one plan.
    """

    def __init__(
        self, num_blocks: int, block_size: int, cost: PreemptionCost | None = None
    ) -> None:
        self._blocks = BlockManager(num_blocks, block_size)
        self.cost = cost
        self._retired: list[Hashable] = []

    @property
    def num_blocks(self) -> int:
        """Host blocks in all."""
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Host blocks that nobody owns."""
        return self._blocks.num_free_blocks

    def choose(self, num_computed_tokens: int) -> PreemptionKind:
        """How a request with KV of so many tokens is preempted now."""
        num_blocks = self._blocks.blocks_for(num_computed_tokens)
        if not 0 < num_blocks <= self.num_free_blocks:
            return PreemptionKind.RECOMPUTE
        if self.cost is None:
            return PreemptionKind.SWAP
        return self.cost.cheaper(num_computed_tokens, num_blocks)

    def take(self, owner: Hashable, num_tokens: int) -> Sequence[int]:
        """Host blocks for the KV of ``num_tokens`` tokens of ``owner``, who has none yet."""
        self._blocks.create(owner)
        return self._blocks.allocate(owner, self._blocks.blocks_for(num_tokens))

    def retire(self, owner: Hashable) -> Sequence[int]:
        """The host blocks of ``owner``, to be read once more; they are freed by ``settle``."""
        self._retired.append(owner)
        return self._blocks.block_table(owner)

    def keep(self, owner: Hashable) -> None:
        """Take ``retire`` back."""
        self._retired.remove(owner)

    def settle(self) -> None:
        """Free what was retired: the plan that reads it is complete."""
        for owner in self._retired:
            self._blocks.free(owner)
        self._retired.clear()

    def truncate(self, owner: Hashable, num_tokens: int) -> None:
        """Give back what lies behind ``num_tokens`` tokens."""
        self._blocks.truncate(owner, self._blocks.blocks_for(num_tokens))

    def free(self, owner: Hashable) -> None:
        """Give back all host blocks of ``owner``; freeing twice raises ``LifecycleError``."""
        self._blocks.free(owner)

    def owns(self, owner: Hashable) -> bool:
        """Whether KV of ``owner`` is here."""
        return self._blocks.owns(owner)

    def check_integrity(self) -> None:
        """Verify the bookkeeping; raises ``AssertionError``."""
        self._blocks.check_integrity()
        assert not self._retired, "host blocks are neither owned nor free"
