"""Records of a run or a pipeline that somebody else wrote into: one error or the word damaged, never a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from face import Ftf
from finetuneflow.config import RunConfig, dump_config
from finetuneflow.pipeline_config import build_pipeline, dump_pipeline
from finetuneflow.training.status import pipeline_summary

HEAD = '"seq": 2, "time": "2026-01-01T00:00:00+00:00"'
EVENTS = {
    "no name": f"{{{HEAD}}}",
    "a name that is a list": f'{{{HEAD}, "event": []}}',
    "no time": '{"seq": 2, "event": "log", "step": 1, "loss": 1.0}',
    "a time that is a number": '{"seq": 2, "time": 5, "event": "phase"}',
    "a time without its zone": '{"seq": 2, "time": "2026-01-01T00:00:00", "event": "phase"}',
    "a number that is text": '{"seq": "2", "time": "2026-01-01T00:00:00+00:00", "event": "phase"}',
    "a gate without its outcome": f'{{{HEAD}, "event": "gate", "stage": "one"}}',
    "a gate of lists": f'{{{HEAD}, "event": "gate", "stage": [], "gate": [], "passed": [], "found": "", "accepted": 1}}',
    "a pipeline without its status": f'{{{HEAD}, "event": "pipeline"}}',
    "a failure without its code": f'{{{HEAD}, "event": "failed"}}',
    "a step that is a list": f'{{{HEAD}, "event": "log", "step": [], "loss": 1.0}}',
    "a loss that is text": f'{{{HEAD}, "event": "eval", "step": 1, "eval_loss": "x"}}',
    "endless brackets": "[" * 200_000,
}
IGNORED = {"no object": "[1, 2]", "no JSON": "{", "null": "null", "no bytes of text": "\udcff"}
FIRST = '{"seq": 1, "time": "2026-01-01T00:00:00+00:00", "event": "started", "attempt": 1, "run": "r", "resuming": false}\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a run and a pipeline that were interrupted."""
    monkeypatch.setenv("FTF_HOME", str(tmp_path))
    run, pipeline = tmp_path / "runs" / "r-20260101-001", tmp_path / "pipelines" / "p-20260101-001"
    for folder in (run, pipeline):
        folder.mkdir(parents=True)
    (run / "run.yaml").write_text(dump_config(RunConfig(), {}))
    (pipeline / "pipeline.yaml").write_text(dump_pipeline(build_pipeline({"stages": [{"name": "one"}]})))
    return tmp_path


def written(folder: Path, line: str) -> None:
    (folder / "events.jsonl").write_bytes((FIRST + line + "\n").encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("line", EVENTS.values(), ids=EVENTS.keys())
def test_an_event_of_another_hand_is_one_error_that_tells_the_place(ftf: Ftf, place: Path, line: str) -> None:
    run, pipeline = next((place / "runs").iterdir()), next((place / "pipelines").iterdir())
    for folder in (run, pipeline):
        written(folder, line)
        for verb in ("resume", "logs", "stop"):
            answer = ftf(verb, folder.name, "--json").json
            assert answer["error_code"] == "RUN_DAMAGED", (verb, answer)
            assert answer["context"]["where"].endswith("events.jsonl, after event 1") and answer["context"]["remedy"]
    assert [row["status"] for row in ftf("runs", "--json").json] == ["damaged"]
    assert [row["status"] for row in ftf("runs", "--pipelines", "--json").json] == ["damaged"]
    assert ftf("runs").code == 0


@pytest.mark.parametrize("line", IGNORED.values(), ids=IGNORED.keys())
def test_a_line_that_is_no_event_is_passed_over(ftf: Ftf, place: Path, line: str) -> None:
    for folder in (*(place / "runs").iterdir(), *(place / "pipelines").iterdir()):
        written(folder, line)
    assert [row["status"] for row in ftf("runs", "--json").json] == ["interrupted"]
    assert [row["status"] for row in ftf("runs", "--pipelines", "--json").json] == ["interrupted"]
    assert ftf("logs", "r-20260101-001").code == ftf("logs", "p-20260101-001").code == 0


@pytest.mark.parametrize(
    "lineage",
    [
        [],
        5,
        {"pipeline": ["p"], "stage": {}},
        {"pipeline": "p-20260101-001", "stage": "one", "result": ["x"]},
        {"pipeline": "p-20260101-001", "stage": "one", "result": {"sha256": {}}},
        {"pipeline": "p-20260101-001", "stage": ["one"], "result": "x"},
    ],
    ids=str,
)
def test_a_lineage_of_another_shape_tells_nothing(ftf: Ftf, place: Path, lineage: object) -> None:
    run, pipeline = next((place / "runs").iterdir()), next((place / "pipelines").iterdir())
    (run / "lineage.json").write_text(json.dumps(lineage))
    (pipeline / "state.json").write_text("[[[")  # a view, which nothing reads
    assert pipeline_summary(pipeline)["stages"][0].get("result_sha256") is None
    assert [row["status"] for row in ftf("runs", "--pipelines", "--json").json] == ["interrupted"]
    assert ftf("runs").code == ftf("runs", "--json").code == ftf("logs", "p-20260101-001").code == 0
