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

FEW_POINTS = 12  # below, each logged value gets a mark: lines between so few say little by themselves

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


# Of the figures a run logged, in this order, those that are drawn: names, title, unit.
PANELS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("accuracy",), "accuracy", "share of pairs"),
    (("margin",), "margin", "score, chosen less rejected"),
    (("reward",), "reward", "reward"),
    (("kl",), "divergence from the reference", "nats"),
    (("logp_chosen", "logp_rejected"), "log-probability", "nats per answer"),
    (("reward_chosen", "reward_rejected"), "score", "score"),
    (("response_length",), "response length", "tokens"),
    (("entropy",), "entropy", "nats per token"),
    (("clip_fraction",), "clipped", "share of tokens"),
    (("value_explained_variance",), "value head", "share of variance explained"),
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
    panels = [panel for panel in PANELS if any(points(logged, name) for name in panel[0])][:MOST_PANELS]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, -(-len(panels) // rows))
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.5), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        _plain(f"{record.name}: what {record.config.training.objective} did"), fontsize=12, fontweight="bold", color=INK
    )
    for number, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), panel, logged, record.eval_lines)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "FineTuneFlow"})
    return buffer.getvalue()


def _draw_panel(
    axes: Any, panel: tuple[tuple[str, ...], str, str], logged: list[dict[str, Any]], evaluated: list[dict[str, Any]]
) -> None:
    """One figure (or a chosen and a rejected one) over the steps: solid as trained, dashed squares as held out."""
    names, title, unit = panel
    for name, colour in zip(names, (TRAIN, EVAL), strict=False):
        side = name.rsplit("_", 1)[-1] if len(names) > 1 else ""
        _draw_logged(axes, points(logged, name), colour, side or "training")
        if held := points(evaluated, f"eval_{name}"):
            axes.plot(*zip(*held, strict=True), color=colour if side else EVAL, linestyle=(0, (4, 2)), marker="s",
                      markersize=4, linewidth=1.2, label=f"{side}, held out" if side else "held out")  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_ylabel(unit, fontsize=8.5, color=GREY)
    _dress_axes(axes, label="step", ticks=5, size=8)
    axes.set_xlim(left=0)  # a run of one step has no width of its own
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _dress_axes(axes: Any, *, label: str, ticks: int, size: float) -> None:
    """Steps in whole numbers below, a light grid, and no more lines than that."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(label, fontsize=size + 1, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=size, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")


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
    few = len(train) < FEW_POINTS
    _draw_logged(axes, train, TRAIN, "train loss" if few else "train loss, smoothed", raw_label="train loss, as logged")


def _draw_logged(axes: Any, values: Points, colour: str, label: str, *, raw_label: str | None = None) -> None:
    """A line with a mark at each value; of many values, a smooth line with what was logged behind it."""
    if not values:
        return
    if len(values) < FEW_POINTS:
        axes.plot(*zip(*values, strict=True), color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
        return
    axes.plot(*zip(*values, strict=True), color=colour, alpha=0.28, linewidth=1.0, label=raw_label)
    axes.plot(*zip(*smooth(values), strict=True), color=colour, linewidth=2.2, label=label)


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
    base = Path(record.config.model.base).name or record.config.model.base
    axes.set_title(_plain(f"Loss of {record.name}"), loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.025, _plain(f"{record.method} on {base}"), transform=axes.transAxes, fontsize=10, color=GREY)
    _dress_axes(axes, label="optimizer step", ticks=9, size=9.5)
    supervised = record.config.training.objective in ("sft", "pretrain")
    axes.set_ylabel("loss (nats per supervised token)" if supervised else "loss", fontsize=10.5, color=INK)
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
