"""Every real dataset file is read, its shape recognised, and its rows counted as an independent script counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuneflow.data.examples import Example, to_examples
from finetuneflow.data.quality import inspect, inspect_files
from finetuneflow.data.sources import read_rows
from finetuneflow.errors import DataError

pytestmark = pytest.mark.shared_data

TABLE = json.loads((Path(__file__).parent / "independent_counts.json").read_text(encoding="utf-8"))
NO_DATASET_SUFFIXES = {".pdf", ".docx", ".odt", ".html"}
OTHER_FOLDERS = {"tokenizers", "weights", "chat_templates"}


def dataset_files(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return [path for path in paths if path.parent != root and path.relative_to(root).parts[0] not in OTHER_FOLDERS]


def test_every_shared_file_is_in_the_table_or_no_dataset(shared_data: Path) -> None:
    names = {str(path.relative_to(shared_data)) for path in dataset_files(shared_data) if path.suffix not in NO_DATASET_SUFFIXES}
    assert names == set(TABLE)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_counts_agree_with_the_independent_count(shared_data: Path, name: str) -> None:
    expected = TABLE[name]
    report = inspect(shared_data / name, near_duplicates=False)
    assert (report.rows, report.usable, report.rejected_rows) == (expected["rows"], expected["usable"], expected["rejected"])
    assert report.shapes == ({expected["shape"]: expected["rows"]} if expected["shape"] else {})


def test_documents_are_refused_with_a_clear_word(shared_data: Path) -> None:
    documents = [path for path in dataset_files(shared_data) if path.suffix in NO_DATASET_SUFFIXES]
    assert len(documents) == 7
    for path in documents:
        with pytest.raises(DataError, match="is not a dataset") as caught:
            inspect(path)
        assert caught.value.code == "DATASET_NOT_A_DATASET"
        assert caught.value.remedy


def test_one_bad_file_does_not_stop_the_others(shared_data: Path) -> None:
    reports = inspect_files([shared_data / "documents/fr/presentation.pdf", shared_data / "mlx/lora_test.jsonl"])
    assert reports[0].error is not None and reports[0].error["error_code"] == "DATASET_NOT_A_DATASET"
    assert reports[1].usable == 100


def examples_of(path: Path) -> list[Example]:
    return [item for item in to_examples(read_rows(path)) if isinstance(item, Example)]


def test_duplicates_of_metropole_equal_a_count_of_equal_lines(shared_data: Path) -> None:
    lines = (shared_data / "metropole/metropole.jsonl").read_text(encoding="utf-8").splitlines()
    distinct = {json.dumps(json.loads(line), sort_keys=True) for line in lines}
    assert inspect(shared_data / "metropole/metropole.jsonl").duplicates == len(lines) - len(distinct)


def test_an_applied_alpaca_prompt_is_taken_apart(shared_data: Path) -> None:
    first = examples_of(shared_data / "dolly/dolly.jsonl")[0]
    assert first.messages[0].content == "Why is Citizen Kane considered the Best Film?"
    assert not first.messages[1].content.rstrip().endswith("###")
    assert "alpaca_prompt_unwrapped" in first.notes


def test_no_input_in_many_spellings_is_left_out(shared_data: Path) -> None:
    with_marker = [
        example for example in examples_of(shared_data / "llamafactory/alpaca_en_demo.json") if "no_input_marker" in example.notes
    ]
    assert len(with_marker) == 8
    assert all("input" not in example.messages[0].content.lower().split("\n")[-1] for example in with_marker)


def test_tool_calls_of_sharegpt_are_parsed(shared_data: Path) -> None:
    examples = examples_of(shared_data / "llamafactory/glaive_toolcall_en_demo.json")
    calls = [call for example in examples for message in example.messages for call in message.tool_calls]
    source = (shared_data / "llamafactory/glaive_toolcall_en_demo.json").read_text(encoding="utf-8")
    assert len(calls) == source.count('"function_call"')
    assert all(isinstance(call.arguments, dict) and call.name for call in calls)
    assert sum(bool(example.tools) for example in examples) == 191


def test_the_whole_tree_gives_every_path_and_the_best_one_by_default(shared_data: Path) -> None:
    path = shared_data / "oasst/en_100_tree.rows0-59.jsonl"
    best = examples_of(path)
    everything = [item for item in to_examples(read_rows(path), tree_paths="all") if isinstance(item, Example)]
    assert len(best) == 60
    assert len(everything) > len(best)
    assert {example.group for example in best} == {example.group for example in everything}
    tree = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    ranked = min(tree["prompt"]["replies"], key=lambda reply: reply["rank"])
    assert best[0].messages[1].content == ranked["text"]
