"""Which steps a profile measures."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from shared.core.step_work import StepWork

MIN_PREFILL_TOKENS = 16
MIN_CONTEXT_TOKENS = 64
CACHED_TOKENS = (0, 512, 2048, 8192)
PROMPTS_PER_STEP = (4, 16)
MIXED_BATCHES = (4, 16)
NUM_SPARE_TOKENS = 16
"""Room in the context for the steps of one measurement."""
JITTER = 0.25
"""Sizes are drawn within this share around powers of two: a model is asked about any size."""


class StepKind(StrEnum):
    """What a step is made of."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step to be measured.

    ``prompts``: token ranges ``[start, end)`` to prefill, up to their prompts' ends, the tokens
    before ``start`` being cached. ``contexts``: the context lengths of decoding requests.
    """

    prompts: tuple[tuple[int, int], ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def kind(self) -> StepKind:
        """By what is in it."""
        if not self.contexts:
            return StepKind.PREFILL
        return StepKind.MIXED if self.prompts else StepKind.DECODE

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request that need room for their KV."""
        return (*(end for _, end in self.prompts), *self.contexts)

    @property
    def work(self) -> StepWork:
        """What the latency model is asked."""
        return StepWork(
            chunks=self.prompts,
            num_sampled_chunks=len(self.prompts),
            num_decode=len(self.contexts),
            decode_context_tokens=sum(self.contexts),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GridLimits:
    """What an engine can take."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int


def make_grid(limits: GridLimits, random: Random) -> list[StepShape]:
    """Shapes that cover ``limits``, in no particular order, the same for the same ``random``.

    Prefill over lengths and cached prefixes, alone and several in a step; decode over batch and
    context; both mixed.
    """
    shapes = [*_prefills(limits, random), *_decodes(limits, random), *_mixed(limits, random)]
    return [shape for shape in dict.fromkeys(shapes) if fits(shape, limits)]


def _prefills(limits: GridLimits, random: Random) -> Iterator[StepShape]:
    for length in _sizes(MIN_PREFILL_TOKENS, limits.max_num_batched_tokens):
        for cached in CACHED_TOKENS:
            start = _jittered(cached, random)
            yield StepShape(prompts=((start, start + _jittered(length, random)),))
        for count in PROMPTS_PER_STEP:
            lengths = [max(2, _jittered(length, random) // count) for _ in range(count)]
            yield StepShape(prompts=tuple((0, each) for each in lengths))
    longest = min(limits.max_num_batched_tokens, limits.max_model_len - NUM_SPARE_TOKENS)
    yield StepShape(prompts=((0, longest),))


def _decodes(limits: GridLimits, random: Random) -> Iterator[StepShape]:
    contexts = _sizes(min(MIN_CONTEXT_TOKENS, limits.max_model_len // 2), limits.max_model_len)
    # Powers of two and what lies between: a batch may be of any size, kernels prefer some.
    doubles = _sizes(1, limits.max_num_seqs)
    halfway = [size + size // 2 for size in doubles[1:] if size + size // 2 < limits.max_num_seqs]
    for index, batch in enumerate(sorted({*doubles, *halfway, limits.max_num_seqs})):
        for context in contexts[index % 2 :: 2]:
            yield StepShape(contexts=tuple(_jittered(context, random) for _ in range(batch)))


def _mixed(limits: GridLimits, random: Random) -> Iterator[StepShape]:
    contexts = _sizes(min(MIN_CONTEXT_TOKENS, limits.max_model_len // 2), limits.max_model_len)
    for batch in MIXED_BATCHES:
        batch = min(batch, max(1, limits.max_num_seqs - 1))
        for length in _sizes(MIN_PREFILL_TOKENS, limits.max_num_batched_tokens):
            context, cached = random.choice(contexts), random.choice(CACHED_TOKENS)
            start = _jittered(cached, random)
            yield StepShape(
                prompts=((start, start + _jittered(length, random)),),
                contexts=tuple(_jittered(context, random) for _ in range(batch)),
            )


def fits(shape: StepShape, limits: GridLimits) -> bool:
    """Whether an engine of these ``limits`` can run ``shape``."""
    # A reservation takes one block more than it has tokens for.
    needed_blocks = sum(-(-length // limits.block_size) + 1 for length in shape.lengths)
    return (
        all(end - start > 1 for start, end in shape.prompts)
        and min(shape.lengths) > 1
        and len(shape.lengths) <= limits.max_num_seqs
        and shape.work.num_batched_tokens <= limits.max_num_batched_tokens
        and max(shape.lengths) + NUM_SPARE_TOKENS <= limits.max_model_len
        and needed_blocks <= limits.num_blocks
    )


def _sizes(least: int, most: int) -> list[int]:
    """``least`` and its doubles up to ``most``."""
    sizes = [max(1, least)]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return sizes


def _jittered(size: int, random: Random) -> int:
    return round(size * random.uniform(1.0 - JITTER, 1.0 + JITTER))
