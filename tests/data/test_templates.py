"""Templates: the sandbox holds, the right one is chosen, and answers are found in all of them."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from template_support import TOYS, as_dicts, byte_tokenizer, chat, piece_tokenizer, real_tokenizers

from finetuneflow.data.examples import Message, ToolCall
from finetuneflow.data.sandbox import CompiledTemplate, TemplateRefusal
from finetuneflow.data.templates import BUILT_IN, resolve_template
from finetuneflow.errors import CODES, DataError

# --- the sandbox -----------------------------------------------------------------------------------------------------

DOUBLE = "{% set x = 'aaaaaaaaaa' %}"
COSTLY = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "list times a number": "{{ (range(100000) | list * 100000) | length }}",
    "doubling by ~": DOUBLE + "{% set x = x ~ x %}" * 60,
    "doubling by +": DOUBLE + "{% set x = x + x %}" * 60,
    "doubling by set blocks": DOUBLE + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by lists": "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubling by dicts": "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "doubling by macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{{ " + "m(" * 60 + "'aaaaaaaa'" + ")" * 60 + " }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "padding by a method": "{{ 'a'.ljust(10**9) }}",
    "padding by a filter": "{{ 'a' | center(10**9) }}",
    "padding by %": "{{ '%1000000000d' % 1 }}",
    "padding by format": "{{ '{:>1000000000}'.format(1) }}",
    "padding by a computed format": "{{ '{:>{}}'.format(1, 10**9) }}",
    "replace in a long text": "{% set a = 'a' * 4000000 %}{{ a.replace('', a) }}",
    "replace by a filter": "{% set a = 'a' * 4000000 %}{{ a | replace('', a) }}",
    "join of a generator": "{{ range(100000) | map('string') | join('a' * 1000000) }}",
    "join by a method": "{{ ('a' * 1000000).join(['x'] * 90000) }}",
    "indent": "{% set a = '\\n' * 4000000 %}{{ a | indent(9999) }}",
    "a power": "{{ (10**400000000) | string | length }}",
    "a loop over its own results": "{% for i in range(1000) recursive %}{{ loop(range(1000)) }}{% endfor %}",
}


@pytest.mark.parametrize("source", COSTLY.values(), ids=COSTLY.keys())
def test_a_template_that_grows_without_bound_is_stopped_in_seconds(source: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        CompiledTemplate(source, "hostile").render(messages=[])
    assert caught.value.code == "TEMPLATE_TOO_COSTLY"
    assert time.process_time() - started < 8


@pytest.mark.parametrize(
    "source",
    [
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    with pytest.raises(DataError) as caught:
        text = CompiledTemplate(source, "hostile").render(messages=[{"role": "user", "content": "x"}])
        assert "class" not in text and "uid=" not in text and "0x" not in text
        raise DataError("TEMPLATE_UNSAFE", "harmless: it wrote nothing")
    assert caught.value.code in ("TEMPLATE_UNSAFE", "TEMPLATE_INVALID", "TEMPLATE_REFUSED")


@pytest.mark.parametrize(
    "source", ["{% include 'a' %}", "{% import 'a' as b %}", "{% extends 'a' %}", "{% for %}", "{{ 'a' ", "{{ a | nofilter }}"]
)
def test_a_template_that_is_no_chat_template_is_refused_when_compiled(source: str) -> None:
    with pytest.raises(DataError) as caught:
        CompiledTemplate(source, "broken")
    assert caught.value.code == "TEMPLATE_INVALID"


def test_a_template_larger_than_any_real_one_is_refused() -> None:
    with pytest.raises(DataError, match="larger than"):
        CompiledTemplate("x" * 300_000, "huge")


def test_the_date_a_template_asks_for_is_fixed_and_part_of_the_digest() -> None:
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = _with_template(piece_tokenizer(), source)
    first, second = resolve_template(tokenizer), resolve_template(tokenizer, today=date(2030, 5, 17))
    assert first.render([Message("user", "x")]) == "01 Jan 2026<user>x</s>"
    assert second.render([Message("user", "x")]).startswith("17 May 2030")
    assert first.digest != second.digest
    undated = _with_template(piece_tokenizer(), source.replace("{{ strftime_now('%d %b %Y') }}", ""))
    assert resolve_template(undated).digest == resolve_template(undated, today=date(2030, 5, 17)).digest


def test_every_error_code_of_the_sandbox_is_explained() -> None:
    codes = [
        "TEMPLATE_TOO_COSTLY",
        "TEMPLATE_UNSAFE",
        "TEMPLATE_INVALID",
        "TEMPLATE_REFUSED",
        "TEMPLATE_NO_SPANS",
        "TEMPLATE_MISMATCH",
    ]
    assert set(codes) <= set(CODES)


def _with_template(tokenizer: Any, source: str | dict[str, str] | None) -> Any:
    import copy

    clone = copy.deepcopy(tokenizer)
    clone.chat_template = source
    return clone


# --- which template --------------------------------------------------------------------------------------------------

OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def test_the_tokenizers_own_template_comes_first() -> None:
    template = resolve_template(_with_template(piece_tokenizer(), OWN))
    assert (template.origin, template.source) == ("tokenizer", OWN)
    assert template.render([Message("user", "Hi")], (), True) == "[user]Hi</s>[assistant]"


def test_of_several_named_templates_the_default_is_taken() -> None:
    template = resolve_template(_with_template(piece_tokenizer(), {"tool_use": "x", "default": OWN}))
    assert template.source == OWN


def test_a_base_model_gets_the_plain_form_and_is_told_so() -> None:
    template = resolve_template(byte_tokenizer())
    assert template.name == "plain"
    assert "no chat template" in template.notes[0]


def test_another_template_than_the_models_own_needs_consent() -> None:
    tokenizer = _with_template(piece_tokenizer(), OWN)
    with pytest.raises(DataError) as caught:
        resolve_template(tokenizer, "alpaca")
    assert caught.value.code == "TEMPLATE_MISMATCH"
    template = resolve_template(tokenizer, "alpaca", consent=True)
    assert template.differs and any("consent" in note for note in template.notes)


def test_a_file_that_writes_what_the_own_template_writes_needs_no_consent(tmp_path: Path) -> None:
    path = tmp_path / "same.jinja"
    path.write_text("{# a remark #}" + OWN, encoding="utf-8")
    template = resolve_template(_with_template(piece_tokenizer(), OWN), str(path))
    assert (template.origin, template.differs) == ("file", False)


def test_a_misspelt_name_gets_the_nearest_one_suggested() -> None:
    with pytest.raises(DataError) as caught:
        resolve_template(byte_tokenizer(), "chatlm")
    assert caught.value.code == "TEMPLATE_UNKNOWN" and "'chatml'" in str(caught.value)


def test_a_tokenizer_without_fast_form_is_refused_by_name() -> None:
    class Slow:
        chat_template = None
        bos_token_id = None
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    with pytest.raises(DataError) as caught:
        resolve_template(Slow())
    assert caught.value.code == "TOKENIZER_UNSUPPORTED"


# --- where answers stand ---------------------------------------------------------------------------------------------

TWO_TURNS = chat(("system", "SYS"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))

# The formats as their makers document them; what stands between « and » is what the model learns to write.
WRITTEN = {
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n",
    "llama2": "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nQ1 [/INST]« A1 </s>»<s>[INST] Q2 [/INST]« A2 </s>»",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A1<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A2<|eot_id|>»",
    "mistral": "<s>[INST] SYS\n\nQ1 [/INST]« A1</s>»[INST] Q2 [/INST]« A2</s>»",
    "gemma": "<s><start_of_turn>user\nSYS\n\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2<end_of_turn>»\n",
    "phi3": "<|system|>\nSYS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»\n<|user|>\nQ2<|end|>\n<|assistant|>\n«A2<|end|>»\n",
    "phi4": "<|im_start|>system<|im_sep|>SYS<|im_end|><|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>«A1<|im_end|>»"
    "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>«A2<|im_end|>»",
    "alpaca": "SYS\n\n### Instruction:\nQ1\n\n### Response:\n«A1</s>»\n\n### Instruction:\nQ2\n\n### Response:\n«A2</s>»",
    "vicuna": "SYS USER: Q1 ASSISTANT:« A1</s>»USER: Q2 ASSISTANT:« A2</s>»",
    "plain": "SYS\n\nUser: Q1\nAssistant:« A1</s>»\nUser: Q2\nAssistant:« A2</s>»\n",
}


def _bracketed(template: Any, example: Any) -> str:
    located = template.locate(example.messages, example.tools)
    text, position = "", 0
    for answer in located.answers:
        text += located.text[position : answer.start] + "«" + located.text[answer.start : answer.end] + "»"
        position = answer.end
    return text + located.text[position:]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_writes_its_format_and_its_answers_are_found(name: str) -> None:
    template = resolve_template(piece_tokenizer(), name)
    begin = "" if WRITTEN[name].startswith("<s>") else "<s>"  # this tokenizer begins every text with <s>
    assert _bracketed(template, TWO_TURNS) == begin + WRITTEN[name]


def test_every_built_in_template_is_in_the_table_above() -> None:
    assert set(WRITTEN) == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("toy", TOYS)
def test_the_prompt_at_inference_is_the_beginning_of_the_training_row(name: str, toy: str) -> None:
    template = resolve_template(TOYS[toy](), name)
    example = chat(("user", "What is it?"), ("assistant", "It is Paris."))
    row = template.encoder.encode(template.locate(example.messages).text).ids
    prompt = template.prompt_ids(example.messages[:1])
    assert row[: len(prompt)] == prompt


def test_a_system_message_without_a_place_goes_before_the_first_question() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + OWN
    template = resolve_template(_with_template(piece_tokenizer(), source))
    assert _bracketed(template, TWO_TURNS).startswith("[user]SYS\n\nQ1</s>[assistant]«A1</s>»")
    assert any("no place for a system message" in note for note in template.notes)


def test_generation_marks_are_accepted_and_not_needed() -> None:
    marked = OWN.replace("{{ m.content }}</s>", "{% generation %}{{ m.content }}</s>{% endgeneration %}")
    plain, tagged = (resolve_template(_with_template(piece_tokenizer(), source)) for source in (OWN, marked))
    assert _bracketed(plain, TWO_TURNS) == _bracketed(tagged, TWO_TURNS)


def test_a_header_without_generation_prompt_is_context_and_inference_adds_it() -> None:
    source = "{% for m in messages %}<{{ m.role }}>: {{ m.content }}</s>{% endfor %}"
    template = resolve_template(_with_template(piece_tokenizer(), source))
    assert _bracketed(template, chat(("user", "Q"), ("assistant", "A"))) == "<user>: Q</s><assistant>: «A</s>»"
    prompt = template.tokenizer.decode(template.prompt_ids([Message("user", "Q")]))
    assert prompt.rstrip().endswith("<assistant>:")


def test_reasoning_is_trained_on_as_the_template_writes_it() -> None:
    source = (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "[{{ m.role }}]{{ c }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = resolve_template(_with_template(piece_tokenizer(), source))
    example = chat(
        ("user", "Q"), ("assistant", "<think>\nR\n</think>\n\nA"), ("user", "P"), ("assistant", "<think>\nS\n</think>\n\nB")
    )
    assert _bracketed(template, example) == "[user]Q</s>[assistant]«A</s>»[user]P</s>[assistant]«<think>\nS\n</think>\n\nB</s>»"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ messages | tojson | length }}",
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}{{ raise_exception('no') }}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}#{% else %}!{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}?{% endif %}",
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_with_the_reason(source: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_template(_with_template(piece_tokenizer(), source))
    assert caught.value.code == "TEMPLATE_NO_SPANS" and caught.value.remedy


def test_a_row_whose_turn_the_template_drops_is_refused() -> None:
    source = "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    template = resolve_template(_with_template(piece_tokenizer(), source))
    with pytest.raises(DataError, match="leaves out a turn of role 'tool'"):
        template.locate([Message("user", "Q"), Message("tool", "42"), Message("assistant", "A")])
    with pytest.raises(DataError, match="leaves out tool calls"):
        template.locate([Message("user", "Q"), Message("assistant", "A", tool_calls=(ToolCall("f", {"x": 1}),))])


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_tool_calls_are_answers_and_tool_results_are_not(name: str) -> None:
    template = resolve_template(piece_tokenizer(), name)
    turns = (
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Lyon"}), ToolCall("clock", {"zone": 1}))),
        Message("tool", "RESULT"),
        Message("assistant", "Sunny."),
    )
    tools = ({"type": "function", "function": {"name": "weather", "description": "DESCRIPTION"}},)
    located = template.locate(turns, tools)
    answers = [located.text[answer.start : answer.end].strip() for answer in located.answers]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>\n'
    call += '<tool_call>\n{"name": "clock", "arguments": {"zone": 1}}\n</tool_call>'
    assert answers == [call + template.stop, "Sunny." + template.stop]
    assert "RESULT" in located.text and "DESCRIPTION" in located.text


def test_a_template_may_refuse_a_conversation_in_its_own_words() -> None:
    template = resolve_template(piece_tokenizer(), "llama2")
    with pytest.raises(TemplateRefusal, match="no role tool"):
        template.locate([Message("user", "Q"), Message("tool", "R"), Message("assistant", "A")])


def test_one_shape_of_conversation_gives_the_same_spans_fast_and_slow() -> None:
    fast, slow = (resolve_template(byte_tokenizer(), "chatml") for _ in range(2))
    slow._skeleton = lambda *_: None  # type: ignore[method-assign]
    for content in ("A", "  padded \n", "é😀\n\nx", "ends in spaces   ", "\tTab"):
        example = chat(("system", content), ("user", content), ("assistant", content), ("user", "more"), ("assistant", content))
        quick, thorough = fast.locate(example.messages), slow.locate(example.messages)
        assert quick.text == thorough.text
        assert [(a.start, a.end, a.ended) for a in quick.answers] == [(a.start, a.end, a.ended) for a in thorough.answers]


# --- real templates, real tokenizers ---------------------------------------------------------------------------------

EOS = "the tokenizer's end of sequence"
TURN_ENDS = {
    "axolotl/alpaca": EOS, "axolotl/aya": "<|END_OF_TURN_TOKEN|>", "axolotl/chatml": "<|im_end|>", "axolotl/cohere": "<|END_OF_TURN_TOKEN|>",
    "axolotl/deepseek_v2": EOS, "axolotl/exaone": "[|endofturn|]", "axolotl/falcon_h1": "<|im_end|>", "axolotl/gemma": "<end_of_turn>",
    "axolotl/gemma3": "<end_of_turn>", "axolotl/llama3": "<|eot_id|>", "axolotl/llava": "", "axolotl/metharme": EOS,
    "axolotl/mistral_v1": EOS, "axolotl/mistral_v3_tekken": EOS, "axolotl/nemotron_h": "<|im_end|>", "axolotl/phi_3": "<|end|>",
    "axolotl/phi_4": "<|im_end|>", "axolotl/qwen_25": "<|im_end|>", "chujiezheng/alpaca": EOS, "chujiezheng/chatml": "<|im_end|>",
    "chujiezheng/gemma-it": "<end_of_turn>", "chujiezheng/llama-2-chat": EOS, "chujiezheng/llama-3-instruct": "<|eot_id|>",
    "chujiezheng/mistral-instruct": EOS, "chujiezheng/phi-3": "<|end|>", "chujiezheng/vicuna": EOS, "chujiezheng/zephyr": EOS,
    "mistral_common/v1": EOS, "mistral_common/v3": EOS, "mistral_common/v7": EOS, "mistral_common/v13": EOS, "mistral_common/v15": EOS,
}  # fmt: skip
TOKENIZERS = ("gpt2", "llama2", "mistral_v3", "minimind")


@pytest.mark.shared_data
def test_the_table_of_turn_ends_names_every_template_file(shared_data: Path) -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in (shared_data / "chat_templates").glob("*/*.jinja")}
    assert files == set(TURN_ENDS)


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_real_templates_render_as_transformers_renders_them(shared_data: Path, name: str, tokenizer_name: str) -> None:
    tokenizer = real_tokenizers(shared_data)[tokenizer_name]
    path = shared_data / "chat_templates" / f"{name}.jinja"
    template = resolve_template(tokenizer, str(path), consent=True)
    for example, prompt in ((chat(("user", "Hé? "), ("assistant", " Yes\n")), False), (chat(("user", "Hé? ")), True)):
        expected = tokenizer.apply_chat_template(
            as_dicts(example), chat_template=path.read_text(encoding="utf-8"), tokenize=False, add_generation_prompt=prompt
        )
        assert template.render(example.messages, (), prompt) == expected


@pytest.mark.shared_data
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", TURN_ENDS)
def test_inference_prompts_of_real_templates_are_the_beginning_of_training_rows(
    shared_data: Path, name: str, tokenizer_name: str
) -> None:
    tokenizer = real_tokenizers(shared_data)[tokenizer_name]
    template = resolve_template(tokenizer, str(shared_data / "chat_templates" / f"{name}.jinja"), consent=True)
    row = template.encoder.encode(
        template.locate([Message("user", "What is it?"), Message("assistant", "It is Paris.")]).text
    ).ids
    prompt = template.prompt_ids([Message("user", "What is it?")])
    assert row[: len(prompt)] == prompt
