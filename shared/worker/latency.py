"""The worker's own latency model: from a profile if there is one, refitted by every step."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from shared.core.latency_model import LatencyModel, rough_constants
from shared.core.latency_online import OnlineFit
from shared.engine.facts import facts_of, profile_fingerprint
from shared.engine.outputs import EngineStats
from shared.engine.thread import EngineInfo
from shared.errors import ConfigError
from shared.metrics import Metrics
from shared.worker.config import WorkerSettings

log = logging.getLogger(__name__)

MIN_STEPS = 50
"""So many steps make a model out of a guess; before that, only a profile is worth reporting."""
SHOWN_PREFILL_TOKENS = 1024
SHOWN_CONTEXT_TOKENS = 1024


def read_profile(path: Path) -> LatencyModel:
    """The model in a file that ``banyan profile`` has written.

    Raises ``ConfigError`` naming the setting and the file if there is none in it.
    """
    try:
        data = json.loads(path.read_text())
        return LatencyModel.from_dict(data["latency_model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"latency_profile={path}: not a profile of `banyan profile` "
            f"({type(error).__name__}: {error})"
        ) from error


def first_model(
    profile: LatencyModel | None, info: EngineInfo, settings: WorkerSettings
) -> tuple[LatencyModel, bool]:
    """What a worker starts from, and whether it was measured.

    That is the profile, or an order of magnitude: a profile of another model, of other weights or
    of KV stored otherwise says little about this one and is not used.
    """
    spec, max_num_batched_tokens = info.spec, settings.max_num_batched_tokens
    facts, fingerprint = facts_of(spec, Path(settings.model)), profile_fingerprint(spec)
    if profile is not None and (profile.fingerprint, profile.facts) == (fingerprint, facts):
        return replace(profile, max_num_batched_tokens=max_num_batched_tokens), True
    if profile is not None:
        log.warning(
            "latency_profile=%s is of another model, dtype, quantisation or KV dtype and is not "
            "used",
            settings.latency_profile,
        )
    guess = LatencyModel(
        facts=facts,
        constants=rough_constants(facts, info.device),
        max_num_batched_tokens=max_num_batched_tokens,
        device=info.device,
        num_threads=settings.num_threads or 0,
        dtype=spec.dtype,
        fingerprint=fingerprint,
    )
    return guess, False


class LatencyMeter:
    """Refits the model from the engine's steps and shows it. Used from the event loop only."""

    def __init__(
        self, base: LatencyModel, *, is_profiled: bool, metrics: Metrics, role: str
    ) -> None:
        self._fit = OnlineFit(base)
        self._is_profiled = is_profiled
        self._error = metrics.gauge(
            role, "latency_error", "ratio", "Mean relative error of predicted step times"
        )
        self._prefill = metrics.gauge(
            role, "predicted_prefill", "seconds", f"Of {SHOWN_PREFILL_TOKENS} tokens"
        )
        self._decode = metrics.gauge(
            role, "predicted_decode", "seconds", f"A step of one, {SHOWN_CONTEXT_TOKENS} tokens"
        )

    def on_step(self, stats: EngineStats) -> None:
        """One engine iteration is over."""
        self._fit.observe(stats.work, stats.step_s)

    @property
    def error(self) -> float | None:
        """Mean relative error of late predictions, ``None`` before the first step."""
        return self._fit.error

    def model(self) -> LatencyModel | None:
        """The model of now, ``None`` while it would be a mere guess."""
        if not self._is_profiled and self._fit.num_steps < MIN_STEPS:
            return None
        model = self._fit.model()
        self._prefill.set(model.prefill_s(SHOWN_PREFILL_TOKENS))
        self._decode.set(model.decode_step_s(1, SHOWN_CONTEXT_TOKENS))
        if self._fit.error is not None:
            self._error.set(self._fit.error)
        return model
