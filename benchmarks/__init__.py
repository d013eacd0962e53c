"""Speed and memory as ratios against a peer, measured in one run, with equal results shown beside them.

`make bench` (or `python -m benchmarks [name …]`) runs them and writes `benchmarks/results/<name>.json`.
Each contender runs in a process of its own, in turns, so that neither inherits the other's memory or warm caches.
"""
