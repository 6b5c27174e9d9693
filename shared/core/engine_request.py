"""One request inside an engine: its tokens, its progress and its states.

::

    RESERVED ─start→ WAITING ─schedule→ RUNNING ─hold→ HELD
                        ↑                 │  └─finish→ FINISHED
                        └────preempt──────┘
    WAITING, RUNNING ─swap_out→ SWAPPED ─swap_in→ RUNNING
    WAITING, RUNNING, SWAPPED ─fail→ FAILED
    RESERVED, WAITING, RUNNING, SWAPPED, HELD ─release→ RELEASED

This is the engine's view of an attempt; the life of the request is its gateway's business
(``shared/core/lifecycle.py``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum

from shared.core.prefix import extend_block_keys
from shared.core.request import FinishReason, Request, RequestKey
from shared.core.token_counts import TokenCounts
from shared.errors import ContextLengthExceeded, InvalidRequest, LifecycleError


class EngineState(StrEnum):
    """Where an attempt is."""

    RESERVED = "reserved"
    """Owns blocks that somebody else fills."""
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    """Preempted; its KV is in host memory, and it owns no block of the pool."""
    HELD = "held"
    """Has its first token and keeps its blocks until they are released."""
    FINISHED = "finished"
    FAILED = "failed"
    RELEASED = "released"


class EngineEvent(StrEnum):
    """What can happen to it."""

    START = "start"
    SCHEDULE = "schedule"
    PREEMPT = "preempt"
    """Lose all blocks, to be computed again."""
    SWAP_OUT = "swap_out"
    """Lose all blocks, whose content goes to host memory."""
    SWAP_IN = "swap_in"
    HOLD = "hold"
    FINISH = "finish"
    FAIL = "fail"
    RELEASE = "release"


_S, _E = EngineState, EngineEvent

TRANSITIONS: dict[tuple[EngineState, EngineEvent], EngineState] = {
    (_S.RESERVED, _E.START): _S.WAITING,
    (_S.WAITING, _E.SCHEDULE): _S.RUNNING,
    (_S.RUNNING, _E.PREEMPT): _S.WAITING,
    # One that waits with its blocks filled can lose them.
    (_S.WAITING, _E.PREEMPT): _S.WAITING,
    (_S.RUNNING, _E.SWAP_OUT): _S.SWAPPED,
    (_S.WAITING, _E.SWAP_OUT): _S.SWAPPED,
    (_S.SWAPPED, _E.SWAP_IN): _S.RUNNING,
    (_S.RUNNING, _E.HOLD): _S.HELD,
    (_S.RUNNING, _E.FINISH): _S.FINISHED,
    **{(state, _E.FAIL): _S.FAILED for state in (_S.WAITING, _S.RUNNING, _S.SWAPPED)},
    **{
        (state, _E.RELEASE): _S.RELEASED
        for state in (_S.RESERVED, _S.WAITING, _S.RUNNING, _S.SWAPPED, _S.HELD)
    },
}


def transition(state: EngineState, event: EngineEvent) -> EngineState:
    """The state after ``event``; raises ``LifecycleError`` if it is not allowed."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise LifecycleError(f"{event} is not allowed in state {state}")
    return following


def check_request(request: Request, max_model_len: int) -> None:
    """Raise ``InvalidRequest`` for what no engine with such a context can take."""
    sampling = request.sampling
    if request.num_tokens == 0:
        raise InvalidRequest("the prompt has no tokens", field="prompt")
    if request.num_tokens >= max_model_len:
        raise ContextLengthExceeded(
            f"{request.num_tokens} tokens leave no room to generate in a context of "
            f"{max_model_len}",
            field="prompt",
        )
    num_emitted = len(request.output_token_ids)
    is_valid = {
        f"max_tokens (of which {num_emitted} exist)": sampling.max_tokens > num_emitted,
        "temperature": 0.0 <= sampling.temperature < math.inf,
        "top_p": 0.0 < sampling.top_p <= 1.0,
        "top_k": sampling.top_k is None or sampling.top_k >= 1,
        "min_p": 0.0 <= sampling.min_p <= 1.0,
        "repetition_penalty": 0.0 < sampling.repetition_penalty < math.inf,
        "presence_penalty": math.isfinite(sampling.presence_penalty),
        "frequency_penalty": math.isfinite(sampling.frequency_penalty),
        "logit_bias": len(dict(sampling.logit_bias)) == len(sampling.logit_bias)
        and all(math.isfinite(bias) for _, bias in sampling.logit_bias),
        "logprobs": sampling.logprobs is None or sampling.logprobs >= 0,
    }
    for what, is_right in is_valid.items():
        if not is_right:
            field = what.split()[0]
            value = getattr(sampling, field)
            raise InvalidRequest(f"{what} cannot be {value}", field=field)


@dataclass(kw_only=True, slots=True, eq=False)
class EngineRequest:
    """A started attempt. Owned and changed by the iteration scheduler and its planner alone.

    ==================================== =====================================================
    token positions (half-open)          meaning
    ==================================== =====================================================
    ``[0, num_computed_tokens)``         KV is in the request's blocks (``SWAPPED``: the host's)
    ``[num_computed_tokens, num_tokens)``  to be computed; the last one's logits give the next
    ==================================== =====================================================

    ``token_ids`` is the prompt and all output; it ends with one of ``end_token_ids`` or with
    ``max_num_tokens`` tokens. ``num_cached_tokens`` were not computed when the request first ran.
    ``arrival`` numbers the requests of one engine. ``block_keys`` are those of the full blocks so
    far, of which ``num_registered_blocks`` are in the prefix cache.
    ``num_exported_blocks`` have been handed to the KV sink in every layer; ``is_exporting`` ends
    with the chunk that completes the prefill. ``token_counts`` are there from the first sampling
    with penalties on.
    """

    request: Request
    arrival: int
    root: bytes
    end_token_ids: frozenset[int]
    max_num_tokens: int
    prefill_only: bool = False
    is_exporting: bool = False
    state: EngineState = EngineState.WAITING
    token_ids: list[int] = dataclass_field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_registered_blocks: int = 0
    num_exported_blocks: int = 0
    num_preemptions: int = 0
    was_admitted: bool = False
    block_keys: list[bytes] = dataclass_field(default_factory=list)
    token_counts: TokenCounts | None = None
    key: RequestKey = dataclass_field(init=False)
    """Identity of the attempt; also the name under which it owns blocks."""
    num_prompt_tokens: int = dataclass_field(init=False)
    is_plain: bool = dataclass_field(init=False)
    """``SamplingParams.is_plain``, asked for in every iteration."""

    def __post_init__(self) -> None:
        """Take key and tokens over from the request."""
        self.key = self.request.key
        self.is_plain = self.request.sampling.is_plain
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, those of earlier attempts counted."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens without KV: 1 means that the next step decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    def count_tokens(self) -> TokenCounts:
        """The counts of its tokens for penalties, up to date; called before each sampling."""
        if self.token_counts is None:
            prompt = self.request.prompt_token_ids
            is_counting_prompt = self.request.sampling.repetition_penalty != 1.0
            self.token_counts = TokenCounts(prompt if is_counting_prompt else (), len(prompt))
        self.token_counts.update(self.token_ids)
        return self.token_counts

    def rewind(self, num_computed_tokens: int, block_size: int) -> None:
        """Distrust the KV behind ``num_computed_tokens`` tokens, if there is any."""
        self.num_computed_tokens = min(self.num_computed_tokens, num_computed_tokens)
        self.num_registered_blocks = min(
            self.num_registered_blocks, self.num_computed_tokens // block_size
        )

    def apply(self, event: EngineEvent) -> None:
        """Change state; raises ``LifecycleError`` if ``event`` is not allowed."""
        self.state = transition(self.state, event)

    def full_block_keys(self, num_tokens: int, block_size: int) -> Sequence[bytes]:
        """Keys of the full blocks within the first ``num_tokens`` tokens."""
        extend_block_keys(self.block_keys, self.token_ids, block_size, self.root)
        return self.block_keys[: num_tokens // block_size]

    def append(self, token_ids: Sequence[int]) -> tuple[int, FinishReason | None]:
        """Append sampled tokens up to the one that ends the request.

        Returns how many were taken and the reason if generation ends with the last of them.
        """
        own, end_token_ids, num_before = self.token_ids, self.end_token_ids, len(self.token_ids)
        for count, token in enumerate(token_ids, 1):
            own.append(token)
            if token in end_token_ids:
                return count, FinishReason.STOP
            if num_before + count >= self.max_num_tokens:
                return count, FinishReason.LENGTH
        return len(token_ids), None
