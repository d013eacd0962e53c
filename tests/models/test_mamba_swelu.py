"""MambaSWELU behaves as a transformers model: generation, padding, saving, tying, checkpointing, dispatch."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetuneflow.kernels.scan import selective_scan
from finetuneflow.models import mamba_swelu
from finetuneflow.models.mamba_swelu import (
    LAYOUTS,
    SWELU,
    MambaSWELUCache,
    MambaSWELUConfig,
    MambaSWELUForCausalLM,
    register,
)
from models.test_mamba_swelu_reference import tiny

PROMPTS = [[5, 9, 13, 2, 40, 41, 7], [3], [8, 8, 21]]


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> MambaSWELUForCausalLM:
    return tiny(request.param)


def padded(prompts: list[list[int]], side: str, *, pad: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch; the padding token is an ordinary one, so that a leak is seen."""
    width = max(map(len, prompts))
    fill = lambda row, value: [value] * (width - len(row))  # noqa: E731
    ids = [fill(row, pad) + row if side == "left" else row + fill(row, pad) for row in prompts]
    mask = [fill(row, 0) + [1] * len(row) if side == "left" else [1] * len(row) + fill(row, 0) for row in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def greedy(model: MambaSWELUForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, everything computed anew for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# --- size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "expected"), [("simplified", 124_104_719), ("selective", 100_917_257)])
def test_the_default_sizes_have_the_published_number_of_parameters(layout: str, expected: int) -> None:
    with torch.device("meta"):
        model = MambaSWELUForCausalLM(MambaSWELUConfig(layout=layout, learn_lambda=False, max_seq_len=1024))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_token_table_is_found_replaced_and_enlarged(model: MambaSWELUForCausalLM) -> None:
    """In the model and in its part before the head, by the library's own methods."""
    table = torch.nn.Embedding(50, 20)
    for part in (model, model.model):
        assert part.get_input_embeddings() is model.model.token_embedding
        part.set_input_embeddings(table)
        assert model.model.token_embedding is table
        table = torch.nn.Embedding(50, 20)
    model.tie_weights()
    model.resize_token_embeddings(53)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[52]])).logits.shape == (1, 1, 53)


def test_common_names_of_sizes_work_both_ways() -> None:
    config = MambaSWELUConfig(hidden_size=96, num_hidden_layers=3, max_position_embeddings=77)
    assert (config.d_model, config.n_layers, config.max_seq_len) == (96, 3, 77)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (96, 3, 77)
    assert config.dt_rank == 6 and config.inner_size == 192


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="simplified, selective"):
        MambaSWELUConfig(layout="fast")


# --- the activation -----------------------------------------------------------------------------------


def plain_swelu(z: torch.Tensor, k: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    return lam * torch.sign(z) * (1 - torch.exp(-((z.abs() + 1e-8) ** (k.abs() + 1e-6))))


@pytest.mark.parametrize("k", [-0.7, 0.3, 1.0, 2.5])
def test_swelu_and_its_gradients_equal_the_formula(k: float) -> None:
    torch.manual_seed(0)
    activation = SWELU(MambaSWELUConfig(swelu_k=k)).double()
    activation.lam.data.fill_(-1.3)
    z = (torch.randn(200, dtype=torch.float64) * 3).requires_grad_()
    wanted = [value.detach().clone().requires_grad_() for value in (z, activation.k, activation.lam)]
    weight = torch.randn_like(z)
    expected, got = plain_swelu(*wanted), activation(z)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, (z, activation.k, activation.lam), weight),
        torch.autograd.grad(expected, wanted, weight),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("k", [0.3, 1.0, 30.0])
def test_swelu_has_finite_gradients_at_zero_and_far_out(k: float) -> None:
    activation = SWELU(MambaSWELUConfig(swelu_k=k))
    z = torch.tensor([0.0, -0.0, 1e-30, -1e6, 1e30], requires_grad=True)
    out = activation(z)
    assert out[:2].tolist() == [0.0, 0.0] and out[3:].tolist() == [-1.0, 1.0]
    gradients = torch.autograd.grad(out.sum(), (z, activation.k, activation.lam))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_swelu_has_the_slope_of_its_neighbours_at_zero() -> None:
    z = torch.tensor([0.0, 1e-6], requires_grad=True)
    (slope,) = torch.autograd.grad(SWELU(MambaSWELUConfig()).forward(z).sum(), z)
    assert slope.tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


# --- generation ---------------------------------------------------------------------------------------


def test_step_by_step_generation_equals_computing_everything_anew(model: MambaSWELUForCausalLM) -> None:
    out = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False, pad_token_id=1)
    assert out[0, 7:].tolist() == greedy(model, PROMPTS[0], 20)


def test_the_cache_is_used_one_token_at_a_time(model: MambaSWELUForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kw: lengths.append(kw["input_ids"].shape[1]) or forward(**kw))
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert lengths == [7, 1, 1, 1]


def test_a_left_padded_batch_answers_as_each_row_alone(model: MambaSWELUForCausalLM) -> None:
    ids, mask = padded(PROMPTS, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert [row[7:].tolist() for row in out] == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_beam_search_takes_its_memories_along(model: MambaSWELUForCausalLM) -> None:
    ids, mask = padded(PROMPTS, "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_and_no_gradient(model: MambaSWELUForCausalLM, side: str) -> None:
    ids, mask = padded(PROMPTS, side)
    logits = model(ids, attention_mask=mask).logits
    alone = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=1e-5, atol=1e-5)
    sums = logits[mask.bool()].square().sum(), sum(part.square().sum() for part in alone)
    used = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and not unused(name, model)]
    for got, expected in zip(torch.autograd.grad(sums[0], used), torch.autograd.grad(sums[1], used), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def unused(name: str, model: MambaSWELUForCausalLM) -> bool:
    return model.config.layout == "simplified" and (".x_proj." in name or ".dt_proj." in name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_may_come_in_pieces_that_are_padded(model: MambaSWELUForCausalLM, side: str) -> None:
    texts = [[5, 9, 13, 2, 40, 41, 7, 3, 3], [3, 8, 8, 21, 17]]
    pieces = [[[5, 9, 13, 2], [3]], [[40, 41, 7], [8, 8, 21]], [[3, 3], [17]]]
    cache = MambaSWELUCache.empty(2)
    last: list[torch.Tensor] = []
    with torch.no_grad():
        for piece in pieces:
            ids, mask = padded(piece, side)
            logits = model(ids, attention_mask=mask, cache_params=cache).logits
            last = [logits[row][mask[row].bool()][-1] for row in range(2)]
        expected = [model(torch.tensor([text])).logits[0, -1] for text in texts]
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)
    assert cache.seen is not None and cache.seen.tolist() == [9, 5]


def test_padding_in_the_middle_is_as_if_it_were_not_there(model: MambaSWELUForCausalLM) -> None:
    text, holes = torch.tensor([[5, 9, 13, 2, 40]]), torch.tensor([[5, 1, 9, 13, 1, 1, 2, 40, 1]])
    mask = (holes != 1).long()
    torch.testing.assert_close(model(holes, attention_mask=mask).logits[mask.bool()], model(text).logits[0], rtol=1e-5, atol=1e-5)


def test_a_simplified_layer_sees_three_tokens_back_and_a_selective_one_everything(model: MambaSWELUForCausalLM) -> None:
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 50
    changed = (model(ids).logits != model(other).logits).any(dim=2)[0]
    reach = 2 + 2 * 3 if model.config.layout == "simplified" else 19  # two layers of width 4
    assert changed.nonzero().squeeze(1).tolist() == list(range(2, reach + 1))


def test_rows_longer_than_the_model_has_positions_are_refused(model: MambaSWELUForCausalLM) -> None:
    with pytest.raises(ValueError, match="41 tokens; this model has positions for 40"):
        model(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="max_seq_len"):
        model.generate(torch.zeros(1, 39, dtype=torch.long), max_new_tokens=4, pad_token_id=1)


def test_only_real_tokens_count_against_the_positions(model: MambaSWELUForCausalLM) -> None:
    ids = torch.randint(0, 50, (1, 50))
    mask = torch.cat([torch.zeros(1, 10), torch.ones(1, 40)], dim=1).long()
    logits = model(ids, attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(logits, model(ids[:, 10:]).logits, rtol=1e-5, atol=1e-5)


def test_packed_rows_are_refused(model: MambaSWELUForCausalLM) -> None:
    with pytest.raises(ValueError, match="packed"):
        model(torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


# --- training -------------------------------------------------------------------------------------------


def test_labels_are_shifted_once(model: MambaSWELUForCausalLM) -> None:
    ids = torch.tensor([[4, 9, 2, 17, 30]])
    labels = torch.tensor([[-100, -100, 2, 17, 30]])
    out = model(ids, labels=labels)
    scores = out.logits[0].log_softmax(dim=-1)
    assert out.loss.item() == pytest.approx(-(scores[1, 2] + scores[2, 17] + scores[3, 30]).item() / 3, rel=1e-5)


def test_every_used_weight_gets_a_gradient_and_the_unused_none(model: MambaSWELUForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    model.train()(ids, labels=ids).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if unused(name, model)}
    assert bool(without) == (model.config.layout == "simplified")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model: MambaSWELUForCausalLM, reentrant: bool) -> None:
    ids, mask = padded(PROMPTS, "right")
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(results[1], results[0])


def test_the_base_model_gives_what_the_head_multiplies(model: MambaSWELUForCausalLM) -> None:
    """What fused output heads rely on: TRL computes its own loss from these two."""
    ids, mask = padded(PROMPTS, "right")
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(hidden @ model.get_output_embeddings().weight.T, model(ids, attention_mask=mask).logits)


def test_kept_logits_are_those_of_the_whole(model: MambaSWELUForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_hidden_states_and_tuples_are_given_on_request(model: MambaSWELUForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    out = model.base_model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert isinstance(model(ids, return_dict=False), tuple)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_it_learns_a_text_by_heart(model: MambaSWELUForCausalLM) -> None:
    ids = torch.tensor([[7, 3, 7, 12, 44, 3, 9, 30, 12, 7, 2, 41]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    first = model(ids, labels=ids).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"learn_lambda": False, "tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, layout: str, settings: dict[str, Any]) -> None:
    register()
    register()
    model = tiny(layout, **settings)
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MambaSWELUForCausalLM and not any(loading.values())
    assert AutoConfig.from_pretrained(tmp_path).layout == layout
    tied = again.lm_head.weight is again.model.token_embedding.weight
    assert tied == settings.get("tie_word_embeddings", True)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_fresh_weights_start_as_mamba_does() -> None:
    torch.manual_seed(0)
    model = MambaSWELUForCausalLM(MambaSWELUConfig(d_model=64, vocab_size=20, n_layers=1, dense_hidden_dim=8, layout="selective"))
    mixer = model.model.mamba_stack.layers[0].mamba
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17.0).expand(128, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 0.1001
    assert mixer.D.tolist() == [1.0] * 128 and model.model.swelu1.k.item() == 1.0


# --- fused kernels ------------------------------------------------------------------------------------------


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for `mamba_ssm` that counts its calls and computes with our own scan."""
    calls: list[str] = []

    def selective_scan_fn(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *, return_last_state: bool) -> Any:
        calls.append("scan")
        assert u.shape[1] == A.shape[0] and B.shape[1] == A.shape[1] and u.dtype == delta.dtype and return_last_state
        y, last = selective_scan(*(value.transpose(1, 2) for value in (u, delta)), A, B.transpose(1, 2), C.transpose(1, 2), D)
        return y.transpose(1, 2), last

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mamba_swelu, "fused_scan", mamba_swelu.fused_scan.__wrapped__)
    return calls


def test_an_installed_fused_kernel_is_used_on_its_device(fused_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("selective")
    ids, mask = padded(PROMPTS, "left")
    expected = model(ids, attention_mask=mask).logits
    assert fused_calls == [], "a processor has no fused kernel"
    monkeypatch.setattr(mamba_swelu, "FUSED_DEVICES", frozenset({"cpu"}))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    assert len(fused_calls) == model.config.n_layers
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert [row[7:].tolist() for row in out] == [greedy(model, prompt, 3) for prompt in PROMPTS]


def test_without_the_package_there_is_no_fused_kernel() -> None:
    assert mamba_swelu.fused_scan() is None
