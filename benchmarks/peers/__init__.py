"""The contenders of `benchmarks.speed`, each a module that is run in a process of its own: `python -m … job.json`.

A job is a cell's name, its folder and base, the number of steps, threads, and the settings of this contender. The last line a
contender prints is its result as JSON (`recorder.report`).
"""
