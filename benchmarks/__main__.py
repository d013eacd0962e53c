"""`python -m benchmarks [name …]`: run all benchmarks, or those named."""

from __future__ import annotations

import importlib
import sys

NAMES = ("data_check", "sft_against_trl", "adapters_135m", "memory", "scan")

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        if name not in NAMES:
            raise SystemExit(f"There is no benchmark {name!r}; there are: {', '.join(NAMES)}.")
        importlib.import_module(f"benchmarks.{name}").main()
