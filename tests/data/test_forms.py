"""Pairs, rated answers and prompts, held against an independent way to the same ids and labels.

The reference shares no code with the product: transformers renders and encodes with offsets, answers are found by searching
their text behind the prompt, and a token is in the loss when one of its characters is in an ending's answer or turn-end.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_support import TOYS, byte_tokenizer, piece_tokenizer, real_tokenizers
from test_templates import EOS, TOKENIZERS, TURN_ENDS, _with_template

from finetuneflow.data.examples import Example, Message, Place, Problem, ToolCall
from finetuneflow.data.forms import Prompt, Sides, prompt_fields, side_fields, tokenize_prompts, tokenize_sides
from finetuneflow.data.templates import BUILT_IN, Template, resolve_template
from finetuneflow.data.tokens import MASKED, Policy, TokenizeStats

QUESTIONS = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital of France is Paris."),
    Message("user", "Et de l'Italie ? 😀"),
)
GOOD = (Message("assistant", "Rome, bien sûr.\n\n- ancienne\n- belle"),)
BAD = (Message("assistant", "Je ne sais pas."),)
LONGER = (Message("assistant", "Milan."), Message("user", "Sûr ?"), Message("assistant", "Non, Rome."))


def pair(prompt: Any = QUESTIONS, chosen: Any = GOOD, rejected: Any = BAD, **more: Any) -> Example:
    return Example(
        "preference", Place("p.jsonl", 3, 4), "test", tuple(prompt), chosen=tuple(chosen), rejected=tuple(rejected), **more
    )


def rated(label: bool, prompt: Any = QUESTIONS, answer: Any = GOOD) -> Example:
    return Example("unpaired", Place("r.jsonl", 0, 1), "test", (*prompt, *answer), label=label)


def sides(example: Example, template: Template, **policy: Any) -> Sides:
    result = outcome(example, template, **policy)
    assert isinstance(result, Sides), result
    return result


def outcome(example: Example, template: Template, **policy: Any) -> Sides | Problem:
    (result,) = tokenize_sides([example], template, Policy(**policy))
    return result


def prompt(example: Example, template: Template, **policy: Any) -> Prompt | Problem:
    (result,) = tokenize_prompts([example], template, Policy(**policy))
    return result


def learned(labels: list[int], template: Template) -> str:
    return str(template.tokenizer.decode([label for label in labels if label != MASKED], skip_special_tokens=False))


def as_dicts(messages: Any) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def reference(tokenizer: Any, source: str, before: Any, ending: Any, turn_end: str) -> tuple[list[int], list[int]]:
    """Ids and labels of one side by transformers' rendering, a text search and offsets."""
    dicts = as_dicts((*before, *ending))
    text = tokenizer.apply_chat_template(dicts, chat_template=source, tokenize=False, add_generation_prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_learned = [False] * len(text)
    position = 0
    for number, message in enumerate(dicts):
        content = message["content"].strip()
        begin = text.index(content, position)
        position = begin + len(content)
        if number < len(before) or message["role"] != "assistant":
            continue
        head = tokenizer.apply_chat_template(dicts[:number], chat_template=source, tokenize=False, add_generation_prompt=True)
        begin = len(head) if text.startswith(head) else begin
        after = text[position:]
        gap = len(after) - len(after.lstrip())
        if turn_end and after.startswith(turn_end, gap):
            position += gap + len(turn_end)
        is_learned[begin:position] = [True] * (position - begin)
    labels = [
        token if any(is_learned[start:end]) else MASKED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def longest_shared(first: list[int], second: list[int], labels: list[list[int]]) -> int:
    """Token by token: shared, and in the loss of neither side."""
    count = 0
    for one, other, *marks in zip(first, second, *labels, strict=False):
        if one != other or any(mark != MASKED for mark in marks):
            break
        count += 1
    return count


def assert_equals_reference(example: Example, template: Template, tokenizer: Any, source: str, turn_end: str) -> None:
    found = sides(example, template)
    expected = [reference(tokenizer, source, example.messages, ending, turn_end) for ending in (example.chosen, example.rejected)]
    assert [(row.ids, row.labels) for row in found.rows] == expected
    (first, first_labels), (second, second_labels) = expected
    assert found.prompt_length == longest_shared(first, second, [first_labels, second_labels])
    assert found.length == max(len(first), len(second))


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [GOOD, LONGER], ids=["one turn", "several turns"])
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_both_sides_equal_an_independent_reference(name: str, toy: str, ending: tuple[Message, ...]) -> None:
    tokenizer = TOYS[toy]()
    template = resolve_template(tokenizer, name)
    assert_equals_reference(pair(chosen=ending), template, tokenizer, template.source, template.stop)


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_both_sides_of_real_templates_equal_an_independent_reference(shared_data: Path, name: str, tokenizer_name: str) -> None:
    tokenizer = real_tokenizers(shared_data)[tokenizer_name]
    path = shared_data / "chat_templates" / f"{name}.jinja"
    template = resolve_template(tokenizer, str(path), consent=True)
    turn_end = tokenizer.eos_token if TURN_ENDS[name] == EOS else TURN_ENDS[name]
    assert_equals_reference(pair(), template, tokenizer, path.read_text(encoding="utf-8"), turn_end)


def test_only_the_endings_are_learned_each_with_its_turn_end() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    chosen, rejected = sides(pair(rejected=LONGER), template).rows
    assert learned(chosen.labels, template) == GOOD[0].content + "<|im_end|>"
    assert learned(rejected.labels, template) == "Milan.<|im_end|>Non, Rome.<|im_end|>"
    assert [span.kind for span in chosen.spans if span.message == 1] == ["masked", "masked"]


def test_a_turn_of_weight_zero_in_an_ending_stays_out_of_the_loss() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    ending = (replace(LONGER[0], weight=0.0), *LONGER[1:])
    assert learned(sides(pair(rejected=ending), template).rows[1].labels, template) == "Non, Rome.<|im_end|>"


def test_a_system_message_that_goes_into_the_question_moves_nothing() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TOOLS
    template = resolve_template(_with_template(byte_tokenizer(), source))
    assert not template.takes_system
    found = sides(pair((Message("system", "Be brief."), *QUESTIONS), rejected=LONGER), template)
    assert [learned(row.labels, template) for row in found.rows] == [
        GOOD[0].content + "<|im_end|>",
        "Milan.<|im_end|>Non, Rome.<|im_end|>",
    ]


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_in_prompt_and_ending() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Rome"}),))
    other = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Oslo"}),))
    template = resolve_template(_with_template(byte_tokenizer(), TOOLS))
    asked = (Message("user", "Weather?"), call, Message("tool", "sunny"), Message("user", "And Oslo?"))
    found = sides(pair(asked, (other,), (call,)), template)
    texts = [learned(row.labels, template) for row in found.rows]
    assert texts == [f'<tool_call>weather {{"city": "{city}"}}</tool_call><|im_end|>' for city in ("Oslo", "Rome")]
    ended = sides(pair(asked, (other, Message("tool", "rain"), Message("assistant", "Rain.")), BAD), template)
    assert learned(ended.rows[0].labels, template) == texts[0] + "Rain.<|im_end|>"


def test_a_template_without_generation_prompt() -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    tokenizer = _with_template(piece_tokenizer(), source)
    template = resolve_template(tokenizer)
    assert not template.anatomy.generation_prompt
    assert_equals_reference(pair(), template, tokenizer, source, "</s>")


def test_prompts_that_the_template_writes_differently_are_left_out() -> None:
    source = "{% if messages | length > 4 %}LONG {% endif %}" + TOOLS
    template = resolve_template(_with_template(byte_tokenizer(), source))
    assert isinstance(outcome(pair(), template), Sides)
    problem = outcome(pair(rejected=LONGER), template)
    assert isinstance(problem, Problem) and problem.code == "ROW_PROMPTS_DIFFER" and problem.place.line == 4


def test_answers_that_differ_in_white_space_alone_are_alike_where_the_template_trims() -> None:
    template = resolve_template(byte_tokenizer(), "phi3")
    problem = outcome(pair(rejected=(Message("assistant", GOOD[0].content + "  "),)), template)
    assert isinstance(problem, Problem) and problem.code == "ROW_ANSWERS_ALIKE"


def test_examples_come_in_order_across_batches_with_problems_between() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    examples = [pair(chosen=(Message("assistant", f"Number {n}"),)) for n in range(700)]
    examples[300] = pair(chosen=BAD)
    stats = TokenizeStats()
    results = list(tokenize_sides(iter(examples), template, Policy(), stats=stats))
    assert isinstance(results[300], Problem)
    for number in (0, 299, 301, 699):
        found = results[number]
        assert isinstance(found, Sides) and learned(found.rows[0].labels, template) == f"Number {number}<|im_end|>"
    assert (stats.examples, stats.rows, stats.dropped, stats.problems["ROW_ANSWERS_ALIKE"]) == (700, 699, 1, 1)
    assert stats.tokens == sum(len(row.ids) for found in results if isinstance(found, Sides) for row in found.rows)


# --- too long ----------------------------------------------------------------------------------------------------------


MANY = (
    Message("system", "Be brief."),
    *(turn for n in range(6) for turn in (Message("user", f"Question {n}?"), Message("assistant", f"Answer {n}."))),
    Message("user", "The last?"),
)


@pytest.mark.parametrize("gone", [1, 3, 6])
def test_the_oldest_exchanges_go_first_the_same_on_both_sides(gone: int) -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    left = (MANY[0], *MANY[1 + 2 * gone :])
    expected = [reference(tokenizer, template.source, left, ending, template.stop) for ending in (GOOD, BAD)]
    whole = sides(pair(MANY), template)
    limit = max(len(ids) for ids, _ in expected)
    found = sides(pair(MANY), template, max_length=limit)
    assert [(row.ids, row.labels) for row in found.rows] == expected
    assert [row.lost_tokens for row in found.rows] == [
        len(long.ids) - len(short.ids) for long, short in zip(whole.rows, found.rows, strict=True)
    ]
    assert not any(row.lost_answer_tokens for row in found.rows)


def test_then_the_ends_of_the_endings_are_cut() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    last = sides(pair((MANY[0], MANY[-1])), template)
    limit = last.prompt_length + 6
    found = sides(pair(MANY), template, max_length=limit)
    for row, whole in zip(found.rows, last.rows, strict=True):
        assert row.ids == whole.ids[:limit] and row.labels == whole.labels[:limit]
        assert row.lost_answer_tokens == whole.supervised - row.supervised
        assert row.turn_ends == (1 if len(whole.ids) <= limit else 0)


def test_what_cutting_makes_equal_or_empty_is_left_out_and_counted() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    alike = pair((MANY[-1],), (Message("assistant", "Well, yes."),), (Message("assistant", "Well, not at all."),))
    start = sides(alike, template).prompt_length
    stats = TokenizeStats()
    policies = [(alike, start + 1), (alike, start - 1), (pair(MANY), 9)]
    codes = [next(tokenize_sides([example], template, Policy(max_length=n), stats=stats)) for example, n in policies]
    assert [problem.code for problem in codes if isinstance(problem, Problem)] == [
        "ROW_ANSWERS_ALIKE",
        "ROW_NO_ANSWER_LEFT",
        "ROW_NO_ANSWER_LEFT",
    ]
    assert stats.dropped == 3 and stats.rows == 0


def test_long_pairs_are_dropped_when_asked() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    problem = outcome(pair(MANY), template, max_length=40, overlong="drop")
    assert isinstance(problem, Problem) and problem.code == "ROW_TOO_LONG"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab é\n😀", max_size=30), min_size=1, max_size=5),
    st.text("ab cé", max_size=40),
    st.text("ab cé", max_size=40),
    st.integers(2, 90),
    st.sampled_from(["chatml", "mistral", "plain", "llama2"]),
)
def test_whatever_is_cut_both_sides_fit_and_stay_comparable(
    questions: list[str], chosen: str, rejected: str, limit: int, name: str
) -> None:
    template = resolve_template(piece_tokenizer(), name)
    asked = [turn for text in questions for turn in (Message("user", f"q{text}"), Message("assistant", f"a{text}"))][:-1]
    example = pair(asked, (Message("assistant", f"x{chosen}"),), (Message("assistant", f"x{rejected}"),))
    whole = outcome(example, template, max_length=100_000)
    found = outcome(example, template, max_length=limit)
    if isinstance(whole, Problem):
        assert whole.code == "ROW_ANSWERS_ALIKE" and isinstance(found, Problem)
        return
    if isinstance(found, Problem):
        assert found.code in ("ROW_ANSWERS_ALIKE", "ROW_NO_ANSWER_LEFT") and whole.length > limit
        return
    first, second = found.rows
    assert found.length <= limit and first.supervised and second.supervised
    assert found.prompt_length == longest_shared(first.ids, second.ids, [first.labels, second.labels])
    for row, long in zip(found.rows, whole.rows, strict=True):
        assert all(label in (MASKED, token) for token, label in zip(row.ids, row.labels, strict=True))
        assert len(long.ids) - len(row.ids) == row.lost_tokens
        assert long.supervised - row.supervised == row.lost_answer_tokens >= 0


# --- rated answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rated_answer_is_the_last_one_alone(name: str) -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, name)
    for label in (True, False):
        example = rated(label)
        found = sides(example, template)
        ids, labels = reference(tokenizer, template.source, QUESTIONS, GOOD, template.stop)
        fields = side_fields(example, found)
        assert (fields["input_ids"], fields["labels"], fields["label"]) == (ids, labels, label)
        assert fields["prompt_length"] == next(i for i, value in enumerate(labels) if value != MASKED)
        assert fields["length"] == len(ids) and fields["place"] == "r.jsonl:1"


# --- prompts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "phi4"])
def test_a_prompt_ends_with_the_generation_prompt(name: str, toy: str) -> None:
    tokenizer = TOYS[toy]()
    template = resolve_template(tokenizer, name)
    text = tokenizer.apply_chat_template(
        as_dicts(QUESTIONS), chat_template=template.source, tokenize=False, add_generation_prompt=True
    )
    found = prompt(pair(), template)
    assert isinstance(found, Prompt)
    decoded = tokenizer.decode(found.row.ids, skip_special_tokens=False)
    assert decoded.replace(" ", "").rstrip() == text.replace(" ", "").rstrip()  # an end that joins the answer is its business
    assert found.row.ids == template.prompt_ids(list(QUESTIONS)) and set(found.row.labels) == {MASKED}


@pytest.mark.parametrize(
    ("example", "answer"),
    [
        (Example("chat", Place("c", 0), "t", (*QUESTIONS, *GOOD)), GOOD[0].content),
        (Example("chat", Place("c", 0), "t", (*QUESTIONS, *LONGER)), "Non, Rome."),
        (pair(), GOOD[0].content),
        (pair(chosen=LONGER), "Milan."),
        (rated(True), GOOD[0].content),
        (rated(False), ""),
    ],
    ids=["chat", "long chat", "pair", "pair of several turns", "good", "bad"],
)
def test_the_reference_answer_travels_with_the_prompt(example: Example, answer: str) -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    found = prompt(example, template)
    assert isinstance(found, Prompt)
    fields = prompt_fields(example, found)
    assert fields["answer"] == answer
    asked = example.messages if example.kind == "preference" else example.messages[:-1]
    assert json.loads(fields["messages"]) == as_dicts(asked)


def test_a_long_prompt_loses_its_oldest_exchanges_or_is_left_out() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    left = (MANY[0], *MANY[-3:])
    limit = len(template.prompt_ids(left))
    stats = TokenizeStats()
    (found,) = tokenize_prompts([pair(MANY)], template, Policy(max_length=limit), stats=stats)
    assert isinstance(found, Prompt) and found.messages == left and found.row.ids == template.prompt_ids(left)
    assert stats.cut == 1 and stats.lost_tokens == len(template.prompt_ids(MANY)) - limit
    for policy, code in (
        (Policy(max_length=9), "ROW_PROMPT_TOO_LONG"),
        (Policy(max_length=limit, overlong="drop"), "ROW_TOO_LONG"),
    ):
        (problem,) = tokenize_prompts([pair(MANY)], template, policy)
        assert isinstance(problem, Problem) and problem.code == code


def test_a_prompt_that_the_template_refuses_is_a_problem() -> None:
    template = resolve_template(byte_tokenizer(), "alpaca")
    asked = (Message("user", "Weather?"), Message("assistant", "", tool_calls=(ToolCall("w", {}),)), Message("tool", "sunny"))
    problem = prompt(pair(asked), template)
    assert isinstance(problem, Problem) and problem.code.startswith("TEMPLATE_")
