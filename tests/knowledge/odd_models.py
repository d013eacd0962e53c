"""Small models with odd settings of every listed family, built by transformers: the reference that shapes are held against."""

from __future__ import annotations

import dataclasses
from typing import Any

# Every number differs from every other where the family allows it, so that no two can be mistaken for each other.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 5),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "attention_heads", "n_heads"), 6),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff"), 56),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 77),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    "vocab_size": 211,
    "pad_token_id": 0,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 72,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 18,
    "sliding_window": 16,
    "rotary_dim": 8,
}
_DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LATENT = {"num_key_value_heads": 6}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 16, "attn_layer_indices": [1, 3]},
    "codegen": {"n_head": 8},
    "cwm": {"head_dim": 16},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "gpt_neo": {"attention_types": [[["global"], 5]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"],
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2": {"full_attn_idxs": [1, 4], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 12, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "minicpm3": _LATENT,
    "nemotron": {"head_dim": 16},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "youtu": _LATENT,
}
# Settings tried one by one in each family that has them, beside each of its flags turned over.
VARIANTS: list[dict[str, Any]] = [
    {"num_key_value_heads": 6},
    {"num_key_value_heads": None},
    {"head_dim": 24},
    {"head_dim": None},
    {"n_inner": 40},
    {"num_experts": 0},
    {"first_k_dense_replace": 2},
    {"num_dense_layers": 2},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [1]},
    {"mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]},
    {"moe_layer_interval": 2},
    {"moe_layer_start_index": 2, "moe_layer_end_index": 3},
    {"moe_layers": [0, 3]},
    {"interleave_moe_layer_step": 2},
    {"num_shared_experts": 3},
    {"n_shared_experts": 3},
    {"moe_num_shared_experts": 3},
    {"shared_intermediate_size": 0},
    {"q_lora_rank": None},
    {"word_embed_proj_dim": 40},
    {"num_ln_in_parallel_attn": 1},
    {"new_decoder_architecture": True},
    {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    {"multi_query": False, "parallel_attn": False},
    {"expand": 3},
    {"time_step_rank": 7},
    {"conv_kernel": 3},
    {"mamba_dt_rank": 9},
    {"mamba_expand": 4},
    {"expert_layer_period": 3, "expert_layer_offset": 2},
    {"conv_L_cache": 4},
    {"block_ffn_dim_multiplier": 1.3},
]


def fields(model_type: str) -> dict[str, Any]:
    """The settings a configuration class has, with their defaults as written in the class (before it fills any in)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = {}
    for field in dataclasses.fields(CONFIG_MAPPING[model_type]):
        plain = field.default is not dataclasses.MISSING
        found[field.name] = field.default if plain else field.default_factory()  # type: ignore[misc]
    return found


def odd_settings(model_type: str) -> dict[str, Any]:
    known = fields(model_type)
    return {k: v for k, v in (SMALL | OWN.get(model_type, {})).items() if k in known or k == "pad_token_id"}


def odd_config(model_type: str, **changes: Any) -> Any:
    """A transformers configuration; raises what the class raises for settings it does not take."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**(odd_settings(model_type) | changes))


def on_meta(config: Any) -> Any:
    """The model without any memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
