"""Pipeline files that try tricks: each ends in one error of the family, and what is read comes back from its dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.config import load_values
from finetuneflow.errors import ConfigError
from finetuneflow.pipeline_config import build_pipeline, dump_pipeline, load_pipeline

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
