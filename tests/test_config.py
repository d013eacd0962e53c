"""The run file: defaults as documented, every mistake named, reads back what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.config import (
    FORMER_NAMES,
    RunConfig,
    build_config,
    dump_config,
    load_config,
    parse_yaml,
    require_runnable,
    settings,
)
from finetuneflow.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_documented_ones() -> None:
    config = RunConfig()
    t, m = config.training, config.method
    assert (t.epochs, t.learning_rate, t.batch_size, t.gradient_accumulation) == (3, None, 4, 4)
    assert (t.warmup_ratio, t.weight_decay, t.scheduler) == (0.03, 0.01, "cosine")
    assert (t.log_steps, t.eval_steps, t.save_steps, t.keep_checkpoints, t.patience) == (10, 100, 200, 3, 3)
    assert config.data.max_length == 2048
    assert (m.kind, m.r, m.alpha, m.dropout, m.double_quantization) == ("lora", 16, 32, 0.05, True)


def test_a_written_run_file_reads_back_equal(tmp_path: Path) -> None:
    config, origins = build_config(
        {"data": {"train": "a b.jsonl", "mapping": {"prompt": "clé: é"}}, "name": "x"}, ["training.learning_rate=3e-5"]
    )
    text = dump_config(config, origins)
    assert load_config(write(tmp_path, text))[0] == config
    assert "learning_rate: 3.0e-05  # yours" in text and "epochs: 3.0  # default" in text


def test_learning_rates_written_as_people_write_them_are_numbers() -> None:
    for text in ("2e-4", "2.0e-4", "1E-3", ".0002"):
        assert isinstance(build_config({}, [f"training.learning_rate={text}"])[0].training.learning_rate, float)


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  learning_rat: 0.1\n")
    with pytest.raises(
        ConfigError, match=r"training\.learning_rat: unknown setting; did you mean 'training\.learning_rate'"
    ) as caught:
        load_config(path)
    assert caught.value.code == "CONFIG_UNKNOWN_KEY" and str(path) in str(caught.value)


@pytest.mark.parametrize("old", sorted(FORMER_NAMES))
def test_names_of_other_tools_lead_to_ours(old: str) -> None:
    known = {key for key, *_ in settings()}
    assert FORMER_NAMES[old] in known
    with pytest.raises(ConfigError, match=f"did you mean '{FORMER_NAMES[old]}'"):
        build_config({"training": {old: 1}})


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"training": {"epochs": "many", "seed": -1}, "method": {"kind": "loraa"}})
    for key in ("training.epochs", "training.seed", "method.kind"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1, seed: 2}", "twice"),
        ("a: &x [1]\nb: [*x, *x]", "aliases"),
        ("name: !!python/object/apply:os.system ['true']", "Not valid YAML"),
        ("training: [", "Not valid YAML"),
        ("- a\n- b", "mapping"),
        ("x: " + "[" * 5_000 + "]" * 5_000, "nested too deeply"),
        ("x: '" + "a" * 1_000_001 + "'", "larger than"),
    ],
)
def test_hostile_and_broken_yaml_is_refused_with_a_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_yaml_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "name: a\ntraining:\n  seed: 1\n  seed: 2\n"))
    assert caught.value.where is not None and caught.value.where.endswith(":4")


def test_nan_and_infinity_are_no_settings() -> None:
    for value in (".nan", ".inf"):
        with pytest.raises(ConfigError):
            build_config({}, [f"training.learning_rate={value}"])


def test_overrides_need_a_value_and_a_group() -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        build_config({}, ["training.seed"])
    with pytest.raises(ConfigError, match="not a group"):
        build_config({"name": "x"}, ["name.first=1"])


def test_a_run_without_data_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty") as caught:
        require_runnable(RunConfig())
    assert caught.value.code == "CONFIG_CONFLICT"


def test_every_setting_is_explained() -> None:
    for key, _, _, explanation in settings():
        assert len(explanation) > 15, key


@pytest.mark.parametrize("text", ["x: 2001-99-99", f"x: {'1' * 5000}", "x: !!int ''"])
def test_a_value_that_yaml_cannot_build_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="r.yaml")
    assert caught.value.code == "CONFIG_UNREADABLE" and "quotes" in (caught.value.remedy or "")


def test_the_reason_of_a_value_stands_in_its_remark_and_cannot_end_the_comment() -> None:
    text = dump_config(RunConfig(), {"training.weight_decay": "recommended"}, {"training.weight_decay": "as\nname: injected"})
    assert "weight_decay: 0.01  # recommended: as name: injected\n" in text
    assert build_config(parse_yaml(text, where="x"))[0] == RunConfig()
