"""The pictures of a run.

`train_loss.png`: the loss curve, raw and smoothed, with its evaluations and the weights that were kept.
`objective.png`: for preferences and rewards, the figures beside the loss, one small plot each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuneflow.errors import missing_extra
from finetuneflow.export.record import RunRecord, read_run
from finetuneflow.workspace import write_atomic

INK, GREY, GRID = "#1f2933", "#52606d", "#e4e7eb"
TRAIN, EVAL = "#2563ab", "#c2410c"  # told apart by colour-blind readers, and by markers
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 8.0, 4.5, 200

Points = list[tuple[float, float]]


def plot_loss(run_dir: Path, path: Path | None = None) -> Path:
    """Draw the run's loss curve as PNG (1600 x 900) to `path`, by default `train_loss.png` in the run directory."""
    target = path or run_dir / "train_loss.png"
    write_atomic(target, draw_loss(read_run(run_dir)))
    return target


def draw_loss(record: RunRecord) -> bytes:
    """The picture as PNG bytes. The same run gives the same bytes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "train") from error
    import io

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, evaluations = points(record.log_lines, "loss"), points(record.eval_lines, "eval_loss")
    _draw_train(axes, train)
    _draw_evaluations(axes, evaluations, record)
    _dress(axes, record, train, evaluations)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "FineTuneFlow"})
    return buffer.getvalue()


PANELS = (  # of the figures a run logged, in this order, those that are drawn
    ("accuracy",),
    ("margin",),
    ("reward",),
    ("kl",),
    ("logp_chosen", "logp_rejected"),
    ("reward_chosen", "reward_rejected"),
    ("response_length",),
    ("entropy",),
    ("clip_fraction",),
    ("value_explained_variance",),
)
MOST_PANELS, COLUMNS = 6, 3


def draw_objective(record: RunRecord) -> bytes | None:
    """Small plots of what was logged beside the loss, each with its held-out values; None for a run that logged nothing more."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "train") from error
    import io

    logged = [{"step": line["step"], **line["metrics"]} for line in record.log_lines if isinstance(line.get("metrics"), dict)]
    panels = [names for names in PANELS if any(points(logged, name) for name in names)][:MOST_PANELS]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.5), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        _plain(f"{record.name}: what {record.config.training.objective} did"), fontsize=12, fontweight="bold", color=INK
    )
    for number, names in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), names, logged, record.eval_lines)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "FineTuneFlow"})
    return buffer.getvalue()


def _draw_panel(axes: Any, names: tuple[str, ...], logged: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> None:
    """One figure (or a chosen and a rejected one) over the steps: solid as trained, dashed squares as held out."""
    for name, colour in zip(names, (TRAIN, EVAL), strict=False):
        label = name.rsplit("_", 1)[-1] if len(names) > 1 else "training"
        if values := points(logged, name):
            axes.plot(*zip(*values, strict=True), color=colour, linewidth=1.6, label=label)
        if held := points(evaluated, f"eval_{name}"):
            axes.plot(*zip(*held, strict=True), color=colour if len(names) > 1 else EVAL, linestyle=(0, (4, 2)), marker="s",
                      markersize=4, linewidth=1.2, label="held out" if len(names) == 1 else None)  # fmt: skip
    title = (
        names[0].replace("_", " ") if len(names) == 1 else names[0].rsplit("_", 1)[0].replace("_", " ") + ", chosen and rejected"
    )
    axes.set_title(
        title.replace("logp", "log-probability").replace("kl", "divergence (nats)"), fontsize=10, loc="left", color=INK
    )
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=8, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def points(lines: Sequence[dict[str, Any]], key: str) -> Points:
    """(step, value) of every line with a finite value."""
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float) and math.isfinite(line[key])]


def smooth(values: Points) -> Points:
    """A local straight-line fit at every step, weighted by a Gaussian a thirtieth of the run wide.

    Unlike a running average it neither lags behind a falling loss nor bends at the ends, and uneven logging does not matter.
    At most 1,000 points are returned.
    """
    import numpy as np

    if len(values) < 3:
        return values
    steps, losses = (np.array(column, dtype=float) for column in zip(*values, strict=True))
    width = max((steps[-1] - steps[0]) / 30, 1.5 * float(np.median(np.diff(steps))))
    at = steps if len(steps) <= 1000 else np.linspace(steps[0], steps[-1], 1000)
    return [(float(step), _local_fit(np, steps, losses, step, width)) for step in at]


def _local_fit(np: Any, steps: Any, losses: Any, step: float, width: float) -> float:
    """The value at `step` of the straight line that fits its neighbourhood best."""
    distance = steps - step
    weight = np.exp(-0.5 * (distance / width) ** 2)
    total, first, second = weight.sum(), (weight * distance).sum(), (weight * distance**2).sum()
    spread = total * second - first**2
    if spread <= 1e-12 * max(total, 1e-300) * max(second, 1e-300):
        return float((weight * losses).sum() / total)
    return float((second * (weight * losses).sum() - first * (weight * distance * losses).sum()) / spread)


def _draw_train(axes: Any, train: Points) -> None:
    if not train:
        return
    few = len(train) < 12
    axes.plot(*zip(*train, strict=True), color=TRAIN, alpha=1.0 if few else 0.28, linewidth=1.6 if few else 1.0,
              marker="o" if few else None, markersize=3.5, label="train loss" if few else "train loss, as logged")  # fmt: skip
    if not few:
        axes.plot(*zip(*smooth(train), strict=True), color=TRAIN, linewidth=2.2, label="train loss, smoothed")


def _draw_evaluations(axes: Any, evaluations: Points, record: RunRecord) -> None:
    if not evaluations:
        return
    best_step, word = record.best_step, "weights kept" if record.config.training.load_best else "lowest"
    axes.plot(
        *zip(*evaluations, strict=True),
        color=EVAL,
        linewidth=1.6,
        linestyle=(0, (4, 2)),
        marker="s",
        markersize=5,
        label="eval loss",
    )
    best = [value for step, value in evaluations if step == best_step]
    if best and best_step is not None:
        axes.plot([best_step], best, marker="o", markersize=13, markerfacecolor="none", markeredgecolor=EVAL,
                  markeredgewidth=1.8, linestyle="none", label=f"{word}: step {best_step:,}, eval loss {best[0]:.3f}")  # fmt: skip


def _dress(axes: Any, record: RunRecord, train: Points, evaluations: Points) -> None:
    """Axes, title, legend and the message where there is nothing to draw."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    base = Path(record.config.model.base).name or record.config.model.base
    axes.set_title(_plain(f"Loss of {record.name}"), loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.025, _plain(f"{record.method} on {base}"), transform=axes.transAxes, fontsize=10, color=GREY)
    axes.set_xlabel("optimizer step", fontsize=10.5, color=INK)
    supervised = record.config.training.objective in ("sft", "pretrain")
    axes.set_ylabel("loss (nats per supervised token)" if supervised else "loss", fontsize=10.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9.5, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    if train or evaluations:
        _set_limits(axes, train, evaluations)
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="upper right")
    else:
        axes.text(0.5, 0.5, "No loss was logged.", transform=axes.transAxes, ha="center", color=GREY, fontsize=11)


def _set_limits(axes: Any, train: Points, evaluations: Points) -> None:
    """From zero where that costs little, with a margin above; one single spike may leave the picture."""
    values = sorted(value for _, value in [*train, *evaluations])
    low, high = values[0], values[-1]
    nearly_all = values[int(0.98 * (len(values) - 1))]
    if len(values) > 50 and high > 3 * nearly_all:
        high = nearly_all
    bottom = 0.0 if low < 0.45 * high else low - 0.12 * (high - low or 1.0)
    axes.set_ylim(bottom, high + 0.08 * ((high - bottom) or 1.0))
    steps = [step for step, _ in [*train, *evaluations]]
    pad = 0.02 * (max(steps) - min(steps)) or 1
    axes.set_xlim(min(0, min(steps)), max(steps) + pad)


def _plain(text: str) -> str:
    """A name as matplotlib shall print it: `$` would start a formula, a long one would leave the picture."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return (printable if len(printable) <= 80 else printable[:79] + "…").replace("$", r"\$")
