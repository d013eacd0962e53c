"""Promises of `finetuneflow.decode_loop`: the same answers as transformers' own loop, whatever rows leave and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.asking import PROMPTS, tiny_generator
from finetuneflow import decode_loop
from finetuneflow.decode_loop import Greedy, RowLayer, answer_rows, lean_layers, moved_up, serves
from finetuneflow.inference import Decoding, Generation, Generator, SeededSampling, left_padded
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from models.tiny import ARCHITECTURES

STEPS = 12


def adapted(architecture: str, kind: Any = "lora", **settings: Any) -> Generator:
    """A tiny generator with an adapter that changes what it says."""
    generator = tiny_generator(architecture)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        generator.model = attach_adapter(generator.model, AdapterSpec(kind=kind, r=4, **settings)).eval()
        with torch.no_grad():
            for name, parameter in generator.model.named_parameters():
                if "lora_B" in name or "ia3" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return generator


def by_generate(generator: Generator, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Generation]:
    """The same answers by `model.generate`."""
    with monkeypatch.context() as patch:
        patch.setattr(decode_loop, "serves", lambda model: False)
        return generator.generate(PROMPTS, **options)


def end_at_some(generator: Generator, answers: Sequence[Generation]) -> None:
    """End tokens by which these answers end at different steps."""
    generator.model.generation_config.eos_token_id = [3, answers[0].ids[0], answers[2].ids[3], answers[4].ids[6]]


# --- which models -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_called_in_the_ordinary_way_is_served_and_no_other(architecture: str) -> None:
    assert serves(tiny_generator(architecture).model) == (architecture not in ("mamba", "phi3"))


def test_adapters_inside_layers_are_served_and_a_prefix_is_not() -> None:
    assert serves(adapted("llama").model) and serves(adapted("llama", "ia3").model) and serves(adapted("llama", "dora").model)
    generator = tiny_generator("llama")
    assert not serves(attach_adapter(generator.model, AdapterSpec(kind="prefix", num_virtual_tokens=3)))


def test_a_class_that_prepares_its_inputs_in_a_way_of_its_own_is_not_served() -> None:
    model = tiny_generator("llama").model

    class Odd(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    Odd.__module__ = type(model).__module__
    assert serves(model)
    model.__class__ = Odd
    assert not serves(model)


# --- the same answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_generate(architecture: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator(architecture)
    end_at_some(generator, generator.generate(PROMPTS, max_new_tokens=STEPS))
    options = {"max_new_tokens": STEPS, "batch_size": batch_size}
    assert generator.generate(PROMPTS, **options) == by_generate(generator, monkeypatch, **options)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("mamba", "phi3")])
def test_rows_that_leave_at_any_step_do_not_change_the_others(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator(architecture)
    generator.model.generation_config.eos_token_id = generator.tokenizer.eos_token_id = generator.tokenizer.pad_token_id
    # Drawn hot, so that the answers differ in every model.
    drawing = Decoding(STEPS, temperature=20.0)
    whole = [list(answer.ids) for answer in by_generate(generator, monkeypatch, max_new_tokens=STEPS, temperature=20.0)]
    prompts = [generator.prompt_ids(messages) for messages in PROMPTS]
    for order in ([2, 9, 4, 12, 7, 4], [12, 1, 3, 1, 8, 12], [1, 2, 3, 4, 5, 6]):
        # A row is known by its answer so far, so that its end needs no token of its own.
        ends = {tuple(answer[:length]) for answer, length in zip(whole, order, strict=True)}
        cut = [next((a[:n] for n in range(1, STEPS + 1) if tuple(a[:n]) in ends), a) for a in whole]
        ids, mask = left_padded(prompts, 0, device="cpu")
        choice = SeededSampling(drawing, prompts)
        with generator.ready() as model:
            found = answer_rows(model, ids, mask, limit=STEPS, choice=choice, ended=lambda a: tuple(a) in ends)  # noqa: B023
        assert found == cut and len({len(answer) for answer in found}) >= 3


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_with_an_adapter_too(architecture: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = adapted(architecture, kind)
    answers = generator.generate(PROMPTS, max_new_tokens=STEPS)
    assert answers != generator.view(None).generate(PROMPTS, max_new_tokens=STEPS)
    end_at_some(generator, answers)
    assert generator.generate(PROMPTS, max_new_tokens=STEPS) == by_generate(generator, monkeypatch, max_new_tokens=STEPS)
    base = generator.view(None)
    assert base.generate(PROMPTS, max_new_tokens=STEPS) == by_generate(base, monkeypatch, max_new_tokens=STEPS)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba"])
def test_a_single_token_is_one_step(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator(architecture)
    answers = generator.generate(PROMPTS, max_new_tokens=1)
    assert answers == by_generate(generator, monkeypatch, max_new_tokens=1)
    assert max(len(answer.ids) for answer in answers) == 1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_sampled_answers_are_those_of_generate_when_rows_leave(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator(architecture, scale=1.5)
    options: dict[str, Any] = {"max_new_tokens": STEPS, "temperature": 1.0, "top_p": 0.95, "seed": 5}
    end_at_some(generator, generator.generate(PROMPTS, **options))
    expected = by_generate(generator, monkeypatch, **options)
    assert generator.generate(PROMPTS, **options) == expected
    assert generator.generate(PROMPTS, batch_size=1, **options) == expected


def test_an_end_of_several_tokens_lets_a_row_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator("llama")
    free = generator.generate(PROMPTS, max_new_tokens=STEPS)

    class Ends:
        turn_end = (5, 6)
        stop = free[1].text[3:6]
        prompt_ids = staticmethod(generator.template.prompt_ids)

    generator.template = Ends()  # type: ignore[assignment]
    assert generator.ending.text
    answers = generator.generate(PROMPTS, max_new_tokens=STEPS)
    assert answers == by_generate(generator, monkeypatch, max_new_tokens=STEPS)
    assert answers[1].stopped and len(answers[1].ids) < len(free[1].ids)


def test_an_answer_longer_than_the_room_made_at_once_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator("llama")
    steps = 2 * decode_loop.GROWTH + 5
    answers = generator.generate(PROMPTS[:3], max_new_tokens=steps)
    with monkeypatch.context() as patch:
        patch.setattr(decode_loop, "serves", lambda model: False)
        assert answers == generator.generate(PROMPTS[:3], max_new_tokens=steps)


# --- what is saved --------------------------------------------------------------------------------


def test_a_row_that_has_ended_is_computed_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator("llama")
    forward, rows = generator.model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(generator.model, "forward", counted)
    end_at_some(generator, generator.generate(PROMPTS, max_new_tokens=STEPS))
    rows.clear()
    answers = generator.generate(PROMPTS, max_new_tokens=STEPS)
    # Reading a prompt gives a row's first token, and each further step one more; the end token is one of them.
    assert sum(rows) == sum(len(answer.ids) + answer.stopped for answer in answers)
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]


@given(st.integers(1, 12), st.data())
def test_the_last_rows_fill_the_places_of_those_that_left(count: int, data: st.DataObject) -> None:
    going = data.draw(st.lists(st.sampled_from(range(count)), unique=True, min_size=1).map(sorted))
    order = moved_up(going)
    assert sorted(order) == going
    assert all(order[place] == place for place in going if place < len(going))


def test_a_cache_layer_keeps_and_grows_rows_as_plain_tensors_would() -> None:
    layer, keys = RowLayer(), torch.empty(4, 2, 0, 3)
    for step, new in enumerate([9, 1, 1, decode_loop.GROWTH, 1]):
        states = torch.randn(len(keys), 2, new, 3)
        keys = torch.cat([keys, states], dim=2)
        held, values = layer.update(states, states + 1)
        assert torch.equal(held, keys) and torch.equal(values, keys + 1) and layer.get_seq_length() == keys.shape[2]
        if step in (1, 3):
            kept = moved_up([1, 3][: len(keys)] if step == 1 else [1])
            layer.keep(kept)
            keys = keys[kept]
            assert torch.equal(layer.keys, keys)


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lean_lora_layer_gives_what_pefts_gives_and_is_gone_afterwards(
    architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = adapted(architecture, alpha=7).model
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    layers = [m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
    assert layers
    with torch.no_grad():
        for layer in layers:
            x = torch.randn(3, 5, layer.in_features).to(dtype)
            plain = layer(x)
            with lean_layers(model):
                assert "forward" in vars(layer)
                lean = layer(x)
            assert "forward" not in vars(layer)
            assert lean.dtype == plain.dtype == dtype
            assert (lean - plain).abs().max() <= tolerance * plain.abs().max()


def test_a_switched_off_or_merged_adapter_is_left_to_peft() -> None:
    model = adapted("llama").model
    (layer, *_) = (m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    with model.disable_adapter(), lean_layers(model):
        assert "forward" not in vars(layer)
    model.merge_adapter()
    with lean_layers(model):
        assert "forward" not in vars(layer)


def test_a_failing_answer_leaves_the_model_as_it_was() -> None:
    generator = adapted("llama")
    with generator.ready(), pytest.raises(ZeroDivisionError):
        ids = torch.tensor([[5, 6, 7]])
        answer_rows(generator.model, ids, torch.ones_like(ids), limit=3, choice=Greedy(), ended=lambda answer: bool(1 // 0))
    assert not any("forward" in vars(module) for module in generator.model.modules())


def test_decoding_with_a_limit_of_the_context_is_the_same_in_both_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = tiny_generator("gpt2")
    prompt = (list(generator.prompt_ids(PROMPTS[3])) * 8)[: generator.context_length - 3]
    found = generator.generate_batch([prompt], Decoding(max_new_tokens=9))
    monkeypatch.setattr(decode_loop, "serves", lambda model: False)
    assert found == generator.generate_batch([prompt], Decoding(max_new_tokens=9))
