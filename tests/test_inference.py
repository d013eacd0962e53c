"""Promises of `finetuneflow.inference`: an answer depends on its prompt alone, streams are whole, runs load as trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.asking import PROMPTS, naive_greedy, tiny_generator
from export.run_dir import make_run
from finetuneflow.data.examples import Message
from finetuneflow.errors import EvaluationError, ModelError
from finetuneflow.inference import (
    Decoding,
    Ending,
    Generator,
    SeededSampling,
    before_text,
    load_generator,
    trimmed,
    whole_characters,
)
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from models.tiny import save_tiny, tiny_tokenizer

STEPS = 10


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "mamba"])
def test_a_batched_answer_equals_a_plain_greedy_loop_over_that_prompt_alone(architecture: str) -> None:
    generator = tiny_generator(architecture)
    answers = generator.generate(PROMPTS, max_new_tokens=STEPS, batch_size=4)
    for messages, answer in zip(PROMPTS, answers, strict=True):
        prompt = generator.prompt_ids(messages)
        expected = naive_greedy(generator.model, prompt, STEPS)
        cut = next((i for i, token in enumerate(expected) if token in generator.ending.tokens), STEPS)
        assert list(answer.ids) == expected[:cut]
        assert answer.stopped == (cut < STEPS)
        assert answer.prompt_tokens == len(prompt)


def test_the_tiny_models_answer_differently_so_that_equality_means_something() -> None:
    for architecture in ("llama", "gpt2", "mamba"):
        answers = tiny_generator(architecture).generate(PROMPTS, max_new_tokens=STEPS)
        assert len({answer.ids for answer in answers}) >= 5


def test_an_answer_ends_at_the_first_end_token_which_is_not_part_of_it() -> None:
    generator = tiny_generator()
    free = generator.generate(PROMPTS, max_new_tokens=STEPS)
    end = free[3].ids[4]
    generator.model.generation_config.eos_token_id = [3, end]
    answers = generator.generate(PROMPTS, max_new_tokens=STEPS)
    first = list(free[3].ids).index(end)
    assert answers[3].ids == free[3].ids[:first]
    assert answers[3].stopped
    for before, after in zip(free, answers, strict=True):
        assert after.ids == tuple(before.ids[: before.ids.index(end)] if end in before.ids else before.ids)


def test_a_turn_end_of_several_ordinary_tokens_is_found_as_text_even_inside_a_token() -> None:
    tokenizer = tiny_tokenizer()
    ending = Ending(tokenizer, frozenset({3}), "lo to")
    ids = tokenizer("It says hello to the cat", add_special_tokens=False)["input_ids"]
    kept, text, stopped = ending.cut(ids)
    assert (text, stopped) == ("It says hel", True)
    assert "It says hello".startswith(tokenizer.decode(kept))
    first_reached = next(n for n in range(1, len(ids) + 1) if ending.reached(torch.tensor([ids[:n]])).item())
    assert tokenizer.decode(ids[:first_reached]) == "It says hello to"
    assert ending.cut(ids[: first_reached - 1])[2] is False


def test_a_checkpoints_own_sampling_defaults_do_not_change_a_measurement() -> None:
    generator = tiny_generator()
    plain = generator.generate(PROMPTS, max_new_tokens=STEPS)
    config = generator.model.generation_config
    config.repetition_penalty, config.suppress_tokens, config.do_sample = 7.0, [plain[0].ids[0]], True
    assert generator.generate(PROMPTS, max_new_tokens=STEPS) == plain
    assert generator.model.generation_config is config


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_near_the_context_limit_gets_a_shorter_answer_and_does_not_shorten_its_neighbours(architecture: str) -> None:
    generator = tiny_generator(architecture)
    long = list(generator.prompt_ids(PROMPTS[3])) * 8
    long = long[: generator.context_length - 4]
    prompts = [list(generator.prompt_ids(PROMPTS[0])), long, list(generator.prompt_ids(PROMPTS[1]))]
    decoding = Decoding(max_new_tokens=8)
    batches = generator.plan_batches(prompts, decoding, batch_size=8)
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]
    (answer,) = generator.generate_batch([long], decoding)
    assert list(answer.ids) == naive_greedy(generator.model, long, 4)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths() -> None:
    generator = tiny_generator("gpt2")
    with pytest.raises(EvaluationError, match="512") as caught:
        generator.generate([(Message("user", "été " * 600),)], max_new_tokens=4)
    assert caught.value.code == "PROMPT_TOO_LONG"


def test_decoding_settings_out_of_range_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(EvaluationError):
            Decoding(**wrong)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9))
def test_a_batch_plan_holds_every_prompt_once_and_no_batch_is_too_large(lengths: list[int], batch_size: int) -> None:
    generator = Generator(_Shape(), None, None)  # type: ignore[arg-type]
    batches = generator.plan_batches([[1] * n for n in lengths], Decoding(max_new_tokens=16), batch_size=batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) + 16 <= 64


class _Shape:
    """The part of a model that a batch plan looks at: a context of 64 tokens, attention."""

    class config:
        model_type = "llama"
        num_attention_heads = 4
        max_position_embeddings = 64


def test_a_recurrent_model_that_cannot_leave_padding_out_batches_equal_lengths_only() -> None:
    class Recurrent:
        class config:
            model_type = "rwkv"

    generator = Generator(Recurrent(), None, None)  # type: ignore[arg-type]
    lengths = [3, 5, 3, 5, 5, 2]
    batches = generator.plan_batches([[1] * n for n in lengths], Decoding(), batch_size=2)
    assert [[lengths[i] for i in batch] for batch in batches] == [[5, 5], [5], [3, 3], [2]]


def test_a_long_conversation_loses_its_oldest_exchanges_but_not_its_system_message() -> None:
    generator = tiny_generator("gpt2")
    turns = [Message(role, f"{role} {i} " + "é" * 40) for i in range(9) for role in ("user", "assistant")][:-1]
    chat = [Message("system", "Be brief."), *turns]
    kept = generator.recent(chat, room=100)
    assert kept[0] == chat[0] and kept[1:] == turns[-len(kept) + 1 :] and kept[1].role == "user"
    assert len(generator.prompt_ids(kept)) <= 512 - 100 < len(generator.template.prompt_ids([chat[0], *turns[-len(kept) - 1 :]]))
    assert generator.recent(chat[:2], room=511) == chat[:2]
    assert generator.recent(turns[:1], room=1) == turns[:1]


def test_a_model_asked_between_two_training_steps_goes_on_training() -> None:
    generator = tiny_generator("phi3")
    generator.model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    generator.model(input_ids=ids, labels=ids).loss.backward()
    generator.generate(PROMPTS[:2], max_new_tokens=2)
    generator.model(input_ids=ids, labels=ids).loss.backward()


# --- sampling -----------------------------------------------------------------------------------


def test_a_sampled_answer_is_the_same_alone_and_in_any_batch_and_changes_with_the_seed() -> None:
    generator = tiny_generator(scale=1.0)
    options: dict[str, Any] = {"max_new_tokens": STEPS, "temperature": 1.0, "top_p": 0.9}
    together = generator.generate(PROMPTS, seed=3, **options)
    alone = [generator.generate([prompt], seed=3, **options)[0] for prompt in PROMPTS]
    assert together == alone
    assert generator.generate(PROMPTS, seed=4, **options) != together


def test_sampling_follows_the_softmax_at_the_temperature_asked_for() -> None:
    logits, rows = torch.tensor([2.0, 1.0, 0.0, -1.0]), 20_000
    sampling = SeededSampling(Decoding(temperature=2.0), [[i] for i in range(rows)])
    drawn = sampling(torch.zeros(rows, 1), logits.expand(rows, 4)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / rows
    # Four standard errors of a share estimated from 20,000 draws are at most 0.0142.
    assert torch.allclose(shares, torch.softmax(logits / 2.0, dim=0), atol=0.0142)


def test_top_p_never_draws_outside_the_likeliest_tokens_of_that_mass() -> None:
    logits, rows = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3])), 3_000
    sampling = SeededSampling(Decoding(temperature=1.0, top_p=0.7), [[i] for i in range(rows)])
    drawn = sampling(torch.zeros(rows, 1), logits.expand(rows, 4)).argmax(dim=1)
    assert set(drawn.tolist()) == {1, 3}
    assert abs((drawn == 1).float().mean().item() - 0.5 / 0.8) < 0.04


# --- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_pieces_of_a_stream_together_are_the_generated_answer(architecture: str) -> None:
    generator = tiny_generator(architecture, scale=1.0)
    for prompt in PROMPTS:
        options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.2, "seed": 1}
        (answer,) = generator.generate([prompt], **options)
        assert "".join(generator.stream(prompt, **options)) == answer.text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="�"), max_size=40))
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    pieces = list(whole_characters(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    assert "".join(whole_characters(ids[:-1], tokenizer)) == tokenizer.decode(ids[:-1])


@given(st.lists(st.text(alphabet="ab\n #", max_size=4), max_size=12), st.sampled_from(["", "\n#", "ab", "aab", "###"]))
def test_a_stream_ends_before_the_stop_text_however_it_is_cut_into_pieces(pieces: list[str], end: str) -> None:
    text = "".join(pieces)
    assert "".join(before_text(pieces, end)) == (text.split(end)[0] if end else text)


@given(st.lists(st.text(alphabet="ab\n ", max_size=3), max_size=12))
def test_a_stream_has_no_outer_white_space_and_no_empty_piece(pieces: list[str]) -> None:
    shown = list(trimmed(pieces))
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


def test_closing_a_stream_stops_the_model_and_frees_it() -> None:
    generator = tiny_generator(scale=1.0)
    stream = generator.stream(PROMPTS[0], max_new_tokens=400, temperature=2.0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert generator.generate(PROMPTS[:1], max_new_tokens=3)[0].ids


def test_an_error_inside_a_stream_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(generator.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(generator.stream(PROMPTS[0]))


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_an_adapter_is_switched_off_and_on_and_the_answers_follow(run: Path) -> None:
    generator = load_generator(run, dtype="fp32")
    base = load_generator(run, adapter=False, dtype="fp32")
    tuned = generator.generate(PROMPTS, max_new_tokens=STEPS)
    with generator.adapter(None):
        assert generator.generate(PROMPTS, max_new_tokens=STEPS) == base.generate(PROMPTS, max_new_tokens=STEPS)
    assert generator.generate(PROMPTS, max_new_tokens=STEPS) == tuned
    assert tuned != base.generate(PROMPTS, max_new_tokens=STEPS)


def test_several_adapters_on_one_base_answer_by_name(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", method__r=8)
    _shift(other / "adapter")
    both = load_generator(run, adapters={"other": other / "adapter"}, dtype="fp32")
    assert both.adapters == ("tuned", "other")
    alone = load_generator(run, dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS)
    shifted = load_generator(other, dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS)
    assert both.view("other").generate(PROMPTS, max_new_tokens=STEPS) == shifted
    assert both.view("tuned").generate(PROMPTS, max_new_tokens=STEPS) == alone
    with both.adapter("other"):
        assert both.generate(PROMPTS, max_new_tokens=STEPS) == shifted
    assert both.generate(PROMPTS, max_new_tokens=STEPS) == alone
    with pytest.raises(ModelError, match="tuned, other"):
        both.view("nobody")


def _shift(adapter_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter_dir / "adapter_model.safetensors")
    save_file({k: v * -3 for k, v in weights.items()}, adapter_dir / "adapter_model.safetensors", metadata={"format": "pt"})


def test_a_trained_prefix_answers_as_a_plain_loop_through_the_same_model_does() -> None:
    generator = tiny_generator("llama")
    generator.model = attach_adapter(generator.model, AdapterSpec(kind="prefix", num_virtual_tokens=5)).eval()
    assert generator.context_length == 512 - 5
    (answer,) = generator.generate(PROMPTS[1:2], max_new_tokens=6)
    expected = naive_greedy(generator.model, generator.prompt_ids(PROMPTS[1]), 6)
    assert list(answer.ids) == expected


def test_asking_a_model_in_training_leaves_it_in_training(run: Path) -> None:
    generator = load_generator(run)
    generator.model.train()
    generator.generate(PROMPTS[:1], max_new_tokens=2)
    assert generator.model.training
    with pytest.raises(RuntimeError), generator.adapter(None), generator.ready() as model:
        assert not model.training
        raise RuntimeError
    assert generator.model.training and generator.active == "active"


def test_a_fingerprint_follows_weights_and_adapter_and_nothing_else(run: Path) -> None:
    generator = load_generator(run, dtype="fp32")
    first = generator.fingerprint()
    assert load_generator(run, dtype="fp32").fingerprint() == first
    assert generator.view(None).fingerprint() != first
    with torch.no_grad():
        next(p for n, p in generator.model.named_parameters() if "lora_B" in n).add_(1e-3)
    assert generator.fingerprint() != first


# --- loading ------------------------------------------------------------------------------------


def test_a_model_folder_an_adapter_folder_and_a_full_run_are_loaded(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "m", "gpt2")
    assert load_generator(base).generate(PROMPTS[:2], max_new_tokens=3)[0].prompt_tokens > 0
    run = make_run(tmp_path / "lora")
    by_folder = load_generator(run / "adapter", dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS)
    assert by_folder == load_generator(run, dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS)
    full = make_run(tmp_path / "full", "full")
    tuned, untuned = load_generator(full, dtype="fp32"), load_generator(full, adapter=False, dtype="fp32")
    assert tuned.fingerprint() != untuned.fingerprint()
    assert (tuned.adapters, tuned.name, untuned.name) == ((), full.name, "base")


def test_a_run_that_did_not_end_says_so_and_answers_from_a_checkpoint(run: Path) -> None:
    from finetuneflow.training.checkpoints import write_checkpoint

    final = load_generator(run, dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS)

    def save(folder: Path) -> None:
        shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)

    write_checkpoint(run / "checkpoints", 20, save)
    shutil.rmtree(run / "adapter")
    with pytest.raises(ModelError) as caught:
        load_generator(run)
    assert caught.value.code == "RUN_NOT_FINISHED"
    for name in (20, "20", "step-000020"):
        assert load_generator(run, checkpoint=name, dtype="fp32").generate(PROMPTS, max_new_tokens=STEPS) == final
    (run / "checkpoints" / "step-000020" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="instead of") as caught:
        load_generator(run, checkpoint=20)
    assert caught.value.code == "CHECKPOINT_UNUSABLE"


@pytest.mark.parametrize(("stored", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_run_is_loaded_in_the_precision_it_computed_in(tmp_path: Path, stored: str, expected: torch.dtype) -> None:
    import json

    run = make_run(tmp_path)
    environment = json.loads((run / "environment.json").read_text())
    environment["setup"]["storage_dtype"] = stored
    (run / "environment.json").write_text(json.dumps(environment))
    model = load_generator(run, adapter=False).model
    assert {p.dtype for p in model.parameters()} == {expected}


def test_a_run_is_asked_through_the_template_it_was_trained_with(run: Path) -> None:
    import json

    source = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    (run / "template.json").write_text(json.dumps({"name": "own", "source": source}))
    generator = load_generator(run)
    assert generator.tokenizer.decode(generator.prompt_ids((Message("user", "Hi"),))).startswith("[user] Hi<|im_end|>[assistant]")
