"""Measures an engine's steps over a grid and fits the latency model to them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from shared.core.latency_fit import LatencyPoint, fit, fit_constants
from shared.core.latency_model import LatencyConstants, LatencyModel, ModelFacts
from shared.core.request import Request, RequestKey, SamplingParams
from shared.core.step_work import StepWork
from shared.engine.build import build_engine
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.facts import facts_of, hardware_of, profile_fingerprint
from shared.engine.profile_grid import GridLimits, StepKind, StepShape, fits, make_grid
from shared.errors import EngineError

Progress = Callable[[str, float], None]
"""``(what, fraction)``: what is being done and how much of all is over."""

LOADING_FRACTION = 0.05
MIN_PASSES = 4
"""A grid that cannot be measured so often within the budget is thinned out."""
MAX_STEP_SHARE = 1 / 60
"""Steps that would take more of the budget than this, a time, are left out."""
MIN_SHAPES = 8
"""So many of each kind, the quickest, are measured in any case."""
DECODE_STEPS = 3
HELD_OUT_SHARE = 0.25
CALIBRATION = (
    StepShape(prompts=((0, 16),)),
    StepShape(prompts=((0, 128),)),
    StepShape(prompts=((0, 512),)),
    StepShape(contexts=(64,)),
    StepShape(contexts=(256,) * 8),
)
"""Measured first, roughly, to know what the grid will cost; the first of them warms up, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileOptions:
    """How much to measure: after ``budget_s`` (loading apart) no new step begins.

    Except in the first pass, for which the grid is made small enough to need a quarter of it.
    """

    budget_s: float = 120.0
    max_passes: int = 9
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilePoint:
    """A measured step: ``step_s`` is the lower quartile of ``num_samples`` times.

    Not their median, since what disturbs a step only ever makes it longer. ``spread`` is the
    distance from quartile to median over the quartile: how far this machine agrees with itself.
    ``fitted_s`` is the model's prediction; a held-out point had no part in the fit.
    """

    kind: StepKind
    work: StepWork
    step_s: float
    spread: float
    num_samples: int
    fitted_s: float
    is_held_out: bool

    @property
    def error(self) -> float:
        """Relative error of the prediction, with its sign."""
        return self.fitted_s / self.step_s - 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileErrors:
    """Mean absolute relative errors of one kind of step, ``None`` without points; see ``mape``."""

    kind: StepKind
    num_fitted: int
    num_held_out: int
    fitted: float | None
    held_out: float | None
    spread: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A fitted model and what it was fitted to. ``num_skipped`` shapes were too slow to measure."""

    model: LatencyModel
    points: tuple[ProfilePoint, ...]
    num_skipped: int
    measured_s: float
    seed: int

    def errors(self) -> tuple[ProfileErrors, ...]:
        """The errors by kind of step."""
        return tuple(_errors(self.points, kind) for kind in StepKind)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; a worker reads ``latency_model``."""
        return {
            "latency_model": self.model.to_dict(),
            "errors": [asdict(errors) for errors in self.errors()],
            "points": [asdict(point) for point in self.points],
            "num_skipped": self.num_skipped,
            "measured_s": self.measured_s,
            "seed": self.seed,
        }


def run_profile(
    config: EngineConfig,
    options: ProfileOptions,
    *,
    on_progress: Progress = lambda what, fraction: None,
) -> Profile:
    """Load the model of ``config`` and profile it.

    The prefix cache is off. Raises as ``build_engine``, and ``EngineError`` if a step fails or the
    engine is too small for anything to be measured.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    engine = build_engine(
        replace(config, enable_prefix_cache=False),
        is_pipelined=False,  # each step is to be measured alone
        on_progress=lambda what, fraction: on_progress(what, fraction * LOADING_FRACTION),
    )
    facts = facts_of(engine.spec, Path(config.model_path))
    began_s = time.monotonic()
    samples, num_skipped = _Grid(engine, facts, config, options, on_progress).measure()
    points = [
        (shape, LatencyPoint(work=work, step_s=_lower_quartile(times)), times)
        for shape, (work, times) in samples.items()
    ]
    held_out = _choose_held_out(list(samples), Random(options.seed))
    on_progress("fitting", 1.0)
    model = fit(
        [point for shape, point, _ in points if shape not in held_out],
        facts,
        max_num_batched_tokens=config.max_num_batched_tokens,
        hardware=hardware_of(engine.device),
        device=str(engine.device),
        num_threads=torch.get_num_threads(),
        dtype=engine.spec.dtype,
        fingerprint=profile_fingerprint(engine.spec),
    )
    return Profile(
        model=model,
        points=tuple(
            ProfilePoint(
                kind=shape.kind,
                work=point.work,
                step_s=point.step_s,
                spread=_spread(times),
                num_samples=len(times),
                fitted_s=model.step_s(point.work),
                is_held_out=shape in held_out,
            )
            for shape, point, times in points
        ),
        num_skipped=num_skipped,
        measured_s=time.monotonic() - began_s,
        seed=options.seed,
    )


@dataclass(slots=True)
class _Grid:
    """One measurement of the grid, in several passes in changing order.

    What disturbs the machine for a while then hits one sample of many shapes, not all of one.
    """

    engine: Engine
    facts: ModelFacts
    config: EngineConfig
    options: ProfileOptions
    on_progress: Progress
    random: Random = field(init=False)
    deadline_s: float = field(init=False)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.options.seed)
        self.deadline_s = time.monotonic() + self.options.budget_s

    def measure(self) -> tuple[dict[StepShape, tuple[StepWork, list[float]]], int]:
        """Every shape's work and times, and how many shapes were left out."""
        engine = self.engine
        limits = GridLimits(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_model_len=engine.max_model_len,
            num_blocks=engine.num_blocks,
            block_size=engine.layout.block_size,
        )
        grid = make_grid(limits, self.random)
        if not grid:
            raise EngineError(f"an engine with {limits} is too small to be profiled")
        shapes = self._affordable(grid, limits)
        samples: dict[StepShape, tuple[StepWork, list[float]]] = {}
        num_done = 0
        for number in range(self.options.max_passes):
            self.random.shuffle(shapes)
            for shape in shapes:
                remaining_s = self.deadline_s - time.monotonic()
                if remaining_s <= 0.0 and number > 0:
                    return samples, len(grid) - len(samples)
                work, times = self._run(shape)
                samples.setdefault(shape, (work, []))[1].extend(times)
                num_done += 1
                share = max(
                    num_done / (len(shapes) * self.options.max_passes),
                    min(1.0, 1.0 - remaining_s / self.options.budget_s),
                )
                self.on_progress(
                    f"pass {number + 1}: {shape.kind}",
                    LOADING_FRACTION + (1.0 - LOADING_FRACTION) * share,
                )
        return samples, len(grid) - len(samples)

    def _affordable(self, grid: Sequence[StepShape], limits: GridLimits) -> list[StepShape]:
        """The shapes that the budget allows to be measured often enough."""
        calibration = [shape for shape in CALIBRATION if fits(shape, limits)] or grid[:1]
        self.on_progress("warming up", LOADING_FRACTION)
        self._run(calibration[0])
        points = []
        for shape in calibration:
            work, times = self._run(shape)
            points.append(LatencyPoint(work=work, step_s=min(times)))
        constants = fit_constants(points, self.facts)
        costs = {shape: self._cost_s(shape, constants) for shape in grid}
        by_cost = sorted(grid, key=costs.__getitem__)
        certain = {
            shape
            for kind in StepKind
            for shape in [shape for shape in by_cost if shape.kind is kind][:MIN_SHAPES]
        }
        budget_s = self.options.budget_s
        extra = [
            shape
            for shape in by_cost
            if shape not in certain and costs[shape] <= budget_s * MAX_STEP_SHARE
        ]
        free_s = budget_s / MIN_PASSES - sum(costs[shape] for shape in certain)
        while extra and sum(costs[shape] for shape in extra) > free_s:
            # One of the costliest quarter: some large ones stay.
            del extra[self.random.randrange(len(extra) * 3 // 4, len(extra))]
        certain.update(extra)
        return [shape for shape in grid if shape in certain]

    def _cost_s(self, shape: StepShape, constants: LatencyConstants) -> float:
        num_steps = (1 if shape.prompts else DECODE_STEPS) + (1 if shape.contexts else 0)
        return num_steps * constants.step_s(self.facts.features(shape.work))

    def _run(self, shape: StepShape) -> tuple[StepWork, list[float]]:
        """Measure ``shape`` once (a decode alone: several steps running)."""
        decodes = [self._start(context - 1, context) for context in shape.contexts]
        prompts: list[RequestKey] = []
        try:
            if decodes:  # the first step of a request may cost what later ones do not
                self._step()
            prompts += [self._start(start, end) for start, end in shape.prompts]
            results = [self._step() for _ in range(1 if prompts else DECODE_STEPS)]
        finally:
            for key in (*decodes, *prompts):
                self.engine.release(key)
        return results[0][0], [step_s for _, step_s in results]

    def _start(self, num_cached_tokens: int, num_tokens: int) -> RequestKey:
        """Queue a request whose first tokens have their KV (zeros, or whatever is there).

        With all but one of them it decodes: the last token counts as its first output.
        """
        self.num_requests += 1
        is_decode = num_cached_tokens == num_tokens - 1
        tokens = tuple(self.random.randrange(self.engine.spec.vocab_size) for _ in range(64))
        tokens = (tokens * (num_tokens // 64 + 1))[:num_tokens]
        request = Request(
            request_id=f"profile-{self.num_requests}",
            attempt=0,
            prompt_token_ids=tokens[:-1] if is_decode else tokens,
            output_token_ids=tokens[-1:] if is_decode else (),
            sampling=SamplingParams(max_tokens=1 << 30, temperature=0.0, ignore_eos=True),
        )
        if num_cached_tokens:
            self.engine.reserve(request.key, num_tokens)
            self.engine.start_reserved(request, num_computed_tokens=num_cached_tokens)
        else:
            self.engine.add(request)
        return request.key

    def _step(self) -> tuple[StepWork, float]:
        started_s = time.perf_counter()
        output = self.engine.step()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        step_s = time.perf_counter() - started_s
        if output is None:
            raise EngineError("the engine found nothing to compute")
        for item in output.outputs:
            if item.error is not None:
                raise EngineError(f"a profiled step failed: {item.error}")
        return output.stats.work, step_s


def _choose_held_out(shapes: Sequence[StepShape], random: Random) -> set[StepShape]:
    """A share of each kind, but none of which there are too few to spare one."""
    held_out: set[StepShape] = set()
    for kind in StepKind:
        of_kind = [shape for shape in shapes if shape.kind is kind]
        held_out.update(random.sample(of_kind, int(len(of_kind) * HELD_OUT_SHARE)))
    return held_out


def _lower_quartile(times: Sequence[float]) -> float:
    return sorted(times)[(len(times) - 1) // 4]


def _spread(times: Sequence[float]) -> float:
    return statistics.median(times) / _lower_quartile(times) - 1.0


def _errors(points: Sequence[ProfilePoint], kind: StepKind) -> ProfileErrors:
    of_kind = [point for point in points if point.kind is kind]
    fitted = [abs(point.error) for point in of_kind if not point.is_held_out]
    held_out = [abs(point.error) for point in of_kind if point.is_held_out]
    return ProfileErrors(
        kind=kind,
        num_fitted=len(fitted),
        num_held_out=len(held_out),
        fitted=_mean(fitted),
        held_out=_mean(held_out),
        spread=_mean([point.spread for point in of_kind]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
