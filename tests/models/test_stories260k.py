"""A really trained foreign model goes through the product's loading, quantising and adapting, and still tells its story."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stories import greedy_encode, read_pieces, save_stories

from finetuneflow.models.adapters import AdapterSpec, attach_adapter, trainable_parameters
from finetuneflow.models.load import LoadedBase, load_base

pytestmark = pytest.mark.shared_data

STORY = (
    "Once upon a time, there was a little boy named Tom. Tom had a red ball. He liked to play with it in the park. "
    'One day, the ball went up into a big tree. Tom was sad. His mom came and said, "Don\'t worry, Tom. I can help you." '
    'She took the ball and gave it to Tom. Tom was very happy. He said, "Thank you, mom!" They went home and played.'
)


@pytest.fixture(scope="module")
def weights(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K"


@pytest.fixture(scope="module")
def folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stories(weights, tmp_path_factory.mktemp("stories") / "base")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedBase:
    return load_base(str(folder), dtype="fp32", device="cpu")


def token_ids(loaded: LoadedBase, text: str) -> torch.Tensor:
    return torch.tensor([[loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]])


@torch.no_grad()
def mean_loss(model: Any, ids: torch.Tensor) -> float:
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def test_it_has_the_stated_shape_and_size(loaded: LoadedBase) -> None:
    assert loaded.facts.architecture == "LlamaForCausalLM"
    assert trainable_parameters(loaded.model).total == loaded.facts.num_parameters
    assert 255_000 < loaded.facts.num_parameters < 265_000


def test_the_converted_tokenizer_equals_the_original_algorithm(loaded: LoadedBase, weights: Path) -> None:
    pieces = read_pieces(weights / "tok512.bin")
    for text in (STORY, "Lily's mom said hi!", "été 12 €", "  two  blanks", "ab\ncd", "x"):
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == greedy_encode(pieces, text)
        assert loaded.tokenizer.decode(ids) == text


def test_greedy_decoding_tells_the_story_of_the_model_card(loaded: LoadedBase, weights: Path) -> None:
    card = (weights / "stories260K.md").read_text()
    expected = re.search(r"-t 0\.0\n(.*?)\n```", card, re.S)
    assert expected is not None
    ids = torch.tensor([[loaded.tokenizer.bos_token_id]])
    out = loaded.model.generate(ids, max_new_tokens=180, do_sample=False)
    told = loaded.tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert len(told) > 300
    assert expected.group(1).startswith(told[:300])


def test_its_loss_on_a_simple_story_is_that_of_a_trained_model(loaded: LoadedBase) -> None:
    """The card states 1.30 nats per token on its own kind of text; a random model has ln 512 = 6.2."""
    assert 0.5 < mean_loss(loaded.model, token_ids(loaded, STORY)) < 2.0
    assert mean_loss(loaded.model, token_ids(loaded, "Ball the in gradient xylophone tree of went quantum, up."[::-1])) > 3.0


def test_nf4_costs_this_trained_model_little(folder: Path, loaded: LoadedBase) -> None:
    ids = token_ids(loaded, STORY)
    quantized = load_base(str(folder), quantize="nf4", dtype="fp32", device="cpu")
    before, after = mean_loss(loaded.model, ids), mean_loss(quantized.model, ids)
    assert before < after < before + 0.4
    assert quantized.facts.num_parameters == loaded.facts.num_parameters


def test_lora_teaches_it_a_new_sentence(folder: Path) -> None:
    base = load_base(str(folder), dtype="fp32", device="cpu")
    ids = token_ids(base, "Lily ate a green car for lunch and it was yummy.")
    torch.manual_seed(0)
    model = attach_adapter(base.model, AdapterSpec(r=8, alpha=16, dropout=0.0, target_modules="all-linear"))
    before = mean_loss(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(model, ids) < before - 1.0
