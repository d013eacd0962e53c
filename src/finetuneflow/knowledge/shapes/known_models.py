"""Shapes of well-known hub models, so that a plan needs no download: hub id -> the settings of its config.json.

Source: the `config.json` in each model's own repository on the hub (the revision current at the end of 2025). Keys that equal
the default of the model's configuration class are left out, as transformers does. The tests hold each row against the number
of parameters that the model's card, paper or safetensors header states.
"""

from __future__ import annotations

import re
from typing import Any

Config = dict[str, Any]


def _row(model_type: str, layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any) -> Config:
    """The seven numbers every decoder has, by their usual keys."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        **more,
    }


def _llama3(layers: int, width: int, heads: int, inner: int, *, positions: int = 131_072, tied: bool = False) -> Config:
    return _row("llama", layers, width, heads, 8, inner, 128_256, max_position_embeddings=positions, tie_word_embeddings=tied)


def _qwen25(layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, *, tied: bool) -> Config:
    return _row("qwen2", layers, width, heads, kv_heads, inner, vocab, tie_word_embeddings=tied, max_position_embeddings=32_768)


def _qwen3(layers: int, width: int, heads: int, inner: int, *, tied: bool) -> Config:
    return _row(
        "qwen3", layers, width, heads, 8, inner, 151_936, head_dim=128, tie_word_embeddings=tied, max_position_embeddings=40_960
    )


def _gpt2(layers: int, width: int, heads: int) -> Config:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": 50_257, "n_positions": 1024}


def _pythia(layers: int, width: int, heads: int, vocab: int = 50_304) -> Config:
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }


def _opt(layers: int, width: int, heads: int, **more: Any) -> Config:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        **more,
    }


def _bloom(layers: int, width: int, heads: int) -> Config:
    return {"model_type": "bloom", "n_layer": layers, "hidden_size": width, "n_head": heads, "vocab_size": 250_880}


def _gemma2(layers: int, width: int, heads: int, kv_heads: int, inner: int, head_dim: int) -> Config:
    return _row("gemma2", layers, width, heads, kv_heads, inner, 256_000, head_dim=head_dim, sliding_window=4096)


def _gemma3(layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any) -> Config:
    return _row("gemma3_text", layers, width, heads, kv_heads, inner, vocab, **more)


_MISTRAL = _row("mistral", 32, 4096, 32, 8, 14_336, 32_000, max_position_embeddings=32_768, sliding_window=None)
_PHI3_MINI = _row("phi3", 32, 3072, 32, 32, 8192, 32_064, sliding_window=2047)
_TINYLLAMA = _row("llama", 22, 2048, 32, 4, 5632, 32_000)

KNOWN: dict[str, Config] = {
    "meta-llama/llama-2-7b": _row("llama", 32, 4096, 32, 32, 11_008, 32_000, max_position_embeddings=4096),
    "meta-llama/llama-2-13b": _row("llama", 40, 5120, 40, 40, 13_824, 32_000, max_position_embeddings=4096),
    "meta-llama/llama-2-70b": _row("llama", 80, 8192, 64, 8, 28_672, 32_000, max_position_embeddings=4096),
    "codellama/codellama-7b": _row("llama", 32, 4096, 32, 32, 11_008, 32_016, max_position_embeddings=16_384),
    "meta-llama/meta-llama-3-8b": _llama3(32, 4096, 32, 14_336, positions=8192),
    "meta-llama/meta-llama-3-70b": _llama3(80, 8192, 64, 28_672, positions=8192),
    "meta-llama/llama-3.1-8b": _llama3(32, 4096, 32, 14_336),
    "meta-llama/llama-3.1-70b": _llama3(80, 8192, 64, 28_672),
    "meta-llama/llama-3.1-405b": _llama3(126, 16_384, 128, 53_248),
    "meta-llama/llama-3.2-1b": _llama3(16, 2048, 32, 8192, tied=True),
    "meta-llama/llama-3.2-3b": _llama3(28, 3072, 24, 8192, tied=True),
    "meta-llama/llama-3.3-70b": _llama3(80, 8192, 64, 28_672),
    "tinyllama/tinyllama-1.1b-v1.0": _TINYLLAMA,
    "tinyllama/tinyllama-1.1b-intermediate-step-1431k-3t": _TINYLLAMA,
    "mistralai/mistral-7b-v0.1": _MISTRAL | {"sliding_window": 4096},
    "mistralai/mistral-7b-v0.2": _MISTRAL,
    "mistralai/mistral-7b-v0.3": _MISTRAL | {"vocab_size": 32_768},
    "mistralai/mistral-nemo-2407": _row(
        "mistral", 40, 5120, 32, 8, 14_336, 131_072, head_dim=128, sliding_window=None, max_position_embeddings=131_072
    ),
    "mistralai/mixtral-8x7b-v0.1": _row("mixtral", 32, 4096, 32, 8, 14_336, 32_000, max_position_embeddings=32_768),
    "mistralai/mixtral-8x22b-v0.1": _row("mixtral", 56, 6144, 48, 8, 16_384, 32_000, max_position_embeddings=65_536),
    "qwen/qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864, 151_936, tied=True),
    "qwen/qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960, 151_936, tied=True),
    "qwen/qwen2.5-3b": _qwen25(36, 2048, 16, 2, 11_008, 151_936, tied=True),
    "qwen/qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    "qwen/qwen2.5-14b": _qwen25(48, 5120, 40, 8, 13_824, 152_064, tied=False),
    "qwen/qwen2.5-32b": _qwen25(64, 5120, 40, 8, 27_648, 152_064, tied=False),
    "qwen/qwen2.5-72b": _qwen25(80, 8192, 64, 8, 29_568, 152_064, tied=False),
    "qwen/qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen/qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen/qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen/qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen/qwen3-14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen/qwen3-32b": _qwen3(64, 5120, 64, 25_600, tied=False),
    "qwen/qwen3-30b-a3b": _row("qwen3_moe", 48, 2048, 32, 4, 6144, 151_936, head_dim=128, max_position_embeddings=40_960),
    "qwen/qwen3-235b-a22b": _row(
        "qwen3_moe", 94, 4096, 64, 4, 12_288, 151_936, head_dim=128, moe_intermediate_size=1536, max_position_embeddings=40_960
    ),
    "google/gemma-2b": _row("gemma", 18, 2048, 8, 1, 16_384, 256_000),
    "google/gemma-7b": _row("gemma", 28, 3072, 16, 16, 24_576, 256_000),
    "google/gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216, 256),
    "google/gemma-2-9b": _gemma2(42, 3584, 16, 8, 14_336, 256),
    "google/gemma-2-27b": _gemma2(46, 4608, 32, 16, 36_864, 128),
    "google/gemma-3-270m": _gemma3(18, 640, 4, 1, 2048, 262_144, max_position_embeddings=32_768, sliding_window=512),
    "google/gemma-3-1b": _gemma3(26, 1152, 4, 1, 6912, 262_144, max_position_embeddings=32_768, sliding_window=512),
    "google/gemma-3-4b": {"model_type": "gemma3", "text_config": _gemma3(34, 2560, 8, 4, 10_240, 262_208, sliding_window=1024)},
    "google/gemma-3-12b": {"model_type": "gemma3", "text_config": _gemma3(48, 3840, 16, 8, 15_360, 262_208, sliding_window=1024)},
    "google/gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": _gemma3(62, 5376, 32, 16, 21_504, 262_208, head_dim=128, sliding_window=1024),
    },
    "microsoft/phi-2": _row("phi", 32, 2560, 32, 32, 10_240, 51_200),
    "microsoft/phi-3-mini-4k": _PHI3_MINI,
    "microsoft/phi-3-mini-128k": _PHI3_MINI | {"max_position_embeddings": 131_072, "sliding_window": 262_144},
    "microsoft/phi-3.5-mini": _PHI3_MINI | {"max_position_embeddings": 131_072, "sliding_window": 262_144},
    "microsoft/phi-3-medium-4k": _row("phi3", 40, 5120, 40, 10, 17_920, 32_064, sliding_window=2047),
    "microsoft/phi-4": _row("phi3", 40, 5120, 40, 10, 17_920, 100_352, max_position_embeddings=16_384),
    "microsoft/phi-4-mini": _row(
        "phi3", 32, 3072, 24, 8, 8192, 200_064, tie_word_embeddings=True, max_position_embeddings=131_072, sliding_window=262_144
    ),
    "huggingfacetb/smollm2-135m": _row(
        "llama", 30, 576, 9, 3, 1536, 49_152, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "huggingfacetb/smollm2-360m": _row(
        "llama", 32, 960, 15, 5, 2560, 49_152, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "huggingfacetb/smollm2-1.7b": _row(
        "llama", 24, 2048, 32, 32, 8192, 49_152, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "huggingfacetb/smollm3-3b": _row("smollm3", 36, 2048, 16, 4, 11_008, 128_256, max_position_embeddings=65_536),
    "openai-community/gpt2": _gpt2(12, 768, 12),
    "openai-community/gpt2-medium": _gpt2(24, 1024, 16),
    "openai-community/gpt2-large": _gpt2(36, 1280, 20),
    "openai-community/gpt2-xl": _gpt2(48, 1600, 25),
    "eleutherai/pythia-70m": _pythia(6, 512, 8),
    "eleutherai/pythia-160m": _pythia(12, 768, 12),
    "eleutherai/pythia-410m": _pythia(24, 1024, 16),
    "eleutherai/pythia-1b": _pythia(16, 2048, 8),
    "eleutherai/pythia-1.4b": _pythia(24, 2048, 16),
    "eleutherai/pythia-2.8b": _pythia(32, 2560, 32),
    "eleutherai/pythia-6.9b": _pythia(32, 4096, 32, 50_432),
    "eleutherai/pythia-12b": _pythia(36, 5120, 40, 50_688),
    "eleutherai/gpt-neox-20b": _pythia(44, 6144, 64, 50_432),
    "eleutherai/gpt-j-6b": {"model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "vocab_size": 50_400},
    "facebook/opt-125m": _opt(12, 768, 12),
    "facebook/opt-350m": _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(24, 2048, 32),
    "facebook/opt-2.7b": _opt(32, 2560, 32),
    "facebook/opt-6.7b": _opt(32, 4096, 32),
    "facebook/opt-13b": _opt(40, 5120, 40),
    "facebook/opt-30b": _opt(48, 7168, 56),
    "bigscience/bloom-560m": _bloom(24, 1024, 16),
    "bigscience/bloom-7b1": _bloom(30, 4096, 32),
    "tiiuae/falcon-7b": {
        "model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65_024,
    },
    "tiiuae/falcon-40b": {
        "model_type": "falcon", "num_hidden_layers": 60, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8,
        "new_decoder_architecture": True, "vocab_size": 65_024,
    },
    "state-spaces/mamba-130m": {"model_type": "mamba", "num_hidden_layers": 24, "hidden_size": 768, "vocab_size": 50_280},
    "state-spaces/mamba-2.8b": {"model_type": "mamba", "num_hidden_layers": 64, "hidden_size": 2560, "vocab_size": 50_280},
    "deepseek-ai/deepseek-v3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 129_280,
        "max_position_embeddings": 163_840,
    },
    "openai/gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 32},
    "openai/gpt-oss-120b": {"model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "num_local_experts": 128},
}  # fmt: skip

# Other ids of the same shape.
_RENAMED = {
    "deepseek-ai/deepseek-r1": "deepseek-ai/deepseek-v3",
    "deepseek-ai/deepseek-v3.1": "deepseek-ai/deepseek-v3",
    "meta-llama/llama-3-8b": "meta-llama/meta-llama-3-8b",
    "meta-llama/llama-3-70b": "meta-llama/meta-llama-3-70b",
    "meta-llama/meta-llama-3.1-8b": "meta-llama/llama-3.1-8b",
    "meta-llama/meta-llama-3.1-70b": "meta-llama/llama-3.1-70b",
    "meta-llama/meta-llama-3.1-405b": "meta-llama/llama-3.1-405b",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "tinyllama/tinyllama_v1.1": "tinyllama/tinyllama-1.1b-v1.0",
}
# What a tuned or converted edition adds to the name without changing the shape.
_EDITION = re.compile(r"-(instruct|chat|base|hf|it|pt|thinking|coder|deduped|unsloth|bnb-4bit)(?=-|$)")
_DATED = re.compile(r"^(qwen/.*|qwen3-.*)-2507$")
# Organisations that publish the models above again under the same names.
_MIRRORS = ("unsloth/", "nousresearch/")
_BY_LAST_PART = {hub_id.rsplit("/", 1)[-1]: hub_id for hub_id in [*KNOWN, *_RENAMED]}


def known_config(name: str) -> Config | None:
    """The settings of a well-known model by its hub id, or by the last part of it alone; tuned editions included."""
    hub_id = _DATED.sub(r"\1", _EDITION.sub("", name.strip().lower()))
    for mirror in _MIRRORS:
        hub_id = hub_id.removeprefix(mirror)
    if "/" not in hub_id:
        hub_id = _BY_LAST_PART.get(hub_id, hub_id)
    return KNOWN.get(_RENAMED.get(hub_id, hub_id))
