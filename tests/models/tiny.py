"""Tiny models with a tokenizer, built from configs in about a second: the base models of the whole test suite.

Use from any test: `from models.tiny import save_tiny`, then `save_tiny(tmp_path / "base", "llama")`.
The weights are random but fixed by `seed`; the folder looks like any downloaded model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "mamba")
SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def training_text() -> Iterator[str]:
    """Lines of English and French with figures, enough for some hundred merges."""
    for who in ("system", "user", "assistant", "the cat", "a dog", "Marie", "mon voisin", "the teacher"):
        for what in ("says hello to", "helps", "asks", "regarde", "answers", "donne un livre à"):
            for whom in ("the little girl.", "her friend!", "tout le monde.", "the big red ball?", "son père, 12 fois."):
                yield f"{who} {what} {whom} What is 3 + 4? It is 7. Quelle est la capitale ? Paris."


@functools.cache
def tokenizer_json(vocab: int) -> str:
    """A byte-level BPE of at most `vocab` entries: any text is encoded without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(vocab: int = 512, *, chat_template: bool = True, **special_tokens: str | None) -> Any:
    """A fresh tokenizer: ChatML, ends a turn with `<|im_end|>`, pads right with a token of its own, adds no BOS.

    `special_tokens` override the roles, for instance `pad_token=None` or `eos_token="<|endoftext|>"`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    roles = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special_tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(vocab)),
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
        padding_side="right",
        **{role: token for role, token in roles.items() if token is not None},
    )
    tokenizer.chat_template = CHATML if chat_template else None
    return tokenizer


def tiny_config(architecture: str, *, vocab: int = 512, hidden: int = 48, layers: int = 2) -> Any:
    """The configuration of a tiny model; 4 attention heads, 2 key/value heads where the family groups them."""
    import transformers as t

    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
    llama_like: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **ids,
    }
    gemma_like = llama_like | {"head_dim": hidden // 4, "tie_word_embeddings": True}
    without_groups = {key: value for key, value in llama_like.items() if key != "num_key_value_heads"}
    mamba = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "state_size": 4, "time_step_rank": 4, **ids}
    gpt2 = {"vocab_size": vocab, "n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 512, **ids}
    built: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", llama_like),
        "mistral": ("MistralConfig", llama_like | {"sliding_window": None}),
        "qwen2": ("Qwen2Config", llama_like),
        "qwen3": ("Qwen3Config", llama_like | {"head_dim": hidden // 4}),
        "gemma": ("GemmaConfig", gemma_like),
        "gemma2": ("Gemma2Config", gemma_like | {"query_pre_attn_scalar": hidden // 4, "sliding_window": 64}),
        "gemma3": ("Gemma3TextConfig", gemma_like | {"query_pre_attn_scalar": hidden // 4, "sliding_window": 64}),
        "phi": ("PhiConfig", llama_like),
        "phi3": ("Phi3Config", llama_like),
        "gpt2": ("GPT2Config", gpt2),
        "gpt_neox": ("GPTNeoXConfig", without_groups),
        "mamba": ("MambaConfig", mamba),
    }
    class_name, settings = built[architecture]
    return getattr(t, class_name)(**settings)


def tiny_model(architecture: str = "llama", *, seed: int = 0, vocab: int = 512, hidden: int = 48, layers: int = 2) -> Any:
    """A model in memory, fp32, random weights fixed by `seed`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, vocab=vocab, hidden=hidden, layers=layers))


def save_tiny(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    vocab: int = 512,
    hidden: int = 48,
    layers: int = 2,
    tokenizer: Any = None,
) -> Path:
    """Write a tiny model and its tokenizer to the folder `path`, as `save_pretrained` would; returns `path`."""
    model = tiny_model(architecture, seed=seed, vocab=vocab, hidden=hidden, layers=layers)
    model.save_pretrained(path)
    (tokenizer or tiny_tokenizer(vocab)).save_pretrained(path)
    return path
