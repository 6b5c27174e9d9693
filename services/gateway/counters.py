"""What the gateway counts."""

from collections import Counter

from shared.core.lifecycle import TERMINAL, RequestState
from shared.metrics import LATENCY_BUCKETS_S, Metrics


class GatewayCounters:
    """The gateway's metrics, made once a process."""

    def __init__(self, metrics: Metrics) -> None:
        self.accepted = metrics.counter("gateway", "accepted", "requests", "Requests accepted")
        self._ended = metrics.counter(
            "gateway", "ended", "requests", "Requests by their one terminal state", ["state"]
        )
        self.lost = metrics.counter("gateway", "lost_attempts", "events", "Attempts begun anew")
        self.stale = metrics.counter(
            "gateway", "stale", "messages", "Token deltas of attempts that are over, dropped"
        )
        self.tokens = metrics.counter("gateway", "output", "tokens", "Tokens passed to clients")
        self.refetched = metrics.counter(
            "gateway", "refetched", "tokens", "Tokens that had to be asked for again"
        )
        self.ttft = metrics.histogram(
            "gateway", "ttft", "seconds", "Accepted to first token", buckets=LATENCY_BUCKETS_S
        )
        self._e2e = metrics.histogram(
            "gateway", "e2e", "seconds", "Accepted to the end", buckets=LATENCY_BUCKETS_S
        )
        self._totals: Counter[RequestState] = Counter()

    def totals(self) -> dict[str, float]:
        """How many requests ended in each terminal state, for the report: ``total_finished`` …"""
        return {f"total_{state.value}": float(self._totals[state]) for state in sorted(TERMINAL)}

    def ended(self, state: RequestState, e2e_s: float) -> None:
        """A request reached its terminal state."""
        self._ended.labels(state=state.value).inc()
        self._totals[state] += 1
        if state is RequestState.FINISHED:
            self._e2e.observe(e2e_s)
