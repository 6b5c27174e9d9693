"""What a worker says about its load."""

from shared.engine.outputs import EngineStats
from shared.engine.thread import EngineInfo
from shared.messages.load import InstanceState, WorkerReport
from shared.metrics import Metrics
from shared.transport.base import Transport
from shared.worker.attempts import AttemptTable
from shared.worker.config import WorkerSettings
from shared.worker.engine_totals import EngineTotals
from shared.worker.latency import LatencyMeter


class LoadMeter:
    """Sums up engine steps between two reports. Used from the event loop only."""

    def __init__(
        self,
        *,
        settings: WorkerSettings,
        info: EngineInfo,
        transport: Transport,
        kv_layout: str,
        attempts: AttemptTable,
        latency: LatencyMeter,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._info = info
        self._transport = transport
        self._kv_layout = kv_layout
        self._attempts = attempts
        self._latency = latency
        self.is_draining = False
        self.is_waiting_for_stats = False
        self._stats: EngineStats | None = None
        self._sequence = 0
        self._busy_s = 0.0
        self._num_steps = 0
        self._num_tokens = 0
        self._since_s: float | None = None
        role = settings.service
        self._step_seconds = metrics.histogram(role, "step", "seconds", "Engine iterations")
        self._tokens = metrics.counter(role, "batched", "tokens", "Tokens computed")
        self._free = metrics.gauge(role, "free", "blocks", "KV blocks free")
        self._running = metrics.gauge(role, "running", "requests", "Requests in the engine")
        self._stale = metrics.gauge(role, "stale", "messages", "Commands of the past, dropped")
        self._quarantined = metrics.gauge(
            role, "quarantined", "transfers", "Buffers a late write may still reach"
        )
        self._totals = EngineTotals(metrics, role)

    def on_step(self, stats: EngineStats) -> None:
        """One engine iteration is over."""
        self._busy_s += stats.step_s
        self._num_steps += 1
        self._num_tokens += stats.num_batched_tokens
        self._stats = stats
        self._step_seconds.observe(stats.step_s)
        self._tokens.inc(stats.num_batched_tokens)
        self._latency.on_step(stats)
        self._totals.follow(stats)

    def on_stats(self, stats: EngineStats | None) -> None:
        """The engine said how it is between two iterations, or was too busy to say."""
        self.is_waiting_for_stats = False
        self._stats = stats or self._stats

    def report(self, now_s: float) -> WorkerReport:
        """The load since the last report."""
        period_s = max(1e-3, now_s - self._since_s) if self._since_s is not None else 1.0
        step_s = self._busy_s / self._num_steps if self._num_steps else 0.0
        stats, spec, info = self._stats, self._info.spec, self._info
        self._sequence += 1
        report = WorkerReport(
            role=self._settings.service,
            instance=self._settings.instance,
            sequence=self._sequence,
            state=InstanceState.DRAINING if self.is_draining else InstanceState.READY,
            model=self._settings.served_model_name,
            kv_layout=self._kv_layout,
            max_model_len=info.max_model_len,
            block_size=info.layout.block_size,
            num_blocks=stats.num_blocks if stats is not None else info.num_blocks,
            num_free_blocks=stats.num_free_blocks if stats is not None else info.num_blocks,
            num_running=stats.num_running if stats is not None else 0,
            num_waiting=stats.num_waiting + stats.num_swapped if stats is not None else 0,
            num_held=stats.num_held if stats is not None else 0,
            num_reserved=stats.num_reserved if stats is not None else 0,
            compute_utilisation=min(1.0, self._busy_s / period_s),
            tokens_per_s=self._num_tokens / period_s,
            step_s=step_s,
            layer_s=step_s / spec.num_layers,
            num_stale_dropped=self._attempts.num_stale,
            num_quarantined=self._transport.num_quarantined,
            num_preemptions=stats.total_preemptions if stats is not None else 0,
            transport=self._transport.name,
            device=info.device,
            dtype=spec.dtype,
            num_layers=spec.num_layers,
            kv_bytes_per_token=spec.kv_bytes_per_token,
            param_bytes=spec.param_bytes,
            latency=self._latency.model(),
            latency_error=self._latency.error,
        )
        self._since_s, self._busy_s, self._num_steps, self._num_tokens = now_s, 0.0, 0, 0
        self._free.set(report.num_free_blocks)
        self._running.set(report.num_running)
        self._stale.set(report.num_stale_dropped)
        self._quarantined.set(report.num_quarantined)
        return report
