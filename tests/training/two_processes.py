"""One process of a run in several, for `test_fast_path.py`: `two_processes.py ROOT BASE DATA SETTINGS EMPTY_RANK`.

Takes one step as `torch.distributed.run` tells it; writes the rows and gradients it saw to ROOT/RANK.pt. On the rank named by
EMPTY_RANK nothing is supervised in the last micro-batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from finetuneflow.data.batches import IGNORED
from training.test_trainer import Prepared
from training.workbench import Bench


def main(root: str, base: str, data: str, settings: str, empty_rank: str) -> None:
    rank = os.environ["RANK"]
    folder = Path(root) / f"rank-{rank}"
    folder.mkdir()
    prepared = Prepared(Bench(folder, Path(base), Path(data)), **json.loads(settings))
    collate = prepared.trainer.data_collator

    def emptied(rows: list[dict[str, Any]]) -> Any:
        step = collate(rows)
        if rank == empty_rank:
            step["micro_batches"][-1]["targets"].fill_(IGNORED)
        return step

    prepared.trainer.data_collator = emptied
    steps: list[list[dict[str, Any]]] = []
    forward_backward = prepared.trainer.forward_backward

    def watched(model: Any, inputs: dict[str, Any], count: Any = None) -> torch.Tensor:
        steps.append(inputs["micro_batches"])
        return forward_backward(model, inputs, count)

    prepared.trainer.forward_backward = watched
    prepared.trainer.train()
    names = {name.removeprefix("module."): gradient for name, gradient in prepared.watch.gradients[0].items()}
    torch.save(
        {"micro_batches": steps[0], "gradients": names, "fast": prepared.trainer.fast is not None}, Path(root) / f"{rank}.pt"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
