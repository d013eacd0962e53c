"""Preparing: tokens are made once, found again, and never half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.data import prepare as preparing
from finetuneflow.data.preferences import Pairing
from finetuneflow.data.prepare import Prepared, Recipe, prepare
from finetuneflow.data.spool import Spool
from finetuneflow.data.templates import Template, resolve_template
from finetuneflow.data.tokens import Policy
from finetuneflow.errors import DataError, FineTuneFlowError
from models.tiny import tiny_tokenizer


class Kitchen:
    """A folder with a data file and a cache; counts how often examples are tokenized."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.cache = root / "cache"
        self.template: Template = resolve_template(tiny_tokenizer(), "auto")
        self.events: list[dict[str, Any]] = []
        self.tokenized = 0
        tokenize = preparing.tokenize_many

        def counting(examples: Any, *args: Any, **kwargs: Any) -> Any:
            for result in tokenize(examples, *args, **kwargs):
                self.tokenized += 1
                yield result

        monkeypatch.setattr(preparing, "tokenize_many", counting)

    def emit(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self.events.append({"event": name, **fields})
        return self.events[-1]

    def file(self, name: str, rows: list[Any]) -> str:
        path = self.root / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    def cook(self, recipe: Recipe, *, tokenizer: str = "t", template: Template | None = None) -> Prepared:
        self.events, self.tokenized = [], 0
        return prepare(recipe, tokenizer, template or self.template, self.cache, self.emit)

    def warnings(self) -> list[str]:
        return [event["code"] for event in self.events if event["event"] == "warning"]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kitchen:
    return Kitchen(tmp_path, monkeypatch)


def rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"What is {n} plus {7 * n}? {'Think. ' * (n % 4)}", "output": f"It is {8 * n}."}
        for n in range(start, start + count)
    ]


@pytest.fixture
def recipe(kitchen: Kitchen) -> Recipe:
    return Recipe(train=(kitchen.file("sums.jsonl", rows(40)),))


def test_a_second_preparation_finds_the_tokens_and_makes_none(kitchen: Kitchen, recipe: Recipe) -> None:
    first = kitchen.cook(recipe)
    assert kitchen.tokenized == 40
    second = kitchen.cook(recipe)
    assert kitchen.tokenized == 0 and second.digest == first.digest and second.manifest == first.manifest
    assert second.train[:] == first.train[:] and second.eval is not None


CHANGES: dict[str, Callable[[Kitchen, Recipe], Recipe]] = {
    "content": lambda kitchen, recipe: replace(recipe, train=(kitchen.file("sums.jsonl", rows(39)),)),
    "name of the file": lambda kitchen, recipe: replace(recipe, train=(kitchen.file("other.jsonl", rows(40)),)),
    "evaluation file": lambda kitchen, recipe: replace(recipe, eval=(kitchen.file("held.jsonl", rows(5, start=90)),)),
    "share": lambda kitchen, recipe: replace(recipe, eval_fraction=0.2),
    "evaluation limit": lambda kitchen, recipe: replace(recipe, eval_limit=2),
    "seed": lambda kitchen, recipe: replace(recipe, seed=7),
    "limit": lambda kitchen, recipe: replace(recipe, limit=20),
    "length": lambda kitchen, recipe: replace(recipe, policy=Policy(max_length=100)),
    "supervised": lambda kitchen, recipe: replace(recipe, policy=Policy(supervise="all")),
    "form": lambda kitchen, recipe: replace(recipe, form="prompt"),
    "pairing": lambda kitchen, recipe: replace(recipe, pairing=Pairing(min_rating_gap=1)),
    "replayed file": lambda kitchen, recipe: replace(recipe, replay=(kitchen.file("general.jsonl", rows(9, start=90)),)),
    "mapping": lambda kitchen, recipe: replace(recipe, mapping={"prompt": "output", "answer": "instruction"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_shapes_the_tokens_gives_them_another_place(kitchen: Kitchen, recipe: Recipe, change: str) -> None:
    before = kitchen.cook(recipe)
    after = kitchen.cook(CHANGES[change](kitchen, recipe))
    assert after.digest != before.digest and after.folder != before.folder
    assert kitchen.tokenized > 0 or after.manifest["form"] == "prompt"  # prompts go another way through the tokenizer


def test_another_tokenizer_template_or_version_of_our_code_gives_another_place(
    kitchen: Kitchen, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {kitchen.cook(recipe).digest, kitchen.cook(recipe, tokenizer="u").digest}
    digests.add(kitchen.cook(recipe, template=resolve_template(tiny_tokenizer(), "plain", consent=True)).digest)
    monkeypatch.setattr(preparing, "source_digest", lambda *rooms: "newer")
    digests.add(kitchen.cook(recipe).digest)
    assert len(digests) == 4


@pytest.mark.parametrize("name", ["train.arrow", "eval.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
def test_a_damaged_cache_is_made_again(kitchen: Kitchen, recipe: Recipe, name: str, damage: str) -> None:
    first = kitchen.cook(recipe)
    expected = first.train[:]
    path = first.folder / name
    data = path.read_bytes()
    path.unlink()  # the first one keeps its mapping of the old file
    if damage != "delete":
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    assert kitchen.cook(recipe).train[:] == expected and kitchen.tokenized == 40


class Killed(BaseException):
    pass


def test_a_build_that_is_interrupted_leaves_nothing_that_is_taken_for_a_cache(
    kitchen: Kitchen, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_canonical", killed)
        with pytest.raises(Killed):
            kitchen.cook(recipe)
    assert list(kitchen.cache.iterdir()) == []
    assert len(kitchen.cook(recipe).train) == 36


def test_what_a_killed_build_left_is_removed_and_that_of_a_living_one_is_not(kitchen: Kitchen, recipe: Recipe) -> None:
    dead, alive = kitchen.cache / ".building-4194400-x", kitchen.cache / f".building-{os.getpid()}-y"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "train.arrow").write_bytes(b"half")
    kitchen.cook(recipe)
    assert not dead.exists() and alive.exists()


def test_the_manifest_counts_what_is_there(kitchen: Kitchen) -> None:
    bad = [{"instruction": "What?", "output": ""}, {"colour": "red"}, "{not json"]
    name = kitchen.file("mixed.jsonl", [*rows(60), *bad])
    prepared = kitchen.cook(Recipe(train=(name,)))
    manifest, train, held_out = prepared.manifest, prepared.train, prepared.eval
    assert manifest["train_examples"] + manifest["eval_examples"] == 60 and manifest["eval_examples"] == 6
    assert (len(train), len(held_out)) == (manifest["train_rows"], manifest["eval_rows"]) == (54, 6)
    assert sum(manifest["rejected"].values()) == 3 and len(manifest["rejected"]) == 3
    tokens = sum(len(ids) for ids in train["input_ids"])
    assert manifest["avg_tokens"] == pytest.approx(tokens / 54) and list(train["length"]) == [
        len(ids) for ids in train["input_ids"]
    ]
    supervised = sum(label != -100 for labels in train["labels"] for label in labels)
    assert manifest["supervised_share"] == pytest.approx(supervised / tokens)
    assert manifest["train"] == [{"file": name, "bytes": os.path.getsize(name), "sha256": _sha256(name)}]
    problems = (prepared.folder / "problems.jsonl").read_text().splitlines()
    assert len(problems) == 3


def _sha256(name: str) -> str:
    import hashlib

    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def test_every_row_names_the_line_it_came_from(kitchen: Kitchen, recipe: Recipe) -> None:
    prepared = kitchen.cook(replace(recipe, eval_fraction=0.0))
    tokenizer = tiny_tokenizer()
    for index in (0, 17, 39):
        assert f"What is {index} plus {7 * index}?" in tokenizer.decode(prepared.train[index]["input_ids"])
        assert "sums.jsonl" in prepared.place(index) and str(index + 1) in prepared.place(index)


def test_the_tokens_are_those_of_the_tokenizers_own_template(kitchen: Kitchen, recipe: Recipe) -> None:
    """Against transformers: same ids as `apply_chat_template`, and the labels are the answer with its end."""
    prepared = kitchen.cook(replace(recipe, eval_fraction=0.0))
    tokenizer = tiny_tokenizer()
    for row, source in zip(prepared.train, rows(40), strict=True):
        turns = [{"role": "user", "content": source["instruction"]}, {"role": "assistant", "content": source["output"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        # Whether a template's last line break and an instruction's own outer blanks stay is the template room's matter.
        assert tokenizer.decode(row["input_ids"]).split() == text.split()
        answer = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert answer.strip() == f"{source['output']}<|im_end|>"


def test_given_evaluation_files_are_used_whole_and_leaks_are_told(kitchen: Kitchen, recipe: Recipe) -> None:
    clean = kitchen.file("held.jsonl", rows(8, start=500))
    prepared = kitchen.cook(replace(recipe, eval=(clean,)))
    assert (len(prepared.train), len(prepared.eval)) == (40, 8) and "EVAL_LEAK" not in kitchen.warnings()
    leaky = kitchen.file("leaky.jsonl", [*rows(6, start=500), *rows(2, start=3)])
    kitchen.cook(replace(recipe, eval=(leaky,)))
    (warning,) = [event for event in kitchen.events if event.get("code") == "EVAL_LEAK"]
    assert warning["message"].startswith("2 evaluation examples") and warning["advice"]


def test_held_out_examples_are_never_trained_on_and_are_kept_readable(kitchen: Kitchen, recipe: Recipe) -> None:
    prepared = kitchen.cook(replace(recipe, eval_fraction=0.25))
    trained = {tuple(ids) for ids in prepared.train["input_ids"]}
    held_out = {tuple(ids) for ids in prepared.eval["input_ids"]}
    assert not trained & held_out and len(trained) + len(held_out) == 40
    target = kitchen.root / "run" / "eval.jsonl"
    prepared.copy_held_out(target)
    assert len(target.read_text().splitlines()) == prepared.manifest["eval_examples"] == 10


def test_the_limit_takes_the_first_usable_examples(kitchen: Kitchen) -> None:
    name = kitchen.file("mixed.jsonl", [{"colour": "red"}, *rows(30)])
    prepared = kitchen.cook(Recipe(train=(name,), limit=12, eval_fraction=0.0))
    assert len(prepared.train) == 12 and "What is 11 plus" in tiny_tokenizer().decode(prepared.train[11]["input_ids"])


def test_the_evaluation_limit_caps_the_share(kitchen: Kitchen, recipe: Recipe) -> None:
    assert len(kitchen.cook(replace(recipe, eval_fraction=0.5, eval_limit=3)).eval) == 3


def test_a_share_of_zero_holds_nothing_out(kitchen: Kitchen, recipe: Recipe) -> None:
    prepared = kitchen.cook(replace(recipe, eval_fraction=0.0))
    assert prepared.eval is None and len(prepared.train) == 40 and not kitchen.warnings()


def test_examples_of_kinds_the_objective_cannot_use_are_counted_apart(kitchen: Kitchen) -> None:
    pairs = [{"prompt": f"What is {n}?", "chosen": f"A number, {n}.", "rejected": "No."} for n in range(4)]
    prepared = kitchen.cook(Recipe(train=(kitchen.file("pairs.jsonl", [*rows(20), *pairs]),)))
    assert prepared.manifest["not_for_this_objective"] == {"preference": 4} and sum(prepared.manifest["rejected"].values()) == 0
    with pytest.raises(DataError) as caught:
        kitchen.cook(Recipe(train=(kitchen.file("only.jsonl", pairs),)))
    assert caught.value.code == "TRAINING_NO_DATA" and "4 preference" in caught.value.message


@pytest.mark.parametrize(
    ("form", "content", "objective"),
    [
        ("supervised", "preference", "dpo"),
        ("supervised", "unpaired", "kto"),
        ("pair", "chat", "sft"),
        ("rated", "text", "pretrain"),
    ],
)
def test_data_of_another_objective_names_it(kitchen: Kitchen, form: Any, content: str, objective: str) -> None:
    row = {
        "preference": {"prompt": "Why?", "chosen": "So it is.", "rejected": "No."},
        "unpaired": {"prompt": "Why?", "completion": "No.", "label": False},
        "chat": {"question": "Why?", "answer": "So."},
        "text": {"text": "A passage of some length."},
    }[content]
    with pytest.raises(DataError) as caught:
        kitchen.cook(Recipe(train=(kitchen.file("one.jsonl", [row]),), form=form))
    assert f"--set training.objective={objective}" in str(caught.value.remedy)
    assert f"1 {content} example" in caught.value.message and "examples" not in caught.value.message


def test_what_is_left_out_is_said_on_every_run_and_kept_for_the_report(kitchen: Kitchen) -> None:
    long = [{"instruction": "Count.", "output": "one two three " * 60}]
    pair = {"prompt": "Why?", "chosen": "So it is.", "rejected": "No."}
    recipe = Recipe(
        train=(kitchen.file("mixed.jsonl", [*rows(40), *long, pair, "{not json"]),),
        policy=Policy(max_length=80, overlong="drop"),
        eval_fraction=0.0,
    )
    said = []
    for _ in range(2):
        manifest = kitchen.cook(recipe).manifest
        said.append([{"event": "warning", **warning} for warning in manifest["warnings"]])
        assert [event for event in kitchen.events if event["event"] == "warning"] == said[-1]
    assert kitchen.tokenized == 0 and said[0] == said[1]
    rejected, dropped = said[0]
    assert rejected["code"] == "ROWS_REJECTED" and dropped["code"] == "ROWS_DROPPED"
    assert (
        "2 rows" in rejected["message"]
        and "ROW_BAD_JSON 1" in rejected["message"]
        and "1 preference example" in rejected["message"]
    )
    assert dropped["message"].startswith("1 of 41 examples left out (ROW_TOO_LONG 1)")
    assert all(warning["advice"] for warning in said[0])


def test_documents_of_one_token_are_refused_as_there_is_nothing_to_predict(kitchen: Kitchen) -> None:
    template = resolve_template(tiny_tokenizer(eos_token=None), "auto")
    name = kitchen.file("words.jsonl", [{"text": letter} for letter in "abcdefgh"])
    with pytest.raises(FineTuneFlowError) as caught:
        kitchen.cook(Recipe(train=(name,), eval_fraction=0.0), template=template)
    assert caught.value.code == "TRAINING_NO_SUPERVISED_TOKENS"


def test_nothing_but_the_cache_folder_is_written(kitchen: Kitchen, recipe: Recipe) -> None:
    before = {path.name for path in kitchen.root.iterdir()}
    prepared = kitchen.cook(recipe)
    assert {path.name for path in kitchen.root.iterdir()} - before == {"cache"}
    shutil.rmtree(prepared.folder)
    assert len(kitchen.cook(recipe).train) == 36


def test_tokens_are_the_same_when_examples_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"Say {n} twice", "output": f"{n} {n} {n * 7}"}) + "\n" for n in range(60))
    )
    template = resolve_template(tiny_tokenizer())
    made = []
    for number, limit in enumerate((10**9, 100)):
        monkeypatch.setattr(preparing, "Spool", lambda folder, limit=limit: Spool(folder, memory_chars=limit))
        prepared = preparing.prepare(
            preparing.Recipe(train=(str(rows),)), "t", template, tmp_path / f"cache{number}", lambda name, /, **fields: {}
        )
        made.append((prepared.train.to_list(), prepared.eval.to_list(), prepared.manifest["rejected"]))
    assert made[0] == made[1] and len(made[0][0]) == 54


# --- pairs, rated answers, prompts -----------------------------------------------------------------------------------


def pairs(prompts: int, per_prompt: int = 1, *, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {n} plus {7 * n}?", "chosen": f"It is {8 * n}, surely.", "rejected": f"Perhaps {k} or {n + 1}."}
        for n in range(start, start + prompts)
        for k in range(per_prompt)
    ]


PAIR_COLUMNS = {
    "index": "int64",
    "chosen_ids": "list<item: int32>",
    "chosen_labels": "list<item: int32>",
    "rejected_ids": "list<item: int32>",
    "rejected_labels": "list<item: int32>",
    "prompt_length": "int32",
    "length": "int32",
    "place": "string",
}
RATED_COLUMNS = {
    "index": "int64",
    "input_ids": "list<item: int32>",
    "labels": "list<item: int32>",
    "label": "bool",
    "prompt_length": "int32",
    "length": "int32",
    "place": "string",
}
PROMPT_COLUMNS = {
    "index": "int64",
    "input_ids": "list<item: int32>",
    "length": "int32",
    "place": "string",
    "messages": "string",
    "answer": "string",
}


@pytest.mark.parametrize(
    ("form", "columns", "size"), [("pair", PAIR_COLUMNS, 20), ("rated", RATED_COLUMNS, 40), ("prompt", PROMPT_COLUMNS, 20)]
)
def test_each_form_has_its_columns_and_is_found_again(kitchen: Kitchen, form: Any, columns: dict[str, str], size: int) -> None:
    recipe = Recipe(train=(kitchen.file("pairs.jsonl", pairs(20)),), form=form, eval_fraction=0.0)
    prepared = kitchen.cook(recipe)
    assert {field.name: str(field.type) for field in prepared.train.data.schema} == columns
    assert len(prepared.train) == size == prepared.manifest["train_rows"] and prepared.manifest["form"] == form
    assert list(prepared.train["index"]) == list(range(size)) and prepared.place(size - 1).endswith(":20")
    assert kitchen.cook(recipe).train[:] == prepared.train[:]


def test_a_pair_in_the_file_equals_transformers_rendering(kitchen: Kitchen) -> None:
    tokenizer = tiny_tokenizer()
    source = pairs(5)
    prepared = kitchen.cook(Recipe(train=(kitchen.file("pairs.jsonl", source),), form="pair", eval_fraction=0.0))
    for row, given in zip(prepared.train, source, strict=True):
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": given["prompt"]}, {"role": "assistant", "content": given[side]}]
            assert row[f"{side}_ids"] == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            learned = [label for label in row[f"{side}_labels"] if label != -100]
            assert tokenizer.decode(learned).strip() == f"{given[side]}<|im_end|>"
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        assert row["chosen_ids"][: row["prompt_length"]] == prompt == row["rejected_ids"][: row["prompt_length"]]
        assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))


@pytest.mark.parametrize("form", ["pair", "rated", "prompt"])
def test_no_prompt_is_on_both_sides_of_the_split(kitchen: Kitchen, form: Any) -> None:
    name = kitchen.file("pairs.jsonl", pairs(30, per_prompt=3))
    prepared = kitchen.cook(Recipe(train=(name,), form=form, eval_fraction=0.2))
    tokenizer = tiny_tokenizer()

    def prompts(rows: Any) -> set[str]:
        key = "chosen_ids" if form == "pair" else "input_ids"
        return {tokenizer.decode(ids).split("<|im_end|>")[0] for ids in rows[key]}

    assert len(prompts(prepared.train)) + len(prompts(prepared.eval)) == 30
    assert not prompts(prepared.train) & prompts(prepared.eval)
    kinds = {json.loads(line)["kind"] for line in (prepared.folder / "eval.jsonl").read_text().splitlines()}
    assert kinds == {"unpaired" if form == "rated" else "preference"}


def test_a_prompt_that_was_trained_on_is_a_leak(kitchen: Kitchen) -> None:
    train = kitchen.file("train.jsonl", pairs(10))
    other = [{"prompt": "What is 3 plus 21?", "chosen": "A sum that has nothing in common.", "rejected": "Ask somebody else!"}]
    held = kitchen.file("held.jsonl", [*other, *pairs(2, start=90)])
    kitchen.cook(Recipe(train=(train,), eval=(held,), form="pair"))
    (warning,) = [event for event in kitchen.events if event.get("code") == "EVAL_LEAK"]
    assert warning["message"].startswith("1 evaluation example is") and "prompt" in warning["message"]


def test_what_is_set_aside_does_not_count_as_rejected(kitchen: Kitchen) -> None:
    rated = [
        {"prompt": f"Why {n}?", "response": f"reason {score} of {n}", "score": score}
        for n in range(10)
        for score in ((1, 5) if n < 4 else (3,))
    ]
    prepared = kitchen.cook(Recipe(train=(kitchen.file("rated.jsonl", rated),), form="pair", eval_fraction=0.0))
    manifest = prepared.manifest
    assert len(prepared.train) == 4 and manifest["rejected"] == {} and manifest["not_for_this_objective"] == {"ROW_NO_PARTNER": 6}
    assert manifest["ratings"] == {"rated_answers": 14, "rated_prompts": 10, "pairs_of_ratings": 4}
    assert len((prepared.folder / "problems.jsonl").read_text().splitlines()) == 6
    with pytest.raises(DataError) as caught:
        kitchen.cook(Recipe(train=(kitchen.file("lone.jsonl", rated[8:]),), form="pair"))
    assert caught.value.code == "TRAINING_NO_DATA" and "ROW_NO_PARTNER 6 set aside" in caught.value.message


def test_what_preferences_teach_wrongly_is_said_also_for_tokens_out_of_the_cache(kitchen: Kitchen) -> None:
    biased = [{**row, "chosen": row["chosen"] * 5} for row in pairs(6)]
    recipe = Recipe(train=(kitchen.file("biased.jsonl", biased),), form="pair", eval_fraction=0.0)
    for _ in range(2):
        assert kitchen.cook(recipe).manifest["pairs"]["length_ratio"] > 1.5 and "LENGTH_BIAS" in kitchen.warnings()
    kitchen.cook(replace(recipe, by_token=True))
    assert "LENGTH_BIAS" not in kitchen.warnings()
    labels = [{"prompt": f"Why {n}?", "completion": f"So {n}.", "label": n % 4 == 0} for n in range(40)]
    rated = Recipe(train=(kitchen.file("labels.jsonl", labels),), form="rated", eval_fraction=0.0)
    first = kitchen.cook(rated)
    assert first.manifest["rated"] == {"good": 10, "bad": 30, "desirable_weight": 3.0, "undesirable_weight": 1.0}
    assert "LABEL_BALANCE" in kitchen.warnings()
    weighted = kitchen.cook(replace(rated, rated_weights=(3.0, 1.0)))
    assert weighted.digest == first.digest and "LABEL_BALANCE" not in kitchen.warnings()


def test_split_becomes_cut_for_pairs_with_a_note(kitchen: Kitchen) -> None:
    name = kitchen.file("pairs.jsonl", pairs(5))
    prepared = kitchen.cook(Recipe(train=(name,), form="pair", eval_fraction=0.0, policy=Policy(max_length=34, overlong="split")))
    assert max(prepared.train["length"]) == 34 and prepared.manifest["tokens"]["cut"] == 5
    assert any(event["event"] == "decision" and event["setting"] == "data.overlong" for event in kitchen.events)


def test_prompts_alone_that_cannot_be_used_stop_the_run(kitchen: Kitchen) -> None:
    recipe = Recipe(train=(kitchen.file("sums.jsonl", rows(5)),), form="prompt", eval_fraction=0.0, policy=Policy(max_length=8))
    with pytest.raises(DataError) as caught:
        kitchen.cook(recipe)
    assert caught.value.code == "TRAINING_NO_DATA" and "ROW_PROMPT_TOO_LONG 5" in caught.value.message


# --- replay ------------------------------------------------------------------------------------------------------------


def general(count: int) -> list[dict[str, str]]:
    return [{"question": f"Who wrote book {n} about {'abcdefgh'[n % 8] * 9}?", "answer": f"Writer {n}."} for n in range(count)]


def test_a_share_of_the_training_examples_is_replayed_and_none_is_held_out(kitchen: Kitchen, recipe: Recipe) -> None:
    name = kitchen.file("general.jsonl", general(50))
    prepared = kitchen.cook(replace(recipe, replay=(name,), replay_share=0.25))
    places = [prepared.place(index) for index in range(len(prepared.train))]
    replayed = [place for place in places if "general.jsonl" in place]
    assert (len(places), len(replayed), len(set(replayed))) == (48, 12, 12)  # 12 of 48 are a quarter
    assert not any("general.jsonl" in place for place in prepared.eval["place"])
    facts = prepared.manifest["replay"]
    assert (facts["available"], facts["examples"], facts["share"]) == (50, 12, 0.25) and "general.jsonl" in str(prepared.files)
    assert prepared.manifest["train_examples"] == 48
    again = kitchen.cook(replace(recipe, replay=(name,), replay_share=0.25, seed=recipe.seed))
    assert again.train[:] == prepared.train[:]


def test_general_examples_that_are_held_out_are_not_replayed(kitchen: Kitchen, recipe: Recipe) -> None:
    held = kitchen.file("held.jsonl", general(6))
    name = kitchen.file("general.jsonl", general(10))
    prepared = kitchen.cook(replace(recipe, eval=(held,), replay=(name,), replay_share=0.5))
    facts = prepared.manifest["replay"]
    assert facts["held_out_too"] == 6 and facts["examples"] == 4 and "REPLAY_TOO_SMALL" in kitchen.warnings()


def test_only_supervised_rows_are_replayed(kitchen: Kitchen) -> None:
    recipe = Recipe(train=(kitchen.file("pairs.jsonl", pairs(10)),), form="pair", eval_fraction=0.0)
    prepared = kitchen.cook(replace(recipe, replay=(kitchen.file("more.jsonl", pairs(10, start=50)),)))
    assert len(prepared.train) == 10 and "replay" not in prepared.manifest
