"""The parts of a run's memory, and their sums at the moments when a peak can occur.

`memory.py` asks for `phases`: loading, the training step, the optimizer step, evaluation, and drawing answers where the
objective does; each a mapping from part to bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetuneflow.config import Method, RunConfig
from finetuneflow.knowledge import activations
from finetuneflow.knowledge.activations import TYPE_BYTES, Attention, Pass
from finetuneflow.knowledge.memory_heads import (
    Chunks,
    Tiles,
    answer_bytes,
    chunk_bytes,
    chunk_logits,
    drawing_copies,
    logit_bytes,
    tile_bytes,
)
from finetuneflow.knowledge.objectives import Traits, has_live_reference, reference_of, reward_models, takes_fast_path, traits_of
from finetuneflow.knowledge.resolve import Resolved
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape, kv_cache_bytes
from finetuneflow.knowledge.shapes.targets import target_linears

Strategy = Literal["single", "ddp", "fsdp"]

# The CUDA context with PyTorch's and cuBLAS's kernels and workspaces: 0.4-0.6 GB on cards since Ampere.
CUDA_CONTEXT = 500_000_000
# Resident memory of the process with torch, transformers, peft, datasets imported and the tokens ready.
CPU_PROCESS = 560_000_000
# Main memory of a process that has opened CUDA: the libraries' pages and pinned buffers.
CUDA_HOST = 3_000_000_000
# What allocators hold beyond the tensors alive, as a share of the kept activations. CUDA's caching allocator loses a few per
# cent. glibc before 2.38 cannot give a freed aligned block to a request of the same size (it asks for the alignment on top), so
# holes of freed temporaries stay between kept tensors: 0.44-0.76 of the activations in the settings seen. Blocks above 32 MB
# (logits) are mapped one by one and leave no holes.
SLACK = {"cuda": 0.05, "cpu": 0.5}
# With checkpointing glibc's holes remain: 0.33-0.39 of what would have been kept without it.
CPU_CHECKPOINT_SLACK = 0.35
# The fast path makes fewer blocks for a moment, so it leaves fewer holes (0.1-0.8 of the activations seen); but its chunks of logits
# stay just below 32 MB, and leave holes as large as themselves.
FAST_CPU_SLACK, FAST_CPU_CHECKPOINT_SLACK = 0.35, 0.25
# oneDNN compiles a kernel per matrix shape and keeps up to 1,024 of them. Experts get other numbers of tokens at every step, so
# that cache fills within some ten steps. Measured on one mixture: 0.7 GB of kernels and as much in holes between them. Other
# models meet few shapes. (With ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 the same run took 0.9 GB less.)
ONEDNN_CACHE, FAST_ONEDNN_CACHE = 1_500_000_000, 1_000_000_000

# bitsandbytes (optim/optimizer.py): tensors below keep 32-bit states; 8-bit states have an fp32 constant per 256 values;
# only tensors of 100,000 values and more are paged. transformers keeps embeddings in 32 bits.
MIN_8BIT_SIZE, OPTIMIZER_BLOCK, MIN_PAGED_SIZE = 4096, 256, 100_000
# NF4 (Dettmers et al. 2023, section 3): blocks of 64 with an fp32 constant, 4.5 bits; the constants in 8 bits, with an fp32
# constant per 256 of them, 4.127 bits.
NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
COLLATOR_MULTIPLE = 8  # batches are padded to a multiple of this width


@dataclass(frozen=True, slots=True)
class Workload:
    """What passes through the model at once. `batch`: its rows, two for a pair. `tokens`: width of the widest micro-batch,
    padding included. Of a packed row `tokens` is its longest text, and `batch` how many such texts it is as long as.

    `micro_batches`: of an optimizer step, at most. `supervised`: share of tokens that enter the loss. `padded`: rows differ in length,
    so attention needs a mask. `kept_weights`: attention weights that are kept, per token and head (`activations.kept_weights`).
    `drawn`: sequences that answers are drawn for at once, each of `new_tokens` at most, which `tokens` includes.
    """

    batch: float
    tokens: int
    eval_batch: float = 0
    eval_tokens: int = 0
    supervised: float = 1.0
    attention: Attention = "sdpa"
    padded: bool = True
    micro_batches: int = 1
    kept_weights: float = 0.0
    drawn: int = 0
    new_tokens: int = 0
    notes: tuple[str, ...] = ()


# --- what is trained ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensors:
    """`count` trained tensors of one size and shape (a vector has `rows` 1). `embedding`: its states stay in 32 bits."""

    rows: int
    columns: int
    count: int
    embedding: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def total(self) -> int:
        return self.size * self.count


def trainable_tensors(shape: ModelShape, method: Method, targets: Sequence[Linear]) -> tuple[Tensors, ...]:
    """Every tensor that gets a gradient, all in fp32, grouped by size: the optimizer's memory depends on the sizes."""
    if method.kind == "full":
        found = [Tensors(shape.vocab, shape.hidden, 1, embedding=True)]
        if not shape.tied:
            found.append(Tensors(shape.vocab, shape.hidden, 1))
        found += [Tensors(t.outputs, t.inputs, t.count) for t in shape.linears]
        found += [Tensors(1, t.outputs, t.count) for t in shape.linears if t.bias]
        vectors = max(shape.other_parameters // max(shape.hidden, 1), 1)
        found.append(Tensors(1, max(shape.other_parameters // vectors, 1), vectors))
        return tuple(found)
    if method.kind == "prefix":
        width = 2 * shape.layers * shape.kv_heads * shape.head_dim
        return (Tensors(method.num_virtual_tokens, width, 1, embedding=True),)
    found = []
    for t in targets:
        if method.kind == "ia3":
            found.append(Tensors(1, t.inputs if t.part == "mlp" and t.outputs < t.inputs else t.outputs, t.count))
            continue
        rank = 2 * method.r if t.part == "expert" and t.name == "gate_up_proj" else method.r  # once for each half
        found += [Tensors(rank, t.inputs, t.count), Tensors(t.outputs, rank, t.count)]
        if method.kind == "dora":
            found.append(Tensors(1, t.outputs, t.count))
    for name in method.modules_to_save:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in", "word_embeddings"):
            found.append(Tensors(shape.vocab, shape.hidden, 1, embedding=leaf not in ("lm_head", "embed_out")))
        found += [Tensors(t.outputs, t.inputs, t.count) for t in shape.linears if t.name == leaf]
    return tuple(found)


def optimizer_bytes(tensors: Iterable[Tensors], optimizer: str) -> tuple[int, int]:
    """(ordinary, paged) bytes of the optimizer's states.

    AdamW keeps two fp32 moments; in 8 bits they take a byte each and an fp32 constant per 256 values; Adafactor keeps a
    mean per row and per column (Shazeer and Stern 2018), of a vector every value.
    """
    ordinary = paged = 0.0
    for t in tensors:
        if optimizer == "adafactor":
            ordinary += t.count * 4 * (t.rows + t.columns if t.rows > 1 else t.size)
        elif optimizer in ("adamw_8bit", "paged_adamw_8bit"):
            small = t.size < MIN_8BIT_SIZE or t.embedding
            state = 8 * t.size if small else 2 * t.size + 8 * math.ceil(t.size / OPTIMIZER_BLOCK)
            if optimizer == "paged_adamw_8bit" and t.size >= MIN_PAGED_SIZE:
                paged += t.count * state
            else:
                ordinary += t.count * state
        else:
            ordinary += t.count * 8 * t.size
    return round(ordinary), round(paged)


# --- parts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parts:
    """What the phases are computed from."""

    shape: ModelShape
    config: RunConfig
    resolved: Resolved
    run: Pass
    workload: Workload
    tensors: tuple[Tensors, ...]

    @property
    def traits(self) -> Traits:
        return traits_of(self.config)

    @property
    def trainable(self) -> int:
        return sum(t.total for t in self.tensors)

    @property
    def largest_trained(self) -> int:
        return max((t.size for t in self.tensors), default=0)

    @property
    def num_tokens(self) -> int:
        return round(self.workload.batch * self.workload.tokens)

    @property
    def trains_head(self) -> bool:
        saved = {name.rsplit(".", 1)[-1] for name in self.config.method.modules_to_save}
        return self.run.full or self.shape.head_name in saved


def parts_of(shape: ModelShape, config: RunConfig, resolved: Resolved, workload: Workload) -> Parts:
    targets = _targets(shape, config.method)
    run = _pass(config, resolved, targets, workload)
    trained = trainable_tensors(shape, config.method, targets)
    return Parts(shape, config, resolved, run, workload, (*trained, *_heads_of_their_own(shape, config, trained)))


def _heads_of_their_own(shape: ModelShape, config: RunConfig, trained: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
    """What an objective trains beside the policy: a score; for ppo a value, with adapters on an adapter of its own."""
    head = Tensors(1, shape.hidden, 1)
    if config.training.objective == "reward":
        return (head,)
    if traits_of(config).family == "ppo":
        return (head,) if config.method.kind == "full" else (head, *trained)
    return ()


def weight_bytes(
    shape: ModelShape, storage: str, *, quantize: str | None = None, double_quantization: bool = True
) -> dict[str, int]:
    """Base weights: linear layers, embeddings and head, quantisation constants, the rest.

    bitsandbytes packs modules of type linear alone: embeddings, norms, biases, the head and fused experts stay in `storage`
    (a tied head is the embedding).
    """
    width = TYPE_BYTES[storage]
    whole = round(shape.linear_parameters * width)
    constants = 0
    if quantize:
        packed = sum(t.count * t.inputs * t.outputs for t in shape.linears if _is_packed(shape, t))
        bits = {"nf4": 4, "int8": 8}[quantize]
        whole = (shape.linear_parameters - packed) * width + packed * bits // 8
        constants = round(packed * (NF4_BITS[double_quantization] - 4) / 8) if quantize == "nf4" else 0
    return {
        "weights": whole + round(shape.other_parameters * width),
        "embeddings": (shape.embedding_parameters + shape.head_parameters) * width,
        "quantization_constants": constants,
    }


def _is_packed(shape: ModelShape, linear: Linear) -> bool:
    """State-space blocks read some weights directly (models/load.py); fused experts are no linear modules.

    A state-space projection that takes no adapter is a linear module all the same, only never called.
    """
    if shape.model_type in activations.STATE_SPACE and linear.name in ("dt_proj", "out_proj"):
        return False
    return linear.is_linear_module or linear.part == "state"


def _targets(shape: ModelShape, method: Method) -> tuple[Linear, ...]:
    if method.kind in ("full", "prefix"):
        return ()
    return target_linears(shape, method.target_modules, kind=method.kind)


def _pass(config: RunConfig, resolved: Resolved, targets: tuple[Linear, ...], workload: Workload) -> Pass:
    method, storage = config.method, TYPE_BYTES[resolved.storage_dtype]
    return Pass(
        device=resolved.device,
        compute=TYPE_BYTES[resolved.compute_dtype],
        stream=4 if method.kind == "qlora" and resolved.storage_dtype == "float16" else storage,
        kind=method.kind,
        targets=targets,
        rank=method.r,
        dropout=method.dropout > 0 and traits_of(config).dropout,
        attention=workload.attention,
        padded=workload.padded,
        virtual_tokens=method.num_virtual_tokens if method.kind == "prefix" else 0,
        fast=takes_fast_path(config),
        kept_weights=workload.kept_weights,
    )


# --- phases -------------------------------------------------------------------------------------------


def phases(parts: Parts, shares: int, strategy: Strategy) -> dict[str, dict[str, int]]:
    """Bytes of each part in each phase, on one of `shares` devices that hold a shard each."""
    fixed = _fixed(parts, shares)
    loading = _loading(parts, fixed)
    if not has_live_reference(parts.config) and reference_of(parts.config) == "model":
        fixed["reference"] = 0  # asked once and let go
    return {
        "loading": loading,
        "training step": fixed | _step(parts, shares, strategy) | {"allocator_slack": _slack(parts)},
        "optimizer step": fixed | _update(parts, shares, strategy),
        "evaluation": fixed | _evaluation(parts),
        **({"generation": fixed | _generation(parts)} if parts.workload.drawn else {}),
    }


def _fixed(parts: Parts, shares: int) -> dict[str, int]:
    """What is there all the time: weights, adapters, optimizer states, the runtime."""
    method = parts.config.method
    storage = parts.resolved.storage_dtype
    # PEFT's preparation of quantised models raises what stays unquantised to fp32 where it is fp16 (models/adapters.py).
    raised = "float32" if method.kind == "qlora" and storage == "float16" else storage
    weights = weight_bytes(
        parts.shape,
        raised,
        quantize="nf4" if method.kind == "qlora" else None,
        double_quantization=method.double_quantization,
    )
    if parts.traits.head == "score":  # a reward model leaves the output layer out
        weights["embeddings"] -= parts.shape.head_parameters * TYPE_BYTES[raised]
    ordinary, paged = optimizer_bytes(parts.tensors, parts.resolved.optimizer)
    adapters = 0 if method.kind == "full" else 4 * parts.trainable
    pages = 0
    if method.kind != "full" and parts.resolved.device == "cpu":
        # Embeddings are read in place, so the mapped file stays resident with what was packed (4 bits) or fused (experts) from it.
        # Of a file of another type everything is converted, and nothing holds it any more.
        copied = [t for t in parts.shape.linears if method.kind == "qlora" or t.part == "expert"]
        pages = sum(t.num_parameters for t in copied) * TYPE_BYTES[storage] if _file_dtype(parts) == storage else 0
    sharded = {**weights, "adapters": adapters, "optimizer": ordinary, "optimizer_paged": paged, "file_pages": pages}
    sharded |= _beside(parts, sum(weights.values()))
    return {key: -(-value // shares) for key, value in sharded.items()} | {"runtime": _runtime(parts)}


def _beside(parts: Parts, weights: int) -> dict[str, int]:
    """Frozen weights beside those that are trained: the reference, and a reward model.

    A reward adapter on the policy's own base is put beside the policy's (ppo); any other reward model brings its base, which
    is taken to be like this one.
    """
    frozen = {"none": 0, "base": 0, "adapter": 4 * parts.trainable, "model": weights}[reference_of(parts.config)]
    count = reward_models(parts.config)
    shared = parts.traits.family == "ppo" and parts.run.kind in ("lora", "qlora", "dora")
    own = count - 1 if shared and count else count
    on_device = own if parts.resolved.device == "cpu" or parts.traits.family == "ppo" else 0  # grpo and rloo score on the CPU
    rewards = on_device * weights + (2 * parts.trainable if shared and count else 0)  # half of what is trained is the policy's
    return {"reference": frozen, "reward_model": rewards}


def _runtime(parts: Parts) -> int:
    if parts.resolved.device != "cpu":
        return CUDA_CONTEXT
    many_shapes = parts.shape.num_experts > 0 and parts.run.autocast and not parts.run.full
    cache = FAST_ONEDNN_CACHE if parts.run.fast else ONEDNN_CACHE
    return CPU_PROCESS + (cache if many_shapes else 0)


def _loading(parts: Parts, fixed: dict[str, int]) -> dict[str, int]:
    """Weights are read tensor by tensor; quantising has one layer in 16 bits beside the packed ones. On a CPU the mapped file is
    resident beside the weights of another type that are made from it."""
    kept = ("weights", "embeddings", "quantization_constants", "adapters", "file_pages", "reference", "runtime")
    largest = max((t.inputs * t.outputs for t in parts.shape.linears), default=0)
    temporary = largest * TYPE_BYTES[parts.resolved.storage_dtype] if parts.run.kind == "qlora" else 0
    if parts.resolved.device == "cpu" and _file_dtype(parts) != parts.resolved.storage_dtype:
        temporary += TYPE_BYTES[_file_dtype(parts)] * parts.shape.num_parameters
    return {key: fixed[key] for key in kept} | {"temporary": temporary}


def _file_dtype(parts: Parts) -> str:
    """The type of the weights in the file; where it is not known, 16 bits, which can be read in place if they are wanted."""
    wanted = parts.resolved.storage_dtype
    return parts.shape.stored_dtype or ("bfloat16" if wanted == "float32" else wanted)


def _step(parts: Parts, shares: int, strategy: Strategy) -> dict[str, int]:
    """The training step: at the loss all activations are alive; where they are recomputed, one layer at a time is."""
    shape, run, work = parts.shape, parts.run, parts.workload
    every_layer = activations.kept_bytes(shape, run, work.batch, work.tokens)
    copies = 0 if strategy == "fsdp" else cast_copies(parts)  # FSDP gathers weights in the compute type
    head = activations.head_input_bytes(shape, run, parts.num_tokens)
    transient = layer_temporaries(parts)
    logits = head_bytes(parts, training=True)
    gradients = 4 * parts.trainable // shares
    accumulated = gradients if work.micro_batches > 1 else 0
    gathered = _gathered(parts, strategy)
    buckets = gradients if strategy == "ddp" else 0  # the reducer's buckets are a second copy (gradient_as_bucket_view is off)
    head_gradient = 6 * shape.vocab * shape.hidden if run.full and parts.traits.head != "score" else 0
    waiting = 0  # of a tied matrix the head's gradient waits for the embedding's
    if run.fast:
        waiting = 4 * shape.vocab * shape.hidden if parts.trains_head and shape.tied else 0
        head_gradient = 0  # is in `logits`
    if parts.resolved.gradient_checkpointing:
        inputs = activations.checkpoint_bytes(shape, run, parts.num_tokens) + head
        layer = every_layer // max(shape.layers, 1)
        per_layer_copies = copies // max(shape.layers, 1)
        moments = [
            {"activations": inputs, "logits": 0, "temporary": copies, "gradients": accumulated},
            {"activations": inputs, "logits": max(logits, 0), "temporary": head_gradient, "gradients": accumulated},
            {
                "activations": inputs + layer,
                "logits": 0,
                "temporary": transient + per_layer_copies + waiting,
                "gradients": gradients,
            },
        ]
    else:
        kept = every_layer + head
        moments = [
            {"activations": kept, "logits": logits, "temporary": copies, "gradients": accumulated},
            {"activations": kept, "logits": 0, "temporary": copies + transient + waiting, "gradients": accumulated},
            {"activations": kept // max(shape.layers, 1), "logits": 0, "temporary": transient + waiting, "gradients": gradients},
        ]
    highest = max(moments, key=lambda moment: sum(moment.values()))
    highest["temporary"] += gathered
    highest["gradients"] += buckets
    return highest


def head_bytes(parts: Parts, *, training: bool) -> int:
    """What the objective makes of the last hidden states, at the worst moment."""
    shape, run, work, kind = parts.shape, parts.run, parts.workload, parts.traits.head
    scored = round(parts.num_tokens * work.supervised)
    if kind == "logits" and run.fast:
        return chunk_bytes(_chunks(parts, scored), training=training)
    if kind == "logits":
        return logit_bytes(shape.vocab, parts.num_tokens, scored, autocast=run.autocast, training=training)
    if kind == "tiles":
        tiles = Tiles(shape.vocab, shape.hidden, parts.num_tokens, scored, run.compute, run.device == "cuda")
        return tile_bytes(tiles, training=training)
    if kind == "answers":
        return answer_bytes(shape.vocab, round(work.batch * work.new_tokens), run.compute, training=training)
    return 0


def _chunks(parts: Parts, scored: int) -> Chunks:
    stored = 4 if parts.trains_head else TYPE_BYTES[parts.resolved.storage_dtype]
    run = parts.run
    return Chunks(parts.shape.vocab, parts.shape.hidden, scored, run.compute, stored, run.device, parts.trains_head)


def cast_copies(parts: Parts) -> int:
    """16-bit copies of fp32 weights that autocast makes and the graph keeps.

    Trained weights are cast once per forward pass; frozen fp32 weights at each use. Fused experts are left out of autocast. What
    the fast path computes is cast for the moment alone.
    """
    run, shape = parts.run, parts.shape
    if not run.autocast:
        return 0
    linears = sum(t.num_parameters for t in shape.linears if t.part != "expert" and not activations.fused(shape, run, t))
    if run.full or parts.resolved.storage_dtype == "float32":
        whole = parts.traits.head in ("logits", "answers") and not run.fast  # tiles and chunks cast what they need
        return run.compute * (linears + (shape.vocab * shape.hidden if whole else 0))
    fused = sum(t.count * run.rank * (t.inputs + t.outputs) for t in run.targets if activations.fused(shape, run, t))
    copies = run.compute * (parts.trainable - fused)
    # PEFT adds the change of a fused expert tensor to the tensor itself: the sum is a second copy.
    copies += run.compute * sum(t.num_parameters for t in run.targets if t.part == "expert")
    if run.kind == "dora" and run.dropout:  # the base's weight is raised to fp32 for the product, and cast again
        copies += sum(t.count * t.inputs * t.outputs for t in run.targets) * run.compute
    return copies


def layer_temporaries(parts: Parts) -> int:
    """The most that one layer needs for a moment, beyond what it keeps: gradients of its widest tensors, casts, weights."""
    run, shape, n = parts.run, parts.shape, parts.num_tokens
    widest = max((max(t.inputs, t.outputs) * (shape.expert_share if t.part == "expert" else 1) for t in shape.linears), default=0)
    elements = n * widest
    moving = round(elements * 3 * run.compute)
    if run.fast and activations.fused_feed_forward(shape, run):
        # Of the inner width: three gradients, the product made again, the activation, and the gradient times the other branch.
        moving = round(elements * 6 * run.compute)
    elif run.kind in ("lora", "dora", "ia3"):
        moving += round(elements * 8)
    weights = 0
    if run.kind == "qlora":
        weights = max((t.inputs * t.outputs for t in shape.linears), default=0) * run.compute
    if run.full:
        weights = parts.largest_trained * (4 + run.compute if run.autocast else 4)
    if run.kind == "dora":
        weights = max((t.inputs * t.outputs for t in run.targets), default=0) * 16
    return moving + weights


def _gathered(parts: Parts, strategy: Strategy) -> int:
    """FSDP gathers the weights of the layer at work and of the next one; embeddings and head are a unit of their own."""
    if strategy != "fsdp":
        return 0
    layer = parts.shape.linear_parameters // max(parts.shape.layers, 1)
    outside = parts.shape.embedding_parameters + parts.shape.head_parameters
    return TYPE_BYTES[parts.resolved.compute_dtype] * max(2 * layer, layer + outside)


def _update(parts: Parts, shares: int, strategy: Strategy) -> dict[str, int]:
    """The optimizer step: gradients of everything, and what the optimizer needs beside its states."""
    gradients = 4 * parts.trainable // shares
    cuda = parts.resolved.device == "cuda"
    temporary = {
        "adamw_torch": gradients if cuda else 8 * parts.largest_trained,  # CUDA: all square roots at once (foreach)
        "adamw_torch_fused": 0,
        "adafactor": 12 * parts.largest_trained,
    }.get(parts.resolved.optimizer, 0 if cuda else 24 * parts.largest_trained)
    buckets = gradients if strategy == "ddp" else 0
    return {"gradients": gradients + buckets, "temporary": temporary + _gathered(parts, strategy)}


def _evaluation(parts: Parts) -> dict[str, int]:
    """Logits of a whole evaluation batch, without gradients or kept activations."""
    work = parts.workload
    num_tokens = work.eval_batch * work.eval_tokens
    if not num_tokens:
        return {}
    forward = replace(parts, workload=replace(work, batch=work.eval_batch, tokens=work.eval_tokens))
    logits = head_bytes(forward, training=False)
    copies = cast_copies(parts) if parts.run.full else 0
    layer = layer_temporaries(forward)
    if parts.run.fast:
        return {"logits": logits, "temporary": copies + max(layer - logits, 0)}
    return {"logits": logits, "temporary": copies + layer * (1 if not logits else 0)}


def _generation(parts: Parts) -> dict[str, int]:
    """Drawing answers: keys and values of all sequences at full length, and of the last position the logits in both types with
    three fp32 copies that sampling takes. Prompts pass at once.

    On a CPU what a training step held is still there: glibc keeps it, and blocks of another size cannot use it.
    """
    shape, run, work = parts.shape, parts.run, parts.workload
    prompts = replace(parts, workload=replace(work, batch=work.drawn, tokens=work.tokens - work.new_tokens))
    copies = cast_copies(parts) if run.full else 0
    copies += drawing_copies(shape.vocab, shape.hidden, work.drawn, run.compute, cuda=run.device == "cuda")
    held = 0
    if run.device == "cpu" and not parts.resolved.gradient_checkpointing:
        held = activations.kept_bytes(shape, run, work.batch, work.tokens) + _slack(parts)
    return {
        "kv_cache": work.drawn * kv_cache_bytes(shape, work.tokens, run.compute),
        "logits": work.drawn * shape.vocab * (run.compute + 16),
        "temporary": copies + layer_temporaries(prompts),
        "allocator_slack": held,
    }


def host_bytes(parts: Parts) -> int:
    """Main memory of a GPU run: the process, one shard of weights on its way, and room for paged states."""
    largest = max((t.inputs * t.outputs for t in parts.shape.linears), default=0)
    paged = optimizer_bytes(parts.tensors, parts.resolved.optimizer)[1]
    return CUDA_HOST + paged + 4 * max(largest, parts.shape.embedding_parameters)


def _slack(parts: Parts) -> int:
    """What the allocator holds beyond the tensors alive, at the end of a forward pass."""
    on_cpu, checkpointing = parts.resolved.device == "cpu", parts.resolved.gradient_checkpointing
    kept = activations.kept_bytes(parts.shape, parts.run, parts.workload.batch, parts.workload.tokens)
    if on_cpu and parts.run.fast:
        return round((FAST_CPU_CHECKPOINT_SLACK if checkpointing else FAST_CPU_SLACK) * kept) + _chunk_holes(parts)
    if on_cpu:
        return round((CPU_CHECKPOINT_SLACK if checkpointing else SLACK["cpu"]) * kept)
    inputs = activations.checkpoint_bytes(parts.shape, parts.run, parts.num_tokens)
    return round(SLACK["cuda"] * (inputs if checkpointing else kept))


def _chunk_holes(parts: Parts) -> int:
    scored = round(parts.num_tokens * parts.workload.supervised)
    return chunk_logits(_chunks(parts, scored), training=True)
