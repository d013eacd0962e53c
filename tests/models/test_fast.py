"""The fast path computes what transformers and PEFT compute, on every kind of model and of training.

The reference is transformers' own loss on each row alone, its gradients summed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from test_mamba_swelu_reference import tiny as tiny_swelu
from tiny import save_tiny
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from finetuneflow.data.batches import IGNORED, StepCollator
from finetuneflow.kernels import attention
from finetuneflow.models import fast_modules
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from finetuneflow.models.fast import FastPath, describe, prepare_fast
from finetuneflow.models.load import load_base

VOCABULARY = 61
IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    **IDS,
}
GEMMA = LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 16}
WITHOUT_GROUPS = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
FALCON = WITHOUT_GROUPS | {"multi_query": True}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **IDS}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4, **IDS}


class Case(NamedTuple):
    """A tiny model and what the path is expected to do on it: which attention packs (empty: none does), what is fused."""

    family: str
    settings: dict[str, Any]
    attention: str = attention.NAME
    fused: frozenset[str] = frozenset({"norm", "feed-forward", "attention"})


NOTHING, NORM = frozenset[str](), frozenset({"norm"})
CASES = {
    "llama": Case("Llama", LLAMA),
    "llama, tied": Case("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama, biased": Case("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": Case("Llama", LLAMA | {"num_key_value_heads": 1}),
    "mistral": Case("Mistral", LLAMA | {"sliding_window": None}),
    "mistral, window beyond the probe": Case("Mistral", LLAMA | {"sliding_window": 16}),
    "mistral, window within the probe": Case("Mistral", LLAMA | {"sliding_window": 6}),
    "qwen2": Case("Qwen2", LLAMA),
    "qwen2, windowed": Case("Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": Case("Qwen3", LLAMA | {"head_dim": 8}),
    "gemma": Case("Gemma", GEMMA),
    "gemma2": Case("Gemma2", GEMMA, "eager", frozenset({"norm", "feed-forward"})),  # caps its scores
    "gemma3": Case("Gemma3Text", GEMMA),
    "phi": Case("Phi", LLAMA, fused=NOTHING),
    "phi3": Case("Phi3", LLAMA, fused=NORM),
    "granite": Case("Granite", LLAMA | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "cohere": Case("Cohere", LLAMA | {"logit_scale": 0.25}, fused=frozenset({"feed-forward"})),  # pairs neighbours in rotary
    "olmo2": Case("Olmo2", LLAMA),
    "smollm3": Case("SmolLM3", LLAMA | {"num_hidden_layers": 4}, fused=frozenset({"norm", "feed-forward"})),
    "starcoder2": Case("Starcoder2", LLAMA | {"residual_dropout": 0.0, "embedding_dropout": 0.0}, fused=NOTHING),
    "gpt2": Case("GPT2", GPT2, fused=NOTHING),
    "gpt_neox": Case("GPTNeoX", WITHOUT_GROUPS, fused=NOTHING),
    "opt": Case("OPT", WITHOUT_GROUPS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, fused=NOTHING),
    "bloom": Case("Bloom", WITHOUT_GROUPS | {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "", NOTHING),
    "falcon": Case("Falcon", FALCON | {"alibi": False}, "", NOTHING),
    "falcon, alibi": Case("Falcon", FALCON | {"alibi": True}, "", NOTHING),
    "mixtral": Case("Mixtral", LLAMA | {"num_local_experts": 4, "sliding_window": None}, fused=frozenset({"norm", "attention"})),
    "qwen3_moe": Case(
        "Qwen3Moe",
        LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        fused=frozenset({"norm", "attention"}),
    ),
    "mamba": Case("Mamba", MAMBA, "", NORM),
    "mamba_swelu, simplified": Case("", {"layout": "simplified"}, "", NOTHING),
    "mamba_swelu, selective": Case("", {"layout": "selective"}, "", NOTHING),
}
STATE_SPACE = [name for name in CASES if name.startswith("mamba")]
LENGTHS = (5, 30, 1, 19, 24)


def build(name: str, **settings: Any) -> Any:
    """A tiny model with random weights; wider ones than usual, or attention would hardly matter."""
    case = CASES[name]
    if not case.family:
        return tiny_swelu(case.settings["layout"], dropout=0.0)
    config = getattr(transformers, f"{case.family}Config")(**case.settings | settings)
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 4
    return model


def trainable(model: Any, kind: str, **options: Any) -> Any:
    spec = AdapterSpec(
        **{"kind": kind, "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "num_virtual_tokens": 3} | options
    )
    torch.manual_seed(0)
    return randomised(attach_adapter(model, spec))


def randomised(model: Any) -> Any:
    """An adapter that does something: else A gets no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Rows of which the first third is a prompt; the one of a single token has nothing to learn."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(4, 40, (length,), generator=generator).tolist()
        made.append({"index": i, "input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return made


class Result(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def reference(model: Any, lengths: tuple[int, ...] = LENGTHS) -> Result:
    model.train()
    model.zero_grad()
    total = 0.0
    for row in rows(lengths):
        labels = torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != IGNORED).sum())
        if count:
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss * count
            loss.backward()
            total += loss.item()
    return Result(total, gradients(model))


def through(
    fast: FastPath, model: Any, lengths: tuple[int, ...] = LENGTHS, *, budget: int = 60, packed: bool | None = None
) -> Result:
    """The same through the fast path: two micro-batches, with texts behind one another where it packs."""
    model.train()
    model.zero_grad()
    total = 0.0
    step = StepCollator(7, budget=budget, packed=fast.packs if packed is None else packed)(rows(lengths))
    assert len(step["micro_batches"]) > 1
    for micro_batch in step["micro_batches"]:
        with fast.layout(micro_batch):
            loss, count, _ = fast.loss(model, micro_batch)
            loss.backward()
        assert int(count) == int((micro_batch["targets"] != IGNORED).sum())
        total += loss.item()
    return Result(total, gradients(model))


def assert_equal(found: Result, wanted: Result, limit: float = 1e-5) -> None:
    """By the norm of each gradient; one that is zero but for rounding is measured against the largest."""
    assert found.loss == pytest.approx(wanted.loss, rel=limit)
    assert found.gradients.keys() == wanted.gradients.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.gradients.values())
    assert largest > 0
    unequal = {}
    for name, gradient in wanted.gradients.items():
        off = float((found.gradients[name].double() - gradient.double()).norm())
        if not off <= limit * max(float(gradient.norm()), 1e-2 * largest):
            unequal[name] = off / float(gradient.norm())
    assert unequal == {}


def prepared(model: Any) -> FastPath:
    fast = prepare_fast(model)
    assert fast is not None
    return fast


def kinds_of(fast: FastPath) -> set[str]:
    return {replaced.kind for replaced in fast.replaced}


def assert_exact(name: str, kind: str, *, checkpointing: bool = False, limit: float = 1e-5) -> FastPath:
    model = trainable(build(name), kind)
    wanted = reference(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast = prepared(model)
    assert_equal(through(fast, model), wanted, limit)
    return fast


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_transformers_own_row_by_row(name: str, kind: str) -> None:
    fast = assert_exact(name, kind)
    case = CASES[name]
    assert fast.packs is bool(case.attention)
    if fast.packs:
        assert fast.tap.base.config._attn_implementation == case.attention
    assert fast.tap.fused
    assert kinds_of(fast) - {"linear"} == case.fused


@pytest.mark.parametrize("kind", ["dora", "rslora", "ia3", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_so_they_are_for_each_kind_of_adapter(name: str, kind: str) -> None:
    fast = assert_exact(name, kind)
    assert fast.packs is (kind != "prefix"), "a prefix stands before one text alone"


def possible(name: str, kind: str, checkpointing: bool) -> bool:
    """What transformers and PEFT compute themselves: a prefix needs attention with all heads' keys, and a cache."""
    if kind == "prefix":
        return not checkpointing and name not in STATE_SPACE and not name.startswith("falcon")
    return not (checkpointing and name.startswith("mamba_swelu"))


CROSSED = [
    (name, kind, checkpointing)
    for name in CASES
    for kind in ("lora", "rslora", "dora", "ia3", "prefix", "full")
    for checkpointing in (False, True)
    if possible(name, kind, checkpointing)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "checkpointing"), CROSSED)
def test_models_and_kinds_crossed(name: str, kind: str, checkpointing: bool) -> None:
    assert_exact(name, kind, checkpointing=checkpointing, limit=5e-5 if name in STATE_SPACE else 1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_over_4_bit_weights_too(tmp_path: Path, name: str, double: bool) -> None:
    base = load_base(
        str(save_tiny(tmp_path, name, vocab=512, hidden=64)), quantize="nf4", double_quant=double, dtype="fp32", device="cpu"
    )
    base.model.config.use_cache = False
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = trainable(base.model, "qlora")
    wanted = reference(model)
    fast = prepared(model)
    assert fast.packs and fast.tap.fused
    assert (
        kinds_of(fast) == {"llama": {"norm", "feed-forward", "attention", "linear"}, "gpt2": {"linear"}}[name] or name == "gpt2"
    )
    assert_equal(through(fast, model), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_recomputing_activations_gives_the_same(name: str) -> None:
    assert_exact(name, "lora", checkpointing=True)


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_that_is_trained_beside_the_adapter(tied: bool) -> None:
    model = trainable(build("llama", tie_word_embeddings=tied), "lora", modules_to_save=["lm_head"])
    wanted = reference(model)
    assert any("modules_to_save" in name and gradient.any() for name, gradient in wanted.gradients.items())
    fast = prepared(model)
    assert fast.tap.fused
    assert_equal(through(fast, model), wanted)


def test_texts_longer_than_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "UNIT", 8)
    monkeypatch.setattr(attention, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(attention, "STRETCH", 7)
    assert_exact("llama", "lora")


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "mistral, window beyond the probe", "gpt2", "mamba"])
def test_evaluation_counts_loss_and_right_tokens_like_the_model_itself(name: str, kind: str) -> None:
    model = trainable(build(name), kind).eval()
    fast = prepared(model)
    total, right, made = 0.0, 0, rows()
    with torch.no_grad():
        for row in made:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            likeliest = logits.argmax(-1)
            labels = torch.where(
                torch.arange(len(logits)) % 3 == 0, likeliest, likeliest + 1 - VOCABULARY * (likeliest > VOCABULARY - 2)
            )
            row["labels"] = [IGNORED, *labels.tolist()]
            right += len(range(0, len(logits), 3))
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        found = torch.zeros(3)
        for micro_batch in StepCollator(7, budget=60, packed=fast.packs)(made)["micro_batches"]:
            with fast.layout(micro_batch):
                found += torch.tensor([float(part) for part in fast.loss(model, micro_batch)])
    assert found.tolist() == [pytest.approx(total, rel=1e-5), sum(LENGTHS) - len(LENGTHS), right]


# --- what the proof of a short probe cannot see -----------------------------------------------------------


def outputs(model: Any, length: int = 40) -> torch.Tensor:
    torch.manual_seed(3)
    ids = torch.randint(4, 40, (1, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("Starcoder2", {"residual_dropout": 0.5}, id="dropout after attention"),
        pytest.param(
            "SeedOss", {"head_dim": 8, "residual_dropout": 0.5, "attention_dropout": 0.0}, id="dropout after both blocks"
        ),
        pytest.param("Olmo", {"clip_qkv": 0.4}, id="clipped queries, keys and values"),
        pytest.param(
            "Ministral3",
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "llama_4_scaling_beta": 1.0,
                    "original_max_position_embeddings": 16,
                },
            },
            id="queries that grow with their position",
        ),
    ],
)
def test_a_module_that_does_more_than_it_seems_keeps_doing_it(family: str, settings: dict[str, Any]) -> None:
    config = getattr(transformers, f"{family}Config")(**LLAMA | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = outputs(model.train())
    prepare_fast(model)
    torch.testing.assert_close(outputs(model.train()), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["smollm3", "cohere"])
def test_attention_that_turns_queries_in_another_way_is_left_alone_in_16_bits_too(name: str) -> None:
    """There a probe leaves much to rounding, and in a model of small random weights attention hardly matters."""
    config = getattr(transformers, f"{CASES[name].family}Config")(**CASES[name].settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.autocast("cpu", torch.bfloat16):
        fast = prepared(model)
    assert "attention" not in kinds_of(fast)


def test_attention_dropout_is_taken_over() -> None:
    """Half of the weights dropped: the outputs vary, and their mean is that without dropout."""
    model = build("llama", attention_dropout=0.5, num_hidden_layers=1).train()
    fast = prepared(model)
    assert "attention" in kinds_of(fast) and fast.packs
    micro_batch = StepCollator(7, budget=100, packed=True)(rows())["micro_batches"][0]
    torch.manual_seed(0)
    with torch.no_grad(), fast.layout(micro_batch):
        varied = {round(fast.loss(model, micro_batch)[0].item(), 3) for _ in range(4)}
        steady = {round(fast.loss(model.eval(), micro_batch)[0].item(), 3) for _ in range(4)}
    assert len(varied) == 4 and len(steady) == 1


# --- what is wrong is left out ------------------------------------------------------------------------------


def test_a_packed_attention_that_leaks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own keeps the texts apart by a mask, and is taken instead."""
    monkeypatch.setattr(attention, "packed_attention", sdpa_attention_forward)
    model = build("llama")
    wanted = reference(model)
    fast = prepared(model)
    assert fast.packs and model.config._attn_implementation == "sdpa"
    assert_equal(through(fast, model), wanted)


def test_a_model_whose_attention_knows_nothing_of_texts_is_padded() -> None:
    def blind(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        """Sees all that is earlier; of a mask only which keys are padding."""
        padding = None if attention_mask is None else attention_mask[:, :, -1:, :].expand(-1, -1, query.shape[2], -1)
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        return sdpa_attention_forward(module, query, key, value, causal if padding is None else padding & causal, **options)

    AttentionInterface.register("blind", blind)
    AttentionMaskInterface.register(
        "blind",
        lambda *args, attention_mask=None, **options: None if attention_mask is None else attention_mask[:, None, None, :].bool(),
    )
    model = build("llama")
    model.set_attn_implementation("blind")
    wanted = reference(model)
    fast = prepared(model)
    assert not fast.packs and model.config._attn_implementation == "blind"
    assert "padded instead of packed" in describe(fast)
    assert_equal(through(fast, model), wanted)


@pytest.mark.parametrize("kind", ["norm", "feed-forward", "attention"])
def test_a_kind_of_module_that_computes_something_else_is_left_out_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its outputs are right where it is recognised, and its gradients wrong."""
    name = {"norm": "rms_norm", "feed-forward": "gated_block", "attention": "rotate"}[kind]
    right = getattr(fast_modules, name)

    def wrong(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        out = right(x, *arguments)
        return out + 0.1 * (out - out.detach())

    monkeypatch.setattr(fast_modules, name, wrong)
    model = build("llama")
    wanted = reference(model)
    fast = prepared(model)
    assert kinds_of(fast) == {"norm", "feed-forward", "attention"} - {kind}
    assert f"{kind} modules compute as they came" in describe(fast)
    assert_equal(through(fast, model), wanted)


def test_a_head_that_does_something_unknown_to_logits_computes_its_own() -> None:
    class Bent(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.sinh()
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, vocab_size=VOCABULARY)
            return out

    torch.manual_seed(0)
    model = Bent(transformers.LlamaConfig(**LLAMA | {"use_cache": False}))
    wanted = reference(model)
    fast = prepared(model)
    assert not fast.tap.fused and fast.packs
    assert "the model's own output layer" in describe(fast)
    assert_equal(through(fast, model), wanted)


def test_a_model_without_an_output_layer_takes_the_plain_path() -> None:
    assert prepare_fast(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA))) is None


# --- nothing else changes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_preparing_leaves_weights_gradients_mode_and_random_state(kind: str, training: bool) -> None:
    model = trainable(build("llama"), kind).train(training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    weights = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    prepared(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert all(bool((p.grad == 0.5).all()) for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
def test_removed_it_has_never_been_there(name: str) -> None:
    model = trainable(build(name), "lora")
    before, own = outputs(model.eval()), model.config._attn_implementation
    fast = prepared(model)
    fast.remove()
    assert model.config._attn_implementation == own
    assert torch.equal(outputs(model.eval()), before)
    assert fast.replaced == [] and not any(
        "fast" in getattr(getattr(module.forward, "func", module.forward), "__module__", "") for module in model.modules()
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2, windowed", "gpt2", "opt"])
def test_answers_are_generated_as_before_while_it_is_installed(name: str) -> None:
    model = trainable(build(name), "lora").eval()
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    before = model.generate(input_ids=ids, output_scores=True, return_dict_in_generate=True, **options)
    prepared(model)
    after = model.generate(input_ids=ids, output_scores=True, return_dict_in_generate=True, **options)
    assert torch.equal(after.sequences, before.sequences)
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-4, atol=1e-5)


def test_an_adapter_may_be_switched_off_exchanged_or_merged_meanwhile() -> None:
    model = trainable(build("llama"), "lora")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    randomised(model)

    def everything() -> list[torch.Tensor]:
        found = [outputs(model.eval())]
        with model.disable_adapter():
            found.append(outputs(model))
        model.set_adapter("other")
        found.append(outputs(model))
        model.base_model.set_adapter(["default", "other"])
        found.append(outputs(model))
        model.set_adapter("default")
        model.merge_adapter()
        found.append(outputs(model))
        with model.disable_adapter():
            found.append(outputs(model))
        model.unmerge_adapter()
        return [*found, outputs(model)]

    before = everything()
    prepared(model)
    after = everything()
    assert len({round(float(one.double().sum()), 4) for one in before}) >= 4, "they differ"
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_saved_names_nothing_of_it(tmp_path: Path) -> None:
    model = build("llama")
    names = set(model.state_dict())
    prepared(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again.eval()), outputs(model.eval()), rtol=1e-5, atol=1e-5)
