"""Policy, reference, value and reward on one base: each computes what it would alone, and only the trained ones move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.errors import ModelError
from finetuneflow.models.adapters import REFERENCE, TRAINED, AdapterSpec, load_adapters
from finetuneflow.models.load import load_base
from finetuneflow.training.ppo_actors import VALUE, Actors, Answers
from models.tiny import ARCHITECTURES, save_tiny
from training.ppo_bench import PpoBench, tiny

PROMPTS = [[5, 9, 13], [7] * 8, [30, 31, 32, 33, 34]]
ANSWERS = [[40, 41, 42, 43], [50], [60, 61, 3]]
SPECS = {
    "lora": AdapterSpec(r=4, dropout=0.3),
    "lora-head": AdapterSpec(r=4, modules_to_save=["lm_head"]),
    "dora": AdapterSpec(kind="dora", r=4),
    "ia3": AdapterSpec(kind="ia3"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("ppo") / "base", layers=2)


def loaded(base: Path, spec: AdapterSpec | None, *, moved: bool = True) -> Any:
    """A model whose adapter does something (a fresh one would be the base)."""
    model, _ = PpoBench(base, base, spec=spec).model()
    if moved:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def actors_of(model: Any, **changes: Any) -> Actors:
    settings = {"temperature": 1.0, "compute_dtype": "float32", "checkpointing": False, "seed": 1}
    return Actors(model, **{**settings, **changes})


def batch() -> Answers:
    return Answers.of(PROMPTS, ANSWERS, pad=0, device="cpu")


def by_hand(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of one answer's tokens, from a plain forward pass of the row alone."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double() / temperature
    return [float(logits[len(prompt) - 1 + t].log_softmax(dim=-1)[token]) for t, token in enumerate(answer)]


def assert_rows(found: torch.Tensor, expected: list[list[float]]) -> None:
    for row, values in zip(found, expected, strict=True):
        assert row[: len(values)].tolist() == pytest.approx(values, abs=2e-5)
        assert row[len(values) :].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_each_row_alone(base: Path, temperature: float) -> None:
    model = loaded(base, SPECS["lora"])
    alone = copy.deepcopy(model).eval()
    found, spread = actors_of(model, temperature=temperature).log_probs(batch(), with_entropy=True)
    with torch.no_grad():
        assert_rows(found, [by_hand(alone, p, a, temperature) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
        last = alone(torch.tensor([PROMPTS[1]])).logits[0, -1].double() / temperature
    assert spread is not None
    assert float(spread[1, 0].detach()) == pytest.approx(float(torch.distributions.Categorical(logits=last).entropy()), abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_supported_architecture_has_log_probabilities_and_values(tmp_path: Path, architecture: str) -> None:
    """Also where a model bounds its logits, keeps a state instead of attention, or ties its embeddings."""
    model = loaded(save_tiny(tmp_path, architecture, hidden=32, layers=1, vocab=320), AdapterSpec(r=4))
    alone = copy.deepcopy(model).eval()
    actors = actors_of(model)
    with torch.no_grad():
        actors.head.weight.fill_(0.1)
        assert_rows(actors.log_probs(batch())[0], [by_hand(alone, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
        single = Answers.of(PROMPTS[:1], ANSWERS[:1], pad=0, device="cpu")
        torch.testing.assert_close(actors.values(batch())[:1], actors.values(single), atol=1e-5, rtol=1e-4)
    actors.values(batch()).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in actors.value_parameters)


@pytest.mark.parametrize("kind", SPECS)
def test_the_reference_of_a_fresh_adapter_is_the_model_without_it(base: Path, kind: str) -> None:
    model = loaded(base, SPECS[kind])
    plain = copy.deepcopy(model).eval()
    found = actors_of(model).reference_log_probs(batch())
    with torch.no_grad(), plain.disable_adapter():
        expected = [by_hand(plain, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert_rows(found, expected)
    with torch.no_grad():
        assert abs(by_hand(plain, PROMPTS[0], ANSWERS[0])[0] - expected[0][0]) > 1e-3, "the adapter does something"


@pytest.mark.parametrize("kind", ["lora", "lora-head", "dora"])
def test_the_reference_of_an_adapter_that_is_continued_is_what_it_was(base: Path, kind: str) -> None:
    model = loaded(base, SPECS[kind])
    before = copy.deepcopy(model).eval()
    actors = actors_of(model, continued=True)
    with torch.no_grad():
        for parameter in actors.policy_parameters:
            parameter.mul_(1.5)
        expected = [by_hand(before, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert_rows(actors.reference_log_probs(batch()), expected)
        assert abs(float(actors.log_probs(batch())[0][0, 0]) - expected[0][0]) > 1e-3


def test_the_reference_of_a_full_model_is_a_frozen_copy(base: Path) -> None:
    model = loaded(base, None, moved=False)
    before = copy.deepcopy(model).eval()
    actors = actors_of(model)
    with torch.no_grad():
        for parameter in actors.policy_parameters:
            parameter.mul_(1.1)
        assert_rows(actors.reference_log_probs(batch()), [by_hand(before, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)])


def test_a_frozen_model_that_is_handed_over_is_the_reference(base: Path) -> None:
    model, given = loaded(base, None, moved=False), loaded(base, None)
    actors = actors_of(model, reference=given)
    with torch.no_grad():
        assert_rows(actors.reference_log_probs(batch()), [by_hand(given, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert not any(parameter.requires_grad for parameter in given.parameters())


def test_values_start_at_zero_and_are_read_where_the_next_token_is_predicted(base: Path) -> None:
    model = loaded(base, SPECS["lora"])
    plain = copy.deepcopy(model).eval()
    actors = actors_of(model)
    assert actors.values(batch()).eq(0).all()
    with torch.no_grad():
        actors.head.weight.copy_(torch.linspace(-1, 1, actors.head.in_features))
        actors.head.bias.fill_(0.5)
        with plain.disable_adapter():  # a fresh value adapter changes nothing yet
            hidden = [
                plain.get_base_model().model(torch.tensor([[*p, *a]])).last_hidden_state[0]
                for p, a in zip(PROMPTS, ANSWERS, strict=True)
            ]
        expected = [
            [float(states[len(p) - 1 + t] @ actors.head.weight[0]) + 0.5 for t in range(len(a))]
            for states, p, a in zip(hidden, PROMPTS, ANSWERS, strict=True)
        ]
        assert_rows(actors.values(batch()), expected)


@pytest.mark.parametrize(("rank", "taken"), [(4, True), (2, False)])
def test_values_can_start_as_what_a_reward_model_on_the_base_says(base: Path, rank: int, taken: bool) -> None:
    """Scores from a plain forward pass with the reward's adapter alone; one of another shape changes nothing."""
    from peft import LoraConfig

    model = loaded(base, SPECS["lora"])
    other: Any = copy.deepcopy(model.peft_config[TRAINED])
    assert isinstance(other, LoraConfig)
    other.r = rank
    model.add_adapter("reward", other)
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reward" in name.split("."):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    plain = copy.deepcopy(model).eval()
    plain.set_adapter("reward")
    actors = actors_of(model)
    assert actors.start_value_as("reward", head, weight=2.0) is taken
    with torch.no_grad():
        rows = [torch.tensor([[*p, *a]]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        scores = [2.0 * head(plain.get_base_model().model(row).last_hidden_state[0]).squeeze(-1) for row in rows]
    expected = [s[len(p) - 1 :].tolist()[: len(a)] for s, p, a in zip(scores, PROMPTS, ANSWERS, strict=True)]
    assert_rows(actors.values(batch()), expected if taken else [[0.0] * len(a) for a in ANSWERS])
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "reward" in name.split("."))


@pytest.mark.parametrize("kind", [*SPECS, "full"])
def test_each_loss_moves_its_own_parameters_alone(base: Path, kind: str) -> None:
    model = loaded(base, SPECS.get(kind), moved=False)
    actors = actors_of(model)
    with torch.no_grad():
        actors.head.weight.fill_(0.1)
    actors.log_probs(batch())[0].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in actors.value_parameters)
    moved = [p for p in actors.policy_parameters if p.grad is not None and p.grad.any()]
    assert moved
    model.zero_grad()
    actors.values(batch()).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in actors.policy_parameters)
    with_gradient = [p for p in actors.value_parameters if p.grad is not None and p.grad.any()]
    assert len(with_gradient) > (0 if kind == "full" else 2), "the head, and the value's adapter where there is one"


@pytest.mark.parametrize("kind", SPECS)
def test_in_every_role_the_trained_parameters_and_no_others_take_a_gradient(base: Path, kind: str) -> None:
    model = loaded(base, SPECS[kind])
    actors = actors_of(model, continued=True)
    trained = {id(p) for p in (*actors.policy_parameters, *actors.value_parameters)}

    def right() -> bool:
        return all(p.requires_grad == (id(p) in trained) for p in (*model.parameters(), *actors.head.parameters()))

    assert right()
    with actors.value_role():
        assert right() and model.base_model.active_adapters == [VALUE]
    with actors._as_reference():
        assert right() and model.base_model.active_adapters == [REFERENCE]
    actors.reference_log_probs(batch())
    assert right() and model.base_model.active_adapters == [TRAINED] and not model.training


def test_with_recomputed_activations_the_gradients_are_the_same(base: Path) -> None:
    """Also those of the value, whose backward pass runs its forward pass again and needs its adapter for it."""
    found = []
    for checkpointing in (False, True):
        actors = actors_of(loaded(base, SPECS["lora"]), checkpointing=checkpointing)
        with torch.no_grad():
            actors.head.weight.fill_(0.1)
            for parameter in actors.value_parameters:
                parameter += 0.05
        calls = count_calls(actors.model)
        with actors.updating():
            actors.log_probs(batch())[0].sum().backward()
            with actors.value_role():
                actors.values(batch()).sum().backward()
        trained = (*actors.policy_parameters, *actors.value_parameters)
        found.append((calls[0], [p.grad.clone() if p.grad is not None else None for p in trained]))
        assert not any(module.training for module in actors.model.modules())
    (plain_calls, plain), (recomputed_calls, recomputed) = found
    assert recomputed_calls == 2 * plain_calls, "each layer ran twice"
    assert any(gradient is not None and gradient.any() for gradient in plain)
    for one, two in zip(plain, recomputed, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)  # type: ignore[arg-type]


def count_calls(model: Any) -> list[int]:
    """Counts forward passes of the first layer's attention from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("kind", ["lora", "lora-head", "ia3"])
def test_dismissed_actors_leave_the_policy_and_nothing_else(base: Path, kind: str) -> None:
    model = loaded(base, SPECS[kind])
    names, values = set(model.state_dict()), copy.deepcopy(model).eval()
    actors = actors_of(model, continued=True)
    actors.dismiss()
    assert set(model.state_dict()) == names and list(model.peft_config) == [TRAINED]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, values(torch.tensor([PROMPTS[0]])).logits)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in values.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("kind", ["lora", "lora-head", "ia3"])
def test_a_saved_policy_is_an_adapter_like_any_other(base: Path, tmp_path: Path, kind: str) -> None:
    model = loaded(base, SPECS[kind])
    actors = actors_of(model, continued=True)
    actors.save_policy(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = load_adapters(load_base(str(base), dtype="fp32", device="cpu").model, {"default": tmp_path / "saved"}).eval()
    with torch.no_grad():
        assert torch.equal(other(torch.tensor([PROMPTS[0]])).logits, model(torch.tensor([PROMPTS[0]])).logits)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_saved_weights_come_back_bit_for_bit(base: Path, tmp_path: Path, kind: str) -> None:
    first, second = actors_of(loaded(base, SPECS.get(kind))), actors_of(loaded(base, SPECS.get(kind), moved=False), seed=2)
    with torch.no_grad():
        for number, parameter in enumerate(first.value_parameters):
            parameter += 0.01 * number
    first.save_policy(tmp_path)
    first.save_value(tmp_path)
    second.load_policy(tmp_path)
    second.load_value(tmp_path)
    for one, two in zip(
        (*first.policy_parameters, *first.value_parameters), (*second.policy_parameters, *second.value_parameters), strict=True
    ):
        assert torch.equal(one, two)


def test_a_trained_prefix_is_refused(base: Path) -> None:
    with pytest.raises(ModelError) as caught:
        actors_of(loaded(base, AdapterSpec(kind="prefix", num_virtual_tokens=4), moved=False))
    assert caught.value.code == "ADAPTER_UNSUPPORTED" and "lora" in str(caught.value.remedy)
