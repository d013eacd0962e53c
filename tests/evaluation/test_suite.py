"""Acceptance suites: strict reading, checks that mean what they say, judges of the user."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evaluation.asking import tiny_generator
from finetuneflow.config import BUNDLED_SUITES, parse_yaml
from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.judges import BUILT_IN, contains_words, list_items, load_judges, search_with_limit
from finetuneflow.evaluation.suite import (
    CHECK_KEYS,
    PROMPT_KEYS,
    SUITE_KEYS,
    SuiteResult,
    judge_answer,
    judge_answers,
    load_suite,
    parse_suite,
    run_suite,
)
from finetuneflow.inference import Generation

GOOD = """\
version: 1
name: tiny
max_new_tokens: 6
prompts:
  - id: capital
    tags: [capital, en]
    messages: [{role: user, content: "What is the capital of France?"}]
    check: {contains: "Paris"}
  - id: four
    tags: [sum]
    messages: [{role: system, content: "Be brief."}, {role: user, content: "2+2?"}]
    check: {equals: [4, "four"], function: one_word}
    must_stop: false
"""


def suite_of(**check: Any) -> Any:
    item = {"id": "one", "messages": [{"role": "user", "content": "Q"}], "check": check}
    return parse_suite({"version": 1, "name": "s", "prompts": [item]})


def reasons(answer: str, *, stopped: bool = True, judges: Any = None, **check: Any) -> tuple[str, ...]:
    return judge_answer(suite_of(**check).prompts[0], answer, stopped=stopped, judges={**BUILT_IN, **(judges or {})})


# --- reading ------------------------------------------------------------------------------------


def test_a_suite_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(GOOD, encoding="utf-8-sig")
    suite = load_suite(tmp_path / "s.yaml")
    assert (suite.name, suite.max_new_tokens, len(suite.prompts)) == ("tiny", 6, 2)
    first, second = suite.prompts
    assert (first.tags, first.must_stop, first.check.contains) == (("capital", "en"), True, ("Paris",))
    assert (second.must_stop, second.check.equals, [m.role for m in second.messages]) == (
        False,
        ("4", "four"),
        ["system", "user"],
    )


def test_the_bundled_suites_are_valid_and_ask_at_least_sixty_prompts() -> None:
    suite = load_suite("starter")
    assert len(suite.prompts) >= 60
    assert all(prompt.must_stop for prompt in suite.prompts)


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (("contains:", "contain:"), "prompts[0] (capital): check", "did you mean 'contains'"),
        (("must_stop: false", "must_stop: maybe"), "prompts[1] (four)", "true or false"),
        (("id: four", "id: capital"), "s.yaml", "used twice"),
        (("role: system", "role: bot"), "prompts[1] (four): messages[0]", "found 'bot'"),
        (("version: 1", "version: 2"), "s.yaml", "version must be 1"),
        (("max_new_tokens: 6", "max_new_tokens: 0"), "s.yaml", "whole number"),
        (('{contains: "Paris"}', "{}"), "prompts[0] (capital): check", "at least one of"),
        (('{contains: "Paris"}', '{regex: "("}'), "prompts[0] (capital): check", "not valid"),
        (('{contains: "Paris"}', "{contains: []}"), "prompts[0] (capital): check", "contains is empty"),
        (('{contains: "Paris"}', "{contains: yes}"), "prompts[0] (capital): check", "must be a text"),
        (('role: user, content: "2+2?"', 'role: assistant, content: "4"'), "prompts[1] (four)", "nothing left to answer"),
        (("name: tiny", "name: tiny\nname: twice"), "s.yaml:3", "twice"),
        (("    tags: [sum]", "    tag: [sum]"), "prompts[1] (four)", "did you mean 'tags'"),
        (("  - id: four\n    tags: [sum]", "  - tags: [sum]"), "prompts[1] (without id)", "id must be a text"),
    ],
)
def test_a_mistake_in_a_suite_is_named_with_its_place(tmp_path: Path, change: tuple[str, str], where: str, what: str) -> None:
    assert change[0] in GOOD
    (tmp_path / "s.yaml").write_text(GOOD.replace(change[0], change[1], 1))
    with pytest.raises(EvaluationError) as caught:
        load_suite(tmp_path / "s.yaml")
    assert caught.value.code == "SUITE_INVALID"
    assert where in str(caught.value.where) and what in caught.value.message


def test_the_page_about_suites_shows_one_that_works_and_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "acceptance-suites.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    suite = parse_suite(parse_yaml(example, where="page"))
    used = {key for prompt in suite.prompts for key, value in asdict(prompt.check).items() if value}
    assert used == CHECK_KEYS and all(f"`{key}`" in page for key in SUITE_KEYS | PROMPT_KEYS | CHECK_KEYS)
    assert {function.partition(":")[0] for prompt in suite.prompts for function in prompt.check.function} <= BUILT_IN.keys()
    assert all(f"`{name}" in page for name in BUILT_IN)
    for name in BUNDLED_SUITES:
        assert f"| `{name}` | {len(load_suite(name).prompts)} |" in page
    answers = ["It is Paris.", "Four.", "12-25", "red, green and blue"]
    judged = judge_answers(suite, [Generation(text, (), True, 1) for text in answers])
    assert judged.passed == len(answers), judged.failures


def test_a_missing_suite_and_one_that_is_no_mapping_are_errors(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    for name in ("list.yaml", "absent.yaml"):
        with pytest.raises(EvaluationError, match="SUITE_INVALID"):
            load_suite(tmp_path / name)


# --- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted", "found"),
    [
        ("It is Paris!", "paris", True),
        ("C'est PARIS.", "Paris", True),
        ("Parisian", "Paris", False),
        ("2+2 is 14", "4", False),
        ("2 + 2 = 4.", "4", True),
        ("4.5", "4", False),
        ("1,4 million", "4", False),
        ("Élise arrive", "élise", True),
        ("e\u0301lise", "Élise", True),
        ("l’eau", "l'eau", True),
        ("New   York", "new york", True),
        ("C++ is a language", "c++", True),
        ("STRASSE", "straße", True),
    ],
)
def test_contains_looks_for_whole_words_in_any_case(answer: str, wanted: str, found: bool) -> None:
    assert contains_words(answer, wanted) is found


def test_all_parts_of_a_check_must_hold_and_each_failure_is_said() -> None:
    check = {"contains": ["Paris", "France"], "not_contains": "Lyon", "regex": r"^\w+", "function": ["no_loop", "max_words:6"]}
    assert reasons("Paris, the capital of France", **check) == ()
    found = reasons("!Lyon Lyon Lyon Lyon Lyon Lyon Lyon", stopped=False, **check)
    assert len(found) == 7
    assert found[-1] == "did not end its turn"


def test_equals_takes_any_of_its_texts_without_case_edges_or_final_punctuation() -> None:
    for answer in ("4", " Four. ", "four!"):
        assert reasons(answer, equals=["four", 4]) == ()
    assert reasons("four cats", equals=["four", "4"]) == ("is not 'four' or '4'",)


def test_must_stop_false_lets_an_answer_run_on() -> None:
    item = {"id": "x", "messages": [{"role": "user", "content": "Q"}], "check": {"contains": "a"}, "must_stop": False}
    suite = parse_suite({"version": 1, "name": "s", "prompts": [item]})
    assert judge_answers(suite, [Generation("a", (1,), False, 1)]).pass_share == 1.0


def test_a_regex_that_would_run_for_ever_is_ended_and_the_next_one_works() -> None:
    began = time.monotonic()
    reason = search_with_limit(r"^(a+)+$", "a" * 40 + "!")
    assert reason is not None and "longer than" in reason
    assert time.monotonic() - began < 20
    assert search_with_limit(r"^(a+)+$", "aaa") is None
    assert search_with_limit(r"é!$", "été !") == r"does not match the regex 'é!$'"
    assert search_with_limit(r"(?i)ÉTÉ\W*$", "l'été !") is None


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("red, green and blue", ["red", "green", "blue"]),
        ("Red, green, and blue.", ["red", "green", "blue"]),
        ("rouge, vert et bleu", ["rouge", "vert", "bleu"]),
        ("- red\n- green\n- blue", ["red", "green", "blue"]),
        ("1. red\n2) green\n(3) blue", ["red", "green", "blue"]),
        ("Three colours: red, green or blue!", ["red", "green", "blue"]),
        ("Voici :\n\n* un chat\n* un chien", ["un chat", "un chien"]),
        ("sand, orange, brandy", ["sand", "orange", "brandy"]),
        ("", []),
    ],
)
def test_the_items_of_a_list_are_found_however_it_is_written(answer: str, items: list[str]) -> None:
    assert list_items(answer) == items


def test_list_of_wants_that_many_and_all_different() -> None:
    assert reasons("red, green and blue", function="list_of:3") == ()
    assert reasons("red, Red and blue", function="list_of:3") == ("repeats a list item",)
    assert reasons("red and blue", function="list_of:3") == ("has 2 list items instead of 3",)


def test_one_word_no_loop_and_max_words() -> None:
    for answer in ("Paris", "Paris.", " aujourd'hui !", "Saint-Denis"):
        assert reasons(answer, function="one_word") == ()
    for answer in ("", "It is", "a, b"):
        assert reasons(answer, function="one_word") != ()
    twice = "the cat sat down, the cat sat down"
    assert reasons(twice, function="no_loop") == ()
    assert reasons(twice + ", the cat sat down", function="no_loop") == ("repeats 'the cat sat down' 3 times",)
    assert reasons("a b c", function="max_words:3") == ()
    assert reasons("a b c d", function="max_words:3") == ("has 4 words, more than 3",)


# --- judges of the user -------------------------------------------------------------------------


def test_own_judges_by_name_take_the_answer_and_an_argument_if_they_want_one() -> None:
    judges = {
        "polite": lambda answer: "please" in answer,
        "starts": lambda answer, argument: answer.startswith(argument) or "wrong start",
    }
    assert reasons("please", function=["polite", "starts:pl"], judges=judges) == ()
    assert reasons("now", function=["polite", "starts:pl"], judges=judges) == ("fails polite", "wrong start")


def test_a_file_of_judges_gives_its_public_functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import json\nfrom os.path import join\ndef loud(answer):\n    return answer.isupper()\ndef _help(): ...\n"
    )
    judges = load_judges(tmp_path / "mine.py")
    assert set(judges) == {"loud"}
    assert reasons("HELLO", function="loud", judges=judges) == ()


@pytest.mark.parametrize("content", [None, "x = 1\n", "raise RuntimeError('no')\n", "def broken(:\n"])
def test_a_file_without_usable_judges_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(EvaluationError) as caught:
        load_judges(tmp_path / "mine.py")
    assert caught.value.code == "JUDGES_INVALID"


def test_an_unknown_or_failing_judge_is_named() -> None:
    with pytest.raises(EvaluationError, match="'nobody'"):
        judge_answers(suite_of(function="nobody"), [Generation("a", (1,), True, 1)])
    with pytest.raises(EvaluationError, match="list_of:many"):
        reasons("a", function="list_of:many")


# --- running ------------------------------------------------------------------------------------


def test_a_suite_run_answers_each_prompt_as_if_it_were_asked_alone_and_survives_json(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(GOOD)
    suite, generator = load_suite(tmp_path / "s.yaml"), tiny_generator()
    result = run_suite(generator, suite)
    for prompt, item in zip(suite.prompts, result.items, strict=True):
        assert item.answer == generator.generate([prompt.messages], max_new_tokens=6)[0].text
    assert SuiteResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_pass_share_and_tags_are_counted() -> None:
    items = [
        {"id": f"p{i}", "tags": tags, "messages": [{"role": "user", "content": "Q"}], "check": {"contains": "yes"}}
        for i, tags in enumerate((["a"], ["a", "b"], ["b"], []))
    ]
    suite = parse_suite({"version": 1, "name": "s", "prompts": items})
    result = judge_answers(suite, [Generation(t, (1,), True, 1) for t in ("yes", "no", "yes", "yes")])
    assert (result.passed, result.pass_share, [i.id for i in result.failures]) == (3, 0.75, ["p1"])
    assert result.by_tag() == {
        "a": {"prompts": 2, "passed": 1, "pass_share": 0.5},
        "b": {"prompts": 2, "passed": 1, "pass_share": 0.5},
    }
