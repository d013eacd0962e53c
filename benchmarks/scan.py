"""The chunked selective scan against the recurrence as it is written, in one process, turn by turn, on one thread.

The shapes are a quarter of the published MambaSWELU's mixer (512 channels, 16 states), and a small one (128 channels).
Ratios of the naive time to the chunked one are what to read; the times are of the machine. The naive backward pass keeps
every state of the whole sequence, so its memory grows with the length; the chunked one keeps one state per chunk.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import run_contender, spread, write_result

LENGTHS = (128, 256, 512, 1024, 2048)
SHAPES = {"quarter": (1, 512, 16), "small": (1, 128, 16)}
ROUNDS = 3


def contender(shape: str) -> None:
    """Measure one shape at all lengths; A B A B within a length, so that both meet the same neighbours on the machine."""
    import torch

    from finetuneflow.kernels.scan import selective_scan, selective_scan_reference

    torch.set_num_threads(1)
    ways = {"naive": selective_scan_reference, "chunked": selective_scan}
    result: dict[str, Any] = {}
    for length in LENGTHS:
        values, weight = make_inputs(SHAPES[shape], length)
        calls = {(way, kind): call(ways[way], values, weight, kind) for kind in ("forward", "both") for way in ways}
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for number in range(ROUNDS + 1):
            for key, function in calls.items():
                took = timed(function)
                if number:  # the first round warms up
                    seconds[key].append(took)
        result[str(length)] = {kind: summary(seconds, kind, length) for kind in ("forward", "both")}
    print(json.dumps(result))


def make_inputs(shape: tuple[int, int, int], length: int) -> tuple[list[Any], Any]:
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    batch, channels, states = shape
    values = [
        torch.randn(batch, length, channels),
        functional.softplus(torch.randn(batch, length, channels) - 3),
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        torch.randn(batch, length, states),
        torch.randn(batch, length, states),
        torch.randn(channels),
    ]
    return [value.requires_grad_() for value in values], torch.randn(batch, length, channels)


def call(scan: Callable[..., Any], values: list[Any], weight: Any, kind: str) -> Callable[[], None]:
    import torch

    def forward() -> None:
        with torch.no_grad():
            scan(*values)

    def both() -> None:
        torch.autograd.grad(scan(*values)[0], values, weight)

    return forward if kind == "forward" else both


def timed(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def summary(seconds: dict[tuple[str, str], list[float]], kind: str, length: int) -> dict[str, Any]:
    naive, chunked = seconds["naive", kind], seconds["chunked", kind]
    return {
        "ratio": spread([a / b for a, b in zip(naive, chunked, strict=True)]),
        "chunked_microseconds_per_token": statistics.median(chunked) / length * 1e6,
        "naive_microseconds_per_token": statistics.median(naive) / length * 1e6,
    }


def main() -> None:
    shapes = {shape: run_contender("benchmarks.scan", shape) for shape in SHAPES}
    write_result("scan", {"rounds": ROUNDS, "shapes": {name: SHAPES[name] for name in SHAPES}, "lengths": shapes})


if __name__ == "__main__":
    contender(sys.argv[1])
