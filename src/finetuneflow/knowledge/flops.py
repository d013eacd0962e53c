"""Floating-point operations and bytes of a run's steps, from the shape of the model.

A product of (n, k) and (k, m) is 2nkm operations. Kaplan et al. 2020 (arXiv:2001.08361, section 2.1) and Chowdhery et al. 2022
(PaLM, arXiv:2204.02311, appendix B): forward 2 per weight and token, backward twice that, attention on top. The backward
pass of a frozen weight has one of the two products: the gradient of its input, not its own. The tests compare with what
PyTorch counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.activations import TYPE_BYTES
from finetuneflow.knowledge.memory_phases import NF4_BITS, trainable_tensors
from finetuneflow.knowledge.resolve import Resolved
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape
from finetuneflow.knowledge.shapes.targets import target_linears

SCAN_OPERATIONS = (
    9  # per value of a state-space model's state and token: Gu and Dao 2023 (arXiv:2312.00752), section 3.3 (9 B L D N)
)


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations per token that passes through the model. `recompute`: what gradient checkpointing does again."""

    forward: float
    backward: float
    recompute: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute


def flops_per_token(
    shape: ModelShape, config: RunConfig, resolved: Resolved, mean_length: float, *, scored: float = 1.0, packed: bool = False
) -> Flops:
    """Operations of a training step per token of rows `mean_length` wide, padding included.

    Of a mixture of experts the active weights count. Attention counts the whole square where rows are padded: with a mask
    PyTorch computes the masked half too. A row alone in its micro-batch needs no mask, and half the square is skipped, as it is for packed rows on CUDA. `scored`: share of
    the tokens that reach the output layer. Embedding look-ups, norms and activation functions are left out (below 2 %).
    """
    method = config.method
    targets = _targets(shape, config)
    linears = 2.0 * sum(_active_weights(shape, linear) for linear in shape.linears)
    head = 2.0 * shape.embedding_parameters * scored
    virtual = method.num_virtual_tokens if method.kind == "prefix" else 0
    alone = resolved.device == "cuda" if packed else config.training.batch_size == 1
    mixing = _attention(shape, (mean_length / 2 if alone else mean_length) + virtual) + SCAN_OPERATIONS * shape.state_values
    adapters = 2.0 * _low_rank(shape, config, targets)
    again = 2.0 * sum(_active_weights(shape, t) for t in targets) if method.kind == "dora" and method.dropout else 0.0
    forward = linears + head + mixing + adapters + again  # DoRA with dropout multiplies by the frozen weight a second time
    recompute = forward - head if resolved.gradient_checkpointing else 0.0
    if method.kind == "full":
        return Flops(forward, 2 * forward, recompute)
    backward = linears + head + 2 * mixing + 2 * adapters + again + 2.0 * _saved_modules(shape, config, scored)
    return Flops(forward, backward, recompute)


def _targets(shape: ModelShape, config: RunConfig) -> tuple[Linear, ...]:
    if config.method.kind in ("full", "prefix"):
        return ()
    return target_linears(shape, config.method.target_modules, kind=config.method.kind)


def _active_weights(shape: ModelShape, linear: Linear) -> float:
    share = shape.expert_share if linear.part == "expert" else 1.0
    return linear.inputs * linear.outputs * linear.count * share


def _attention(shape: ModelShape, length: float) -> float:
    """Scores and weighted sums: two products of `length` x width per token, head and layer."""
    layers = shape.layers if shape.attention_layers is None else shape.attention_layers
    return 4.0 * layers * shape.heads * shape.head_dim * length


def _low_rank(shape: ModelShape, config: RunConfig, targets: tuple[Linear, ...]) -> float:
    """Adapter weights a token passes through."""
    if config.method.kind not in ("lora", "qlora", "dora"):
        return 0.0
    share = {True: shape.expert_share, False: 1.0}
    return sum(config.method.r * (t.inputs + t.outputs) * t.count * share[t.part == "expert"] for t in targets)


def _saved_modules(shape: ModelShape, config: RunConfig, scored: float) -> float:
    """Weights of modules trained in full beside an adapter; an embedding is looked up, not multiplied."""
    names = {name.rsplit(".", 1)[-1] for name in config.method.modules_to_save}
    linears = sum(_active_weights(shape, linear) for linear in shape.linears if linear.name in names)
    return linears + (shape.embedding_parameters * scored if shape.head_name in names else 0.0)


# --- bytes ------------------------------------------------------------------------------------------

# Main-memory traffic of the rest, per value that a linear layer reads or writes: written, read, and both again for its gradient;
# norms, activation functions and residual sums between them do as much once more.
ACTIVATION_TRAFFIC = 8
LOGIT_TRAFFIC = 24  # bytes per logit: 16-bit and fp32 copy, log-softmax, its gradient, each written and read
# Read and written per trained value and step: weight, gradient and two moments, the gradient's norm, its clearing; bitsandbytes
# keeps the moments in a byte each, Adafactor has a mean per row and column.
OPTIMIZER_BYTES = {"adamw_8bit": 22, "paged_adamw_8bit": 22, "adafactor": 28}
ADAMW_BYTES = 36


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved. `per_micro_batch` and `unpacking` (4-bit weights made 16-bit) per forward and backward pass, then per
    token of it, and per optimizer step. `trainable`: values trained, fp32."""

    per_micro_batch: float
    unpacking: float
    per_token: float
    per_step: float
    trainable: int


def traffic(shape: ModelShape, config: RunConfig, resolved: Resolved, *, scored: float = 1.0) -> Traffic:
    """Bytes a step moves between memory and units: the other bound of its time (Williams et al. 2009, the roofline model).

    `scored`: share of the tokens that become logits.
    """
    width, storage = TYPE_BYTES[resolved.compute_dtype], TYPE_BYTES[resolved.storage_dtype]
    passes = 3 if resolved.gradient_checkpointing else 2
    tensors = trainable_tensors(shape, config.method, _targets(shape, config))
    trainable = sum(tensor.total for tensor in tensors)
    matrices = sum(t.inputs * t.outputs * t.count for t in shape.linears) + shape.embedding_parameters
    weights = float(passes * width * matrices)
    if storage > width:  # autocast reads the stored weights and writes 16-bit copies in each forward pass
        weights += (passes - 1) * storage * matrices
    unpacking = 0.0
    if config.method.kind == "qlora":
        packed = sum(t.inputs * t.outputs * t.count for t in shape.linears if t.is_linear_module)
        unpacking = passes * packed * (NF4_BITS[config.method.double_quantization] / 8 + width)
    values = sum((t.inputs + t.outputs) * t.count * (shape.expert_share if t.part == "expert" else 1.0) for t in shape.linears)
    return Traffic(
        per_micro_batch=weights + 8.0 * trainable,  # gradients are added up in fp32
        unpacking=unpacking,
        per_token=ACTIVATION_TRAFFIC * width * values * passes / 2 + LOGIT_TRAFFIC * shape.vocab * scored,
        per_step=float(OPTIMIZER_BYTES.get(resolved.optimizer, ADAMW_BYTES) * trainable),
        trainable=trainable,
    )
