"""What the KV store counts, for ``/metrics`` and for its report."""

from prometheus_client import Counter

from services.kvstore.index import BlockIndex
from shared.metrics import Metrics


class Tally:
    """A count that only grows, readable here and scraped there."""

    def __init__(self, counter: Counter) -> None:
        self.value = 0
        self._counter = counter

    def add(self, amount: int = 1) -> None:
        """Count ``amount`` more."""
        self.value += amount
        self._counter.inc(amount)


class KVStoreCounters:
    """The store's metrics, made once a process."""

    def __init__(self, metrics: Metrics) -> None:
        def tally(what: str, unit: str, text: str) -> Tally:
            return Tally(metrics.counter("kvstore", what, unit, text))

        self.hits = tally("hit", "blocks", "Blocks that lookups found")
        self.misses = tally("missed", "blocks", "Blocks that lookups did not find")
        self.stored = tally("stored", "blocks", "Blocks that became present")
        self.evicted = tally("evicted", "blocks", "Blocks given up for others")
        self.corrupt = tally("corrupt", "blocks", "Blocks dropped for a checksum mismatch")
        self.received_bytes = tally("received", "bytes", "Bytes of blocks received")
        self.sent_bytes = tally("sent", "bytes", "Bytes of blocks sent")
        self.failed_gets = tally("failed_get", "transfers", "Gets that were accepted and failed")
        self.refused_gets = tally("refused_get", "requests", "Gets refused, too many under way")
        self.incomplete_puts = tally("incomplete_put", "transfers", "Puts that ended early")
        self.skipped_puts = tally("skipped_put", "requests", "Offers not taken, too many puts")
        gauge = metrics.gauge
        self._blocks = gauge("kvstore", "present", "blocks", "Blocks present")
        self._used = gauge("kvstore", "used", "bytes", "Memory of the blocks present")
        self._arriving = gauge("kvstore", "arriving", "bytes", "Memory set aside for puts")
        self._capacity = gauge("kvstore", "capacity", "bytes", "Memory that blocks may take")
        self._transfers = gauge("kvstore", "current", "transfers", "Transfers under way", ["kind"])

    def report(self, index: BlockIndex, *, num_gets: int, num_puts: int) -> dict[str, float]:
        """The gauges of the service report; those of ``/metrics`` are brought up to date."""
        self._blocks.set(len(index))
        self._used.set(index.used_bytes)
        self._arriving.set(index.arriving_bytes)
        self._capacity.set(index.capacity_bytes)
        self._transfers.labels("get").set(num_gets)
        self._transfers.labels("put").set(num_puts)
        gauges = {
            "num_blocks": len(index),
            "used_bytes": index.used_bytes,
            "arriving_bytes": index.arriving_bytes,
            "capacity_bytes": index.capacity_bytes,
            "num_gets": num_gets,
            "num_puts": num_puts,
            "total_hit_blocks": self.hits.value,
            "total_missed_blocks": self.misses.value,
            "total_stored_blocks": self.stored.value,
            "total_evicted_blocks": self.evicted.value,
            "total_corrupt_blocks": self.corrupt.value,
            "total_sent_bytes": self.sent_bytes.value,
            "total_received_bytes": self.received_bytes.value,
        }
        return {name: float(value) for name, value in gauges.items()}
