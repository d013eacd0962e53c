"""Shapes: every common row form becomes the right example; every case that cannot be learned from is a named problem."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuneflow.data.examples import (
    NOTES,
    Example,
    Mapping,
    Message,
    Place,
    Problem,
    ToolCall,
    to_canonical,
    to_examples,
    write_canonical,
)
from finetuneflow.data.sources import Row, read_rows
from finetuneflow.errors import CODES, DataError

U, A, S = (lambda text: Message("user", text)), (lambda text: Message("assistant", text)), (lambda text: Message("system", text))


def convert(*fields: dict[str, Any], mapping: Mapping | None = None, **options: Any) -> list[Example | Problem]:
    items = list(to_examples([Row(Place("f", i, i + 1), row) for i, row in enumerate(fields)], mapping, **options))
    for item in items:
        assert (item.code in CODES and item.found and item.hint) if isinstance(item, Problem) else set(item.notes) <= NOTES.keys()
    return items


def one(fields: dict[str, Any], **options: Any) -> Example:
    [item] = convert(fields, **options)
    assert isinstance(item, Example), item
    return item


def problem(fields: dict[str, Any], **options: Any) -> Problem:
    [item] = convert(fields, **options)
    assert isinstance(item, Problem), item
    return item


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


# --- prompts with answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "shape", "prompt"),
    [
        ({"instruction": "i", "input": "x", "output": "a"}, "instruction+input+output", "i\n\nx"),
        ({"instruction": "i", "input": "", "output": "a"}, "instruction+input+output", "i"),
        ({"instruction": "i", "output": "a"}, "instruction+output", "i"),
        ({"instruction": "i", "response": "a"}, "instruction+response", "i"),
        ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, "instruction+context+response", "i\n\nc"),
        ({"question": "q", "answer": "a"}, "question+answer", "q"),
        ({"title": "t", "question": "q", "answer": "a"}, "title+question+answer", "t\n\nq"),
        ({"context": "c", "question": "q", "answer": "a"}, "context+question+answer", "c\n\nq"),
        (
            {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}},
            "context+question+answers",
            "c\n\nq",
        ),
        ({"prompt": "p", "completion": "a"}, "prompt+completion", "p"),
        ({"prompt": "p", "response": "a"}, "prompt+response", "p"),
        ({"prompt": "p", "answer": "a"}, "prompt+answer", "p"),
        ({"query": "q", "response": "a"}, "query+response", "q"),
        ({"input": "q", "output": "a"}, "input+output", "q"),
        ({"prompt": "p", "canonical_solution": "a", "test": "t"}, "prompt+canonical_solution", "p"),
        ({"Question": "q", "Best Answer": "a", "Correct Answers": "a; b"}, "question+best_answer", "q"),
        ({"instruction": "i", "prompt": "rendered i", "output": "a"}, "instruction+output", "i"),
        ({"instruction": "i", "question": "q", "answer": "a"}, "instruction+question+answer", "i\n\nq"),
    ],
)
def test_instruction_rows_and_their_synonyms(fields: dict[str, Any], shape: str, prompt: str) -> None:
    example = one(fields)
    assert (example.kind, example.shape, example.messages) == ("chat", shape, (U(prompt), A("a")))


def test_shapes_may_be_mixed_in_one_file() -> None:
    items = convert(
        {"question": "q", "answer": "a"}, {"text": "t"}, {"messages": turns(("user", "q"), ("assistant", "a"))}, {"nonsense": 1}
    )
    assert [item.shape for item in items] == ["question+answer", "text", "messages", ""]


def test_system_and_history_columns_become_turns() -> None:
    example = one({"system": "s", "history": [["q0", "a0"]], "instruction": "q", "output": "a"})
    assert example.messages == (S("s"), U("q0"), A("a0"), U("q"), A("a"))


@pytest.mark.parametrize(
    "marker",
    ["<noinput>", "noinput", "No input", "No Input.", "<no input>", "< noinput >", '"<noinput>"', "`<noinput>`", "(noinput)", "N/A", "n/a.", "None", "<none>", "null",
     "No input required", "Aucune", "pas d'entrée"],
)  # fmt: skip
def test_no_input_in_many_spellings(marker: str) -> None:
    example = one({"instruction": "i", "input": marker, "output": "a"})
    assert example.messages[0].content == "i" and example.notes == ("no_input_marker",)


@pytest.mark.parametrize(
    "given_input", ["Nonet", "no input devices were found", "Inputs: none of these", "Nobody", "N/A is a chemical formula"]
)
def test_an_input_that_only_resembles_a_marker_is_kept(given_input: str) -> None:
    assert one({"instruction": "i", "input": given_input, "output": "a"}).messages[0].content == f"i\n\n{given_input}"


ALPACA = "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\nDo it.\n\n### Input:\n{}\n\n### Response:"


def test_an_applied_alpaca_prompt_is_taken_apart_or_kept_with_a_note() -> None:
    assert one({"prompt": ALPACA.format("x"), "completion": "a</s>"}).messages == (U("Do it.\n\nx"), A("a"))
    assert one({"text": ALPACA.format("<noinput>") + " a"}).messages == (U("Do it."), A("a"))
    own = "You are a pirate.\n### Instruction:\nDo it.\n### Response:"
    example = one({"prompt": own, "completion": "a"})
    assert example.messages[0].content == own and example.notes == ("alpaca_prompt_kept",)


def test_placeholders_are_reported_and_code_braces_are_not() -> None:
    assert one({"question": "Who?", "answer": "I am {{name}} of {{ author }}."}).notes == ("placeholder",)
    assert one({"question": "LaTeX?", "answer": "\\frac{{1}}{{2}} and {{}}"}).notes == ()


def test_answers_keep_their_white_space() -> None:
    assert one({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}).messages[1].content == "    return 1\n"


def test_self_instruct_gives_one_example_per_instance_in_one_group() -> None:
    items = convert({"id": "t1", "instruction": "i", "instances": [{"input": "x", "output": "a"}, {"input": "", "output": "b"}]})
    assert [item.messages for item in items if isinstance(item, Example)] == [(U("i\n\nx"), A("a")), (U("i"), A("b"))]
    assert {item.group for item in items if isinstance(item, Example)} == {"t1"}


def test_texts_under_their_names() -> None:
    for name in ("text", "content", "document", "string"):
        example = one({name: "some text", "id": 3})
        assert (example.kind, example.shape, example.text) == ("text", name, "some text")
    assert problem({"text": " \n"}).code == "ROW_EMPTY_TEXT"


# --- conversations ---------------------------------------------------------------------------------


def test_openai_messages_with_parts_weights_tools_and_null_content() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    example = one(
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "q "}, {"type": "text", "value": "more"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                {"role": "assistant", "content": "two", "loss_weight": 0.5},
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        }
    )
    assert example.shape == "messages" and example.tools == ({"type": "function", "function": {"name": "add"}},)
    assert example.messages == (
        S("s"), U("q more"), Message("assistant", "", (ToolCall("add", {"a": 1}, "c1"),)),
        Message("tool", "2", tool_call_id="c1"), Message("assistant", "two", weight=0.5),
    )  # fmt: skip


def test_sharegpt_roles_calls_and_tools_as_json_text() -> None:
    said = [
        ("system", "s"),
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "r"),
        ("gpt", "a"),
        ("user", "q2"),
        ("assistant", "a2"),
    ]
    example = one({"conversations": [{"from": role, "value": value} for role, value in said], "tools": '[{"name": "f"}]'})
    assert example.shape == "sharegpt" and example.tools == ({"name": "f"},)
    assert [message.role for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert example.messages[2].tool_calls == (ToolCall("f", {"x": 1}),)


def test_a_conversation_in_a_table_cell_is_parsed() -> None:
    assert one({"messages": json.dumps(turns(("user", "q"), ("assistant", "a")))}).messages == (U("q"), A("a"))
    assert problem({"messages": "not json"}).code == "ROW_WRONG_TYPE"


@pytest.mark.parametrize(
    ("written", "kept", "note"),
    [
        ([("user", "q"), ("assistant", "a"), ("user", "bye")], (U("q"), A("a")), "ends_without_answer"),
        ([("user", "q"), ("assistant", "a"), ("assistant", " ")], (U("q"), A("a")), "same_role_twice"),
        ([("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "")], (U("q"), A("a")), "empty_answer_dropped"),
        (
            [("user", "q"), ("assistant", ""), ("user", "r"), ("assistant", "a")],
            (U("q"), Message("assistant", "", weight=0.0), U("r"), A("a")),
            "empty_answer_unsupervised",
        ),
        ([("user", "q"), ("user", "r"), ("assistant", "a")], (U("q\n\nr"), A("a")), "same_role_twice"),
        ([("user", "q"), ("assistant", "a"), ("assistant", "b")], (U("q"), A("a\n\nb")), "same_role_twice"),
        ([("assistant", "hello"), ("user", "q"), ("assistant", "a")], (U("q"), A("a")), "starts_with_assistant"),
        ([("system", " "), ("user", "q"), ("assistant", "a")], (U("q"), A("a")), "empty_system_dropped"),
        ([("user", "q"), ("system", "s"), ("assistant", "a")], (U("q"), S("s"), A("a")), "system_in_the_middle"),
        (
            [("user", "q"), ("assistant", "a"), ("user", ""), ("assistant", "b")],
            (U("q"), A("a"), U(""), A("b")),
            "empty_user_turn",
        ),
    ],
)
def test_repairs_of_conversations_are_made_and_noted(
    written: list[tuple[str, str]], kept: tuple[Message, ...], note: str
) -> None:
    example = one({"messages": turns(*written)})
    assert example.messages == kept and note in example.notes


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ([("user", "q"), ("assistant", "")], "ROW_EMPTY_ANSWER"),
        ([("user", "q"), ("assistant", None)], "ROW_EMPTY_ANSWER"),
        ([("user", "q"), ("assistant", "\n \t")], "ROW_EMPTY_ANSWER"),
        ([("user", "q")], "ROW_NO_ASSISTANT"),
        ([("system", "s")], "ROW_NO_ASSISTANT"),
        ([("assistant", "a")], "ROW_NO_PROMPT"),
        ([("system", "s"), ("assistant", "a")], "ROW_NO_PROMPT"),
        ([("user", "  "), ("assistant", "a")], "ROW_NO_PROMPT"),
        ([("assistant", "a"), ("user", "q")], "ROW_NO_ASSISTANT"),
        ([("user", ""), ("assistant", "a"), ("user", "q")], "ROW_NO_PROMPT"),
        ([("user", "q"), ("bot", "a")], "ROW_UNKNOWN_ROLE"),
        ([("user", "q"), (7, "a")], "ROW_UNKNOWN_ROLE"),
        ([("user", "q"), ("tool", "r"), ("assistant", "a")], "ROW_BAD_TOOL_CALL"),
        ([("user", "q"), ("assistant", {"a": 1})], "ROW_WRONG_TYPE"),
        ([("user", "q"), ("assistant", True)], "ROW_WRONG_TYPE"),
        ([("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a")], "ROW_MEDIA"),
        ([("user", [{"type": "text"}]), ("assistant", "a")], "ROW_WRONG_TYPE"),
    ],
)
def test_conversations_that_cannot_be_learned_are_rejected(written: list[tuple[Any, Any]], code: str) -> None:
    assert problem({"messages": turns(*written)}).code == code


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("bot", "assistant"),
        ("assistent", "assistant"),
        ("usr", "user"),
        ("sytem", "system"),
        ("customer", "user"),
        ("AI", "assistant"),
    ],
)
def test_an_unknown_role_names_the_one_meant(role: str, meant: str) -> None:
    assert problem({"messages": turns(("user", "q"), (role, "a"))}).hint == f"role `{role}`: did you mean `{meant}`?"


@pytest.mark.parametrize(
    "call",
    [{"function": {"name": "f", "arguments": "{broken"}}, {"function": {"arguments": "{}"}}, {"name": "", "arguments": {}}, {"name": "f", "arguments": "[1]"},
     {"name": "f", "arguments": '{"a": NaN}'}, "half a call", 7],
)  # fmt: skip
def test_half_a_tool_call_is_rejected(call: Any) -> None:
    messages = [*turns(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert problem({"messages": messages}).code == "ROW_BAD_TOOL_CALL"


def test_a_result_for_an_unknown_call_is_rejected_and_a_call_without_result_noted() -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": {}}]}
    other = {"role": "tool", "tool_call_id": "c2", "content": "r"}
    assert problem({"messages": [*turns(("user", "q")), calling, other, *turns(("assistant", "a"))]}).code == "ROW_BAD_TOOL_CALL"
    assert (
        "tool_call_without_result"
        in one({"messages": [*turns(("user", "q")), calling, *turns(("user", "r"), ("assistant", "a"))]}).notes
    )
    assert one({"messages": [*turns(("user", "q")), calling]}).messages[-1].tool_calls


def test_no_weight_left_is_rejected() -> None:
    silent = {"role": "assistant", "content": "a", "weight": 0}
    assert problem({"messages": [*turns(("user", "q")), silent]}).code == "ROW_NOTHING_SUPERVISED"
    assert problem({"messages": [*turns(("user", "q")), {**silent, "weight": "much"}]}).code == "ROW_WRONG_TYPE"


def test_images_are_refused_with_the_way_out() -> None:
    found = problem({"messages": turns(("user", "<image>Who?"), ("assistant", "a")), "images": ["1.jpg"]})
    assert found.code == "ROW_MEDIA" and "not supported" in found.hint
    assert one({"messages": turns(("user", "q"), ("assistant", "a")), "images": []}).kind == "chat"


# --- trees -----------------------------------------------------------------------------------------

TREE = {
    "message_id": "m", "text": "q", "role": "prompter",
    "replies": [
        {"message_id": "b", "text": "second", "role": "assistant", "rank": 1, "replies": []},
        {"message_id": "a", "text": "first", "role": "assistant", "rank": 0, "replies": [
            {"message_id": "c", "text": "r", "role": "prompter", "rank": None, "replies": [
                {"message_id": "d", "text": "last", "role": "assistant", "replies": []}]}]},
        {"message_id": "x", "text": "deleted", "role": "assistant", "rank": -1, "deleted": True, "replies": []},
    ],
}  # fmt: skip


def test_a_tree_gives_its_best_ranked_path_or_all_of_them() -> None:
    row = {"message_tree_id": "m", "prompt": TREE}
    example = one(row)
    assert example.messages == (U("q"), A("first"), U("r"), A("last")) and example.group == "m" and example.shape == "oasst-tree"
    paths = [item.messages for item in convert(row, tree_paths="all") if isinstance(item, Example)]
    assert paths == [(U("q"), A("first"), U("r"), A("last")), (U("q"), A("second"))]


def flat(node: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {key: value for key, value in node.items() if key != "replies"} | {"parent_id": parent}
    return [row, *[inner for reply in node["replies"] for inner in flat(reply, node["message_id"])]]


def test_flat_parent_linked_rows_give_the_same_path_as_the_tree() -> None:
    other = {
        "message_id": "z",
        "text": "q2",
        "role": "prompter",
        "replies": [{"message_id": "y", "text": "a2", "role": "assistant", "replies": []}],
    }
    items = convert(*flat(TREE), *flat(other), {"question": "q3", "answer": "a3"})
    assert [item.messages for item in items if isinstance(item, Example)] == [
        (U("q"), A("first"), U("r"), A("last")),
        (U("q2"), A("a2")),
        (U("q3"), A("a3")),
    ]
    assert items[0].shape == "oasst-flat" and items[0].place.row == 0


def test_a_flat_row_without_its_parent_and_a_tree_without_answer_are_problems() -> None:
    orphan = {"message_id": "o", "parent_id": "gone", "text": "a", "role": "assistant"}
    alone = {"message_id": "r", "parent_id": None, "text": "q", "role": "prompter"}
    items = convert(alone, orphan)
    assert sorted(item.code for item in items if isinstance(item, Problem)) == ["ROW_BAD_TREE", "ROW_NO_ASSISTANT"]


# --- preferences and labels ------------------------------------------------------------------------

HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("fields", "shape", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference-prompt", (U("q"),)),
        ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, "preference-prompt", (S("s"), U("q"))),
        ({"prompt": turns(("user", "q")), "chosen": turns(("assistant", "good")), "rejected": turns(("assistant", "bad"))}, "preference-prompt", (U("q"),)),
        ({"prompt": "q", "chosen": turns(("user", "q"), ("assistant", "good")), "rejected": turns(("user", "q"), ("assistant", "bad"))}, "preference-transcripts", (U("q"),)),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
         "preference-conversations", (U("q"),)),
        ({"chosen": turns(("user", "q"), ("assistant", "good")), "rejected": turns(("user", "q"), ("assistant", "bad"))}, "preference-transcripts", (U("q"),)),
        ({"chosen": HH.format("good"), "rejected": HH.format("bad")}, "hh-rlhf", (U("q"), A("a"), U("r"))),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"}, "preference-prompt", (U("q"),)),
    ],
)  # fmt: skip
def test_preference_pairs_in_their_forms(fields: dict[str, Any], shape: str, prompt: tuple[Message, ...]) -> None:
    example = one(fields)
    assert (example.kind, example.shape, example.messages) == ("preference", shape, prompt)
    assert [message.content.strip() for message in (*example.chosen, *example.rejected)] == ["good", "bad"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "ROW_BAD_PREFERENCE"),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, "ROW_EMPTY_ANSWER"),
        ({"chosen": "good", "rejected": "bad"}, "ROW_NO_PROMPT"),
        ({"chosen": HH.format("x"), "rejected": HH.format("x")}, "ROW_BAD_PREFERENCE"),
        ({"chosen": HH.format("x"), "rejected": "\n\nHuman: other\n\nAssistant: y"}, "ROW_BAD_PREFERENCE"),
        ({"chosen": HH.format("x"), "rejected": HH.format("")}, "ROW_EMPTY_ANSWER"),
        ({"prompt": "q", "chosen": 1, "rejected": 2}, "ROW_WRONG_TYPE"),
        ({"prompt": turns(("user", "q"), ("assistant", "a")), "chosen": "x", "rejected": "y"}, "ROW_BAD_PREFERENCE"),
        ({"chosen": HH.format("x"), "rejected": "\n\nHuman: q\n\nAssistant: a"}, "ROW_BAD_PREFERENCE"),
    ],
)
def test_pairs_that_teach_nothing_are_rejected(fields: dict[str, Any], code: str) -> None:
    assert problem(fields).code == code


@pytest.mark.parametrize(
    ("label", "meaning"), [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False)]
)
def test_kto_labels(label: Any, meaning: bool) -> None:
    for fields in ({"prompt": "q", "completion": "a"}, {"messages": turns(("user", "q"), ("assistant", "a"))}):
        example = one({**fields, "label": label})
        assert (example.kind, example.label, example.messages) == ("unpaired", meaning, (U("q"), A("a")))
    assert one({"instruction": "q", "output": "a", "kto_tag": label}).label is meaning


def test_a_label_that_is_neither_true_nor_false_is_rejected() -> None:
    assert problem({"prompt": "q", "completion": "a", "label": 3}).code == "ROW_BAD_LABEL"
    assert one({"text": "t", "label": 3}).kind == "text"


# --- rows that are recognised but hold nothing to learn ----------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "shape"),
    [
        ({"question": [[{"role": "user", "content": "q"}]], "function": [{}], "id": 1}, "ROW_NO_ANSWER", "question+function"),
        ({"id": "x", "ground_truth": [{}]}, "ROW_NO_PROMPT", "ground_truth"),
        ({"question_id": 1, "category": "c", "turns": ["q1", "q2"]}, "ROW_NO_ANSWER", "turns"),
        ({"question_id": 1, "choices": [{"turns": ["a"]}]}, "ROW_NO_PROMPT", "choices"),
        (
            {"name": "pair", "type": "pairwise", "system_prompt": "s", "prompt_template": "t"},
            "ROW_NOT_AN_EXAMPLE",
            "judge-prompts",
        ),
        ({"question": "q", "answer": None}, "ROW_NO_ANSWER", "question"),
        ({"question": "q", "answer": ""}, "ROW_EMPTY_ANSWER", "question+answer"),
        ({"question": "", "answer": "a"}, "ROW_NO_PROMPT", "question+answer"),
        ({"answer": "a"}, "ROW_NO_PROMPT", "answer"),
        ({"role": "user", "content": "q"}, "ROW_LONE_MESSAGE", "lone-message"),
        ({"messages": []}, "ROW_NO_MESSAGES", "messages"),
        ({"messages": ["a", "b"]}, "ROW_WRONG_TYPE", "messages"),
        ({}, "ROW_UNKNOWN_SHAPE", ""),
        ({"foo": 1, "bar": 2}, "ROW_UNKNOWN_SHAPE", ""),
    ],
)
def test_rows_without_anything_to_learn_say_so(fields: dict[str, Any], code: str, shape: str) -> None:
    found = problem(fields)
    assert (found.code, found.shape) == (code, shape)


def test_an_unknown_column_names_the_one_meant_and_a_wrapped_list_its_key() -> None:
    assert "did you mean `question`" in problem({"quesion": "q", "anser": "a"}).hint
    assert "under `rows`" in problem({"rows": [{"question": "q"}], "version": 1}).hint


# --- type drift (the same column, other types on other lines) ----------------------------------------


@pytest.mark.parametrize(
    ("value", "text", "note"),
    [
        ("4", "4", ()),
        (4, "4", ("number_as_text",)),
        (4.5, "4.5", ("number_as_text",)),
        (["4"], "4", ("list_of_one",)),
        (["4", "5"], "4", ("first_of_several",)),
    ],
)
def test_drifting_types_are_mapped_and_noted(value: Any, text: str, note: tuple[str, ...]) -> None:
    example = one({"question": "2+2?", "answer": value})
    assert example.messages[1].content == text and example.notes == note


@pytest.mark.parametrize("value", [{"a": 1}, [], [1, 2], True, [["a"]], {"text": []}])
def test_types_that_are_no_text_are_problems(value: Any) -> None:
    assert problem({"question": "q", "answer": value}).code in ("ROW_WRONG_TYPE", "ROW_EMPTY_ANSWER")


# --- mapping ---------------------------------------------------------------------------------------


def test_an_explicit_mapping_reads_any_columns() -> None:
    row = {"Titel": "t", "Frage": "q", "Antwort": "a", "Rolle": "s", "Quelle": "doc1", "gut": 1, "schlecht": "b"}
    example = one(row, mapping=Mapping(prompt="{Titel}: {Frage}", answer="Antwort", system="Rolle", group="Quelle"))
    assert example.messages == (S("s"), U("t: q"), A("a")) and (example.shape, example.group) == ("mapped", "doc1")
    assert one(row, mapping=Mapping(text="{Frage} {Antwort}")).text == "q a"
    assert one(row, mapping=Mapping(prompt="Frage", chosen="Antwort", rejected="schlecht")).kind == "preference"
    assert one(row, mapping=Mapping(prompt="Frage", answer="Antwort", label="gut")).label is True
    chat = {"dialog_turns": [{"speaker": "human", "text": "q"}, {"speaker": "gpt", "text": "a"}]}
    assert one(chat, mapping=Mapping(messages="dialog_turns")).messages == (U("q"), A("a"))


def test_a_mapping_evaluates_nothing() -> None:
    assert problem({"a": "x"}, mapping=Mapping(text="{a.__class__}")).code == "ROW_MISSING_COLUMN"
    assert one({"a": "{b}", "b": "y"}, mapping=Mapping(text="{a}{b}")).text == "{b}y"


def test_a_mapping_to_a_missing_column_or_with_too_little_is_named() -> None:
    assert "`Answer`" in problem({"Question": "q", "Answer": "a"}, mapping=Mapping(prompt="Question", answer="Anser")).hint
    with pytest.raises(DataError) as caught:
        convert({"a": "b"}, mapping=Mapping(prompt="a"))
    assert caught.value.code == "DATASET_BAD_MAPPING"


# --- canonical form --------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "bot"])
calls = st.fixed_dictionaries(
    {"name": text, "arguments": st.dictionaries(text, st.integers() | text, max_size=2)}, optional={"id": text}
)
message = st.fixed_dictionaries(
    {
        "role": roles,
        "content": text
        | st.none()
        | st.integers()
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=2),
    },
    optional={
        "tool_calls": st.lists(calls, max_size=2),
        "weight": st.sampled_from([0, 1, 0.5]),
        "tool_call_id": text,
        "name": text,
    },
)
conversation = st.lists(message, max_size=6)
answer = text | st.integers() | st.none()
known_rows = st.one_of(
    st.fixed_dictionaries(
        {"instruction": answer, "output": answer}, optional={"input": answer, "system": answer, "group": answer}
    ),
    st.fixed_dictionaries(
        {"messages": conversation},
        optional={"tools": st.lists(st.dictionaries(text, text, max_size=1), max_size=1), "label": st.booleans()},
    ),
    st.fixed_dictionaries(
        {"chosen": conversation | text, "rejected": conversation | text}, optional={"prompt": text | conversation}
    ),
    st.fixed_dictionaries({"text": text}),
    st.fixed_dictionaries({"prompt": text, "completion": text, "label": st.booleans()}),
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3),
    max_leaves=8,
)
known_names = st.sampled_from([
    "messages", "conversations", "turns", "prompt", "question", "instruction", "input", "output", "answer", "chosen",
    "rejected", "label", "kto_tag", "text", "content", "instances", "replies", "message_id", "parent_id", "role", "tools",
    "system", "history", "images", "kind", "shape", "notes", "choices", "function", "group", "title", "context", "answers",
    "message_tree_id",
])  # fmt: skip
wild_rows = st.dictionaries(known_names, any_json | conversation, max_size=5)
property_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@property_settings
@given(st.lists(wild_rows, max_size=4))
def test_no_row_of_json_crashes(rows: list[dict[str, Any]]) -> None:
    for item in convert(*rows, tree_paths="all"):
        if isinstance(item, Example) and item.kind == "chat":
            learned = [turn for turn in item.messages if turn.role == "assistant" and turn.weight > 0]
            assert learned and all(turn.content.strip() or turn.tool_calls for turn in learned)
            assert item.messages[-1].role == "assistant"


@property_settings
@given(st.lists(known_rows, min_size=1, max_size=5))
def test_canonical_json_lines_come_back_equal(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    examples = [item for item in convert(*rows) if isinstance(item, Example)]
    path = tmp_path / "examples.jsonl"
    assert write_canonical(examples, path) == (len(examples), 0)
    if not examples:
        return
    nowhere = Place("", 0)
    again = [replace(item, place=nowhere) for item in to_examples(read_rows(path)) if isinstance(item, Example)]
    assert again == [replace(item, place=nowhere) for item in examples]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    [
        "llamafactory/glaive_toolcall_en_demo.json",
        "llamafactory/dpo_en_demo.json",
        "hh_rlhf/harmless-base-test.rows0-499.jsonl.gz",
        "llamafactory/identity.json",
        "mlx/lora_test.jsonl",
    ],
)
def test_canonical_form_of_real_files_comes_back_equal(tmp_path: Path, shared_data: Path, name: str) -> None:
    items = list(to_examples(read_rows(shared_data / name)))
    written, rejected = write_canonical(items, tmp_path / "e.jsonl", problems_path=tmp_path / "p.jsonl")
    examples = [item for item in items if isinstance(item, Example)]
    again = list(to_examples(read_rows(tmp_path / "e.jsonl")))
    assert written == len(examples) == len(again)
    assert [to_canonical(item) for item in again if isinstance(item, Example)] == [to_canonical(item) for item in examples]
    beside = tmp_path / "p.jsonl"
    assert rejected == len(items) - written and beside.exists() is (rejected > 0)
    assert not rejected or len(beside.read_text().splitlines()) == rejected


def test_a_canonical_file_edited_badly_gives_problems() -> None:
    good = to_canonical(one({"question": "q", "answer": "a"}))
    assert problem({**good, "messages": turns(("user", "q"), ("assistant", ""))}).code == "ROW_EMPTY_ANSWER"
    assert problem({**good, "kind": "poem"}).code == "ROW_UNKNOWN_SHAPE"
    assert problem({**good, "notes": ["made up"]}).code == "ROW_WRONG_TYPE"


def test_a_failed_write_leaves_no_file_behind(tmp_path: Path) -> None:
    def failing() -> Any:
        yield one({"question": "q", "answer": "a"})
        raise RuntimeError("reader failed")

    with pytest.raises(RuntimeError):
        write_canonical(failing(), tmp_path / "e.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["user\x1b[31m", "<script>", "\u202eresu"])
def test_hostile_names_in_a_row_are_escaped_in_its_problem(role: str) -> None:
    found = problem({"messages": turns(("user", "q"), (role, "a"))})
    assert found.found.isprintable() and found.hint.isprintable()


# --- hostile rows: time stays linear -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "### Instruction:\n" + "\n### Input:\n" * 60_000},
        {"text": "### Instruction:" + "\n" * 500_000},
        {"instruction": "i", "input": "no" + " " * 500_000, "output": "a"},
        {"text": "{{" * 300_000},
        {"text": "\n\nHuman: " * 60_000 + "Assistant:"},
        {"messages": [{"role": "user", "content": "u"}] * 100_000 + [{"role": "assistant", "content": "a"}]},
        {
            "messages": turns(("user", "u"), ("assistant", "<tool_call>"))
            + [{"role": "tool", "content": "r"}] * 50_000
            + turns(("assistant", "a"))
        },
    ],
)
def test_rows_made_to_be_slow_are_read_in_time(fields: dict[str, Any]) -> None:
    started = time.process_time()
    convert(fields)
    assert time.process_time() - started < 2


def test_a_flat_tree_without_end_is_held_in_bounded_memory() -> None:
    def rows() -> Any:
        for i in range(30_000):
            message = {
                "message_id": str(i),
                "parent_id": str(i - 1) if i else None,
                "text": "t",
                "role": "assistant" if i % 2 else "prompter",
            }
            yield Row(Place("f", i), message)

    items = list(to_examples(rows()))
    assert sum(isinstance(item, Example) for item in items) == 1
    assert sum(isinstance(item, Problem) and item.code == "ROW_BAD_TREE" for item in items) == 20_000


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_half_a_preference_pair_is_told_what_it_lacks(side: str) -> None:
    (problem,) = to_examples([Row(Place("f", 0), {side: "x"})])
    assert isinstance(problem, Problem) and "has both `chosen` and `rejected`" in problem.hint
