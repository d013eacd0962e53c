"""The command line as a stranger uses it: every verb with good and bad input, for people and for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from export.run_dir import make_run
from face import Answer, Ftf
from finetuneflow import cli
from finetuneflow.config import build_config, load_config
from finetuneflow.errors import CODES

ESCAPE, OVERRIDE = "\x1b[31m", "\u202e"
HOSTILE_TEXT = f"[bold]x[/] {ESCAPE}red {OVERRIDE}abc :smile:"
HOSTILE_NAME = f"evil[red]{ESCAPE}.jsonl"
SETTINGS = {
    "name": "tiny",
    "data": {"max_length": 96},
    "training": {
        "max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "log_steps": 1, "eval_steps": 1, "save_steps": 1,
        "precision": "fp32", "threads": 1,
    },
    "evaluation": {"samples": 2, "max_new_tokens": 8},
}  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished LoRA run of a tiny model; `base` in it is that model."""
    root = tmp_path_factory.mktemp("finished")
    make_run(root, steps=10)
    return root


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, with a small dataset, to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTF_HOME", str(tmp_path / "ws"))
    rows = [{"instruction": f"What is {n} + {n}? {HOSTILE_TEXT}", "output": f"It is {2 * n}."} for n in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = ['{"instruction": "a", "output": "b"}', f'{{"{OVERRIDE}[red]": 1}}', "not json [/]"]
    (tmp_path / "bad.jsonl").write_text("\n".join(bad) + "\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n%\xe2\xe3\n1 0 obj\n")
    return tmp_path


@pytest.fixture
def run_file(place: Path, finished: Path) -> Path:
    path = place / "run.yaml"
    settings = {**SETTINGS, "model": {"base": str(finished / "base")}, "data": {**SETTINGS["data"], "train": ["d.jsonl"]}}
    path.write_text(yaml.safe_dump(settings))
    return path


def is_error(answer: Answer, code: int, error_code: str) -> bool:
    """The one shape of an error: one line of JSON, the documented exit code, a known error code, no trace."""
    shape = answer.json
    assert set(shape) == {"detail", "error_code", "context"} and shape["error_code"] in CODES and answer.out.count("\n") == 1
    assert "Traceback" not in answer.err
    return (answer.code, shape["error_code"]) == (code, error_code)


def shows_as_text(answer: Answer) -> bool:
    return ESCAPE not in answer.out + answer.err and OVERRIDE not in answer.out + answer.err


# --- usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("wat",),
        ("train", "run.yaml", "--wat"),
        ("data", "check", "d.jsonl", "--max-length", "1"),
        ("data", "check", "d.jsonl", "--supervise", "everything"),
        ("data", "convert", "d.jsonl"),
        ("data", "wat"),
        ("logs", "--level", "loud"),
        ("export", "--to", "tape"),
        ("chat", "--temperature", "9"),
        ("chat", "--message"),
        ("runs", "--workspace", "d.jsonl"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2_and_names_what_is_wrong(ftf: Ftf, place: Path, arguments: tuple[str, ...]) -> None:
    told = ftf(*arguments)
    assert told.code == 2 and "Error: " in told.err and not told.out and "Traceback" not in told.err
    assert is_error(ftf(*arguments[:1], "--json", *arguments[1:]), 2, "CLI_USAGE")


def test_help_and_verbs_without_arguments_explain_themselves(ftf: Ftf) -> None:
    assert ftf("--help").code == 0
    assert all("Usage: ftf" in (answer := ftf(*arguments)).out + answer.err for arguments in ((), ("data",), ("train", "-h")))


# --- data --------------------------------------------------------------------------------------------


def test_data_check_gives_a_list_with_one_object_per_file_even_when_some_are_no_datasets(ftf: Ftf, place: Path) -> None:
    names = ["d.jsonl", "bad.jsonl", "none.jsonl", ".", "empty.jsonl", "binary.jsonl", "paper.pdf"]
    answer = ftf("data", "check", *names, "--json")
    assert answer.code == 3
    reports = {report["file"]: report for report in answer.json}
    assert list(reports) == names
    assert all({"file", "shapes", "rows", "usable", "rejected", "duplicates"} <= set(report) for report in reports.values())
    whole, bad = reports["d.jsonl"], reports["bad.jsonl"]
    assert (whole["rows"], whole["usable"], whole["shapes"], whole["rejected"]) == (20, 20, {"instruction+output": 20}, {})
    assert (bad["rows"], bad["usable"], bad["rejected"]) == (3, 1, {"ROW_UNKNOWN_SHAPE": 1, "ROW_BAD_JSON": 1})
    errors = {name: report["error"]["error_code"] for name, report in reports.items() if "error" in report}
    assert errors == {
        "none.jsonl": "DATASET_NOT_FOUND",
        ".": "DATASET_NOT_FOUND",
        "empty.jsonl": "DATASET_EMPTY",
        "binary.jsonl": "DATASET_NOT_A_DATASET",
        "paper.pdf": "DATASET_NOT_A_DATASET",
    }


def test_data_check_tells_people_the_same_in_lines(ftf: Ftf, place: Path) -> None:
    answer = ftf("data", "check", "d.jsonl", "none.jsonl", "bad.jsonl")
    assert answer.code == 3 and "20 of 20 rows usable" in answer.out and "There is no file none.jsonl" in answer.out
    assert "bad.jsonl:3: " in answer.out and "not json [/]" in answer.out and shows_as_text(answer)
    assert ftf("data", "check", "d.jsonl").code == 0


@pytest.mark.parametrize("name", [HOSTILE_NAME, "-dash.jsonl", "[bold].jsonl", os.fsdecode(b"\xff.jsonl")], ids=ascii)
def test_any_file_name_is_shown_as_text(ftf: Ftf, place: Path, name: str) -> None:
    (place / name).write_text((place / "bad.jsonl").read_text())
    for options in ((), ("--json",)):
        answer = ftf("data", "check", *options, "--", name)
        assert answer.code == 0 and shows_as_text(answer)
    assert answer.json[0]["file"] == name


@pytest.mark.parametrize("mapping", ["wat=x", "prompt", "prompt=", HOSTILE_NAME])
def test_a_mapping_that_names_no_part_is_refused(ftf: Ftf, place: Path, mapping: str) -> None:
    assert is_error(ftf("data", "check", "d.jsonl", "--map", mapping, "--json"), 2, "CONFIG_INVALID_VALUE")


def test_a_mapped_column_that_is_missing_rejects_the_rows(ftf: Ftf, place: Path) -> None:
    answer = ftf("data", "check", "d.jsonl", "--map", "prompt=no", "--map", "answer=output", "--json")
    assert answer.json[0]["rejected"] == {"ROW_MISSING_COLUMN": 20}


def test_a_template_or_model_that_is_not_there_is_named(ftf: Ftf, place: Path, finished: Path) -> None:
    base = finished / "base"
    assert is_error(ftf("data", "check", "d.jsonl", "-m", base, "--template", "wat", "--json"), 3, "TEMPLATE_UNKNOWN")
    assert is_error(ftf("data", "check", "d.jsonl", "-m", place / "nowhere", "--json"), 4, "MODEL_NOT_FOUND")
    assert ftf("data", "check", "d.jsonl", "-m", base, "--json").json[0]["tokens"]["supervised"] > 0


def test_data_convert_writes_canonical_rows_and_never_overwrites_unasked(ftf: Ftf, place: Path) -> None:
    told = ftf("data", "convert", "d.jsonl", "bad.jsonl", "-o", "out.jsonl", "--json").json
    assert (told["examples"], told["rejected"]) == (21, 2)
    assert ftf("data", "check", "out.jsonl", "--json").json[0]["usable"] == 21
    assert is_error(ftf("data", "convert", "d.jsonl", "-o", "out.jsonl", "--json"), 10, "STORAGE_EXISTS")
    assert "20 examples in out.jsonl" in ftf("data", "convert", "d.jsonl", "-o", "out.jsonl", "--overwrite").out
    assert is_error(ftf("data", "convert", "none.jsonl", "-o", "o.jsonl", "--json"), 3, "DATASET_NOT_FOUND")
    assert is_error(ftf("data", "convert", "d.jsonl", "-o", "d.jsonl/x.jsonl", "--json"), 10, "STORAGE_UNUSABLE")


def test_data_preview_shows_tokens_as_text_and_writes_a_page(ftf: Ftf, place: Path, finished: Path) -> None:
    base = finished / "base"
    answer = ftf("data", "preview", "d.jsonl", "-m", base, "--rows", 1)
    assert answer.code == 0 and shows_as_text(answer) and "[bold]x[/]" in answer.out and "It is 0." in answer.out
    assert ftf("data", "preview", "d.jsonl", "-m", base, "--json").json
    assert ftf("data", "preview", "d.jsonl", "-m", base, "--html", "page.html").code == 0
    page = (place / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "&lt;|im_end|&gt;" in page and ESCAPE not in page
    for arguments in (("d.jsonl", "--skip", 500), ("broken.jsonl",)):
        (place / "broken.jsonl").write_text('{"x": 1}\n')
        assert is_error(ftf("data", "preview", *arguments, "-m", base, "--json"), 3, "DATASET_NOTHING_USABLE")


# --- training ----------------------------------------------------------------------------------------


def test_a_run_is_trained_listed_and_logged(ftf: Ftf, run_file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = ftf("train", run_file, "--dry-run", "--json").json
    assert (manifest["train_examples"], manifest["eval_examples"]) == (18, 2) and not (place / "ws" / "runs").exists()
    result = ftf("train", run_file, "--json").json
    assert result["status"] == "succeeded" and result["metrics"]["train_loss"] > 0
    listed = ftf("runs", "--json").json
    assert [(run["run"], run["status"], run["step"]) for run in listed] == [(result["run"], "succeeded", 2)]
    for columns in ("40", "80", "100"):
        monkeypatch.setattr("finetuneflow.terminal.console.width", int(columns))
        lines = ftf("runs").out.splitlines()
        assert len(lines) == 2 and all(len(line) <= int(columns) for line in lines)
        assert columns == "40" or result["run"] in lines[1]
    events = [json.loads(line) for line in ftf("logs", "--json").out.splitlines()]
    assert [e["step"] for e in events if e["event"] == "log"] == [1, 2] and events[-1]["event"] == "complete"
    assert "step 2/2   loss" in ftf("logs", "latest").out
    assert is_error(ftf("resume", "--json"), 7, "RESUME_FINISHED")
    stopped = ftf("stop", "--json").json
    assert stopped == {"run": result["run"], "before": "succeeded", "status": "succeeded"}


def test_quiet_training_says_nothing_and_no_library_chatters(run_file: Path, place: Path) -> None:
    arguments = [sys.executable, "-m", "finetuneflow.cli", "train", str(run_file), "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=place, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "error_code"),
    [
        (("train", "none.yaml"), 2, "CONFIG_UNREADABLE"),
        (("train", "."), 2, "CONFIG_UNREADABLE"),
        (("train", "paper.pdf"), 2, "CONFIG_UNREADABLE"),
        (("train", "run.yaml", "--set", "training.epoch=2"), 2, "CONFIG_UNKNOWN_KEY"),
        (("train", "run.yaml", "--set", "training.epochs=x"), 2, "CONFIG_INVALID_VALUE"),
        (("train", "run.yaml", "--set", "x"), 2, "CONFIG_INVALID_VALUE"),
        (("train", "run.yaml", "--set", "data.train=none.jsonl", "--dry-run"), 3, "DATASET_NOT_FOUND"),
        (("train", "run.yaml", "--workspace", "/dev/null"), 10, "STORAGE_UNUSABLE"),
        (("resume", "nope"), 10, "RUN_NOT_FOUND"),
        (("stop",), 10, "RUN_NOT_FOUND"),
        (("logs", HOSTILE_NAME), 10, "RUN_NOT_FOUND"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_or_found_is_refused_with_its_code(
    ftf: Ftf, run_file: Path, arguments: tuple[str, ...], code: int, error_code: str
) -> None:
    assert is_error(ftf(*arguments, "--json"), code, error_code)
    told = ftf(*arguments)
    assert told.code == code and f"[{error_code}]" in told.err and not told.out and shows_as_text(told)


def test_an_empty_workspace_lists_no_runs(ftf: Ftf, place: Path) -> None:
    assert ftf("runs", "--json").json == []
    assert "No runs in" in ftf("runs").out


def test_a_damaged_run_is_listed_as_such_and_its_name_shown_as_text(ftf: Ftf, place: Path) -> None:
    for name, content in (("one-1", "name: one\n"), ("one-2", "{[: not yaml"), (f"[red]{ESCAPE}", "name: x\n")):
        run_dir = place / "ws" / "runs" / name
        run_dir.mkdir(parents=True)
        (run_dir / "run.yaml").write_text(content)
        (run_dir / "events.jsonl").write_text('{"seq": 1, "time": "2026-01-01T00:00:00+00:00", "event": "started"}\n{"se')
    assert {run["run"]: run["status"] for run in ftf("runs", "--json").json}["one-2"] == "damaged"
    listed = ftf("runs")
    assert "[red]\\u001b[31m" in listed.out and shows_as_text(listed)
    assert is_error(ftf("logs", "one", "--json"), 10, "RUN_NOT_FOUND")
    assert "fits several runs: one-1, one-2" in ftf("evaluate", "one").err
    assert ftf("logs", "one-1").code == 0  # an event without its fields is named, not fatal
    assert ftf("stop", "one-1", "--json").json["before"] == "interrupted"
    assert is_error(ftf("resume", "one-2", "--json"), 2, "CONFIG_UNREADABLE")


# --- results -----------------------------------------------------------------------------------------


def test_evaluate_measures_a_run_its_base_and_a_folder(ftf: Ftf, finished: Path, place: Path) -> None:
    at = ("--workspace", finished, "--max-new-tokens", 8)
    result = ftf("evaluate", "lora", *at, "--json").json
    assert result["losses"]["eval_loss"] > 0 and result["samples"]
    shown = ftf("evaluate", "lora", *at)
    assert shown.code == 0 and "perplexity" in shown.out and shows_as_text(shown)
    assert ftf("evaluate", "lora", "--base", *at, "--json").json["name"] == "base"
    assert ftf("evaluate", finished / "base", "--data", "d.jsonl", "--limit", 2, *at, "--json").code == 0
    assert is_error(ftf("evaluate", "lora", "--data", "none.jsonl", *at, "--json"), 3, "DATASET_NOT_FOUND")
    assert is_error(ftf("evaluate", "lora", "--suite", "none.yaml", *at, "--json"), 8, "SUITE_INVALID")
    assert is_error(ftf("evaluate", "lora", "--name", "../x", *at, "--json"), 10, "STORAGE_BAD_NAME")
    assert is_error(ftf("evaluate", "lora", "--checkpoint", "77", *at, "--json"), 4, "CHECKPOINT_UNUSABLE")
    assert is_error(ftf("evaluate", place / "nowhere", *at, "--json"), 4, "MODEL_NOT_FOUND")


def test_compare_gives_a_verdict(ftf: Ftf, finished: Path, place: Path) -> None:
    at = ("--workspace", finished, "--max-new-tokens", 8)
    general = place / HOSTILE_NAME
    general.write_text("The cat says hello to the little girl. " * 20)
    result = ftf("compare", "base", "lora", *at, "--general", general, "--json").json
    assert result["verdict"] in ("better", "no evidence", "worse")
    shown = ftf("compare", "base", "lora", *at, "--general", general, "--out", "c.json")
    assert result["verdict"] in shown.out and shows_as_text(shown) and json.loads((place / "c.json").read_text())
    assert is_error(ftf("compare", "base", "base", *at, "--json"), 2, "CONFIG_INVALID_VALUE")
    assert is_error(ftf("compare", "base", place / "nowhere", *at, "--json"), 4, "MODEL_NOT_FOUND")


def test_chat_answers_once_with_both_voices(ftf: Ftf, finished: Path) -> None:
    at = ("--workspace", finished, "--max-new-tokens", 8)
    answer = ftf("chat", "lora", "--message", HOSTILE_TEXT, "--both", *at)
    assert answer.code == 0 and "base > " in answer.out and "tuned> " in answer.out and shows_as_text(answer)
    told = ftf("chat", "lora", "--message", "hi", "--both", *at, "--json").json
    assert told["message"] == "hi" and list(told["answers"]) == ["base", "tuned"]
    assert is_error(ftf("chat", "lora", *at, "--json"), 2, "CLI_USAGE")
    wrong = ftf("chat", "lora", "--message", "hi", "--adapter", "x", *at)
    assert wrong.code == 2 and "name=folder" in wrong.err
    assert ftf("chat", "lora", "--message", "hi", "--adapter", "x=nowhere", *at).code == 4


def test_export_writes_once_and_says_what(ftf: Ftf, finished: Path) -> None:
    at = ("--workspace", finished, "--name", "from-cli")
    result = ftf("export", "lora", *at, "--json").json
    assert {"adapter_model.safetensors", "report.md"} <= {file["name"] for file in result["files"]}
    assert is_error(ftf("export", "lora", *at, "--json"), 10, "STORAGE_EXISTS")
    again = ftf("export", "lora", *at, "--overwrite")
    assert again.code == 0 and "checked by loading it again" in again.out
    assert is_error(ftf("export", "nope", *at, "--json"), 10, "RUN_NOT_FOUND")


# --- help --------------------------------------------------------------------------------------------


def test_doctor_reports_each_check(ftf: Ftf, place: Path) -> None:
    answer = ftf("doctor", "--json")
    assert answer.code in (0, 5) and isinstance(answer.json, dict)
    assert "Python" in ftf("doctor").out


def test_the_printed_run_file_loads_and_holds_the_defaults(ftf: Ftf, place: Path) -> None:
    answer = ftf("config")
    assert answer.code == 0 and isinstance(yaml.safe_load(answer.out), dict)
    (place / "all.yaml").write_text(answer.out)
    loaded, _ = load_config(place / "all.yaml")
    assert loaded == build_config({})[0]
    assert {"setting", "default", "description"} == set(ftf("config", "--json").json[0])


def test_explain_tells_a_code_and_suggests_near_ones(ftf: Ftf) -> None:
    assert ftf("explain", "out_of_memory", "--json").json["meaning"] == CODES["OUT_OF_MEMORY"]
    assert "OUT_OF_MEMORY" in ftf("explain", "OUT_OF_MEM").err
    assert is_error(ftf("explain", HOSTILE_NAME, "--json"), 2, "CONFIG_INVALID_VALUE")


# --- the world around --------------------------------------------------------------------------------


def test_an_interrupt_and_a_mistake_of_ours_end_in_the_documented_way(ftf: Ftf, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: BaseException) -> Callable[..., None]:
        def settings() -> None:
            raise error

        return settings

    monkeypatch.setattr("finetuneflow.config.settings", raises(KeyboardInterrupt()))
    stopped = ftf("config")
    assert (stopped.code, stopped.err.strip()) == (130, "Interrupted.")
    monkeypatch.setattr("finetuneflow.config.settings", raises(ZeroDivisionError("nothing")))
    monkeypatch.setattr(sys, "argv", ["ftf", "config", "--json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("verb", "variables"),
    [
        ("config | head -n 1", {}),
        ("explain RUN_BUSY | true", {}),
        ("data check d.jsonl bad.jsonl | head -n 1", {}),
        ("data check d.jsonl bad.jsonl", {"COLUMNS": "40", "FORCE_COLOR": "1", "NO_COLOR": "1"}),
        ("runs", {"COLUMNS": "1"}),
        ("data check bad.jsonl", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_closed_pipes_narrow_screens_and_poor_encodings_are_borne(place: Path, verb: str, variables: dict[str, str]) -> None:
    env = {**os.environ, **variables}
    shell = ["bash", "-c", f'"{sys.executable}" -m finetuneflow.cli {verb}']
    done = subprocess.run(shell, capture_output=True, text=True, cwd=place, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b[3" not in done.stdout  # colours of text: none where nobody asked, none where NO_COLOR forbids
