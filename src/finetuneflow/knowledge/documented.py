"""Times that documents and papers state, beside the estimate: the table of `docs/time-and-cost.md`.

The documented figures have one home, the recipes; what they leave open (size, lengths, devices) is set here and shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from finetuneflow.config import build_config
from finetuneflow.knowledge.cost import Cost, estimate_cost
from finetuneflow.knowledge.facts import machine_named
from finetuneflow.knowledge.recipes import load_phase
from finetuneflow.knowledge.resolve import resolve
from finetuneflow.knowledge.shapes import shape_from_size
from finetuneflow.knowledge.values import DataFacts


@dataclass(frozen=True, slots=True)
class Stated:
    """A run as a document states it. `hours`: as stated, None where the recipe `recipe` holds them.

    `tokens`: assumed mean length of an example. `batch`: examples per step over all devices, `micro_batch` of one device.
    """

    name: str
    recipe: str | None
    size: str
    method: str
    gpu: str
    count: int
    steps: int
    batch: int
    micro_batch: int
    tokens: int
    max_length: int
    why: str
    hours: tuple[float, float] | None = None
    rank: int = 16


SHARDED = (
    "With 32-bit optimizer states 7B does not fit one card: it ran sharded, which gathers 13 GB of weights for every pass; on "
    "short rows that takes longer than computing. The document's 3,000 steps are 7.4 epochs; the published 3 are 1,219 steps."
)
SMALL = (
    "124M is far below what a card can do: launching its layers is what takes the time. A selective scan in plain PyTorch, a "
    "loop over positions, would explain the documented hours; arithmetic does not."
)
STATED: tuple[Stated, ...] = (
    Stated("Alpaca", "alpaca", "7B", "full", "A100 80GB", 8, 3_000, 128, 4, 130, 512, SHARDED),
    Stated("Vicuna", "vicuna", "7B", "full", "A100 80GB", 8, 12_000, 128, 4, 1_200, 2_048, "12,000 steps are 22 epochs; the published 3 epochs are 1,641 steps, a seventh of it, and the published time for 13B is one day. Steps and hours of the document do not belong together."),
    Stated("LoRA", "lora", "7B", "lora", "A100 80GB", 2, 7_500, 32, 4, 300, 2_048, "Agrees for 7B on two A100; the document says \"1-2 GPUs\" and names neither model nor card. On one it takes twice as long."),
    Stated("Llama 2-Chat", "llama2-chat", "7B", "full", "A100 80GB", 128, 75_000, 256, 2, 4_096, 4_096, "Agrees for 7B with every row full; 13B takes twice, 70B ten times that. The paper states no hours for tuning."),
    Stated("Dolly", "dolly", "12B", "full", "A100 80GB", 8, 2_000, 32, 4, 250, 1_024, "A 12B model sharded over 8 cards (DeepSpeed, with offload in the published configuration) gathers its weights for every short micro-batch; the arithmetic alone takes minutes."),
    Stated("Conservative", "conservative", "124M", "full", "RTX 4090", 6, 25_000, 192, 4, 250, 1_024, SMALL),
    Stated("Conservative, fast", "conservative-fast", "124M", "full", "RTX 4090", 6, 15_000, 96, 4, 250, 1_024, "As above. 43 h x 15,000/25,000 at half the batch would be 13 h by the document's own arithmetic, not 20."),
    Stated("Conservative, ultra-fast", "conservative-ultra-fast", "124M", "full", "RTX 4090", 6, 5_000, 384, 8, 250, 1_024, "As above. 5,000 steps at twice the batch are 40 % of the examples: 17 h by the document's own arithmetic, not 8."),
    Stated("Conservative, max quality", "conservative-max-quality", "124M", "full", "RTX 4090", 6, 50_000, 288, 6, 250, 1_024, "As above. Twice the steps at 1.5 times the batch are three times the examples: 129 h by the document's own arithmetic, not 87."),
    Stated("QLoRA", "qlora", "7B", "qlora", "RTX 3090", 1, 5_000, 16, 4, 300, 512, "Agrees.", rank=64),
    Stated("QLoRA, chapter 13.2.6", None, "7B", "qlora", "RTX 3090", 1, 1_740, 16, 4, 300, 512, "The script does not say how many rows it has. The paper's subset of 9,209 rows makes 1,740 steps in 3 epochs, which take half the time; the French rows alone are fewer.", (6, 8), 64),
    Stated("Guanaco 65B (paper)", None, "65B", "qlora", "RTX A6000", 1, 1_875, 16, 1, 300, 512, "Agrees: one day on one card of 48 GB (arXiv:2305.14314, abstract). The paper does not name the card.", (24, 24), 64),
    Stated("MambaSWELU, quick", "mamba-swelu-quick", "124M", "full", "RTX 4090", 6, 10_000, 192, 4, 130, 1_024, SMALL),
    Stated("MambaSWELU, chat", "mamba-swelu-chat", "124M", "full", "RTX 4090", 6, 25_000, 192, 2, 400, 1_024, SMALL),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DocumentedTime:
    """`documented`: hours as stated, low and high; `estimate`: low, expected and high hours of ours."""

    name: str
    setting: str
    documented: tuple[float, float]
    estimate: tuple[float, float, float]
    cost: Cost
    why: str


def documented_times() -> list[DocumentedTime]:
    """Every stated time with the estimate for the same steps, batch and devices."""
    return [_row(stated) for stated in STATED]


def _row(stated: Stated) -> DocumentedTime:
    machine = machine_named(stated.gpu, stated.count)
    settings: dict[str, Any] = {
        "data": {"train": ["data.jsonl"], "max_length": stated.max_length, "eval_fraction": 0.0},
        "method": {"kind": stated.method, "r": stated.rank, "target_modules": "all-linear"},
        "training": {
            "batch_size": stated.micro_batch,
            "gradient_accumulation": max(stated.batch // (stated.micro_batch * stated.count), 1),
            "max_steps": stated.steps,
            "save_steps": 1_000,
            "learning_rate": 2e-5 if stated.method == "full" else 2e-4,
            "gradient_checkpointing": "off" if stated.size == "124M" else "on",
            "group_by_length": stated.method == "qlora",
            "speed": "reference",  # none of those runs packed its rows
        },
    }
    config = build_config(settings)[0]
    data = DataFacts(examples=stated.steps * stated.batch, eval_examples=0, mean_tokens=stated.tokens)
    if stated.tokens >= stated.max_length:  # rows are full
        data = DataFacts(examples=data.examples, eval_examples=0, length_percentiles=(stated.max_length,) * 101)
    cost = estimate_cost(shape_from_size(stated.size), config, machine, data, resolve(config, machine))
    low, expected, high = (seconds / 3600 for seconds in cost.seconds)
    setting = f"{stated.size} {stated.method}, {stated.count}x {stated.gpu}, {stated.steps:,} steps x {stated.batch}, {stated.tokens:,} tokens"
    return DocumentedTime(stated.name, setting, _hours(stated), (low, expected, high), cost, stated.why)


def _hours(stated: Stated) -> tuple[float, float]:
    if stated.hours is not None:
        return stated.hours
    assert stated.recipe is not None
    figures = load_phase(stated.recipe)[1].documented
    assert figures is not None and figures.hours is not None
    low, high = figures.hours.low, figures.hours.high
    return (low or high or 0.0, high or low or 0.0)


def documented_table() -> str:
    """The rows in Markdown, as `docs/time-and-cost.md` holds them."""
    lines = [
        "| run | what is reckoned with | documented | estimate (range) | ratio | what explains it |",
        "|---|---|---|---|---|---|",
    ]
    for row in documented_times():
        stated = (
            f"{row.documented[0]:g} h"
            if row.documented[0] == row.documented[1]
            else f"{row.documented[0]:g}-{row.documented[1]:g} h"
        )
        low, expected, high = (_short(hours) for hours in row.estimate)
        ratio = math.sqrt(row.documented[0] * row.documented[1]) / row.estimate[1]
        lines.append(f"| {row.name} | {row.setting} | {stated} | {expected} h ({low}-{high}) | {ratio:.2g} | {row.why} |")
    return "\n".join(lines) + "\n"


def _short(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
