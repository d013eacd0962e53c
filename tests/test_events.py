"""The event log: numbered without gaps, survives a torn line, never hurt by a watcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuneflow.errors import StorageError
from finetuneflow.events import EventLog, metric_lines, read_events


def test_numbers_go_on_over_attempts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        with EventLog(path) as log:
            log.emit("phase", name="loading")
            log.emit("phase", name="training")
    assert [event["seq"] for event in read_events(path)] == [1, 2, 3, 4]
    assert [event["seq"] for event in read_events(path, after=2)] == [3, 4]


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.emit("log", step=1, loss=2.0)
    with path.open("ab") as file:
        file.write(b'{"seq": 2, "event": "lo')
    assert len(list(read_events(path))) == 1
    with EventLog(path) as log:
        log.emit("log", step=2, loss=1.0)
    assert [(e["seq"], e["step"]) for e in read_events(path)] == [(1, 1), (2, 2)]


def test_a_repeated_step_counts_once_with_its_newest_line(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5)):
            log.emit("log", step=step, loss=loss)
    assert [(line["step"], line["loss"]) for line in metric_lines(tmp_path / "e")] == [(1, 3.0), (2, 1.5)]


def test_a_failing_watcher_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(event: dict[str, object]) -> None:
        raise RuntimeError("gone")

    seen: list[str] = []
    with EventLog(tmp_path / "e", [broken, lambda event: seen.append(event["event"])]) as log:
        log.emit("phase", name="loading")
        log.emit("phase", name="training")
    names = [event["event"] for event in read_events(tmp_path / "e")]
    assert names == ["phase", "warning", "phase"] and "phase" in seen


def test_a_full_disk_is_a_storage_error_and_tears_no_line(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        log.emit("phase", name="loading")
        log._file.close()
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - EventLog closes it
        with pytest.raises(StorageError) as caught:
            log.emit("phase", name="training")
        assert caught.value.code == "STORAGE_DISK_FULL"
    assert all(json.loads(line) for line in (tmp_path / "e").read_text().splitlines())


def test_a_line_that_is_no_object_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('[1]\n"x"\n3\n{"seq": 1, "event": "log", "step": 1}\n')
    assert [event["seq"] for event in read_events(path)] == [1]
