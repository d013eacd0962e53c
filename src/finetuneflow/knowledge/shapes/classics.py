"""The families before and beside Llama: GPT-2 and its kin, OPT, BLOOM, Falcon, MPT and others with module trees of their own."""

from __future__ import annotations

from collections.abc import Callable

from finetuneflow.knowledge.shapes.layouts import Layout, start
from finetuneflow.knowledge.shapes.settings import Settings, unsupported


def _begin(s: Settings, layer_path: str, embedding: str = "wte") -> Layout:
    """`start` for families with as many key/value heads as heads, heads of width / heads, and a plain feed-forward part."""
    if s.flag("add_cross_attention"):
        raise unsupported("A decoder with cross-attention reads an encoder, which is not a causal language model.", name=s.name)
    d = start(s, layer_path=layer_path, own_head_dim=False)
    d.kv_heads, d.gated_mlp, d.embedding_name = d.heads, False, embedding
    return d


def _plain(d: Layout, attention: str, out: str, mlp_in: str, mlp_out: str, *, attention_bias: bool, out_bias: bool) -> None:
    """A fused query/key/value projection, its output, and a feed-forward part with biases."""
    d.linear(attention, d.hidden, 3 * d.hidden, "attention", bias=attention_bias)
    d.linear(out, d.hidden, d.hidden, "attention", bias=out_bias)
    d.linear(mlp_in, d.hidden, d.intermediate, "mlp", bias=True)
    d.linear(mlp_out, d.intermediate, d.hidden, "mlp", bias=True)


def _norms(d: Layout, per_layer: int, outside: int = 1) -> None:
    """Layer norms with weight and bias."""
    d.other_parameters += 2 * d.hidden * (per_layer * d.layers + outside)


def _positions(d: Layout, s: Settings, more: int = 0) -> None:
    d.other_parameters += (s.integer("max_position_embeddings") + more) * d.hidden


def _gpt2(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}")
    d.intermediate = s.integer("intermediate_size", 4 * d.hidden)
    _plain(d, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", attention_bias=True, out_bias=True)
    _norms(d, 2)
    _positions(d, s)
    return d


def _openai_gpt(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}", "tokens_embed")
    d.intermediate = 4 * d.hidden
    _plain(d, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", attention_bias=True, out_bias=True)
    _norms(d, 2, 0)
    _positions(d, s)
    return d


def _gpt_bigcode(s: Settings) -> Layout:
    d = _gpt2(s)
    if s.flag("multi_query", True):
        d.kv_heads = 1
        d.linears.pop(0)
        d.linear("attn.c_attn", d.hidden, d.hidden + 2 * d.head_dim, "attention", bias=True)
    return d


def _gpt_neo(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}")
    d.intermediate = s.integer("intermediate_size", 4 * d.hidden)
    for name in ("q_proj", "k_proj", "v_proj"):
        d.linear(f"attn.attention.{name}", d.hidden, d.hidden, "attention")
    d.linear("attn.attention.out_proj", d.hidden, d.hidden, "attention", bias=True)
    d.linear("mlp.c_fc", d.hidden, d.intermediate, "mlp", bias=True)
    d.linear("mlp.c_proj", d.intermediate, d.hidden, "mlp", bias=True)
    _norms(d, 2)
    _positions(d, s)
    return d


def _gpt_neox(s: Settings) -> Layout:
    d = _begin(s, "gpt_neox.layers.{}", "embed_in")
    d.intermediate = s.integer("intermediate_size")
    bias = s.flag("attention_bias", True)
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    _plain(d, *names, attention_bias=bias, out_bias=bias)
    _norms(d, 2)
    return d


def _gpt_neox_japanese(s: Settings) -> Layout:
    d = _begin(s, "gpt_neox_japanese.layers.{}", "embed_in")
    d.head_name = "embed_out"
    d.intermediate = s.integer("intermediate_multiple_size") * d.hidden
    d.linear("attention.query_key_value", d.hidden, 3 * d.hidden, "attention")
    d.linear("attention.dense", d.hidden, d.hidden, "attention")
    d.linear("mlp.dense_h_to_4h", d.hidden, d.intermediate, "mlp")
    d.linear("mlp.dense_4h_to_h", d.intermediate, d.hidden, "mlp")
    _norms(d, 2)
    d.other_parameters += d.hidden  # the last layer's attention alone has a bias
    return d


def _gptj(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}")
    d.intermediate = s.integer("intermediate_size", 4 * d.hidden)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        d.linear(f"attn.{name}", d.hidden, d.hidden, "attention")
    d.linear("mlp.fc_in", d.hidden, d.intermediate, "mlp", bias=True)
    d.linear("mlp.fc_out", d.intermediate, d.hidden, "mlp", bias=True)
    _norms(d, 1)
    d.head_bias = True
    d.other_parameters += d.vocab
    return d


def _codegen(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}")
    d.intermediate = s.integer("intermediate_size", 4 * d.hidden)
    names = ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
    _plain(d, *names, attention_bias=False, out_bias=False)
    _norms(d, 1)
    d.head_bias = True
    d.other_parameters += d.vocab
    return d


def _ctrl(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}", "w")
    d.intermediate = s.integer("intermediate_size")
    for name in ("Wq", "Wk", "Wv", "dense"):
        d.linear(f"multi_head_attention.{name}", d.hidden, d.hidden, "attention", bias=True)
    d.linear("ffn.0", d.hidden, d.intermediate, "mlp", bias=True)
    d.linear("ffn.2", d.intermediate, d.hidden, "mlp", bias=True)
    _norms(d, 2)
    d.head_bias = True
    d.other_parameters += d.vocab
    return d


def _projections(d: Layout, *, bias: bool) -> None:
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        d.linear(f"self_attn.{name}", d.hidden, d.hidden, "attention", bias=bias)
    d.linear("fc1", d.hidden, d.intermediate, "mlp", bias=bias)
    d.linear("fc2", d.intermediate, d.hidden, "mlp", bias=bias)


def _opt(s: Settings) -> Layout:
    d = _begin(s, "model.decoder.layers.{}", "embed_tokens")
    d.intermediate = s.integer("intermediate_size")
    _projections(d, bias=s.flag("enable_bias", True))
    table_width = s.integer("word_embed_proj_dim", d.hidden)
    if table_width != d.hidden:
        d.embedding_width = table_width
        d.outer_linear("model.decoder.project_out", d.hidden, table_width)
        d.outer_linear("model.decoder.project_in", table_width, d.hidden)
    if s.flag("layer_norm_elementwise_affine", True):
        final = s.flag("do_layer_norm_before", True) and not s.flag("_remove_final_layer_norm")
        _norms(d, 2, 1 if final else 0)
    _positions(d, s, more=2)  # the table starts two rows late
    return d


def _biogpt(s: Settings) -> Layout:
    d = _begin(s, "biogpt.layers.{}", "embed_tokens")
    d.head_name = "output_projection"
    d.intermediate = s.integer("intermediate_size")
    _projections(d, bias=True)
    _norms(d, 2)
    _positions(d, s, more=2)
    return d


def _xglm(s: Settings) -> Layout:
    d = _begin(s, "model.layers.{}", "embed_tokens")
    d.intermediate = s.integer("intermediate_size")
    _projections(d, bias=True)
    _norms(d, 2)
    return d


def _bloom(s: Settings) -> Layout:
    d = _begin(s, "transformer.h.{}", "word_embeddings")
    d.intermediate = 4 * d.hidden
    names = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    _plain(d, *names, attention_bias=True, out_bias=True)
    _norms(d, 2, 2)
    return d


def _falcon(s: Settings) -> Layout:
    """Falcon 7B shares one key/value head; the later "new decoder architecture" groups them."""
    d = _begin(s, "transformer.h.{}", "word_embeddings")
    d.intermediate = s.integer("intermediate_size", 4 * d.hidden)
    bias, new, parallel = s.flag("bias"), s.flag("new_decoder_architecture"), s.flag("parallel_attn", True)
    if new:
        d.kv_heads = s.integer("num_key_value_heads", d.heads)
        fused = (2 * d.kv_heads + d.heads) * d.head_dim
        d.key_value_width = 2 * d.heads * d.head_dim  # transformers repeats the heads before it caches them
    elif s.flag("multi_query", True):
        d.kv_heads, fused = 1, d.hidden + 2 * d.head_dim
    else:
        fused = 3 * d.hidden
    d.linear("self_attention.query_key_value", d.hidden, fused, "attention", bias=bias)
    d.linear("self_attention.dense", d.hidden, d.hidden, "attention", bias=bias)
    d.linear("mlp.dense_h_to_4h", d.hidden, d.intermediate, "mlp", bias=bias)
    d.linear("mlp.dense_4h_to_h", d.intermediate, d.hidden, "mlp", bias=bias)
    norms = s.optional("num_ln_in_parallel_attn") or (2 if new else 1)
    _norms(d, (2 if norms == 2 else 1) if parallel else 2)
    return d


def _mpt(s: Settings) -> Layout:
    d = _begin(s, "transformer.blocks.{}")
    d.intermediate = 4 * d.hidden
    d.linear("attn.Wqkv", d.hidden, 3 * d.hidden, "attention")
    d.linear("attn.out_proj", d.hidden, d.hidden, "attention")
    d.linear("ffn.up_proj", d.hidden, d.intermediate, "mlp")
    d.linear("ffn.down_proj", d.intermediate, d.hidden, "mlp")
    d.other_parameters += (2 * d.layers + 1) * d.hidden
    return d


def _persimmon(s: Settings) -> Layout:
    d = _begin(s, "model.layers.{}", "embed_tokens")
    d.intermediate = s.integer("intermediate_size")
    names = ("self_attn.query_key_value", "self_attn.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    _plain(d, *names, attention_bias=True, out_bias=True)
    _norms(d, 2)
    d.other_parameters += d.layers * 4 * d.head_dim if s.flag("qk_layernorm", True) else 0
    return d


CLASSICS: dict[str, Callable[[Settings], Layout]] = {
    "gpt2": _gpt2,
    "gpt-sw3": _gpt2,
    "openai-gpt": _openai_gpt,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gpt_neox_japanese": _gpt_neox_japanese,
    "gptj": _gptj,
    "codegen": _codegen,
    "ctrl": _ctrl,
    "opt": _opt,
    "biogpt": _biogpt,
    "xglm": _xglm,
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": _mpt,
    "persimmon": _persimmon,
}
