"""Training speed of our engine against TRL and LLaMA-Factory: same rows, tokens, labels, rows per step, adapter and rate.

    python -m benchmarks.speed [--cells lora-135m-short,…] [--contenders ftf,…] [--repeats 2] [--steps 12] [--search]

A cell is method, shape and rows (`speed_cells.CELLS`). Its contenders run one after the other, each in a process of its own,
and all of that again for each repeat. Speed is useful tokens (no padding) per second over the steps behind the first two.

- `ftf` is `ftf train`'s engine with its default settings, `ftf-reference` the same with `training.speed: reference`.
- `trl-defaults` and `llamafactory-defaults` change nothing that decides the speed.
- `trl-best` and `llamafactory-best` are the fastest settings that `--search` found for the cell (one setting is varied at a
  time; whatever was tried stands in the results, failures too), or a first guess where nothing was searched. A setting
  counts only if its loss agrees with that of the others.

Tokens of each step and the sum of supervised ones must be equal for ours and TRL's, or the benchmark fails. LLaMA-Factory
takes text and tokenizes by itself: its own tokens are counted, and the result says whether they are the same.

`share_of_matrix_rate` relates the operations a cell cannot do without to the rate of a bf16 product of 2048 x 2048 matrices
that is measured in the same run. Those operations are: 2 P per token forward and 2 P for gradients of inputs, P being the
weights of the layers' matrix products; 2 P more for gradients of weights in full fine-tuning, and for DPO's reference; the
vocabulary's matrix at supervised positions alone (`speed_cells.training_flops`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ContenderFailed, run_contender, save_result, spread
from benchmarks.peers import llama_factory
from benchmarks.speed_cells import CELLS, Cell, cell, training_flops, work_folder

WARM_UP = 2  # steps that are not measured
SEARCH_STEPS = 5
FINALISTS = 3  # settings that a search measures twice
TIME_LIMIT = 3_600.0  # seconds of one contender
# What may be run every day: the shape and the rows that the first measurements were made with.
AFFORDABLE = ("lora-135m-short", "lora-135m-alpaca")
NAMES = ("ftf", "ftf-reference", "trl-defaults", "trl-best", "llamafactory-defaults", "llamafactory-best")
MODULES = {
    "ftf": "benchmarks.peers.ours",
    "trl": "benchmarks.peers.trl_trainers",
    "llamafactory": "benchmarks.peers.llama_factory",
}
LOSS_TOLERANCE = 0.01  # relative; 16-bit arithmetic alone moves these losses by a hundredth of that


# --- settings ---------------------------------------------------------------------------------------

Settings = dict[str, Any]
# setting -> values to try; of a setting that is a dict, several words at once
Axes = dict[str, list[Any]]


def trl_axes(cell: Cell) -> tuple[Settings, Axes]:
    """Where the search for TRL's best begins, and what it varies, one after the other."""
    batch = cell.rows.batch
    pairs, quantized = cell.rows.objective == "dpo", cell.method == "qlora"
    sizes = sorted({1, max(1, batch // 2), batch}, reverse=True)
    layouts = [[size, form] for size in sizes for form in ("padded", "free") if form == "padded" or (size > 1 and not pairs)]
    start: Settings = {
        "precision": {"weights": "float32" if cell.method == "full" else "bfloat16", "autocast": True},
        "layout": [1 if cell.rows_name == "long" else batch, "padded" if pairs or cell.rows_name == "long" else "free"],
        "attention": "sdpa",
        **({"adapter": "float32"} if cell.method == "lora" else {}),
        "checkpointing": False,
        **({"compute": "bfloat16"} if quantized else {}),
    }
    axes: Axes = {
        "precision": [{"weights": w, "autocast": a} for w in ("bfloat16", "float32") for a in (True, False)],
        "layout": layouts,
        "attention": ["sdpa", "eager"],
        **({"adapter": ["float32", "bfloat16"]} if cell.method == "lora" else {}),
        **({"compute": ["bfloat16", "float32"]} if quantized else {}),
        "checkpointing": [False, True],
    }
    return start, axes


def llamafactory_axes(cell: Cell, pack_tokens: int) -> tuple[Settings, Axes]:
    """The same for LLaMA-Factory, whose packs (`neat_packing`) hold about the tokens of one of our steps, but other rows."""
    start: Settings = {"precision": {"bf16": True}, "disable_gradient_checkpointing": True, "flash_attn": "sdpa"}
    axes: Axes = {
        "precision": [{"bf16": True}, {"bf16": False}, {"pure_bf16": True}],
        **(
            {"packing": [{}, {"packing": True, "neat_packing": True, "packed_length": pack_tokens}]}
            if cell.rows.objective == "sft"
            else {}
        ),
        "flash_attn": ["sdpa", "disabled"],
        "disable_gradient_checkpointing": [True, False],
    }
    return start, axes


def flat(settings: Settings) -> Settings:
    """The settings as a contender takes them: a setting of several words becomes those words."""
    return {
        key: value
        for name, chosen in settings.items()
        for key, value in (chosen.items() if isinstance(chosen, dict) else ((name, chosen),))
    }


# --- running ----------------------------------------------------------------------------------------


class Bench:
    """One cell with its rows prepared: runs contenders on it."""

    def __init__(self, cell: Cell, steps: int) -> None:
        self.cell, self.steps = cell, steps
        self.folder = work_folder() / "cells" / f"{cell.name}-{steps}"
        self.facts = run_contender("benchmarks.speed_cells", cell.name, str(self.folder), str(steps))

    @property
    def pack_tokens(self) -> int:
        """Tokens of a mean step, or of the longest row; in eights, since its collator pads masks and rows apart otherwise."""
        return -(-max(int(statistics.mean(self.facts["tokens"])), self.facts["row_tokens"]["longest"]) // 8) * 8

    def run(self, family: str, settings: Settings) -> dict[str, Any]:
        """What a contender reported. Raises `ContenderFailed`."""
        job = {
            "cell": self.cell.name,
            "folder": str(self.folder),
            "base": self.facts["base"],
            "steps": self.steps,
            "threads": len(os.sched_getaffinity(0)),
            "settings": settings,
        }
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "job.json"
            path.write_text(json.dumps(job))
            found = run_contender(MODULES[family], str(path), python=python_of(family), time_limit=TIME_LIMIT)
        if family == "ftf":
            assert found["supervised_total"] == sum(self.facts["supervised"]), (family, found["supervised_total"], self.facts)
        elif family == "trl":
            assert found["supervised"] == self.facts["supervised"], (family, found["supervised"], self.facts)
        if family != "llamafactory":
            assert found["tokens"] == self.facts["tokens"], (family, found["tokens"], self.facts)
        return found

    def flops_per_second(self, found: dict[str, Any]) -> float:
        supervised = found["supervised"] or self.facts["supervised"]
        flops = training_flops(self.cell, sum(found["tokens"][WARM_UP:]), sum(supervised[WARM_UP:]))
        return flops / sum(found["seconds"][WARM_UP:])


def python_of(family: str) -> str:
    return str(llama_factory.python_of()) if family == "llamafactory" else sys.executable


def speed_of(found: dict[str, Any]) -> float:
    return float(sum(found["tokens"][WARM_UP:]) / sum(found["seconds"][WARM_UP:]))


def loss_of(found: dict[str, Any]) -> float:
    return statistics.mean(found["losses"][WARM_UP:])


def types_of(found: dict[str, Any]) -> dict[str, list[str]]:
    return {name: found[name] for name in ("trained_types", "frozen_types") if name in found}


def search(start: Settings, axes: Axes, measure: Callable[[Settings], dict[str, Any]]) -> dict[str, Any]:
    """Vary one setting after the other, each time from the best so far, until a round changes nothing (two at most).

    A setting whose loss is not that of most others is no candidate: it does not train the same. The fastest few are measured
    again, and the one with the best mean wins: a single measurement of a few steps may be luck.
    """
    table: list[dict[str, Any]] = []

    def tried(settings: Settings) -> dict[str, Any]:
        if (known := next((line for line in table if line["settings"] == flat(settings)), None)) is None:
            known = {"settings": flat(settings), **measure(flat(settings))}
            table.append(known)
            print(f"  {known}", file=sys.stderr, flush=True)
        return known

    def usable(line: dict[str, Any]) -> bool:
        losses = [line["mean_loss"] for line in table if "mean_loss" in line]
        return "mean_loss" in line and abs(line["mean_loss"] / statistics.median(losses) - 1) <= LOSS_TOLERANCE

    best = start
    tried(best)
    for _ in range(2):
        before = best
        for name, values in axes.items():
            choices = [{**best, name: value} for value in values]
            for choice in choices:
                tried(choice)
            usables = [choice for choice in choices if usable(tried(choice))]
            best = max(usables, key=lambda choice: tried(choice)["useful_tokens_per_second"], default=best)
        if best == before:
            break
    finalists = sorted(filter(usable, table), key=lambda line: line["useful_tokens_per_second"], reverse=True)[:FINALISTS]
    for line in finalists:
        line["again"] = measure(line["settings"]).get("useful_tokens_per_second", 0.0)
    winner = max(finalists, key=lambda line: line["useful_tokens_per_second"] + line["again"], default=None)
    return {"steps": SEARCH_STEPS, "best": winner["settings"] if winner else None, "tried": table}


def run_search(cell: Cell, family: str) -> dict[str, Any]:
    bench = Bench(cell, SEARCH_STEPS)
    start, axes = trl_axes(cell) if family == "trl" else llamafactory_axes(cell, bench.pack_tokens)

    def measure(settings: Settings) -> dict[str, Any]:
        try:
            found = bench.run(family, settings)
        except ContenderFailed as error:
            return {"failed": error.reason}
        return {
            "useful_tokens_per_second": speed_of(found),
            "mean_loss": loss_of(found),
            "peak_bytes": found["peak_bytes"],
            **types_of(found),
        }

    return search(start, axes, measure)


# --- a cell -----------------------------------------------------------------------------------------


def settings_of(name: str, cell: Cell, searched: dict[str, Any], pack_tokens: int) -> Settings | None:
    """Settings of a contender, None where there is no such contender (today)."""
    family, _, kind = name.partition("-")
    if family == "ftf":
        if kind != "reference":
            return {}
        from finetuneflow.config import Training

        return {"training": {"speed": "reference"}} if "speed" in Training.model_fields else None
    if kind == "defaults":
        return {}
    if family in searched:
        best: Settings | None = searched[family]["best"]
        return {**best, "packed_length": pack_tokens} if best and "packed_length" in best else best
    return flat(trl_axes(cell)[0] if family == "trl" else llamafactory_axes(cell, pack_tokens)[0])


def run_cell(cell: Cell, names: list[str], *, repeats: int, steps: int, searched: dict[str, Any]) -> dict[str, Any]:
    """All contenders, one after the other, `repeats` times."""
    bench = Bench(cell, steps)
    settings = {name: settings_of(name, cell, searched, bench.pack_tokens) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failures = {name: "there is no such setting" for name in names if settings[name] is None}
    rates, began = [], time.monotonic()
    for _ in range(repeats):
        rates.append(run_contender("benchmarks.speed", "--matrix-rate")["flops_per_second"])
        for name in names:
            if name in failures:
                continue
            try:
                runs[name].append(bench.run(name.partition("-")[0], settings[name] or {}))
            except ContenderFailed as error:
                failures[name] = error.reason
                continue
            print(f"{cell.name} {name}: {speed_of(runs[name][-1]):.0f} tokens/s", file=sys.stderr, flush=True)
    rate = statistics.median(rates)
    contenders: dict[str, Any] = {name: {"failed": reason, "settings": settings[name]} for name, reason in failures.items()}
    for name in (name for name in names if name not in failures):
        contenders[name] = summary(bench, runs[name], rate) | {"settings": settings[name]}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "minutes": (time.monotonic() - began) / 60,
        "rows": "real" if bench.facts["real_rows"] else "synthetic, of about the lengths of the real ones",
        "rows_per_step": cell.rows.batch,
        "max_length": cell.rows.max_length,
        "row_tokens": bench.facts["row_tokens"],
        "steps": steps,
        "measured_steps": steps - WARM_UP,
        "repeats": repeats,
        "tokens": sum(bench.facts["tokens"][WARM_UP:]),
        "supervised_tokens": sum(bench.facts["supervised"][WARM_UP:]),
        "learning_rate": cell.learning_rate,
        "matrix_flops_per_second": spread(rates),
        "best_settings_from": {family: "search" if family in searched else "first guess" for family in ("trl", "llamafactory")},
        "contenders": {name: contenders[name] for name in names},
        "ratios": ratios(contenders),
        "search": searched,
    }


def summary(bench: Bench, runs: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    speed = spread([speed_of(found) for found in runs])
    first = runs[0]
    padded = {"useful_share_of_positions": sum(first["tokens"]) / sum(first["padded"])} if "padded" in first else {}
    return {
        "useful_tokens_per_second": speed,
        "seconds_per_step": spread([statistics.median(found["seconds"][WARM_UP:]) for found in runs]),
        "mean_loss": loss_of(first),
        "last_loss": first["losses"][-1],
        "peak_bytes": spread([found["peak_bytes"] for found in runs]),
        "share_of_matrix_rate": statistics.median(bench.flops_per_second(found) for found in runs) / rate,
        "same_tokens": first["tokens"] == bench.facts["tokens"],
        "same_supervised": (first["supervised"] or bench.facts["supervised"]) == bench.facts["supervised"],
        "tokens": sum(first["tokens"][WARM_UP:]),
        **padded,
        **types_of(first),
        **(
            {"decisions": {key: value for key, value in first["decisions"].items() if key != "model"}}
            if "decisions" in first
            else {}
        ),
    }


def ratios(contenders: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each other contender ours is."""
    speeds = {name: found["useful_tokens_per_second"]["median"] for name, found in contenders.items() if "failed" not in found}
    return {f"ftf / {name}": speeds["ftf"] / speed for name, speed in speeds.items() if name != "ftf"} if "ftf" in speeds else {}


def matrix_rate() -> float:
    """Operations per second of bf16 products of 2048 x 2048 matrices: the best of some rounds."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size, times = 2_048, []
    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    for _ in range(40):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / min(times))


# --- results ----------------------------------------------------------------------------------------


def known_cells() -> dict[str, Any]:
    path = RESULTS / "speed.json"
    return dict(json.loads(path.read_text())["cells"]) if path.is_file() else {}


def save(name: str, found: dict[str, Any]) -> None:
    """Replace one cell of the results; the others stay."""
    cells = known_cells() | {name: found}
    versions = {package: version(package) for package in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    save_result("speed", {"versions": versions, "cells": {name: cells[name] for name in CELLS if name in cells}})


def table(name: str, found: dict[str, Any]) -> str:
    lines = [f"{name}: {found['tokens']:,} tokens in {found['measured_steps']} steps"]
    for who, line in found["contenders"].items():
        if "failed" in line:
            lines.append(f"  {who:<22} {line['failed'][-160:]}")
            continue
        speed = line["useful_tokens_per_second"]
        lines.append(
            f"  {who:<22} {speed['median']:8.0f} tokens/s ({speed['lowest']:.0f} to {speed['highest']:.0f}), "
            f"{line['peak_bytes']['median'] / 1e9:5.2f} GB, loss {line['mean_loss']:.4f}, "
            f"{line['share_of_matrix_rate']:.1%} of the matrix rate{'' if line['same_tokens'] else ', other tokens'}"
        )
    return "\n".join(lines)


def draw(path: Path = RESULTS.parent.parent / "docs" / "images" / "speed.png") -> None:
    """The results as bars: one panel per cell, useful tokens per second, range of the repeats, peak memory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = known_cells()
    figure, panels = plt.subplots(len(cells), 1, figsize=(8, 0.6 + 2.1 * len(cells)), layout="constrained", squeeze=False)
    for axis, (name, found) in zip(panels[:, 0], cells.items(), strict=True):
        lines = {who: line for who, line in found["contenders"].items() if "failed" not in line}
        speeds = [line["useful_tokens_per_second"] for line in lines.values()]
        medians = [speed["median"] for speed in speeds]
        ranges = [[s["median"] - s["lowest"] for s in speeds], [s["highest"] - s["median"] for s in speeds]]
        colors = ["#1b7837" if who.startswith("ftf") else "#9e9e9e" for who in lines]
        axis.barh(list(lines), medians, xerr=ranges, color=colors, ecolor="#444444", capsize=2)
        for place, (speed, line) in enumerate(zip(speeds, lines.values(), strict=True)):
            told = f"{speed['median']:,.0f}   {line['peak_bytes']['median'] / 1e9:.1f} GB"
            axis.annotate(told, (speed["highest"], place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(f"{name}: {found['rows_per_step']} rows a step, {found['rows']} rows", fontsize=9, loc="left")
        axis.set_xlim(0, 1.3 * max(speed["highest"] for speed in speeds))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("useful tokens per second (median; line: range of the repeats), and peak memory", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] = ()) -> None:
    """`arguments` as on the command line; without any, what can be afforded every day."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description="Training speed against TRL and LLaMA-Factory."
    )
    parser.add_argument("--cells", default=",".join(AFFORDABLE), help=f"of {', '.join(CELLS)}, or `all`")
    default = [name for name in NAMES if not name.startswith("llamafactory") or llama_factory.is_installed()]
    parser.add_argument(
        "--contenders",
        default=",".join(default),
        help=f"of {', '.join(NAMES)}; LLaMA-Factory is installed where it is named first",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps; the first {WARM_UP} are not measured")
    parser.add_argument("--search", action="store_true", help="search the best settings of the peers first")
    parser.add_argument("--matrix-rate", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(list(arguments))
    if chosen.matrix_rate:
        print(json.dumps({"flops_per_second": matrix_rate()}))
        return
    names = chosen.contenders.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"there is no contender {unknown[0]!r}; there are: {', '.join(NAMES)}")
    if chosen.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}")
    for made in [cell(name) for name in (CELLS if chosen.cells == "all" else chosen.cells.split(","))]:
        searched = dict(known_cells().get(made.name, {}).get("search", {}))
        if chosen.search:
            searched |= {family: run_search(made, family) for family in ("trl", "llamafactory") if f"{family}-best" in names}
        found = run_cell(made, names, repeats=chosen.repeats, steps=chosen.steps, searched=searched)
        save(made.name, found)
        draw()
        print(table(made.name, found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
