"""What an engine gives back: tokens, statistics, exported KV."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.core.request import FinishReason, RequestKey, TokenLogprobs
from shared.core.step_work import StepWork


class RequestOutput(NamedTuple):
    """New tokens of one request, or its end.

    ``token_ids`` start at output position ``offset`` (tokens of earlier attempts counted).
    ``logprobs`` has one entry a token when asked for, else it is empty. With ``finish_reason`` or
    ``error`` set this is the last output and the request's blocks are freed; ``error`` says why
    the request failed and comes without tokens. ``num_cached_tokens`` of the prompt were not
    computed here because their KV was cached, imported or a sibling's.
    """

    key: RequestKey
    offset: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0


class EngineStats(NamedTuple):
    """State of an engine after a step; the ``total_`` fields count since its start.

    ``total_preemptions`` counts those of both kinds, swapped or to be recomputed. The pad tokens
    were computed for the shape of a static batch only: prompts up to the longest, rows of requests
    that have ended. ``work`` is what the step computed and ``step_s`` how long it took, its
    planning included; one that was launched early counts from the end of the one before it.
    """

    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_batched_tokens: int
    step_s: float
    total_prefill_tokens: int
    total_decode_tokens: int
    total_cached_tokens: int
    total_preemptions: int
    total_failed: int
    num_swapped: int = 0
    total_swap_preemptions: int = 0
    total_swapped_out_bytes: int = 0
    total_swapped_in_bytes: int = 0
    total_prefill_pad_tokens: int = 0
    total_decode_pad_tokens: int = 0
    work: StepWork = StepWork()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Result of iteration number ``step``."""

    step: int
    outputs: tuple[RequestOutput, ...]
    stats: EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class KVExport:
    """KV of blocks ``[block_lo, block_hi)`` of one layer of one request, all heads.

    The indices count in the request's own block table. ``data`` is a fresh copy in the layout of
    ``KVLayout`` (block, head, key/value, token, dimension) that the receiver owns.
    ``is_last_chunk`` says that these are the layer's last blocks; of the very last block only the
    slots of tokens that exist mean something.
    """

    key: RequestKey
    layer: int
    block_lo: int
    block_hi: int
    data: NDArray[np.uint8]
    is_last_chunk: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Blocks set aside for a request whose KV comes from elsewhere.

    Of its ``num_blocks`` the first ``num_cached_tokens // block_size`` were found in the local
    prefix cache and must not be imported again.
    """

    key: RequestKey
    num_blocks: int
    num_cached_tokens: int


KVSink = Callable[[KVExport], None]
