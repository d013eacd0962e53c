"""Ratings, ranks and lists of scored answers become pairs and labels; what they would teach wrongly is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_support import byte_tokenizer

from finetuneflow.data.examples import Example, Mapping, Message, Place, Problem, to_canonical, to_examples
from finetuneflow.data.forms import Form, Sides, tokenize_sides
from finetuneflow.data.preferences import (
    FormReader,
    Pairing,
    PairTally,
    median_threshold,
    pair_findings,
    rated_facts,
    rated_findings,
    recommended_weights,
)
from finetuneflow.data.quality import inspect
from finetuneflow.data.sources import Row, read_rows
from finetuneflow.data.templates import resolve_template
from finetuneflow.data.tokens import Policy

Items = list[Example | Problem]


def read(rows: list[dict[str, Any]], form: Form = "pair", *, mapping: Mapping | None = None, **pairing: Any) -> Items:
    source = (Row(Place("x.jsonl", n, n + 1), row) for n, row in enumerate(rows))
    items = to_examples(source, mapping, several_answers=form in ("pair", "rated"))
    return list(FormReader(form, Pairing(**pairing)).read(items))


def said(items: Items) -> list[tuple[str, str]]:
    """(chosen, rejected) of each pair."""
    return [(item.chosen[-1].content, item.rejected[-1].content) for item in items if isinstance(item, Example)]


def labels(items: Items) -> dict[str, bool | None]:
    return {item.messages[-1].content: item.label for item in items if isinstance(item, Example)}


def codes(items: Items) -> list[str]:
    return [item.code for item in items if isinstance(item, Problem)]


def rows_of(ratings: list[Any], column: str = "rating", question: str = "Why?") -> list[dict[str, Any]]:
    return [{"prompt": question, "response": f"answer {rating}", column: rating} for rating in ratings]


# --- ratings in rows -----------------------------------------------------------------------------------------------


def test_the_best_answer_wins_against_each_other_one_the_widest_gap_first() -> None:
    items = read(rows_of([3, 5, 1]))
    assert said(items) == [("answer 5", "answer 1"), ("answer 5", "answer 3")]
    pair = items[0]
    assert isinstance(pair, Example) and pair.messages == (Message("user", "Why?"),) and pair.rating is None
    assert "pair_of_ratings" in pair.notes and pair.place.line == 2


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ({"min_rating_gap": 3}, [("answer 5", "answer 1")]),
        ({"max_pairs_per_prompt": 1}, [("answer 5", "answer 1")]),
        ({"pairs": "adjacent"}, [("answer 5", "answer 3"), ("answer 3", "answer 1")]),
        ({"pairs": "adjacent", "max_pairs_per_prompt": 1}, [("answer 5", "answer 3")]),
    ],
)
def test_gap_cap_and_neighbours(pairing: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert said(read(rows_of([3, 5, 1]), **pairing)) == expected


def test_equal_ratings_and_lone_answers_make_no_pair_and_say_so() -> None:
    rows = [*rows_of([4]), *rows_of([2, 2.0], question="How?"), *rows_of([1, 2], question="When?")]
    items = read(rows)
    assert said(items) == [("answer 2", "answer 1")] and codes(items) == ["ROW_NO_PARTNER"] * 3


def test_the_same_answer_rated_twice_is_no_pair() -> None:
    rows = [{"prompt": "Why?", "response": "Because.", "score": score} for score in (1, 5)]
    assert codes(read(rows)) == ["ROW_NO_PARTNER"] * 2
    assert said(read([*rows, {"prompt": "Why?", "response": "No.", "score": 0}])) == [("Because.", "No.")]


def test_only_numbers_are_ratings() -> None:
    for rating in (True, "good", None, [3], "nan", "inf", {"value": 2}, ""):
        items = read(rows_of([rating, 5]))
        assert [item.kind for item in items if isinstance(item, Example)] == ["chat"], rating
        assert codes(items) == ["ROW_NO_PARTNER"]
    assert said(read(rows_of(["3", "10"]))) == [("answer 10", "answer 3")]  # as numbers, not as text


@pytest.mark.parametrize("column", ["rating", "Score", "stars", "quality", "reward", "upvotes"])
def test_rating_columns_are_known_by_name(column: str) -> None:
    assert len(said(read(rows_of([1, 2], column)))) == 1


def test_a_mapping_names_a_rating_column_of_ones_own() -> None:
    rows = [{"q": "Why?", "a": f"answer {n}", "mark": n} for n in (1, 2)]
    assert said(read(rows, mapping=Mapping(prompt="q", answer="a", rating="mark"))) == [("answer 2", "answer 1")]


def test_conversations_with_ratings_pair_only_under_the_same_history() -> None:
    def row(first: str, answer: str, rating: int) -> dict[str, Any]:
        turns = [("user", "Hi"), ("assistant", first), ("user", "Why?"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns], "rating": rating}

    items = read([row("Hello.", "A", 1), row("Hello.", "B", 2), row("Good day.", "C", 3)])
    assert said(items) == [("B", "A")] and codes(items) == ["ROW_NO_PARTNER"]


def test_ratings_survive_our_own_file_form() -> None:
    [example] = to_examples([Row(Place("x", 0), rows_of([4])[0])])
    assert isinstance(example, Example) and example.rating == 4
    [again] = to_examples([Row(Place("x", 0), json.loads(json.dumps(to_canonical(example))))])
    assert again == example


def test_for_supervised_training_ratings_change_nothing() -> None:
    items = read(rows_of([1, 5]), "supervised")
    assert [item.kind for item in items if isinstance(item, Example)] == ["chat", "chat"]


# --- labels ------------------------------------------------------------------------------------------------------------


def test_answers_are_good_from_the_median_or_the_given_rating() -> None:
    rows = [row for n, rating in enumerate([1, 2, 3, 4, 5]) for row in rows_of([rating], question=f"{n}?")]
    assert [label for label in labels(read(rows, "rated")).values()] == [False, False, True, True, True]
    assert [label for label in labels(read(rows, "rated", good_rating=4.5)).values()] == [False] * 4 + [True]


@pytest.mark.parametrize(("ratings", "threshold"), [([1, 1, 1, 4], 4), ([5, 5, 5, 1], 5), ([2, 2], 2), ([1, 2], 1.5)])
def test_the_median_leaves_both_labels_where_ratings_differ(ratings: list[float], threshold: float) -> None:
    assert median_threshold(ratings) == threshold


def test_a_pair_is_a_good_and_a_bad_answer_each_once() -> None:
    rows = [{"prompt": "Why?", "chosen": "Good.", "rejected": bad} for bad in ("Bad.", "Worse.")]
    assert labels(read(rows, "rated")) == {"Good.": True, "Bad.": False, "Worse.": False}
    assert len(read(rows, "rated")) == 3


def test_rated_rows_stay_as_they_are() -> None:
    rows = [{"prompt": "Why?", "completion": "So.", "label": False}]
    assert labels(read(rows, "rated")) == {"So.": False}
    assert [item.kind for item in read(rows, "pair") if isinstance(item, Example)] == ["unpaired"]  # counted apart by prepare


# --- lists of answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "answers": ["bad", "good", "fair"], "scores": [1, 9, 5]},
        {"question": "Why?", "responses": ["bad", "good", "fair"], "ranks": [2, 0, 1]},
        {
            "instruction": "Why?",
            "completions": [{"response": t, "overall_score": s} for t, s in (("bad", "1"), ("good", 9.5), ("fair", 5))],
        },
        {"prompt": "Why?", "completions": [{"text": t, "rank": r} for t, r in (("bad", 3), ("good", 1), ("fair", 2))]},
        {"messages": [{"role": "user", "content": "Why?"}], "candidates": ["bad", "good", "fair"], "rewards": [-3.5, 0.25, 0]},
    ],
    ids=["scores", "ranks", "objects", "ranked objects", "after messages"],
)
def test_lists_of_scored_answers_make_pairs_and_the_best_answer_is_learned_alone(row: dict[str, Any]) -> None:
    pairs = read([row])
    assert said(pairs) == [("good", "bad"), ("good", "fair")]
    assert all(isinstance(pair, Example) and pair.messages == (Message("user", "Why?"),) for pair in pairs)
    [best] = read([row], "supervised")
    assert isinstance(best, Example) and best.kind == "chat" and best.messages[-1].content == "good"
    assert "best_of_several" in best.notes


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1]}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": "1, 2"}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "outputs": "a", "scores": [1]}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "candidates": ["a", "b"], "scores": ["good", None]}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "completions": ["a", "b"]}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "completions": {"a": 1}}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "generations": [], "scores": []}, "ROW_BAD_RATING"),
        ({"prompt": "Why?", "answers": ["", " "], "scores": [1, 2]}, "ROW_EMPTY_ANSWER"),
        ({"prompt": "", "answers": ["a", "b"], "scores": [1, 2]}, "ROW_NO_PROMPT"),
        ({"prompt": ["Why?"], "answers": ["a", "b"], "scores": [1, 2]}, "ROW_WRONG_TYPE"),
        ({"prompt": "Why?", "answers": ["a", ["b", {}]], "scores": [1, 2]}, "ROW_WRONG_TYPE"),
    ],
)
def test_hostile_lists_are_problems(row: dict[str, Any], code: str) -> None:
    forms: tuple[Form, ...] = ("pair", "rated", "supervised")
    for form in forms:
        items = read([row], form)
        assert codes(items) == [code] and len(items) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "answers": ["a", "b"], "scores": [1]},
        {"question": "Why?", "answers": "a", "scores": 3},
        {"question": "Why?", "answers": {"text": ["a"], "answer_start": [7]}, "scores": [0.5]},
        {"question": "Why?", "answers": ["a"], "rank": 3},
        {
            "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "a"}],
            "outputs": "x",
            "scores": [1],
        },
    ],
)
def test_scores_that_cannot_be_used_do_not_take_a_row_from_supervised_training(row: dict[str, Any]) -> None:
    [item] = read([row], "supervised")
    assert isinstance(item, Example) and [turn.content for turn in item.messages] == ["Why?", "a"]


def test_a_whole_conversation_beside_other_lists_stays_one() -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for form in ("supervised", "pair"):
        [item] = read([{"messages": turns, "outputs": ["x", "y"], "scores": [1, 2]}], form)  # type: ignore[arg-type]
        assert isinstance(item, Example) and item.kind == "chat" and item.messages[-1].content == "So."


def test_a_prompt_is_asked_once_for_each_reference_answer() -> None:
    rows = [{"prompt": "Why?", "chosen": good, "rejected": bad} for good in ("So.", "Yes.") for bad in ("No.", "Hm.", "Eh.")]
    reader = FormReader("prompt")
    source = (Row(Place("x.jsonl", n), row) for n, row in enumerate([*rows, {"question": "Why?", "answer": "So."}] * 2))
    items = list(reader.read(to_examples(source)))
    assert [item.kind for item in items if isinstance(item, Example)] == ["preference", "preference", "chat", "chat"]
    assert reader.facts == {"repeated_prompts": 10}


# --- trees -----------------------------------------------------------------------------------------------------------------


def node(role: str, text: str, *replies: dict[str, Any], rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), "rank": rank, **more}


TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "prompter",
        "Q",
        node("assistant", "worst", rank=2),
        node("assistant", "best", node("prompter", "R", node("assistant", "x", rank=1), node("assistant", "y", rank=0)), rank=0),
        node("assistant", "middle", rank=1),
        node("assistant", "gone", rank=3, deleted=True),
        node("assistant", "unranked"),
    ),
}


def test_siblings_of_a_tree_pair_by_rank_at_every_depth() -> None:
    items = read([TREE])
    assert said(items) == [("best", "worst"), ("best", "middle"), ("y", "x")]
    deeper = items[-1]
    assert isinstance(deeper, Example) and [turn.content for turn in deeper.messages] == ["Q", "best", "R"]
    assert {item.group for item in items if isinstance(item, Example)} == {"t"}
    assert said(read([TREE], min_rating_gap=2)) == [("best", "worst")]


def test_ranks_say_good_and_bad_only_among_siblings() -> None:
    assert labels(read([TREE], "rated", good_rating=100)) == {
        "best": True,
        "worst": False,
        "middle": False,
        "y": True,
        "x": False,
    }


def test_a_tree_without_ranked_siblings_is_set_aside() -> None:
    lone = {"message_tree_id": "t", "prompt": node("prompter", "Q", node("assistant", "A", rank=0))}
    assert codes(read([lone])) == ["ROW_NO_PARTNER"]


@pytest.mark.shared_data
def test_pairs_of_the_shared_trees_equal_an_independent_count(shared_data: Path) -> None:
    path = shared_data / "oasst/en_100_tree.rows0-59.jsonl"

    def sizes(tree_node: dict[str, Any]) -> Iterator[int]:
        children = [child for child in tree_node["replies"] if not child.get("deleted")]
        ranked = {child["rank"] for child in children if child["role"] == "assistant" and child.get("rank") is not None}
        yield len(ranked)
        for child in children:
            yield from sizes(child)

    trees = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    expected = sum(min(4, size - 1) for tree in trees for size in sizes(tree) if size > 1)
    items = list(FormReader("pair").read(to_examples(read_rows(path), several_answers=True)))
    assert len(said(items)) == expected > 200 and inspect(path).preferences["pair"] == expected


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "pairs"),
    [("llamafactory/dpo_en_demo.json", 300), ("hh_rlhf/harmless-base-test.rows0-499.jsonl.gz", 499)],
)
def test_every_shared_preference_file_gives_pairs_that_can_be_tokenized(shared_data: Path, name: str, pairs: int) -> None:
    report = inspect(shared_data / name, near_duplicates=False)
    assert report.kinds == {"preference": pairs} and report.preferences["pair"] == pairs
    template = resolve_template(byte_tokenizer(), "chatml")
    examples = [item for item in FormReader("pair").read(to_examples(read_rows(shared_data / name))) if isinstance(item, Example)]
    results = list(tokenize_sides(examples[:60], template, Policy(max_length=100_000)))
    assert all(isinstance(result, Sides) for result in results)


def test_files_without_preferences_say_nothing_about_them(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"question": "Why?", "answer": "So."}\n')
    report = inspect(path)
    assert report.kinds == {"chat": 1} and report.preferences == {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of([1, 5, 2])))
    report = inspect(path)
    assert report.kinds == {"rated chat": 3} and report.preferences == {"pair": 2, "rated": 3} and report.rejected_rows == 0


# --- what pairs teach ------------------------------------------------------------------------------------------------------


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    sides = (Message("assistant", chosen),), (Message("assistant", rejected),)
    return Example("preference", Place("p", 0), "t", (Message("user", prompt),), chosen=sides[0], rejected=sides[1])


def tally(pairs: list[Example], **policy: Any) -> dict[str, Any]:
    found = PairTally()
    template = resolve_template(byte_tokenizer(), "chatml")
    for example, sides in zip(pairs, tokenize_sides(pairs, template, Policy(**policy)), strict=True):
        assert isinstance(sides, Sides)
        found.add(example, sides)
    return found.to_dict()


LONG = ("word and word again " * 20).strip()


def test_length_bias_is_found_in_both_directions_and_before_cutting() -> None:
    fair = [pair("Q", LONG, "no"), pair("R", "yes", LONG)]
    facts = tally(fair)
    assert 0.9 < facts["length_ratio"] < 1.1 and facts["chosen_longer_share"] == 0.5 and not list(pair_findings(facts))
    for pairs in ([pair("Q", LONG, "no")] * 2, [pair("Q", "yes", LONG)] * 2):
        assert [code for code, *_ in pair_findings(tally(pairs))] == ["LENGTH_BIAS"]
    assert tally(fair, max_length=30)["chosen_tokens"] == facts["chosen_tokens"]
    tokenizer = byte_tokenizer()
    facts = tally([pair("Q", LONG, "no")])
    expected = [len(tokenizer.encode(text)) + 1 for text in (LONG, "no")]  # and the turn's end
    assert [facts["chosen_tokens"], facts["rejected_tokens"]] == expected


def test_pairs_that_turn_each_other_around_are_counted() -> None:
    facts = tally([pair("Q", "a", "b"), pair("Q", "b", "a"), pair("Q", "b", "c"), pair("R", "b", "a")])
    assert (facts["pairs"], facts["prompts"], facts["contradictory"]) == (4, 2, 1)
    assert facts["chosen_is_elsewhere_rejected"] == 3  # a once and b twice, under Q
    assert "PAIRS_CONTRADICT" in [code for code, *_ in pair_findings(facts)]


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_recommended_weights_meet_the_rule_of_kto(good: int, bad: int) -> None:
    desirable, undesirable = recommended_weights(good, bad)
    assert 1 - 1e-9 <= desirable * good / (undesirable * bad) <= 4 / 3 + 1e-9
    assert min(desirable, undesirable) == 1.0
    assert not list(rated_findings(rated_facts(good, bad), (desirable, undesirable)))


def test_labels_out_of_balance_are_said_with_the_weights_that_mend_them() -> None:
    [(code, message, advice)] = rated_findings(rated_facts(100, 300), (1.0, 1.0))
    assert code == "LABEL_BALANCE" and "100 answers are good and 300 bad" in message and "desirable_weight=3 " in advice
    assert not list(rated_findings(rated_facts(100, 300), (3.0, 1.0)))
    assert [code for code, *_ in rated_findings(rated_facts(5, 0), (1.0, 1.0))] == ["ONE_LABEL"]


def test_the_group_travels_with_a_pair() -> None:
    [made] = read([{**row, "group": "g"} for row in rows_of([1, 2])])
    assert isinstance(made, Example) and made.group == "g"
