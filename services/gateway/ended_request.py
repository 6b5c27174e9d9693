"""A request at its end: how long it took, and whether that was what it was promised. Pure."""

from dataclasses import dataclass

from services.gateway.generation import GenerationRequest
from shared.core.lifecycle import RequestState
from shared.core.request import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedRequest:
    """What its gateway knows of a request in its terminal state.

    The times ``…_s`` at the end of names like ``accepted_s`` are on the gateway's clock; tokens are
    those that arrived there. ``error`` is what the client was told, of a request that failed.
    """

    request: GenerationRequest
    state: RequestState
    num_attempts: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None
    error: Exception | None
    accepted_s: float
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float

    @property
    def ttft_s(self) -> float | None:
        """Accepted to first token; ``None`` without one."""
        return None if self.first_token_s is None else self.first_token_s - self.accepted_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; ``None`` with fewer than two."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Accepted to the end."""
        return self.ended_s - self.accepted_s

    @property
    def is_ttft_met(self) -> bool | None:
        """Whether the first token came in time; ``None`` without such an SLO."""
        return self._is_met(self.request.slo.ttft_s, self.ttft_s, at_least_s=self.e2e_s)

    @property
    def is_tpot_met(self) -> bool | None:
        """Whether tokens came fast enough; ``None`` without such an SLO.

        An answer of one token has no time between tokens that could be too long.
        """
        measured_s = self.tpot_s
        if measured_s is None and self.state is RequestState.FINISHED:
            measured_s = 0.0
        return self._is_met(self.request.slo.tpot_s, measured_s, at_least_s=0.0)

    @property
    def is_e2e_met(self) -> bool | None:
        """Whether the answer was complete in time; ``None`` without such an SLO."""
        is_complete = self.state is RequestState.FINISHED
        measured_s = self.e2e_s if is_complete else None
        return self._is_met(self.request.slo.e2e_s, measured_s, at_least_s=self.e2e_s)

    def _is_met(
        self, promised_s: float | None, measured_s: float | None, *, at_least_s: float
    ) -> bool | None:
        """One promise against what was measured, or would have been at least.

        A request that failed kept none of its promises. Of one that the client gave up, those count
        that were kept or broken by then; for the others the answer is ``None``.
        """
        if promised_s is None:
            return None
        if self.state is RequestState.FAILED:
            return False
        if measured_s is not None:
            return measured_s <= promised_s
        return False if at_least_s > promised_s else None
