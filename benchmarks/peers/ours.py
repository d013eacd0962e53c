"""FineTuneFlow, by the engine that `ftf train` runs."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.recorder import report
from benchmarks.speed_cells import cell, run_settings


def main(job: dict[str, Any]) -> None:
    from finetuneflow.config import build_config
    from finetuneflow.training.run import train
    from finetuneflow.workspace import Workspace

    steps, ends, losses, seen, decisions = job["steps"], [0.0], [], [0], {}
    run_dirs: list[Path] = []
    folder = Path(job["folder"])
    settings = run_settings(cell(job["cell"]), Path(job["base"]), folder / "rows.jsonl", steps, job["threads"], job["settings"])
    config, origins = build_config(settings)

    def sink(event: dict[str, Any]) -> None:
        if event["event"] == "phase" and event["name"] == "training":
            ends[0] = time.perf_counter()
        elif event["event"] == "decision":
            decisions[event["setting"]] = event["value"]
        elif event["event"] == "log":
            ends.append(time.perf_counter())
            losses.append(event["loss"])
            seen.append(event["tokens_seen"])
            if event["step"] == steps:
                # The data room's own count covers every row, and a run takes each row once.
                supervised = json.loads((run_dirs[0] / "data" / "manifest.json").read_text())["tokens"]["supervised"]
                tokens = [after - before for before, after in itertools.pairwise(seen)]
                scratch.cleanup()
                report(ends, losses, tokens, [], supervised_total=supervised, decisions=decisions)

    scratch = tempfile.TemporaryDirectory()
    train(config, workspace=Workspace(Path(scratch.name)), origins=origins, sinks=[sink], on_start=run_dirs.append)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
