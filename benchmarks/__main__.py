"""`python -m benchmarks [name …]`: run all benchmarks, or those named."""

from __future__ import annotations

import argparse
import importlib

NAMES = ("data_check", "sft_against_trl", "adapters_135m", "memory", "scan", "speed")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run all benchmarks, or those named.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}")
    chosen = parser.parse_args().names
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    for name in chosen or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
