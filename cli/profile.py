"""``banyan profile``: how long this machine takes for what, and how well that can be predicted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.errors import CommandFailed
from cli.models import Model

if TYPE_CHECKING:
    from shared.core.step_work import StepWork
    from shared.engine.profile import Profile, ProfileErrors, ProfilePoint


NOISY_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What to profile, how, and where to write it; ``out`` ``None`` is a file named after it."""

    model: Model
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    device: str
    num_threads: int | None
    budget_s: float
    out: Path | None
    as_json: bool


def run_profile(request: ProfileRequest, output: TextIO, errors: TextIO) -> int:
    """Measure, write the file and print the result; returns the exit code.

    Progress goes to ``errors``. Raises ``CommandFailed`` if the file cannot be written or there is
    no torch here, and what loading a model raises.
    """
    path = request.out or Path(f"latency-{request.model.name.replace('/', '--')}.json")
    if not path.parent.is_dir():
        raise CommandFailed(f"--out={path}: there is no directory {path.parent}")
    if path.is_dir():
        raise CommandFailed(f"--out={path}: is a directory; name the file to write")
    profile = _measure(request, errors)
    text = json.dumps(profile.to_dict(), indent=2) + "\n"
    try:
        path.write_text(text)
    except OSError as error:
        raise CommandFailed(f"--out={path}: cannot be written: {error.strerror}") from error
    if request.as_json:
        output.write(text)
        output.flush()
        return 0
    console = Console(file=output)
    console.print(_points_table(profile.points))
    console.print(_errors_table(profile.errors()))
    spread = max((errors.spread or 0.0 for errors in profile.errors()), default=0.0)
    if spread > NOISY_SPREAD:
        console.print(
            f"equal steps differ by {spread * 100:.0f} %: something else computes here, and no "
            "model can be better than that",
            soft_wrap=True,
        )
    if profile.num_skipped:
        console.print(
            f"{profile.num_skipped} steps left out: they take too much of {request.budget_s:g} s"
        )
    console.print(
        f"wrote {path}: a worker starts from it with BANYAN_PREFILL_LATENCY_PROFILE or "
        "BANYAN_DECODE_LATENCY_PROFILE",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _measure(request: ProfileRequest, errors: TextIO) -> "Profile":
    console = Console(file=errors)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task("starting", total=1.0)
        try:
            from shared.engine.config import EngineConfig
            from shared.engine.profile import ProfileOptions, run_profile
        except ModuleNotFoundError as error:
            raise CommandFailed(
                f"no {error.name} here: install what a worker needs, pip install 'banyan[worker]'"
            ) from error

        def on_progress(what: str, fraction: float) -> None:
            bars.update(task, description=what, completed=fraction)

        config = EngineConfig(
            model_path=str(request.model.directory),
            dtype=request.dtype,
            quantization=request.quantization,
            kv_cache_dtype=request.kv_cache_dtype,
            device=request.device,
            num_threads=request.num_threads,
        )
        return run_profile(
            config, ProfileOptions(budget_s=request.budget_s), on_progress=on_progress
        )


def _points_table(points: Sequence["ProfilePoint"]) -> Table:
    table = _table("step", "measured\nms", "fitted\nms", "error\n%", "spread\n%", "held\nout")
    order = sorted(points, key=lambda p: (p.kind, p.work.num_batched_tokens, p.step_s))
    for point in order:
        table.add_row(
            f"{point.kind} {describe(point.work)}",
            f"{point.step_s * 1e3:.2f}",
            f"{point.fitted_s * 1e3:.2f}",
            f"{point.error * 100:+.1f}",
            f"{point.spread * 100:.1f}",
            "yes" if point.is_held_out else "",
        )
    return table


def _errors_table(errors: Sequence["ProfileErrors"]) -> Table:
    table = _table(
        "mean error of",
        "held out\n%",
        "held out\npoints",
        "fitted\n%",
        "fitted\npoints",
        "spread\n%",
    )
    for kind in errors:
        table.add_row(
            kind.kind,
            _percent(kind.held_out),
            str(kind.num_held_out),
            _percent(kind.fitted),
            str(kind.num_fitted),
            _percent(kind.spread),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def describe(work: "StepWork") -> str:
    """What a step computes, in a few words."""
    parts = []
    if len(work.chunks) == 1:
        ((start, end),) = work.chunks
        parts.append(f"{end - start}" + (f" behind {start}" if start else ""))
    elif work.chunks:
        parts.append(f"{work.num_prefill_tokens} in {len(work.chunks)} prompts")
    if work.num_decode:
        mean = round(work.decode_context_tokens / work.num_decode)
        parts.append(f"{work.num_decode} × {mean}")
    return " + ".join(parts)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.1f}"
