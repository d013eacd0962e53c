"""The verbs that answer before a run, as a stranger uses them: plan, lint, score, recipes, diff, explain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from export.run_dir import make_run
from face import Answer, Ftf
from finetuneflow.config import RunConfig, load_config
from finetuneflow.errors import CODES
from finetuneflow.knowledge.lint import RULES

ROOT = Path(__file__).parents[1]
BAD = sorted((ROOT / "examples" / "bad").glob("*.yaml"))


@pytest.fixture(autouse=True)
def wide(ftf: Ftf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not cut."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTF_HOME", str(tmp_path / "ws"))
    rows = [{"instruction": f"What is {n} + {n}?", "output": f"It is {2 * n}, as everybody knows."} for n in range(400)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def is_error(answer: Answer, code: int, error_code: str) -> bool:
    assert error_code in CODES and "Traceback" not in answer.err
    return (answer.code, answer.json["error_code"]) == (code, error_code)


# --- plan ---------------------------------------------------------------------------------------------


def test_a_plan_has_the_documented_shape_and_its_choice_fits(ftf: Ftf, place: Path) -> None:
    plan = ftf(
        "plan", "--model", "meta-llama/Llama-2-7b-hf", "--data", "d.jsonl", "--gpu", "RTX 4090", "--count", 6, "--json"
    ).json
    assert {"hardware", "model", "options", "choice"} <= set(plan)
    for option in plan["options"]:
        assert {"method", "fits", "memory_gb", "breakdown", "hours", "cost", "settings", "why"} <= set(option)
        assert sum(option["breakdown"].values()) / 1e9 == pytest.approx(option["memory_gb"], rel=0.01)
    by_name = {option["name"]: option for option in plan["options"]}
    chosen = by_name[plan["choice"]]
    assert chosen["fits"] and chosen["hours"] > 0 and chosen["cost"] > 0 and plan["hardware"]["count"] == 6
    assert {option["method"] for option in plan["options"]} >= {"full", "lora", "qlora"}
    assert not any(option["fits"] for option in plan["options"] if option["name"] == "full" and option["devices"] == 1)


def test_pairs_are_planned_as_pairs_and_name_their_objective_where_another_is_set(ftf: Ftf, place: Path) -> None:
    pairs = [
        {"prompt": f"Why is {n}?", "chosen": f"Because of {n}.", "rejected": "Ask somebody else, please."} for n in range(40)
    ]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    refused = ftf("plan", "--model", "starter", "--data", "p.jsonl")
    assert refused.code == 3 and "what to do" in refused.err and "--set training.objective=dpo" in refused.err
    shown = ftf("plan", "--model", "starter", "--data", "p.jsonl", "--set", "training.objective=dpo").out
    assert "36 pairs of" in shown and "tokens (both sides), 4 held out" in shown


def test_a_plan_is_written_as_a_run_file_with_a_reason_beside_each_value(ftf: Ftf, place: Path) -> None:
    assert ftf("plan", "--model", "starter", "--data", "d.jsonl", "-o", "run.yaml").code == 0
    config, _ = load_config(place / "run.yaml")
    assert config.model.base == "starter" and config.data.train == ["d.jsonl"]
    lines = [line for line in (place / "run.yaml").read_text().splitlines()[1:] if not line.endswith(":")]
    reasons = [line.partition("  # ")[2] for line in lines]
    assert all(re.match(r"(default|recipe|recommended|yours): \S", reason) for reason in reasons[1:]), reasons
    assert any(reason.startswith("recommended: ") for reason in reasons)
    assert ftf("lint", "run.yaml", "--json").code == 0
    assert not {finding["code"] for finding in ftf("lint", "run.yaml", "--json").json} & {"METHOD_SETTING_WITHOUT_EFFECT"}


def test_an_existing_file_is_not_replaced_unasked(ftf: Ftf, place: Path) -> None:
    (place / "run.yaml").write_text("name: precious\n")
    answer = ftf("plan", "--model", "starter", "--data", "d.jsonl", "-o", "run.yaml")
    assert answer.code == 10 and "exists already" in answer.err and (place / "run.yaml").read_text() == "name: precious\n"


def test_what_the_run_file_says_is_kept_in_the_plan(ftf: Ftf, place: Path) -> None:
    (place / "mine.yaml").write_text("data: {train: d.jsonl, max_length: 128}\nmethod: {r: 4}\n")
    plan = ftf("plan", "mine.yaml", "--json").json
    for option in plan["options"]:
        assert option["settings"].get("data.max_length", 128) == 128
    lora = next(option for option in plan["options"] if option["name"] == "lora")
    assert lora["settings"].get("method.r", 4) == 4


def test_the_processor_gets_a_plan_with_hours(ftf: Ftf, place: Path) -> None:
    plan = ftf("plan", "--model", "starter", "--data", "d.jsonl", "--set", "training.device=cpu", "--json").json
    assert plan["hardware"]["planned_kind"] == "cpu" and plan["choice"]
    assert all(option["hours"] for option in plan["options"] if option["fits"])


@pytest.mark.parametrize(
    ("arguments", "code", "error_code"),
    [
        (("--model", "no/such-model-anywhere"), 4, "MODEL_NOT_FOUND"),
        (("--model", "./nowhere"), 4, "MODEL_NOT_FOUND"),
        (("--model", "7B", "--gpu", "RTX 4096"), 2, "CONFIG_INVALID_VALUE"),
        (("--model", "7B", "--data", "nowhere.jsonl"), 3, "DATASET_NOT_FOUND"),
        (("--model", "7B", "--goal", "riches"), 2, "CONFIG_INVALID_VALUE"),
        (("--model", "7B", "--set", "training.country=France"), 2, "CONFIG_INVALID_VALUE"),
        (("--model", "7B", "--set", "training.country=XXX", "--data", "d.jsonl"), 2, "CONFIG_INVALID_VALUE"),
        (("--model", "70B", "--option", "nonsense", "-o", "x.yaml"), 2, "CONFIG_INVALID_VALUE"),
        (("nowhere.yaml",), 2, "CONFIG_UNREADABLE"),
    ],
)
def test_bad_questions_get_one_clear_error(ftf: Ftf, place: Path, arguments: tuple[str, ...], code: int, error_code: str) -> None:
    answer = ftf("plan", *arguments, "--json")
    error = json.loads(answer.out.strip().splitlines()[-1])
    assert (answer.code, error["error_code"]) == (code, error_code)


def test_the_matrix_marks_where_the_documented_one_differs(ftf: Ftf) -> None:
    cells = ftf("plan", "--matrix", "--json").json
    assert len(cells) == 7 * 4
    differing = [cell for cell in cells if cell["differs"]]
    assert differing and all(cell["why"] for cell in differing)
    cell = next(cell for cell in cells if cell["band"].startswith("24") and cell["model"].startswith("13B"))
    assert cell["differs"]  # 26 GB of weights do not fit 24 GB
    assert "documented matrix differs" in ftf("plan", "--matrix").out


# --- lint ---------------------------------------------------------------------------------------------


def expected_codes(path: Path) -> set[str]:
    """The codes that the comment at the head of a bad example promises."""
    head = "\n".join(line for line in path.read_text().splitlines()[:12] if line.startswith("#"))
    return set(re.findall(r"\b[A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+\b", head)) & set(RULES)


def test_there_are_ten_bad_examples() -> None:
    assert len(BAD) >= 10 and all(expected_codes(path) for path in BAD)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_bad_example_gives_the_finding_it_promises(ftf: Ftf, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    answer = ftf("lint", path.relative_to(ROOT), "--json")
    findings = answer.json
    assert expected_codes(path) <= {finding["code"] for finding in findings}
    assert answer.code == (2 if any(finding["level"] == "error" for finding in findings) else 0)
    for finding in findings:
        assert set(finding) == {"code", "level", "field", "found", "why", "fix"} and finding["why"]


@pytest.mark.parametrize("name", ["alpaca_lora.yaml", "qlora.yaml", "continued_pretraining.yaml"])
def test_good_examples_have_no_errors(ftf: Ftf, name: str, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "examples" / name).read_text())
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"Passage {n}. " * 40}) + "\n" for n in range(300)))
    if values.get("training", {}).get("objective") != "pretrain":
        rows = [{"instruction": f"Question {n}?", "output": f"Answer {n}, at some length."} for n in range(300)]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] = {**values.get("data", {}), "train": str(tmp_path / "d.jsonl"), "mapping": {}}
    values["model"] = {"base": "starter"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert not [finding for finding in ftf("lint", tmp_path / "run.yaml", "--json").json if finding["level"] == "error"]


def test_fixing_keeps_comments_and_clears_the_finding(ftf: Ftf, place: Path) -> None:
    text = """\
# my run
data:
  train: d.jsonl  # the sums
method:
  kind: lora
training:
  # copied from a full fine-tuning
  learning_rate: 5e-6  # hm
"""
    (place / "run.yaml").write_text(text)
    before = {finding["code"] for finding in ftf("lint", "run.yaml", "--json").json}
    assert "LR_FULL_RATE_ON_ADAPTER" in before
    shown = ftf("lint", "run.yaml", "--fix")
    fixed = (place / "run.yaml").read_text()
    assert "-  learning_rate: 5e-6  # hm" in shown.out and "LR_FULL_RATE_ON_ADAPTER" in shown.out
    for comment in ("# my run", "# the sums", "# copied from a full fine-tuning", "# hm"):
        assert comment in fixed
    assert load_config(place / "run.yaml")[0].training.learning_rate > 5e-5
    assert "LR_FULL_RATE_ON_ADAPTER" not in {finding["code"] for finding in ftf("lint", "run.yaml", "--json").json}
    again = ftf("lint", "run.yaml", "--fix")
    assert "Nothing can be fixed safely" in again.out and (place / "run.yaml").read_text() == fixed


def test_settings_in_braces_are_fixed_too(ftf: Ftf, place: Path) -> None:
    (place / "run.yaml").write_text("data: {train: d.jsonl}\ntraining: {learning_rate: 5.0e-6, epochs: 2}\n")
    ftf("lint", "run.yaml", "--fix")
    config = load_config(place / "run.yaml")[0]
    assert config.training.learning_rate > 5e-5 and config.training.epochs == 2 and config.data.train == ["d.jsonl"]


def test_a_recipe_can_be_looked_over(ftf: Ftf, place: Path) -> None:
    answer = ftf("lint", "--recipe", "lora", "--set", "data.train=d.jsonl", "--json")
    assert answer.code == 0 and isinstance(answer.json, list)
    assert ftf("lint", "--recipe", "lora", "--fix").code == 2


# --- score --------------------------------------------------------------------------------------------

DOCUMENTED = [
    "--params",
    "124M",
    "--examples",
    "114000",
    "--steps",
    "25000",
    "--lr",
    "5e-6",
    "--batch",
    "192",
    "--warmup",
    "1000",
    "--gpus",
    "6",
    "--hours",
    "43",
]


def test_the_documented_example_gets_the_documented_marks(ftf: Ftf) -> None:
    found = ftf("score", *DOCUMENTED, "--gpu", "RTX 4090", "--json").json
    assert [criterion["score"] for criterion in found["criteria"]] == [10, 9, 9, 7, 7, 9, 6, 10]
    assert found["overall"] == 8.5 and all(criterion["reason"] for criterion in found["criteria"])


def test_another_setup_gets_other_marks(ftf: Ftf) -> None:
    hasty = [{"5e-6": "5e-4", "43": "300"}.get(argument, argument) for argument in DOCUMENTED]
    found = ftf("score", *hasty, "--gpu", "RTX 4090", "--json").json
    marks = {criterion["name"]: criterion["score"] for criterion in found["criteria"]}
    assert marks["learning rate"] < 5 and marks["time"] < 6 and found["overall"] < 8


def test_a_run_file_can_be_judged(ftf: Ftf, place: Path) -> None:
    (place / "run.yaml").write_text("data: {train: d.jsonl}\n")
    found = ftf("score", "run.yaml", "--json").json
    assert len(found["criteria"]) == 8 and found["overall"] > 0
    assert "overall" in ftf("score", "run.yaml").out
    assert ftf("score", "--params", "7B").code == 2


# --- recipes and diff ---------------------------------------------------------------------------------


def test_recipes_are_listed_and_shown(ftf: Ftf) -> None:
    listed = ftf("recipes", "--json").json
    names = {recipe["name"] for recipe in listed}
    assert {"alpaca", "vicuna", "lora", "qlora", "lima", "dpo", "rlhf", "multi-stage", "conservative", "metropole"} <= names
    assert len(listed) >= 18
    for recipe in listed:
        shown = ftf("recipes", "show", recipe["name"])
        assert shown.code == 0 and recipe["title"] in shown.out.replace("\n", " ")
    assert is_error(ftf("recipes", "show", "alpacca", "--json"), 2, "CONFIG_INVALID_VALUE")


def test_a_run_starts_from_a_recipe_and_the_run_file_wins(ftf: Ftf, place: Path) -> None:
    (place / "run.yaml").write_text("data: {train: d.jsonl, max_length: 64}\ntraining: {epochs: 1}\n")
    manifest = ftf("train", "run.yaml", "--recipe", "lora", "--dry-run", "--json")
    assert manifest.code == 0 and manifest.json["train_examples"] > 0


def test_differences_are_named_with_what_follows_from_them(ftf: Ftf, place: Path) -> None:
    (place / "a.yaml").write_text("training: {batch_size: 8}\n")
    found = {entry["key"]: entry for entry in ftf("diff", "default", "a.yaml", "--json").json}
    assert (found["training.batch_size"]["a"], found["training.batch_size"]["b"]) == (RunConfig().training.batch_size, 8)
    assert found["derived.effective_batch"]["ratio"] == 2
    assert ftf("diff", "a.yaml", "a.yaml", "--json").json == []
    assert "same settings" in ftf("diff", "alpaca", "alpaca").out
    assert is_error(ftf("diff", "alpaca", "nothing-of-the-kind", "--json"), 2, "CONFIG_INVALID_VALUE")


def test_runs_can_be_compared(ftf: Ftf, tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4)
    found = {entry["key"] for entry in ftf("diff", run.name, "default", "--workspace", tmp_path, "--json").json}
    assert "model.base" in found


# --- explain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["OUT_OF_MEMORY", "LR_FULL_RATE_ON_ADAPTER", "out_of_memory", "KL_RUNAWAY", "LENGTH_BIAS"])
def test_codes_are_explained(ftf: Ftf, code: str) -> None:
    answer = ftf("explain", code)
    assert answer.code == 0 and len(answer.out) > 100
    told = ftf("explain", code, "--json").json
    assert told["code"] == code.upper() and told["meaning"]


def test_every_rule_has_a_page(ftf: Ftf) -> None:
    for code in RULES:
        assert len(ftf("explain", code, "--json").json["page"]) > 200, code


def test_a_failed_run_is_explained_with_remedies_for_it(ftf: Ftf, tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4)
    lines = [
        {"seq": 1, "time": "2026-01-01T00:00:00+00:00", "event": "started", "attempt": 1},
        {"seq": 2, "time": "2026-01-01T00:00:01+00:00", "event": "failed", "code": "OUT_OF_MEMORY", "message": "Memory ran out."},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ftf("explain", run.name, "--workspace", tmp_path, "--json").json
    assert found["code"] == "OUT_OF_MEMORY" and found["remedies"]
    assert any(remedy["settings"] and remedy["saves"] for remedy in found["remedies"])
    assert "1. " in ftf("explain", run.name, "--workspace", tmp_path).out


def test_an_unknown_code_names_near_ones(ftf: Ftf, place: Path) -> None:
    answer = ftf("explain", "OUT_OF_MEMRY", "--json")
    assert is_error(answer, 2, "CONFIG_INVALID_VALUE") and "OUT_OF_MEMORY" in answer.json["context"]["remedy"]
