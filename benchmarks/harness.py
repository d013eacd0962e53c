"""What the benchmarks share: contenders in processes of their own, spread over repeats, one results folder."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def run_contender(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments…`; its last line of output is its result as JSON."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    from finetuneflow.training.progress import peak_resident_bytes

    return peak_resident_bytes()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def write_result(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    value = {"benchmark": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    print(json.dumps(value, indent=2))
