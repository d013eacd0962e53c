"""Pipeline files that try tricks: each ends in one error of the family, and what is read comes back from its dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.config import load_values
from finetuneflow.errors import ConfigError
from finetuneflow.pipeline_config import build_pipeline, dump_pipeline, load_pipeline, require_readable
from finetuneflow.training.pipeline import train_pipeline
from finetuneflow.workspace import Workspace

BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9))

REFUSED = {
    "a path as stage name": "stages: [{name: ../x}]",
    "an absolute path as stage name": "stages: [{name: /etc}]",
    "a line break at the end of a name": 'stages: [{name: "a\\n"}]',
    "two dots in the pipeline's name": "name: a..b\nstages: [{name: a}]",
    "the base's name": "stages: [{name: base}]",
    "from itself": "stages: [{name: a, from: a}]",
    "from a cycle": "stages: [{name: a, from: b}, {name: b, from: a}]",
    "a cyclic alias": "stages: &s [{name: a, model: *s}]",
    "exploding aliases": BOMB + "stages: [{name: a}]",
    "a tag that would run code": "x: !!python/object/apply:os.system [id]\nstages: [{name: a}]",
    "a section that is text": "stages: [{name: a, model: x}]",
    "a key that is no text": "stages: [{name: a, 1: 2}]",
    "a gate of NaN": "stages: [{name: a, gate: [eval loss >= nan]}]",
    "a recipe outside the recipes": "stages: [{name: a, recipe: ../x}]",
    "more stages than anybody means": "stages: [" + ", ".join(f"{{name: s{i}}}" for i in range(51)) + "]",
    "a NUL in a suite's path": 'measure: {suites: ["a\\0b"]}\nstages: [{name: a}]',
    "a NUL in the text's path": 'measure: {general_text: "a\\0b"}\nstages: [{name: a}]',
    "a NUL in the judges' path": 'measure: {judges: "a\\0b"}\nstages: [{name: a}]',
    "a NUL in a path of a stage": 'stages: [{name: a, data: {train: ["a\\0b"]}}]',
    "half a pair of surrogates": 'stages: [{name: a, model: {base: "a\\ud800"}}]',
    "more text than settings are": "stages: [{name: a}]\n#" + "x" * 1_000_000,
    "nested without end": "stages: " + "[" * 5_000,
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_tricks_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    assert caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("stages.a=1", "--set stages.a", "names a stage and none of its settings"),
        ("stages.a", "--set stages.a", "names a stage and none of its settings"),
        ("stages.a.training.epochs=[", "--set stages.a.training.epochs:1", "Not valid YAML"),
        ("stages.a.training.epochs", "--set stages.a.training.epochs", "not of the form"),
        ("stages.a.name.x=1", "--set stages.a.name.x", "not a group"),
        ("stages.b.training.epochs=1", "--set stages.b.training.epochs", "no stage 'b'"),
        ("training.epochs=[", "--set training.epochs:1", "Not valid YAML"),
        ('data.train="a\\0b"', "--set data.train:1", "character '\\x00'"),
    ],
)
def test_a_mistake_in_an_override_is_told_as_it_was_typed(override: str, where: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("stages: [{name: a}]")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, [override])
    assert caught.value.where == where and words in caught.value.message and caught.value.remedy


@pytest.mark.parametrize(
    "override",
    ["stages=[]", "stages..x=1", "stages.b.name=x", "stages.a.name=../x", "stages.a.model=x", "name=../x", "=", "model=5"],
)
def test_overrides_cannot_break_the_structure(override: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("stages: [{name: a}]")
    with pytest.raises(ConfigError):
        load_pipeline(path, [override])


def test_signs_of_yaml_in_a_path_survive_the_dump(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("""stages: [{name: a, model: {base: "a #b: c"}, data: {train: "x: [y] # z.jsonl"}}]""")
    before = load_pipeline(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_pipeline(before))
    after = build_pipeline(load_values(copy), complete=True)
    assert after.stages[0].config == before.stages[0].config
    assert after.stages[0].config.model.base == "a #b: c"
    assert after.stages[0].config.data.train == ["x: [y] # z.jsonl"]


@pytest.mark.parametrize("name", ["bell\a", "line\u2028end", "\x7f", "\ufeff", "two\n\n  lines", "tab\tand  blanks"])
def test_a_name_of_strange_characters_comes_back_from_the_dump(name: str, tmp_path: Path) -> None:
    pipeline = build_pipeline({"stages": [{"name": "a", "model": {"base": name}, "data": {"train": [name]}}, {"name": "b"}]})
    require_readable(pipeline)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_pipeline(pipeline), encoding="utf-8")
    after = build_pipeline(load_values(copy), complete=True)
    assert [stage.config for stage in after.stages] == [stage.config for stage in pipeline.stages]


def test_a_pipeline_whose_file_would_be_too_long_is_refused_before_it_has_a_folder(tmp_path: Path) -> None:
    files = [tmp_path / f"{'x' * 200}-{number}" for number in range(300)]
    for file in files:
        file.touch()
    stages = [{"name": f"s{number}"} for number in range(50)]
    pipeline = build_pipeline({"data": {"train": [str(file) for file in files]}, "stages": stages})
    with pytest.raises(ConfigError) as caught:
        train_pipeline(pipeline, workspace=Workspace(tmp_path / "ws"))
    assert "larger than 1,000,000 characters" in caught.value.message and "fewer" in str(caught.value.remedy)
    assert not (tmp_path / "ws").exists()


def test_a_name_that_yaml_would_give_back_as_another_is_refused() -> None:
    pipeline = build_pipeline({"stages": [{"name": "a", "model": {"base": "next\x85line"}}]})
    with pytest.raises(ConfigError, match="something else for the stage a"):
        require_readable(pipeline)
