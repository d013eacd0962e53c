"""Tokens and the loss mask, held against an independent way to the same labels.

The reference here shares no code with the product: transformers renders and encodes with offsets, answers are found by
searching their text, and a token is in the loss when one of its characters is in an answer or its turn-end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_support import MARKUP, TOYS, as_dicts, byte_tokenizer, chat, piece_tokenizer, real_tokenizers
from test_templates import EOS, OWN, TOKENIZERS, TURN_ENDS, _with_template

from finetuneflow.data.examples import Example, Message, Place, Problem, ToolCall
from finetuneflow.data.templates import BUILT_IN, Template, resolve_template
from finetuneflow.data.tokens import MASKED, Measure, Policy, TokenizeStats, Tokens, audit, measure, tokenize, tokenize_many
from finetuneflow.errors import DataError

LONG_CHAT = chat(
    ("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."),
    ("user", "Et de l'Italie ? 😀"), ("assistant", "Rome, bien sûr.\n\n- ancienne\n- belle"),
    ("user", "Merci"), ("assistant", "Je t'en prie !"),
)  # fmt: skip


def _rows(example: Example, template: Template, **policy: Any) -> list[Tokens]:
    result = tokenize(example, template, Policy(**policy))
    assert not isinstance(result, Problem), result
    return result


def _row(example: Example, template: Template, **policy: Any) -> Tokens:
    (row,) = _rows(example, template, **policy)
    return row


def _learned(row: Tokens, template: Template) -> str:
    return str(template.tokenizer.decode([label for label in row.labels if label != MASKED], skip_special_tokens=False))


def _reference(tokenizer: Any, source: str, example: Example, turn_end: str) -> tuple[list[int], list[int]]:
    """Ids and labels by transformers' rendering, a text search and offsets."""
    dicts = as_dicts(example)
    text = tokenizer.apply_chat_template(dicts, chat_template=source, tokenize=False, add_generation_prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [False] * len(text)
    position = 0
    for number, message in enumerate(dicts):
        content = message["content"].strip()
        begin = text.index(content, position)
        position = begin + len(content)
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(dicts[:number], chat_template=source, tokenize=False, add_generation_prompt=True)
        begin = len(prompt) if text.startswith(prompt) else begin
        after = text[position:]
        gap = len(after) - len(after.lstrip())
        if turn_end and after.startswith(turn_end, gap):
            position += gap + len(turn_end)
        learned[begin:position] = [True] * (position - begin)
    labels = [
        token if any(learned[start:end]) else MASKED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


# --- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_ids_and_labels_of_real_templates_equal_an_independent_reference(
    shared_data: Path, name: str, tokenizer_name: str
) -> None:
    tokenizer = real_tokenizers(shared_data)[tokenizer_name]
    path = shared_data / "chat_templates" / f"{name}.jinja"
    template = resolve_template(tokenizer, str(path), consent=True)
    turn_end = tokenizer.eos_token if TURN_ENDS[name] == EOS else TURN_ENDS[name]
    row = _row(LONG_CHAT, template)
    ids, labels = _reference(tokenizer, path.read_text(encoding="utf-8"), LONG_CHAT, turn_end)
    assert row.ids == ids
    assert row.labels == labels


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_the_loss_begins_exactly_where_the_inference_prompt_ends(shared_data: Path, name: str, tokenizer_name: str) -> None:
    template = resolve_template(
        real_tokenizers(shared_data)[tokenizer_name], str(shared_data / "chat_templates" / f"{name}.jinja"), consent=True
    )
    row = _row(chat(("user", "What is it?"), ("assistant", "Paris it is.")), template)
    first = next(number for number, label in enumerate(row.labels) if label != MASKED)
    assert row.ids[:first] == template.prompt_ids([Message("user", "What is it?")])


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_ids_and_labels_of_built_in_templates_equal_an_independent_reference(name: str, toy: str) -> None:
    tokenizer = TOYS[toy]()
    template = resolve_template(tokenizer, name)
    row = _row(LONG_CHAT, template)
    ids, labels = _reference(tokenizer, template.source, LONG_CHAT, template.stop)
    assert (row.ids, row.labels) == (ids, labels)
    assert row.turn_ends == 3


@pytest.mark.parametrize("toy", TOYS)
def test_spans_cover_all_tokens_in_order_and_agree_with_labels(toy: str) -> None:
    row = _row(LONG_CHAT, resolve_template(TOYS[toy](), "chatml"))
    assert [span.start for span in row.spans] == [0, *(span.end for span in row.spans[:-1])]
    assert row.spans[-1].end == len(row.ids) == len(row.labels)
    for span in row.spans:
        expected = row.ids[span.start : span.end] if span.kind in ("supervised", "end") else [MASKED] * (span.end - span.start)
        assert row.labels[span.start : span.end] == expected


def test_only_the_last_answer_is_learned_when_asked() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    assert _learned(_row(LONG_CHAT, template, supervise="last"), template) == "Je t'en prie !<|im_end|>"


def test_everything_is_learned_when_asked() -> None:
    row = _row(LONG_CHAT, resolve_template(byte_tokenizer(), "chatml"), supervise="all")
    assert row.labels == row.ids


def test_a_turn_of_weight_zero_is_context_and_its_turn_end_too() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    turns = (Message("user", "Q"), Message("assistant", "bad", weight=0.0), Message("user", "R"), Message("assistant", "good"))
    row = _row(replace(LONG_CHAT, messages=turns), template)
    assert _learned(row, template) == "good<|im_end|>"
    assert [span.kind for span in row.spans if span.message == 1] == ["masked", "masked"]


def test_weights_stay_with_their_turns_when_a_system_message_is_merged() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + OWN
    template = resolve_template(_with_template(piece_tokenizer(), source))
    turns = (
        Message("system", "S"),
        Message("user", "Q"),
        Message("assistant", "bad", weight=0.0),
        Message("user", "R"),
        Message("assistant", "good"),
    )
    assert _learned(_row(replace(LONG_CHAT, messages=turns), template), template) == "good</s>"


def test_the_end_of_a_turn_is_learned_although_pad_and_eos_are_one_token() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = _row(LONG_CHAT, resolve_template(tokenizer, "chatml"))
    assert row.labels.count(tokenizer.eos_token_id) == 3


def test_an_empty_answer_is_never_learned() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    result = tokenize(chat(("user", "Q"), ("assistant", "  \n")), template)
    assert isinstance(result, Problem) and result.code == "ROW_NO_ANSWER"
    row = _row(chat(("user", "Q"), ("assistant", ""), ("user", "R"), ("assistant", "A")), template)
    assert (_learned(row, template), row.unlocated) == ("A<|im_end|>", 1)


def test_a_tool_call_is_learned_with_its_markup_tokens() -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    turns = (
        Message("user", "Q"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"x": "y"}),)),
        Message("tool", "R"),
        Message("assistant", "A"),
    )
    row = _row(replace(LONG_CHAT, messages=turns), template)
    assert _learned(row, template) == '<tool_call>\n{"name": "f", "arguments": {"x": "y"}}\n</tool_call><|im_end|>A<|im_end|>'
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in row.labels


def test_a_document_is_learned_whole_and_ends() -> None:
    document = Example("text", Place("a.txt", 0), "text", text="The capital of France.")
    row = _row(document, resolve_template(piece_tokenizer()))
    tokenizer = piece_tokenizer()
    expected = [
        tokenizer.bos_token_id,
        *tokenizer("The capital of France.", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert row.ids == row.labels == expected
    assert _row(document, resolve_template(byte_tokenizer())).ids[0] != byte_tokenizer().bos_token_id


def test_of_a_preference_pair_the_chosen_answer_is_learned_and_a_bad_answer_never() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    pair = Example(
        "preference",
        Place("p", 0),
        "pair",
        (Message("user", "Q"),),
        chosen=(Message("assistant", "yes"),),
        rejected=(Message("assistant", "no"),),
    )
    assert _learned(_row(pair, template), template) == "yes<|im_end|>"
    rated = replace(LONG_CHAT, kind="unpaired", label=False)
    assert isinstance(tokenize(rated, template), Problem)


# --- people's text is plain text -------------------------------------------------------------------------------------


def _control_count(row: Tokens, tokenizer: Any, template: Template) -> int:
    control = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in template.source
    }
    return sum(1 for token_id in row.ids if token_id in control)


def _assert_forgery_is_plain(tokenizer: Any, template: Template) -> None:
    """A question with the name of every control token gives as many control tokens as a harmless one."""
    added = [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in template.source
    ]
    added = [content for content in added if content.strip()][:40]
    harmless = chat(("user", "What is it?"), ("assistant", "It is."), ("user", "And?"), ("assistant", "So."))
    for forged in (" ".join(added), "".join(added), f"x{added[-1]}"):
        example = chat(("user", f"What {forged} is it?"), ("assistant", "It is."), ("user", forged), ("assistant", "So."))
        row, plain = _row(example, template, max_length=100_000), _row(harmless, template)
        assert _control_count(row, tokenizer, template) == _control_count(plain, tokenizer, template)
        decoded = tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert forged.strip() in decoded
        assert row.turn_ends == plain.turn_ends and row.supervised == plain.supervised


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_control_tokens_in_a_question_are_plain_text_for_real_templates(
    shared_data: Path, name: str, tokenizer_name: str
) -> None:
    tokenizer = real_tokenizers(shared_data)[tokenizer_name]
    _assert_forgery_is_plain(
        tokenizer, resolve_template(tokenizer, str(shared_data / "chat_templates" / f"{name}.jinja"), consent=True)
    )


@pytest.mark.shared_data
def test_control_tokens_in_a_question_are_plain_text_for_minimind(shared_data: Path) -> None:
    tokenizer = real_tokenizers(shared_data)["minimind"]
    _assert_forgery_is_plain(tokenizer, resolve_template(tokenizer))


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_control_tokens_in_a_question_are_plain_text(name: str, toy: str) -> None:
    _assert_forgery_is_plain(TOYS[toy](), resolve_template(TOYS[toy](), name))


def test_control_tokens_in_tools_and_arguments_and_documents_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = (Message("user", "Q"), Message("assistant", "", tool_calls=(ToolCall("f", {"x": "a<|im_end|>b"}),)))
    tools = ({"type": "function", "function": {"name": "f", "description": "<|im_end|><|im_start|>system"}},)
    row = _row(replace(LONG_CHAT, messages=turns, tools=tools), template)
    assert row.ids.count(end) == 3
    assert "a<|im_end|>b" in _learned(row, template)
    document = _row(Example("text", Place("d", 0), "text", text="say <|im_end|> aloud"), template)
    assert document.ids.count(end) == 1


def test_markup_that_is_no_special_token_stays_markup_in_an_answer_and_not_in_a_question() -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    call = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert _row(chat(("user", "Q"), ("assistant", "<tool_call>x")), template).ids.count(call) == 1
    assert _row(chat(("user", "<tool_call>x"), ("assistant", "A")), template).ids.count(call) == 0
    assert "<think>" in MARKUP and "<think>" not in template.source  # the template does not write it: an ordinary token
    assert (
        _row(chat(("user", "<think>"), ("assistant", "A")), template).ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    )


_text = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([" ", "\n", "é", "😀", "<|im_end|>", "<|im_start|>user\n", "</s>", "<s>", "<tool_call>", "<0x41>"]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    question=_text,
    answer=_text,
    system=_text,
    toy=st.sampled_from(sorted(TOYS)),
    name=st.sampled_from(["chatml", "plain", "llama2"]),
)
def test_whatever_people_write_the_row_reads_back_and_holds_no_forged_token(
    question: str, answer: str, system: str, toy: str, name: str
) -> None:
    tokenizer = TOYS[toy]()
    template = resolve_template(tokenizer, name)
    result = tokenize(chat(("system", system), ("user", question), ("assistant", answer)), template, Policy(max_length=10_000))
    if isinstance(result, Problem):
        assert (
            not answer.strip()
            or not question.strip()
            or any(ord(char) >= 0x100000 or 0xD800 <= ord(char) < 0xE000 for char in system + question + answer)
        )
        return
    (row,) = result
    harmless = _row(chat(("system", "s" if system.strip() else ""), ("user", "q"), ("assistant", "a")), template)
    if question.strip():
        assert _control_count(row, tokenizer, template) - answer.count("<tool_call>") * (
            toy == "bytes" and "<tool_call>" in template.source
        ) == _control_count(harmless, tokenizer, template)
    if toy == "bytes":
        rendered = template.render([Message("system", system), Message("user", question), Message("assistant", answer)])
        assert tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == rendered
        assert _learned(row, template).strip() == (answer.strip() + (" " if name == "llama2" else "") + template.stop).strip()


def test_private_characters_reserved_for_finding_spans_are_a_problem_of_that_row_alone() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    results = list(tokenize_many([chat(("user", "a\U00108000"), ("assistant", "b")), LONG_CHAT], template))
    assert isinstance(results[0], Problem) and results[0].code == "TEXT_PRIVATE_CHARACTERS"
    assert isinstance(results[1], list)


# --- rows that are too long ------------------------------------------------------------------------------------------


def test_a_cut_row_keeps_its_beginning_and_gets_no_turn_end_it_did_not_reach() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    example = chat(("user", "Q"), ("assistant", "one two three four five six seven eight nine ten"))
    whole = _row(example, template)
    limit = len(whole.ids) - 6
    row = _row(example, template, max_length=limit)
    assert row.ids == whole.ids[:limit] and row.labels == whole.labels[:limit]
    assert row.turn_ends == 0 and byte_tokenizer().eos_token_id not in row.ids[-3:]
    assert (row.lost_tokens, row.lost_answer_tokens) == (6, whole.supervised - row.supervised)


def test_a_row_whose_answer_cannot_be_reached_is_left_out_and_counted() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    stats = TokenizeStats()
    (result,) = tokenize_many([chat(("user", "word " * 200), ("assistant", "A"))], template, Policy(max_length=32), stats=stats)
    assert isinstance(result, Problem) and result.code == "ROW_NO_ANSWER_LEFT"
    assert (stats.examples, stats.dropped, dict(stats.problems)) == (1, 1, {"ROW_NO_ANSWER_LEFT": 1})


def test_a_long_conversation_gives_up_its_oldest_exchanges_before_its_only_learned_answer() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    turns = [
        ("system", "S"),
        *[(role, f"{role} {n} " * 10) for n in range(8) for role in ("user", "assistant")],
        ("user", "last?"),
        ("assistant", "LAST"),
    ]
    row = _row(chat(*turns), template, supervise="last", max_length=160)
    assert _learned(row, template) == "LAST<|im_end|>"
    assert len(row.ids) <= 160 and row.lost_tokens > 0 and row.lost_answer_tokens == 0
    assert template.tokenizer.decode(row.ids).startswith("<|im_start|>system\nS<|im_end|>")


def test_dropping_says_how_long_the_row_was() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    result = tokenize(LONG_CHAT, template, Policy(max_length=20, overlong="drop"))
    length = len(_row(LONG_CHAT, template).ids)
    assert isinstance(result, Problem) and result.code == "ROW_TOO_LONG" and result.found.startswith(f"{length:,} tokens")


def test_split_parts_a_conversation_between_exchanges_and_loses_no_answer() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    example = chat(("system", "S"), *((message.role, message.content) for message in LONG_CHAT.messages))
    whole = _row(example, template)
    parts = _rows(example, template, max_length=len(whole.ids) - 5, overlong="split")
    assert [part.part for part in parts] == [0, 1]
    assert sum(part.supervised for part in parts) == whole.supervised and sum(part.lost_answer_tokens for part in parts) == 0
    assert all(
        template.tokenizer.decode(part.ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user") for part in parts
    )


def test_split_documents_keep_every_token_and_end_once() -> None:
    tokenizer = piece_tokenizer()
    document = Example("text", Place("a", 0), "text", text="The capital of France is Paris. " * 20)
    template = resolve_template(tokenizer)
    whole = _row(document, template)
    parts = _rows(document, template, max_length=50, overlong="split")
    assert [token for part in parts for token in part.ids[1:]] == whole.ids[1:]
    assert all(part.ids[0] == tokenizer.bos_token_id and len(part.ids) <= 50 for part in parts)
    assert [part.turn_ends for part in parts] == [0] * (len(parts) - 1) + [1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), limit=st.integers(12, 200), overlong=st.sampled_from(["cut", "split", "drop"]),
    supervise=st.sampled_from(["assistant", "last"]),
)  # fmt: skip
def test_no_row_is_ever_too_long_or_without_a_learned_token(
    lengths: list[int], limit: int, overlong: Any, supervise: Any
) -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    turns = [turn for length in lengths for turn in (("user", "word " * length), ("assistant", "answer " * (31 - length)))]
    result = tokenize(chat(*turns), template, Policy(supervise, limit, overlong))
    if not isinstance(result, Problem):
        assert result and all(len(row.ids) <= limit and row.supervised > 0 for row in result)


def test_measure_counts_what_a_limit_would_take() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    whole = _row(LONG_CHAT, template)
    (size,) = measure([LONG_CHAT], template, Policy(max_length=30))
    lost = sum(1 for label in whole.labels[30:] if label != MASKED)
    assert size == Measure(len(whole.ids), whole.supervised, lost)


def test_many_examples_come_out_in_order_whatever_becomes_of_them() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    examples = [
        replace(chat(("user", "Q"), ("assistant", "A" * (number % 3))), place=Place("f", number)) for number in range(1200)
    ]
    results = list(tokenize_many(examples, template))
    places = [result.place.row if isinstance(result, Problem) else result[0].place.row for result in results]
    assert places == list(range(1200))
    assert sum(isinstance(result, Problem) for result in results) == 400


# --- audits ----------------------------------------------------------------------------------------------------------


def test_a_set_without_any_learned_token_is_refused() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    stats = TokenizeStats()
    list(tokenize_many([chat(("user", "Q"), ("assistant", ""))] * 3, template, stats=stats))
    with pytest.raises(DataError) as caught:
        audit(stats, template)
    assert caught.value.code == "TRAINING_NO_SUPERVISED_TOKENS"


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    source = OWN.replace("</s>", " ")
    template = resolve_template(_with_template(piece_tokenizer(), source))
    with pytest.raises(DataError) as caught:
        audit(_rows(LONG_CHAT, template), template)
    assert caught.value.code == "TRAINING_NO_TURN_END"


def test_a_set_of_answers_all_cut_before_their_end_is_refused() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    rows = _rows(chat(("user", "Q"), ("assistant", "long " * 100)), template, max_length=40)
    with pytest.raises(DataError) as caught:
        audit(rows, template)
    assert caught.value.code == "TRAINING_NO_TURN_END"


def test_doubled_bos_is_refused() -> None:
    template = resolve_template(_with_template(piece_tokenizer(), "<s>{{ bos_token }}" + OWN))
    with pytest.raises(DataError) as caught:
        audit(_rows(LONG_CHAT, template), template)
    assert caught.value.code == "TRAINING_DOUBLED_BOS"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_tokenizer_that_adds_bos_and_a_template_that_writes_it_give_one(name: str) -> None:
    tokenizer = piece_tokenizer()
    row = _row(LONG_CHAT, resolve_template(tokenizer, name))
    assert row.ids[0] == tokenizer.bos_token_id and row.ids[1] != tokenizer.bos_token_id


def test_a_sound_set_passes_with_its_losses_named() -> None:
    template = resolve_template(byte_tokenizer(), "chatml")
    stats = TokenizeStats()
    examples = [LONG_CHAT, chat(("user", "Q"), ("assistant", "long " * 100)), chat(("user", "Q"), ("assistant", ""))]
    list(tokenize_many(examples, template, Policy(max_length=120), stats=stats))
    codes = {finding.code for finding in audit(stats, template)}
    assert {"ROWS_DROPPED", "ANSWERS_CUT"} <= codes


def test_a_length_that_holds_nothing_is_a_wrong_setting() -> None:
    with pytest.raises(DataError, match="max_length"):
        tokenize(LONG_CHAT, resolve_template(byte_tokenizer(), "chatml"), Policy(max_length=1))
