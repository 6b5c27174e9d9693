"""What the scheduler counts."""

from prometheus_client import Counter

from shared.metrics import Metrics


class SchedulerCounters:
    """The scheduler's metrics, made once a process."""

    def __init__(self, metrics: Metrics) -> None:
        def counter(what: str, unit: str, text: str) -> Counter:
            return metrics.counter("scheduler", what, unit, text)

        self.accepted = counter("accepted", "requests", "Attempts taken into the queue")
        self.refused = counter("refused", "requests", "Attempts refused because the queue was full")
        self.placed = counter("placed", "requests", "Attempts given to workers")
        self.prefilled = counter("prefilled", "requests", "Attempts whose prefill finished")
        self.lost = counter("lost", "requests", "Attempts lost with an instance")
        self.stale = counter("stale", "events", "Events of older attempts that were dropped")
        self.predictions_failed = counter(
            "prediction_failures", "requests", "Predictions that did not come or made no sense"
        )
        self.predictions_dropped = counter(
            "prediction_drops", "requests", "Predictions not asked for because too many waited"
        )
        self.dispatched_unpredicted = counter(
            "dispatched_unpredicted", "requests", "Requests dispatched before their prediction"
        )
        self.waiting = metrics.gauge("scheduler", "waiting", "requests", "Requests in the queue")
        self.is_leader = metrics.gauge("scheduler", "leader", "info", "1 while this one leads")
