"""What a contender writes down while it trains. Imports nothing of ours: LLaMA-Factory runs in an environment of its own."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback


def report(ends: list[float], losses: list[float], tokens: list[int], supervised: list[int], **more: Any) -> NoReturn:
    """Print the result and leave at once: what a trainer does after its last step (saving) is not measured.

    `ends` holds the time at which training began and that at which each step ended; the others hold one value a step.
    """
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    found = {"seconds": seconds, "losses": losses, "tokens": tokens, "supervised": supervised, "peak_bytes": peak_bytes(), **more}
    print("\n" + json.dumps(found), flush=True)
    sys.stderr.flush()
    os._exit(0)


def peak_bytes() -> int:
    """Highest resident memory of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


class Recorder(TrainerCallback):
    """Times, losses and what is in the batches of any trainer built on transformers' own."""

    def __init__(self) -> None:
        self.types: dict[str, list[str]] = {}
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.batches: list[tuple[int, int, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for name, trained in (("trained_types", True), ("frozen_types", False)):
            types = {str(weight.dtype) for weight in given["model"].parameters() if weight.requires_grad == trained}
            self.types[name] = sorted(type.removeprefix("torch.") for type in types)
        loader = given["train_dataloader"]
        loader = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        collate = loader.collate_fn

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            self.batches.append(contents(batch))
            return batch

        loader.collate_fn = counted
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        size, steps = args.gradient_accumulation_steps, len(self.ends) - 1
        by_step = [self.batches[i * size : (i + 1) * size] for i in range(steps)]  # a loader reads ahead
        tokens, supervised, padded = ([sum(batch[part] for batch in step) for step in by_step] for part in range(3))
        report(self.ends, self.losses, tokens, supervised, padded=padded, **self.types)


def contents(batch: Any) -> tuple[int, int, int]:
    """(tokens, supervised ones, positions that are computed) of a batch, whatever form its mask has."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        tokens = ids.numel()
    elif mask.dim() == 4:  # additive, 0 where attention is allowed; a token always sees itself, padding sees nothing
        tokens = int((mask.diagonal(dim1=-2, dim2=-1) == 0).sum())
    else:
        tokens = int((mask != 0).sum())
    chosen = batch["completion_mask"] == 1 if "completion_mask" in batch else batch["labels"] != -100
    return tokens, int(chosen[:, 1:].sum()), ids.numel()
