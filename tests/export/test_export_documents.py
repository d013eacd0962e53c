"""Report, card and curve: the reference structure, told truly, and safe to show."""

from __future__ import annotations

import ast
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_dir import make_run

from conftest import RunMaker
from finetuneflow.errors import ExportError
from finetuneflow.events import EventLog
from finetuneflow.export import plot_loss, write_report
from finetuneflow.export.card import base_license, card_text
from finetuneflow.export.plot import PANELS, _draw_panel, draw_loss, smooth
from finetuneflow.export.record import METHOD_NAMES, read_run
from finetuneflow.export.redact import Redactor
from finetuneflow.export.text import cell, duration, figure, rate, size
from finetuneflow.export.verify import Check
from finetuneflow.workspace import write_json

PASSED = Check(True, "a and b", 5, 245, 0.001, 0.002, 0.03, 0.5, 0.996, 5)
# The reference's structure, section 6.1 of the defaults document: headings and the beginning of each line.
REFERENCE = [
    "# FineTuneFlow Training Report", "## Project", "- Name: ", "- Task: ", "- Base Model: ", "## Dataset", "- Train examples: ", "- Eval examples: ",
    "- Avg tokens per example: ", "## Training Configuration", "- Method: ", "- Epochs: ", "- Learning rate: ", "- LoRA rank: ",
    "- Max sequence length: ", "- GPU: ", "## Results", "- Final train loss: ", "- Final eval loss: ", "- Perplexity: ", "- Training time: ",
    "## Sample Outputs", "| Instruction | Expected | Model Output |", "|------------|----------|-------------|",
]  # fmt: skip


def lines_of(run_dir: Path) -> list[str]:
    return write_report(run_dir).read_text().splitlines()


def value(lines: list[str], name: str) -> str:
    return next(line.removeprefix(f"- {name}: ") for line in lines if line.startswith(f"- {name}: "))


# --- report ------------------------------------------------------------------------------------------------


def test_the_report_has_the_reference_structure_in_order(new_run: RunMaker) -> None:
    lines = [line for line in lines_of(new_run("lora")) if line]
    found = [next((line for line in lines if line.startswith(start)), None) for start in REFERENCE]
    assert None not in found
    places = [lines.index(line) for line in found if line]
    assert places == sorted(places)


def test_the_report_tells_the_runs_own_values(new_run: RunMaker) -> None:
    lines = lines_of(new_run("lora"))
    told = {
        name: value(lines, name)
        for name in ("Train examples", "Avg tokens per example", "Learning rate", "LoRA rank", "Perplexity", "Training time")
    }
    assert told == {
        "Train examples": "118", "Avg tokens per example": "41.2", "Learning rate": "2e-4", "LoRA rank": "4, alpha: 8",
        "Perplexity": "2.966", "Training time": "1 h 02 min 03 s",
    }  # fmt: skip
    assert "Example CPU 9000" in value(lines, "GPU") and value(lines, "GPU").startswith("none")


@pytest.mark.parametrize("kind", ["lora", "qlora", "dora", "ia3", "prefix", "full"])
def test_the_method_is_told_truly(new_run: RunMaker, kind: str) -> None:
    """An earlier system wrote "(4-bit LoRA)" for every method that was not LoRA."""
    lines = lines_of(new_run(kind))
    expected = {
        "lora": "LoRA",
        "qlora": "QLoRA (4-bit NF4)",
        "dora": "DoRA",
        "ia3": "IA3",
        "prefix": "Prefix tuning",
        "full": "Full fine-tuning",
    }
    assert value(lines, "Method") == expected[kind] == METHOD_NAMES[kind]
    assert ("4-bit" in "\n".join(lines)) is (kind == "qlora")
    assert value(lines, "LoRA rank").startswith("4, alpha" if kind in ("lora", "qlora", "dora") else "none")


def test_a_lowered_learning_rate_is_reported_as_used(new_run: RunMaker) -> None:
    run_dir = new_run("full")
    write_json(run_dir / "environment.json", {"setup": {"learning_rate": 2e-5}})
    assert value(lines_of(run_dir), "Learning rate") == "2e-5"


def test_what_was_left_out_of_the_data_stands_in_its_section(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    warning = {"code": "ROWS_REJECTED", "message": "3 rows of a|b.jsonl left out.", "advice": "Look."}
    write_json(run_dir / "data/manifest.json", {"form": "pair", "avg_tokens": 90.5, "warnings": [warning]})
    section = "\n".join(lines_of(run_dir)).partition("## Dataset")[2].partition("\n## ")[0]
    assert "- Avg tokens per example (both sides): 90.5" in section
    assert "- ROWS\\_REJECTED: 3 rows of a\\|b.jsonl left out. Look." in section


def test_what_was_not_measured_is_said_to_be_so(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    for name in ("metrics.json", "environment.json", "data/manifest.json", "events.jsonl"):
        (run_dir / name).unlink()
    lines = lines_of(run_dir)
    assert value(lines, "Final eval loss") == value(lines, "Train examples") == value(lines, "Training time") == "not measured"
    assert lines[-1] == "No samples were generated for this run."


def test_samples_cannot_break_the_table_or_run_as_markup(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    hostile = "a | b\n<script>alert(1)</script> `x` \x1b[31m \u202e [l](javascript:x) &amp; \\|"
    write_json(
        run_dir / "metrics.json",
        {"inference_samples": [{"instruction": hostile, "expected_output": hostile, "model_output": hostile}]},
    )
    row = lines_of(run_dir)[-1]
    bare = row.replace("\\\\", "").replace("\\|", "")  # an escaped backslash first: "\\|" would end the cell
    assert bare.count("|") == 4
    for forbidden in ("<script", "\x1b", "\u202e", "[l](", " `x"):
        assert forbidden not in row


def test_a_run_without_samples_of_its_own_shows_those_of_its_newest_evaluation(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    write_json(run_dir / "metrics.json", {"inference_samples": []})
    for number, name in enumerate(("old", "new", "none")):
        samples = [] if name == "none" else [{"instruction": "Q", "input": "", "expected_output": "E", "model_output": name}]
        write_json(run_dir / f"evals/{name}.json", {"samples": samples})
        os.utime(run_dir / f"evals/{name}.json", (1000 + number, 1000 + number))
    assert lines_of(run_dir)[-1] == "| Q | E | new |"


def test_a_long_answer_is_cut_and_says_by_how_much() -> None:
    assert cell("x" * 350).endswith(" … (50 more characters)") and cell("x" * 300) == "x" * 300


def test_a_damaged_file_of_the_run_is_named(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    (run_dir / "metrics.json").write_text("{")
    with pytest.raises(ExportError) as caught:
        write_report(run_dir)
    assert caught.value.code == "EXPORT_RUN_DAMAGED" and "metrics.json" in str(caught.value)


def test_the_report_needs_no_torch(new_run: RunMaker) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'peft'): raise ImportError('blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from pathlib import Path\n"
        "from finetuneflow.export import write_report, plot_loss\n"
        "write_report(Path(sys.argv[1])); plot_loss(Path(sys.argv[1]))\n"
    )
    run_dir = new_run("lora")
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.md").is_file() and (run_dir / "train_loss.png").is_file()


def test_numbers_are_written_for_people() -> None:
    assert [duration(s) for s in (0.25, 59.9, 60, 3723.4, None)] == [
        "0.2 s",
        "59.9 s",
        "1 min 00 s",
        "1 h 02 min 03 s",
        "not measured",
    ]
    assert [rate(r) for r in (2e-4, 1e-5, 2.5e-3, 0.1)] == ["2e-4", "1e-5", "2.5e-3", "1e-1"]
    assert [size(n) for n in (12, 1500, 2_340_000, 15_000_000_000)] == ["12 B", "1.5 kB", "2.3 MB", "15.00 GB"]
    assert [figure(v) for v in (52002, 1.5, None, True)] == ["52,002", "1.5000", "not measured", "not measured"]


# --- card -----------------------------------------------------------------------------------------------------


def card_of(run_dir: Path, files_kind: str = "adapter") -> tuple[dict[str, object], str]:
    text = card_text(read_run(run_dir), PASSED, Redactor({}), files_kind=files_kind)
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_the_card_is_filled_from_the_run(new_run: RunMaker) -> None:
    front, body = card_of(new_run("lora"))
    assert front["library_name"] == "peft" and front["base_model"] == "base" and "lora" in front["tags"]  # type: ignore[operator]
    for fact in (
        "ab" * 32,
        "train.jsonl",
        "118",
        "1.0873",
        "2e-4",
        "assistant turns",
        "99.6%",
        "812.0 MB",
        "15.7 kB",
        "92.5% of 40",
        "torch 2.13.0",
    ):
        assert fact in body
    assert "/somewhere/private" not in body
    assert card_of(new_run("full"), "model")[0]["library_name"] == "transformers"


def test_the_licence_is_the_one_the_bases_own_card_states(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert "license" not in card_of(run_dir)[0]
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    assert base_license(read_run(run_dir)) == card_of(run_dir)[0]["license"] == "apache-2.0"
    (tmp_path / "base/README.md").write_text("---\nlicense: !!python/object/apply:os.system [true]\n---\n")
    assert base_license(read_run(run_dir)) is None


def test_a_hostile_base_name_stays_text(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    config = yaml.safe_load((run_dir / "run.yaml").read_text())
    config["model"]["base"] = "x'); import os; print('<b>```\n---\nevil: 1"
    (run_dir / "run.yaml").write_text(yaml.safe_dump(config))
    front, body = card_of(run_dir)
    assert set(front) == {"base_model", "library_name", "pipeline_tag", "tags"} and "<b>" not in body.split("## Use")[0]
    code = body.split("```python")[1].split("```")[0]
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in imports} == {"peft", "transformers"}


# --- curve ------------------------------------------------------------------------------------------------------


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_the_curve_is_a_picture_of_1600_by_900_and_reproducible(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    first = plot_loss(run_dir).read_bytes()
    assert png_size(first) == (1600, 900) and first == plot_loss(run_dir, run_dir / "again.png").read_bytes()


@pytest.mark.parametrize("lines", [0, 1, 2, 5, 3000])
def test_any_number_of_log_lines_can_be_drawn(new_run: RunMaker, lines: int) -> None:
    run_dir = new_run("lora")
    (run_dir / "events.jsonl").unlink()
    with EventLog(run_dir / "events.jsonl") as log:
        for step in range(1, lines + 1):
            log.emit("log", step=step, total_steps=lines, loss=float("nan") if step == 2 else 1000.0 if step == 3 else 1.0)
    assert png_size(draw_loss(read_run(run_dir))) == (1600, 900)


def panel(steps: range, *names: str) -> Any:
    """The axes of one figure of `objective.png`, drawn from a line per step."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    lines = [{"step": step, **{name: -float(step) for name in names}} for step in steps]
    held_out = [{f"eval_{key}" if key != "step" else key: value for key, value in line.items()} for line in lines[-1:]]
    _draw_panel(axes, next(panel for panel in PANELS if panel[0] == names), lines, held_out)
    return axes


@pytest.mark.parametrize(("steps", "marked"), [(range(1, 2), True), (range(1, 5), True), (range(10, 3000, 10), False)])
def test_figures_of_an_objective_mark_few_points_and_name_their_axes(steps: range, marked: bool) -> None:
    axes = panel(steps, "logp_chosen", "logp_rejected")
    assert (axes.lines[0].get_marker() == "o") is marked
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "nats per answer")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["chosen", "chosen, held out", "rejected", "rejected, held out"]
    ticks = axes.get_xticks()
    assert all(tick == int(tick) for tick in ticks) and len(set(ticks)) == len(ticks)
    assert panel(steps, "kl").get_ylabel() == "nats" and panel(steps, "reward").get_ylabel() == "reward"


def test_dollar_signs_and_long_names_do_not_break_the_title(new_run: RunMaker, tmp_path: Path) -> None:
    run_dir = new_run("lora")
    odd = run_dir.rename(tmp_path / ("$x_{$" + "y" * 200))
    assert png_size(draw_loss(read_run(odd))) == (1600, 900)


def test_smoothing_keeps_a_straight_line_and_neither_lags_nor_bends_at_the_ends() -> None:
    line = [(float(step), 5.0 - 0.01 * step) for step in range(0, 300, 3)]
    assert [x for point in smooth(line) for x in point] == pytest.approx([x for point in line for x in point])


def test_smoothing_takes_noise_out() -> None:
    import numpy as np

    noise = np.random.default_rng(0).normal(0, 0.2, 400)
    smoothed = [v for _, v in smooth([(float(s), 2.0 + float(e)) for s, e in enumerate(noise)])]
    assert np.std(np.array(smoothed) - 2.0) < 0.06


# --- redaction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "A1b2" * 8, "ghp_" + "a" * 36, "github_pat_" + "b" * 40, "sk-proj-" + "c" * 30, "AKIA" + "ABCD1234" * 2, "xoxb-123456789012-abc",
     "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_DEF-123"],
)  # fmt: skip
def test_known_token_shapes_are_removed(secret: str) -> None:
    assert (
        secret not in Redactor({}).text(f"before {secret} after")
        and Redactor({}).text(f"before {secret} after") == "before [removed] after"
    )


def test_credentials_in_urls_are_removed_and_the_rest_stays() -> None:
    assert Redactor({}).text("https://me:word@host/x?token=abc123&rows=5") == "https://[removed]@host/x?token=[removed]&rows=5"


def test_values_of_secret_variables_are_removed_but_switches_are_not() -> None:
    redactor = Redactor(
        {"WANDB_API_KEY": "0123456789abcdef", "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/data/token"}, home="/home/ann"
    )
    assert redactor.text("0123456789abcdef is false in /data/token") == "[removed] is false in /data/token"


def test_ordinary_settings_named_like_tokens_stay() -> None:
    value = {
        "eos_token": "<|im_end|>",
        "max_new_tokens": 128,
        "avg_tokens": 3.5,
        "token": "x",
        "sha256": "ab" * 32,
        "commit": "0123456789" * 4,
    }
    assert Redactor({}).value(value) == value | {"token": "[removed]"}


def test_the_home_folder_is_written_as_tilde() -> None:
    assert Redactor({}, home="/home/ann").text("/home/ann/x and /home/annabel/y") == "~/x and /home/annabel/y"


def test_a_run_record_without_setup_still_names_the_device(new_run: RunMaker) -> None:
    run_dir = new_run("lora")
    gpus = [{"name": "NVIDIA A100", "memory_total_bytes": 1}] * 2
    write_json(run_dir / "environment.json", {"hardware": {"gpus": gpus}})
    assert read_run(run_dir).device == "2 x NVIDIA A100"
    write_json(
        run_dir / "environment.json",
        {"hardware": {"gpus": gpus, "cpu": {"model": "X"}}, "setup": {"device": "cpu", "threads": 4}},
    )
    assert read_run(run_dir).device == "none; CPU: X, 4 thread(s)"


def test_the_report_tells_what_was_predicted_and_what_was_measured(tmp_path: Path) -> None:
    import json

    from finetuneflow.export.report import write_report

    run = make_run(tmp_path, steps=2)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {
        "peak_memory_bytes": 2_000_000_000,
        "train_runtime": 100.0,
        "energy": {"kwh": 0.25, "co2_kg": 0.1, "source": "a meter"},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    plan = {
        "memory": {"total_bytes": 1_500_000_000, "uncertain_bytes": 1_000_000_000},
        "training_seconds": 110.0,
        "cost": {"energy_kwh": 0.2, "co2_kg": 0.08},
        "findings": [{"code": "LR_X", "level": "warning", "field": "f", "found": "It is | high", "why": "Because."}],
    }
    (run / "plan.json").write_text(json.dumps(plan))
    text = write_report(run).read_text()
    assert "| Peak memory | 1.50 GB | 2.00 GB | -25 % |" in text and "+10 %" in text
    assert "| Energy | 0.2 kWh | 0.25 kWh | |" in text and "| CO2 | 0.08 kg | 0.1 kg | |" in text and "a meter" in text
    assert "- warning LR\\_X: It is \\| high. Because." in text
