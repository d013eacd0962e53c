"""What a forward pass keeps for the backward pass, counted layer by layer from the shape of a model.

Sources: the modules of transformers 5 and PEFT 0.21 as they run under autocast, and autograd's rule that an operation
keeps what its gradient needs. `tests/knowledge/test_memory_estimate.py` adds up the tensors autograd really saves for small
models of each kind and compares. What the fast path of supervised training (`models/fast.py`) keeps instead stands under
"the fast path" below.

Letters: n tokens of a micro-batch (padding included), h hidden width, c bytes of the compute type, s bytes of the
residual stream. "Kept" below means: alive from the forward pass of a layer to its backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetuneflow.knowledge.shapes.shape import Linear, ModelShape

Attention = Literal["sdpa", "flash", "eager"]
TYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Architectures whose normalisation is `LayerNorm` although nothing else in the shape says so; without a gate it is the rule.
LAYER_NORM = frozenset({"stablelm", "cohere", "cohere2", "starcoder2"})
# Norms on the way in and on the way out of both blocks (transformers: modeling_gemma2, _gemma3, _glm4, _olmo2 has two).
FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
# Normalised queries and keys: per head, in fp32.
NORMED_QUERIES = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmoe", "cohere2"})
# Attention and feed-forward read the same residual stream, which their norms keep once.
PARALLEL_BLOCKS = frozenset({"gpt_neox", "gptj", "phi", "falcon", "cohere", "cohere2", "codegen"})
# The tanh form of GELU written out in Python (`NewGELUActivation`): four tensors are kept instead of one.
WRITTEN_OUT_GELU = frozenset({"gpt2", "gpt_neo", "gptj", "phi", "codegen", "gpt_bigcode"})
# Dropout on attention weights and on both residual branches by default (`attn_pdrop`, `resid_pdrop` = 0.1).
INNER_DROPOUT = frozenset({"gpt2", "gpt_bigcode"})
NO_ROTARY = frozenset({"gpt2", "gpt_bigcode", "opt", "bloom", "gpt_neo", "mpt"})
FUSED_QUERIES = frozenset({"query_key_value", "qkv_proj", "Wqkv", "W_pack", "c_attn"})
MAMBA2_CHUNK = 256
STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba"})
MAMBA_SWELU = "mamba_swelu"
SCAN_CHUNK = 32  # tokens for which our own scan keeps one state; it chooses between 8 and 128

# What the fast path does with a model is found out and proven on the loaded model (`models/fast.py`); these lists foretell it, and a
# test compares.
PADDED_ARCHITECTURES = STATE_SPACE | {MAMBA_SWELU, "bloom", "falcon", "mpt"}  # texts that share a row would see each other
MASKED_ARCHITECTURES = frozenset({"codegen", "gemma2", "gpt_neo", "gptj"})  # packed under a mask, in the model's own attention
CONV1D = frozenset({"gpt2"})  # linear layers of a class of their own: PEFT's layers compute them
# Projections as Llama's, but an attention that computes something else between them.
OWN_ATTENTION = frozenset({"cohere", "cohere2", "gemma2", "glm4", "olmo", "olmoe", "opt", "smollm3", "stablelm", "starcoder2"})
POST_NORMS = frozenset({"olmo2"})  # both norms stand behind their blocks
QUERY_KEY_VALUE, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
UNIT, LARGEST_BLOCK, KEPT_WIDTH, STRETCH = 32, 512, 160, 256  # kernels/attention.py; a test compares
USUAL_BLOCK = 96  # texts of different lengths share blocks of a few widths


@dataclass(frozen=True, slots=True)
class Pass:
    """How a forward pass runs. `targets`: linear layers with an adapter. `stream`: bytes of a residual element.

    `fast`: on the fast path, where rows are packed unless `padded`. `kept_weights`: attention weights
    that short texts keep, per token of all texts and head.
    """

    device: Literal["cuda", "cpu"]
    compute: int
    stream: int
    kind: str
    targets: tuple[Linear, ...] = ()
    rank: int = 0
    dropout: bool = False
    attention: Attention = "sdpa"
    padded: bool = True
    virtual_tokens: int = 0
    fast: bool = False
    kept_weights: float = 0.0

    @property
    def full(self) -> bool:
        return self.kind == "full"

    @property
    def autocast(self) -> bool:
        return self.compute != 4

    @property
    def packed(self) -> bool:
        return self.fast and not self.padded


def kept_bytes(shape: ModelShape, run: Pass, batch: float, tokens: int) -> int:
    """All layers together, without checkpointing. Excludes logits, the head's input and copies of weights."""
    if run.fast:
        per_token = _per_token_fast(shape, run, tokens, together=round(batch * tokens))
    else:
        per_token = _per_token(shape, run, tokens)
    return round(batch * tokens * per_token)


def _per_token(shape: ModelShape, run: Pass, tokens: int) -> float:
    return (
        norms(shape, run)
        + attention(shape, run, tokens)
        + feed_forward(shape, run)
        + experts(shape, run)
        + state_space(shape, run)
        + mamba_swelu(shape, run)
        + inner_dropout(shape, run)
        + linear_inputs(shape, run)
        + adapters(run)
    )


def head_input_bytes(shape: ModelShape, run: Pass, num_tokens: int) -> int:
    """The final norm, and what the output head keeps where it is trained."""
    if run.fast:
        return num_tokens * fast_norm_width(shape, run, run.stream)
    trained = run.stream + run.compute if run.full else 0
    return num_tokens * shape.hidden * (_norm_width(shape, run) + trained)


def checkpoint_bytes(shape: ModelShape, run: Pass, num_tokens: int) -> int:
    """With checkpointing each layer keeps its input alone."""
    return shape.layers * num_tokens * shape.hidden * run.stream


# --- parts, in bytes per token over all layers ------------------------------------------------------


def _norm_width(shape: ModelShape, run: Pass) -> int:
    """RMS norms compute in fp32. LayerNorm keeps its input; autocast on CUDA raises that to fp32, on the CPU it does not."""
    return run.stream if is_layer_norm(shape) and run.device == "cpu" else 4


def is_layer_norm(shape: ModelShape) -> bool:
    return shape.model_type in LAYER_NORM or not (shape.gated_mlp or shape.model_type in STATE_SPACE)


def norms(shape: ModelShape, run: Pass) -> float:
    """The input of each norm, and its normalised form too where an RMS norm's weight is trained."""
    per_block = (
        1 if shape.model_type in STATE_SPACE | PARALLEL_BLOCKS | {MAMBA_SWELU} else 4 if shape.model_type in FOUR_NORMS else 2
    )
    trained = run.stream if run.full and not is_layer_norm(shape) else 0
    first = 0 if run.full else 1  # what stands before the first adapter needs no gradient
    total = (shape.layers * per_block - first) * shape.hidden * (_norm_width(shape, run) + trained)
    if shape.model_type in NORMED_QUERIES:
        heads = (shape.heads + shape.kv_heads) * shape.head_dim
        total += attention_layers(shape) * heads * (4 + (run.compute if run.full else 0))
    return total


def attention_layers(shape: ModelShape) -> int:
    if shape.model_type in STATE_SPACE:
        return 0
    return shape.layers if shape.attention_layers is None else shape.attention_layers


def attention(shape: ModelShape, run: Pass, tokens: int) -> float:
    """Queries, keys, values and the result; what depends on the length: a mask (sdpa) or all weights (eager).

    With a mask, or without grouped kernels, keys and values are repeated for every query head (`repeat_kv`).
    """
    c, width = run.compute, shape.heads * shape.head_dim
    grouped = run.attention == "flash" or (run.attention == "sdpa" and not run.padded)
    kv_width = (shape.kv_heads if grouped else shape.heads) * shape.head_dim
    longer = 1 + run.virtual_tokens / max(tokens, 1)
    if run.attention == "eager":
        weights = shape.heads * tokens * longer * (4 + (c if run.autocast else 0))
        if shape.model_type == "gemma2":  # tanh of the soft cap
            weights += shape.heads * tokens * c
        per_layer = c * (width + 2 * kv_width * longer) + weights
    elif run.device == "cpu" and shape.model_type in INNER_DROPOUT:
        # The CPU's fused kernel has no dropout: softmax, noise and their product are kept in fp32.
        per_layer = 4 * 3 * width + 12 * shape.heads * tokens
    else:
        mask = c * tokens * longer if run.attention == "sdpa" and run.padded else 0
        per_layer = c * (2 * width + 2 * kv_width * longer) + 4 * shape.heads + mask
    if _keeps_fused_queries(shape):
        per_layer += 2 * c * width  # the values are a view of the fused projection, which stays as a whole
    return attention_layers(shape) * per_layer


def _keeps_fused_queries(shape: ModelShape) -> bool:
    return (
        shape.kv_heads == shape.heads
        and shape.model_type not in NO_ROTARY
        and any(linear.name in FUSED_QUERIES for linear in shape.linears)
    )


def _outputs(linears: Sequence[Linear], hidden: int) -> int:
    """Outputs of the layers that lead into the activation function; the way back has `hidden` outputs."""
    inward = [linear for linear in linears if linear.outputs != hidden or linear.inputs == hidden]
    return sum(linear.count * linear.outputs for linear in inward)


def feed_forward(shape: ModelShape, run: Pass) -> float:
    """With a gate: gate, its activation and the other branch, 3/2 of the inner projections' outputs. Else the activation's input."""
    if shape.model_type == MAMBA_SWELU:
        return 0.0
    inner = _outputs([linear for linear in shape.linears if linear.part == "mlp"], shape.hidden)
    factor = 1.5 if shape.gated_mlp else 4.0 if shape.model_type in WRITTEN_OUT_GELU else 1.0
    return inner * factor * run.compute


def experts(shape: ModelShape, run: Pass) -> float:
    """As for a gated block, for the experts a token meets, plus their weighted results; fp32 where fp32 weights are trained,
    for the grouped product is left out of autocast."""
    linears = [linear for linear in shape.linears if linear.part == "expert"]
    if not linears:
        return 0.0
    inner = _outputs(linears, shape.hidden) * shape.expert_share
    rows = shape.experts_per_token * max(1, _expert_layers(shape)) * shape.hidden
    router = 8 * shape.num_experts * _expert_layers(shape)
    if run.full:
        return 4 * (2 * inner + 2 * rows) + router
    return run.compute * (1.5 * inner + rows) + router


def _expert_layers(shape: ModelShape) -> int:
    routers = sum(linear.count for linear in shape.linears if linear.part == "router")
    return routers or shape.layers


def state_space(shape: ModelShape, run: Pass) -> float:
    """Mamba's scan as transformers writes it in PyTorch, step by step (the fused kernels of `mamba_ssm` keep far less).

    Per inner channel: decay, input and state of every token in fp32 and the state in the compute type, N values each; and some
    ten tensors of the inner width. Mamba-2 works in chunks of 256 tokens instead, with one decay per head.
    """
    layers = state_space_layers(shape)
    if not layers or shape.model_type == MAMBA_SWELU:
        return 0.0
    inner, size = inner_width(shape), shape.state_size or 16
    if shape.model_type == "mamba2":
        return layers * (44 * inner + 6 * size * shape.heads + 8 * MAMBA2_CHUNK * shape.heads)
    trained = 4 * inner if run.full else 0
    return layers * (inner * size * (12 + run.compute) + 20 * inner + trained)


def mamba_swelu(shape: ModelShape, run: Pass) -> float:
    """Our own MambaSWELU (`models/mamba_swelu.py`, `kernels/scan.py`): each activation keeps its input alone.

    Simplified: the activation's input, and both factors of the gated product. Selective: the inputs of two activations, the gate
    with the projection it is a part of, the scan's input and steps (these in fp32), its result, and a state per chunk. The
    convolution keeps its input, in fp32, where its kernel is trained. Dropout stands behind each block and dense layer.
    """
    if shape.model_type != MAMBA_SWELU:
        return 0.0
    c, inner = run.compute, inner_width(shape)
    mixer = inner * (6 * c + 8 + 4 * (shape.state_size or 0) / SCAN_CHUNK) if shape.state_size else 3 * inner * c
    kernel = 4 * inner if run.full else 0
    dense = sum(linear.outputs for linear in shape.linears if linear.part == "mlp")
    noise = shape.layers * shape.hidden + dense  # behind the embedding too, not behind the last dense layer of the same width
    return shape.layers * (mixer + kernel + shape.hidden * c) + dense * c + noise * _noise_width(run, c)


def state_space_layers(shape: ModelShape) -> int:
    return shape.layers - attention_layers(shape) if shape.state_size or shape.model_type in STATE_SPACE else 0


def inner_width(shape: ModelShape) -> int:
    """Channels of a state-space block: what its output projection reads."""
    return max(
        (linear.inputs for linear in shape.linears if linear.part == "state" and linear.outputs == shape.hidden), default=0
    )


def inner_dropout(shape: ModelShape, run: Pass) -> float:
    """The noise of both residual branches: as wide as its input on the CPU, one byte on CUDA."""
    if shape.model_type not in INNER_DROPOUT:
        return 0.0
    return (2 * shape.layers + 1) * shape.hidden * _noise_width(run, run.compute)


def _noise_width(run: Pass, width: int) -> int:
    return width if run.device == "cpu" else 1


def linear_inputs(shape: ModelShape, run: Pass) -> float:
    """A trained weight's gradient needs the layer's input.

    Under autocast each layer casts its own copy of an fp32 input; the attention's result and the gated product are
    in the compute type already. Without autocast, layers that read the same tensor share it.
    """
    if not run.full:
        return 0.0
    # A state-space projection that takes no adapter is stored and never called.
    linears = [t for t in shape.linears if t.part != "expert" and (t.is_linear_module or t.part != "state")]
    if run.autocast:
        return sum(linear.count * linear.inputs * run.compute for linear in linears if not _reads_attention(shape, linear))
    return _shared_inputs([linear for linear in linears if not _reads_attention(shape, linear)]) * run.compute


def _reads_attention(shape: ModelShape, linear: Linear) -> bool:
    """The output projection: its input is the attention's result, which is kept anyway."""
    return (
        linear.part == "attention"
        and linear.name in {"o_proj", "dense", "wo", "out_proj"}
        and shape.model_type not in INNER_DROPOUT
    )


def _shared_inputs(linears: Sequence[Linear]) -> int:
    """Width of the distinct inputs: layers of the same part and input width read the same tensor."""
    widest: dict[tuple[str, int], int] = {}
    for linear in linears:
        key = (linear.part, linear.inputs)
        widest[key] = max(widest.get(key, 0), linear.count)
    return sum(width * count for (_, width), count in widest.items())


def adapters(run: Pass) -> float:
    """What the adapter paths keep: the input of A (after dropout), the dropout's noise, the output of A."""
    c = run.compute
    if run.kind == "ia3":
        return sum(t.count * (t.inputs * 4 if t.part == "mlp" and t.outputs < t.inputs else t.outputs * c) for t in run.targets)
    if run.kind not in ("lora", "qlora", "dora"):
        return 0.0
    run = replace(run, targets=tuple(t for t in run.targets if t.part != "expert"))  # those change weights, not inputs
    total = 0.0
    # The input is raised to the adapter's fp32; PEFT's 4-bit layers leave it out where autocast runs on CUDA.
    raised = run.kind != "qlora" or run.device == "cpu"
    if run.dropout:
        noise = _noise_width(run, 4 if raised else c)
        total += sum(t.count * t.inputs * (noise + c) for t in run.targets)
    elif run.autocast and raised:  # cast to the adapter's fp32 and back, for each layer anew
        total += sum(t.count * t.inputs * c for t in run.targets)
    else:
        total += _shared_inputs(run.targets) * c
    total += sum(t.count * run.rank * c for t in run.targets)
    if run.kind == "dora":  # the base's result and the adapter's, for the magnitude's gradient
        total += sum(t.count * 2 * t.outputs * c for t in run.targets)
    return total


# --- the fast path ------------------------------------------------------------------------------------


def packs(shape: ModelShape, kind: str) -> bool:
    """Whether texts may share a row. The keys and values of a prefix belong to one text each."""
    return not (shape.model_type in PADDED_ARCHITECTURES or state_space_layers(shape) or kind == "prefix")


def fused(shape: ModelShape, run: Pass, linear: Linear) -> bool:
    """Whether a linear layer is computed by `kernels.projections`: those of Llama's attention and gated block together, any other
    one where it has an adapter. DoRA and IA3 stay with PEFT's layers."""
    if not run.fast or shape.model_type in CONV1D or run.kind in ("dora", "ia3") or not linear.is_linear_module:
        return False
    if linear.name in QUERY_KEY_VALUE:
        return fused_attention(shape, run) or linear in run.targets
    return (linear.name in GATED and fused_feed_forward(shape, run)) or linear in run.targets


def fused_attention(shape: ModelShape, run: Pass) -> bool:
    names = {linear.name for linear in shape.linears if linear.part == "attention"}
    recognised = {*QUERY_KEY_VALUE, "o_proj"} <= names and shape.model_type not in OWN_ATTENTION
    return run.fast and recognised and run.kind in ("full", "lora", "qlora")


def fused_feed_forward(shape: ModelShape, run: Pass) -> bool:
    names = {linear.name for linear in shape.linears if linear.part == "mlp"}
    return run.fast and names == set(GATED) and run.kind in ("full", "lora", "qlora", "prefix")


def _per_token_fast(shape: ModelShape, run: Pass, tokens: int, together: int) -> float:
    """`together`: tokens that share a packed row."""
    masked = shape.model_type in MASKED_ARCHITECTURES and run.packed
    return (
        fast_norms(shape, run)
        + (fast_attention(shape, run, tokens) if run.packed and not masked else 0.0)
        + (attention(shape, replace(run, padded=True), together if masked else tokens) if masked or not run.packed else 0.0)
        + fast_projections(shape, run)
        + (0.0 if fused_feed_forward(shape, run) else feed_forward(shape, run))
        + experts(shape, run)
        + state_space(shape, run)
        + mamba_swelu(shape, run)
        + inner_dropout(shape, run)
        + adapters(replace(run, targets=tuple(t for t in run.targets if not fused(shape, run, t))))
    )


def fast_norm_width(shape: ModelShape, run: Pass, element: int) -> int:
    """Bytes that a norm keeps of a token whose elements have so many: an RMS norm its input as it comes, and a number per row."""
    return shape.hidden * _norm_width(shape, run) if is_layer_norm(shape) else shape.hidden * element + 4


def fast_norms(shape: ModelShape, run: Pass) -> float:
    """Norms on the way into a block read the residual stream, those on the way out the block's result in the compute type."""
    if is_layer_norm(shape):
        return norms(shape, run)
    single = shape.model_type in STATE_SPACE | PARALLEL_BLOCKS | {MAMBA_SWELU}
    entering, leaving = (2, 2) if shape.model_type in FOUR_NORMS else (0, 2) if shape.model_type in POST_NORMS else (2, 0)
    entering = 1 if single else entering
    first = 0 if run.full or not entering else 1  # what stands before the first adapter needs no gradient
    total = float((shape.layers * entering - first) * fast_norm_width(shape, run, run.stream))
    total += shape.layers * leaving * fast_norm_width(shape, run, run.compute)
    if shape.model_type in NORMED_QUERIES:
        total += attention_layers(shape) * (shape.heads + shape.kv_heads) * (shape.head_dim * run.compute + 4)
    return total


def block_width(tokens: int) -> float:
    """Keys that a text's queries are multiplied with: all of its block, or on average those before a stretch of a long text."""
    return -(-tokens // UNIT) * UNIT if tokens <= LARGEST_BLOCK else (tokens + STRETCH) / 2


def kept_weights(length: float) -> float:
    """Attention weights that the backward pass of a text finds, per head: those of its block where that is narrow, of which a text
    fills a part if others have room beside it."""
    width = max(block_width(math.ceil(length)), USUAL_BLOCK)
    return 0.0 if length > KEPT_WIDTH else width * (width if length > width / 2 else length)


def fast_attention(shape: ModelShape, run: Pass, tokens: int) -> float:
    """Packed rows: queries, keys and values as they meet, heads that share keys not repeated, and no mask.

    CUDA's kernel keeps its result and a number per head. `kernels.attention` keeps the weights of short texts, and the choice of
    a model with dropout on weights.
    """
    c, width = run.compute, shape.heads * shape.head_dim
    per_layer = float(c * (width + 2 * shape.kv_heads * shape.head_dim))
    positions = 2 * shape.head_dim * run.stream if fused_attention(shape, run) else 0  # the rotations' tables, of all layers
    dropout = shape.model_type in INNER_DROPOUT
    if run.device == "cuda" and run.autocast and not dropout:
        per_layer += c * width + 4 * shape.heads
    else:
        per_layer += shape.heads * c * run.kept_weights
        per_layer += shape.heads * block_width(tokens) if dropout else 0
    if _keeps_fused_queries(shape):
        per_layer += 2 * c * width  # the values are a view of the fused projection, which stays as a whole
    return attention_layers(shape) * per_layer + positions


def fast_projections(shape: ModelShape, run: Pass) -> float:
    """Inputs of linear layers, once for those that share one; of a fused gated block the gate and the other branch, of which the
    product is made again; of adapters the outputs of A, and a byte for each input that dropout may take."""
    c, total = run.compute, 0.0
    alone = [t for t in shape.linears if _keeps_its_input(shape, run, t)]
    if fused_attention(shape, run):
        total += attention_layers(shape) * shape.hidden * c
        alone = [t for t in alone if t.name not in QUERY_KEY_VALUE]
    if fused_feed_forward(shape, run):
        block = [t for t in shape.linears if t.name in GATED and t.part == "mlp"]
        total += sum(t.count * (t.outputs + (t.inputs if t.name == "up_proj" else 0)) for t in block if t.name != "down_proj") * c
        alone = [t for t in alone if t not in block]
    # In the type that they are computed in, layers share an input; else each has its own copy.
    total += (_shared_inputs(alone) if run.stream == c else sum(t.count * t.inputs for t in alone)) * c
    if run.kind in ("lora", "qlora"):
        adapted = [t for t in run.targets if fused(shape, run, t)]
        total += sum(t.count * (run.rank * c + (t.inputs if run.dropout else 0)) for t in adapted)
    return total


def _keeps_its_input(shape: ModelShape, run: Pass, linear: Linear) -> bool:
    """Whether a layer keeps its input in the compute type, beside what attention keeps anyway."""
    if _reads_attention(shape, linear) and (not run.packed or run.device == "cuda"):
        return False
    called = linear.part != "expert" and (linear.is_linear_module or linear.part != "state")
    return fused(shape, run, linear) or (run.full and called)
