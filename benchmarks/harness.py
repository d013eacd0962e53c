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


class ContenderFailed(SystemExit):
    """A contender that left no result; `reason` is the last thing it said. Ends a benchmark that does not expect it."""

    def __init__(self, what: str, errors: str) -> None:
        super().__init__(f"{what} failed:\n{errors[-2000:]}")
        last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no output")
        self.reason = last.replace(str(Path.home()), "~")[:500]  # it stands in results


def run_contender(module: str, *arguments: str, python: str = sys.executable, time_limit: float | None = None) -> dict[str, Any]:
    """Run `python -m module arguments…`; its last line of output is its result as JSON. Raises `ContenderFailed`."""
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    command, what = [python, "-m", module, *arguments], f"{module} {' '.join(arguments)}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=time_limit)
    except subprocess.TimeoutExpired as error:
        raise ContenderFailed(what, f"no result within {time_limit:.0f} seconds") from error
    if done.returncode:
        said = f"killed by signal {-done.returncode}" if done.returncode < 0 else ""
        raise ContenderFailed(what, "\n".join(filter(None, [done.stderr.strip(), said])))
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    from finetuneflow.training.progress import peak_resident_bytes

    return peak_resident_bytes()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def write_result(name: str, result: dict[str, Any]) -> None:
    print(json.dumps(save_result(name, result), indent=2))


def save_result(name: str, result: dict[str, Any]) -> dict[str, Any]:
    RESULTS.mkdir(exist_ok=True)
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    value = {"benchmark": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    return value
