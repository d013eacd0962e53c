"""The vocabulary of a run: numbered events, JSON lines out and in.

An event is `{"seq", "time", "event", …}`; `seq` counts from 1 without a gap over all attempts of
a run, `time` is UTC. The live-metrics events (`log`, `eval`, `checkpoint`, `complete`) keep the
reference schema: `{"event": "log", "step", "total_steps", "loss", …}`. Events are data for
programs: no secret and no example text is ever in one, except in `sample`, which exists to show text.

    started     attempt, run, pid                   one per attempt
    phase       name                                checking, loading, tokenizing, training, evaluating, saving
    plan        memory_bytes, capacity_bytes, …     what the run is expected to take
    finding     code, level, field, found, why, fix
    decision    setting, value, reason              a choice or substitution made for the user
    warning     code, message, advice
    log         step, total_steps, loss, …          every `log_steps`
    eval        step, eval_loss, …
    sample      step, …                             a generation shown during training
    suite       step, name, passed, prompts, share  acceptance prompts, during training or after it
    checkpoint  step, path
    complete    total_steps, best_metric, …
    stopped     step, reason                        asked for; can be resumed
    failed      code, message, remedy

A pipeline's own log holds, besides decisions and warnings:

    pipeline    status, pipeline, …                 started, succeeded, stopped, gated, failed
    stage       stage, status, run, number, of      started, resumed, succeeded, kept (done in an earlier attempt)
    measured    stage, suites, bits_per_byte
    gate        stage, gate, passed, found, accepted
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuneflow.workspace import translate_os_errors

Event = dict[str, Any]
Emit = Callable[..., Event]
Sink = Callable[[Event], None]

EVENT_NAMES = frozenset(
    {
        "started",
        "phase",
        "plan",
        "finding",
        "decision",
        "warning",
        "log",
        "eval",
        "sample",
        "suite",
        "checkpoint",
        "complete",
        "stopped",
        "failed",
        "pipeline",
        "stage",
        "measured",
        "gate",
    }
)


class EventLog:
    """Append-only `events.jsonl` of one run, plus any further sinks (terminal, Redis, a test's list).

    The file is always written first; a sink that fails is dropped with a warning, never the run.
    """

    def __init__(self, path: Path, sinks: list[Sink] | None = None) -> None:
        self.path = path
        self.sinks = list(sinks or [])
        self._seq = _repair_tail(path)
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def emit(self, name: str, /, **fields: Any) -> Event:
        """Number, stamp and write one event; returns it."""
        assert name in EVENT_NAMES, name
        event: Event = {"seq": self._seq + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name}
        event.update(fields)
        line = json.dumps(event, ensure_ascii=False, allow_nan=True) + "\n"
        with translate_os_errors(self.path, needed_bytes=len(line)):
            data = line.encode("utf-8", "replace")
            written = self._file.write(data)
            if written != len(data):  # a nearly full disk writes a part
                os.truncate(self.path, self.path.stat().st_size - written)
                raise OSError(28, "No space left on device")
        self._seq += 1
        for sink in list(self.sinks):
            try:
                sink(event)
            except Exception as error:
                self.sinks.remove(sink)
                self.emit("warning", code="SINK_DROPPED", message=f"An event sink failed and was dropped: {error}", advice="")
        return event

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path, *, after: int = 0) -> Iterator[Event]:
    """Events with `seq` greater than `after`. A torn last line (power cut) is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("seq", 0) > after:
                yield event


def metric_lines(path: Path, name: str = "log") -> list[Event]:
    """The `log` (or `eval`) line of each step, in step order; where an attempt repeated a step, the newest."""
    by_step = {event["step"]: event for event in read_events(path) if event["event"] == name and "step" in event}
    return [by_step[step] for step in sorted(by_step)]


def _repair_tail(path: Path) -> int:
    """Cut a torn last line off the file; return the last sequence number."""
    if not path.exists():
        return 0
    last, good_end = 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            good_end += len(line)
            try:
                last = max(last, int(json.loads(line)["seq"]))
            except (ValueError, KeyError, TypeError):
                continue
    if good_end != path.stat().st_size:
        os.truncate(path, good_end)
    return last
