"""`ftf data check` on 52,000 instruction rows, against the floor: parsing the same file with `json.load` and nothing else."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import run_contender, spread, write_result

ROWS, REPEATS = 52_000, 3


def write_rows(path: Path) -> None:
    """Made-up instruction rows of the size of real ones (about 100 words)."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "do", "mi", "lu", "sen", "tra") for b in ("ron", "vel", "sta", "no", "ky", "lim", "per")]
    text = lambda n: " ".join(rng.choice(words) for _ in range(rng.randint(n // 2, n * 2)))  # noqa: E731
    rows = [{"instruction": text(10), "input": text(10) if rng.random() < 0.4 else "", "output": text(50)} for _ in range(ROWS)]
    path.write_text(json.dumps(rows))


def contender(who: str, path: str) -> None:
    began = time.perf_counter()
    if who == "json":
        with open(path) as file:
            rows = len(json.load(file))
    else:
        from finetuneflow.data.quality import inspect

        rows = inspect(path).usable
    print(json.dumps({"seconds": time.perf_counter() - began, "rows": rows}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        write_rows(path)
        times: dict[str, list[float]] = {"ftf": [], "json": []}
        rows = {}
        for _ in range(REPEATS):
            for who, found in times.items():
                result = run_contender("benchmarks.data_check", who, str(path))
                found.append(result["seconds"])
                rows[who] = result["rows"]
    write_result("data_check", {"rows": rows, "seconds": {who: spread(found) for who, found in times.items()}})


if __name__ == "__main__":
    contender(*sys.argv[1:3])
