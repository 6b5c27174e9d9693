"""Prometheus metrics of one process, with names that follow one rule.

A name is ``banyan_<area>_<what>_<unit>`` (the client adds ``_total`` to counters):
``banyan_prefill_step_seconds``, ``banyan_gateway_finished_requests_total``. ``docs/metrics.md``
has the meaning and formula of each.
"""

import re
from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

UNITS: Final = frozenset(
    {
        "seconds",
        "bytes",
        "tokens",
        "blocks",
        "requests",
        "batches",
        "messages",
        "transfers",
        "instances",
        "steps",
        "events",
        "errors",
        "ratio",
        "info",
    }
)

LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""For what a request or an iteration takes."""

SHORT_BUCKETS_S: Final = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1.0,
)  # fmt: skip
"""For decisions and messages, microseconds to milliseconds."""

LENGTH_BUCKETS_TOKENS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""For prompt and output lengths."""

_WORDS = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


class Metrics:
    """Makes and holds the metrics of one process, in a registry of its own.

    Created once in ``shared.runtime`` and passed on; there is no global registry, so two of them in
    one test do not meet. Asking twice for one name raises ``ValueError``: a metric has one owner.
    Metric objects may be updated from any thread.
    """

    def __init__(self, *, process: bool = False) -> None:
        """``process`` adds the client's own metrics of memory, CPU, open files and collections."""
        self.registry = CollectorRegistry()
        if process:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)

    def counter(
        self, area: str, what: str, unit: str, help_text: str, labels: Sequence[str] = ()
    ) -> Counter:
        """A count that only grows: ``banyan_<area>_<what>_<unit>_total``."""
        return Counter(_name(area, what, unit), help_text, labels, registry=self.registry)

    def gauge(
        self, area: str, what: str, unit: str, help_text: str, labels: Sequence[str] = ()
    ) -> Gauge:
        """A value that goes up and down: ``banyan_<area>_<what>_<unit>``."""
        return Gauge(_name(area, what, unit), help_text, labels, registry=self.registry)

    def histogram(
        self,
        area: str,
        what: str,
        unit: str,
        help_text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """A distribution: ``banyan_<area>_<what>_<unit>_bucket``, ``…_sum`` and ``…_count``."""
        return Histogram(
            _name(area, what, unit), help_text, labels, buckets=buckets, registry=self.registry
        )

    def value(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        """The present value of one sample by its full name, ``None`` if there is no such sample."""
        return self.registry.get_sample_value(name, labels or {})

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


def _name(area: str, what: str, unit: str) -> str:
    """The full name; raises ``ValueError`` when a part breaks the rule."""
    for part in (area, what):
        if not _WORDS.fullmatch(part):
            raise ValueError(f"metric name part {part!r} is not lower_snake_case")
    if unit not in UNITS:
        raise ValueError(f"metric unit {unit!r} is none of {sorted(UNITS)}")
    return f"banyan_{area}_{what}_{unit}"
