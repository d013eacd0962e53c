"""Rules about memory, precision, threads and the device. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from finetuneflow.knowledge.criteria import rate_text
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.objectives import least_batch, takes_fast_path
from finetuneflow.knowledge.resolve import Resolved
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.shapes.targets import STATE_SPACE_TARGETS
from finetuneflow.knowledge.situation import Hit, Situation, gb, many, rule
from finetuneflow.knowledge.steps import smaller_budgets
from finetuneflow.knowledge.values import Machine, ModelFacts

BUSY_TOKENS = 8192  # tokens per forward pass from which on a GPU's matrix units are busy with one layer
STATE_SPACE_TOKENS = 128  # beyond it the plain scan of transformers slows down faster than the length grows
BF16_STEP = 2.0**-8  # relative distance of neighbouring bfloat16 values (8 significant bits)


# --- memory -------------------------------------------------------------------------------------------


def _same_result(s: Situation) -> Iterator[dict[str, Any]]:
    """Changes that leave what is learned as it is, each on top of the one before: the cheapest first."""
    training = s.config.training
    fix: dict[str, Any] = {}
    fast = takes_fast_path(s.config)  # evaluation takes as many tokens at once as training
    smaller_evaluation = {"training.eval_batch_size": 1} if training.eval_batch_size > 1 and s.evaluates and not fast else {}
    if smaller_evaluation:
        fix |= smaller_evaluation
        yield dict(fix)
    if s.resolved is not None and not s.resolved.gradient_checkpointing and s.config.method.kind != "prefix":
        fix |= {"training.gradient_checkpointing": "on"}
        yield dict(fix)
    for tokens in smaller_budgets(training) if fast else ():
        fix |= {"training.token_budget": tokens}
        yield dict(fix)
    batch, accumulation = training.batch_size, training.gradient_accumulation
    if fast and training.token_budget is not None:  # the micro-batch decides nothing then
        return
    while batch % 2 == 0 and batch // 2 >= least_batch(s.config) and accumulation <= 2048:
        batch, accumulation = batch // 2, accumulation * 2
        fix |= {"training.batch_size": batch, "training.gradient_accumulation": accumulation}
        yield dict(fix)


def _other_result(s: Situation, fix: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Changes that alter the run a little more each: another optimizer, 4-bit weights, shorter rows."""
    fix = dict(fix)
    on_gpu = s.resolved is not None and s.resolved.device == "cuda"
    if on_gpu and s.machine is not None and s.machine.bitsandbytes and s.config.training.optimizer != "paged_adamw_8bit":
        fix |= {"training.optimizer": "paged_adamw_8bit"}
        yield dict(fix)
    if s.config.method.kind in ("full", "dora"):
        fix |= {"method.kind": "lora"}
        yield dict(fix)
    if s.config.method.kind != "qlora" and s.machine is not None and s.machine.bitsandbytes:
        fix |= {"method.kind": "qlora"}
        yield dict(fix)
    length = s.config.data.max_length
    if s.data is not None and s.data.length_percentiles:
        length = min(length, s.data.length_percentiles[-1])  # a limit above the longest row changes nothing
    while length > 256:
        length = max(256, length // 2)
        fix |= {"data.max_length": length}
        yield dict(fix)


def cheapest_fit(
    s: Situation, *, verdicts: tuple[str, ...] = ("fits", "tight"), only_same_result: bool = False
) -> tuple[dict[str, Any], Estimate | None, bool]:
    """(the least change that fits, what it needs then, whether the result stays the same); ({}, None, False) where none does."""
    last: dict[str, Any] = {}
    for last in _same_result(s):
        if (after := s.memory_with(last)) is not None and after.verdict in verdicts:
            return (*_without_needless(s, last, after, verdicts), True)
    for fix in () if only_same_result else _other_result(s, last):
        if (after := s.memory_with(fix)) is not None and after.verdict in verdicts:
            return (*_without_needless(s, fix, after, verdicts), False)
    return {}, None, False


def _without_needless(
    s: Situation, fix: dict[str, Any], after: Estimate, verdicts: tuple[str, ...]
) -> tuple[dict[str, Any], Estimate]:
    """Leave out the changes that turn out not to be needed, cheapest kept."""
    batches = ("training.batch_size", "training.gradient_accumulation")
    for key in [key for key in fix if key != "training.gradient_accumulation"]:
        fewer = {k: v for k, v in fix.items() if k != key and not (key in batches and k in batches)}
        if fewer and (lighter := s.memory_with(fewer)) is not None and lighter.verdict in verdicts:
            fix, after = fewer, lighter
    return fix, after


def _largest(estimate: Estimate) -> str:
    parts = sorted(estimate.breakdown.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {gb(size)}" for name, size in parts)


@rule("MEMORY_DOES_NOT_FIT", "error", "More memory needed than there is")
def memory_does_not_fit(s: Situation, estimate: Estimate) -> Hit | None:
    if estimate.fits:
        return None
    fix, after, same = cheapest_fit(s)
    if after is None:
        remedy = "Even with 4-bit weights, one row of 256 tokens and checkpointing it does not fit: take a smaller model."
    else:
        remedy = f"The cheapest change that fits needs {gb(after.total_bytes)}" + (" and learns the same." if same else ".")
    return Hit(
        next(iter(fix), "model.base"),
        f"{gb(estimate.total_bytes)} needed, {gb(estimate.usable_bytes)} usable of {gb(estimate.capacity_bytes)}",
        f"At the {estimate.phase}: {_largest(estimate)}. {remedy}",
        fix,
        safe=same,
    )


@rule("MEMORY_TIGHT", "warning", "Memory nearly full, and a long row would end the run")
def memory_tight(s: Situation, estimate: Estimate) -> Hit | None:
    if estimate.verdict != "tight" or s.config.training.oom == "retry":
        return None
    fix, after, _ = cheapest_fit(s, verdicts=("fits",), only_same_result=True)
    remedy = f" The fix needs {gb(after.total_bytes)} and learns the same." if after else ""
    if after is None and s.config.training.batch_size % 2 == 0:
        fix = {"training.oom": "retry"}
        remedy = " With oom: retry the run goes on with half the micro-batch at the same effective batch."
    return Hit(
        "training.oom",
        f"{gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)} usable",
        f"{estimate.total_bytes / estimate.usable_bytes:.0%} of what may be planned with; estimates are off by 10 % and "
        f"more, and oom: stop ends the run.{remedy}",
        fix,
        safe=bool(fix),
    )


@rule("CHECKPOINTING_OFF", "warning", "No gradient checkpointing where memory needs it")
def checkpointing_off(s: Situation, estimate: Estimate) -> Hit | None:
    if s.config.training.gradient_checkpointing != "off" or estimate.verdict == "fits" or s.config.method.kind == "prefix":
        return None
    after = s.memory_with({"training.gradient_checkpointing": "on"})
    if after is None or after.total_bytes > 0.95 * estimate.total_bytes:
        return None
    return Hit(
        "training.gradient_checkpointing",
        f"off, {gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)}",
        f"With it the run needs {gb(after.total_bytes)}: activations are computed twice instead of kept, for about a third more "
        "time. What is learned stays the same.",
        {"training.gradient_checkpointing": "on"},
        safe=True,
    )


@rule("CHECKPOINTING_NEEDLESS", "advice", "Gradient checkpointing where memory is plenty")
def checkpointing_needless(s: Situation, estimate: Estimate, resolved: Resolved) -> Hit | None:
    if not resolved.gradient_checkpointing or estimate.verdict != "fits" or s.config.method.kind == "prefix":
        return None
    after = s.memory_with({"training.gradient_checkpointing": "off"})
    if after is None or after.verdict != "fits":
        return None
    return Hit(
        "training.gradient_checkpointing",
        f"{s.config.training.gradient_checkpointing}, {gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)}",
        f"Without it the run needs {gb(after.total_bytes)} and still fits, and each step is a fifth to a third shorter.",
        {"training.gradient_checkpointing": "off"},
    )


@rule("MICRO_BATCH_SMALL", "advice", "A micro-batch that leaves the GPU idle")
def micro_batch_small(s: Situation, estimate: Estimate, resolved: Resolved) -> Hit | None:
    training = s.config.training
    usual = s.data.length_percentiles[50] if s.data and len(s.data.length_percentiles) > 50 else s.config.data.max_length
    tokens = max(1, min(usual, s.config.data.max_length))
    if resolved.device != "cuda" or estimate.verdict != "fits":
        return None
    if takes_fast_path(s.config) and training.token_budget is not None:
        return None
    batch, accumulation = training.batch_size, training.gradient_accumulation
    fix: dict[str, Any] = {}
    needed = estimate.total_bytes
    while accumulation % 2 == 0 and batch * tokens < BUSY_TOKENS and batch < 256:
        batch, accumulation = batch * 2, accumulation // 2
        after = s.memory_with({"training.batch_size": batch, "training.gradient_accumulation": accumulation})
        if after is None or after.verdict != "fits":
            break
        fix = {"training.batch_size": batch, "training.gradient_accumulation": accumulation}
        needed = after.total_bytes
    if not fix or fix["training.batch_size"] < 4 * training.batch_size:
        return None
    return Hit(
        "training.batch_size",
        f"{training.batch_size} x {tokens:,} tokens, {gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)}",
        f"{training.batch_size * tokens:,} tokens at a time are too few to keep a GPU busy. {fix['training.batch_size']} rows "
        f"need {gb(needed)} and leave the effective batch at {s.batch}: the same result sooner.",
        fix,
    )


# --- precision ----------------------------------------------------------------------------------------


@rule("BF16_UNSUPPORTED", "warning", "bf16 on a device without bf16 units")
def bf16_unsupported(s: Situation, machine: Machine) -> Hit | None:
    if s.config.training.precision != "bf16" or machine.device.bf16 is not False:
        return None
    other = "fp16" if machine.kind in ("cuda", "rocm") and s.config.training.device != "cpu" else "fp32"
    return Hit(
        "training.precision",
        f"bf16 on {machine.device.name}",
        f"Cards before Ampere (2020) and most processors compute bfloat16 by emulation, up to 20 times slower. The run uses "
        f"{other} instead; `auto` says so by itself.",
        {"training.precision": "auto"},
        safe=True,
    )


@rule("FP16_WITH_BF16_MODEL", "warning", "fp16 for a model made in bfloat16")
def fp16_with_bf16_model(s: Situation, model: ModelFacts, resolved: Resolved) -> Hit | None:
    if resolved.compute_dtype != "float16" or model.stored_dtype not in ("bfloat16", "torch.bfloat16"):
        return None
    chosen = s.config.training.precision == "fp16"
    better = bool(s.machine and s.machine.device.bf16)
    return Hit(
        "training.precision",
        f"fp16, {model.name} is stored in bfloat16",
        "fp16 ends at 65,504, bfloat16 at 3.4e38: activations that the model was made with overflow to infinity, and the loss "
        f"becomes NaN. {'This device computes in bfloat16.' if better else 'This device has no bfloat16; fp32 is safe but slower.'}",
        {"training.precision": "auto" if better and chosen else "fp32"},
        safe=better and chosen,
    )


@rule("FP16_ON_CPU", "error", "fp16 training on the processor")
def fp16_on_cpu(s: Situation) -> Hit | None:
    if s.config.training.precision != "fp16" or s.config.training.device != "cpu":
        return None
    return Hit(
        "training.precision",
        "fp16 with device cpu",
        "fp16 needs a loss scaler, which exists for GPUs alone, and its largest number is 65,504; the run refuses it.",
        {"training.precision": "auto"},
        safe=True,
    )


@rule("FULL_IN_16_BITS", "advice", "Full fine-tuning of weights stored in 16 bits")
def full_in_16_bits(s: Situation) -> Hit | None:
    if s.config.method.kind != "full" or s.config.model.dtype not in ("bfloat16", "float16") or not s.chosen("model.dtype"):
        return None
    step = 0.02 * BF16_STEP
    return Hit(
        "model.dtype",
        f"{s.config.model.dtype} with method full",
        f"Near a weight of 0.02 bfloat16 values lie {rate_text(step)} apart; an update of {rate_text(s.rate)} is "
        f"{'lost' if s.rate < step / 2 else 'rounded to a multiple of that'}. The run stores weights in float32 whatever this says.",
        {"model.dtype": "auto"},
        safe=True,
    )


# --- devices ------------------------------------------------------------------------------------------


@rule("THREADS_MORE_THAN_CORES", "warning", "More CPU threads than cores")
def threads_more_than_cores(s: Situation, machine: Machine) -> Hit | None:
    threads = s.config.training.threads or s.cpu_threads
    on_cpu = s.resolved.device == "cpu" if s.resolved else machine.kind == "cpu"
    if not on_cpu or threads is None or threads <= math.ceil(machine.cores):
        return None
    set_here = s.config.training.threads is not None
    return Hit(
        "training.threads",
        f"{threads} threads on {machine.cores:g} cores",
        f"Threads wait for each other by spinning: {many(threads - math.ceil(machine.cores), 'surplus thread')} can make steps up to ten times "
        "slower. Left empty, the best count is measured at the start.",
        {"training.threads": None if set_here else max(1, math.floor(machine.cores))},
        safe=True,
    )


@rule("DEVICE_CUDA_MISSING", "error", "A GPU asked for where there is none")
def device_cuda_missing(s: Situation, machine: Machine) -> Hit | None:
    if s.config.training.device != "cuda" or machine.kind in ("cuda", "rocm"):
        return None
    return Hit(
        "training.device",
        f"cuda on {machine.device.name}",
        f"device: cuda refuses to fall back, and this machine offers {machine.cores:g} processor cores and no usable GPU "
        "(`ftf doctor` says why). `auto` trains on the processor.",
        {"training.device": "auto"},
    )


@rule("DEVICE_CPU_DESPITE_GPU", "warning", "Training on the processor beside an idle GPU")
def device_cpu_despite_gpu(s: Situation, machine: Machine) -> Hit | None:
    if s.config.training.device != "cpu" or machine.kind not in ("cuda", "rocm"):
        return None
    speed = machine.device.flops_bf16 or machine.device.flops_fp32
    how_fast = f" ({speed / 1e12:.0f} TFLOP/s; a processor core reaches 0.1 to 1)" if speed else ""
    return Hit(
        "training.device",
        f"cpu, with {machine.device_count} x {machine.device.name}",
        f"{machine.device.name} with {gb(machine.device.memory_bytes)} stays idle{how_fast}.",
        {"training.device": "auto"},
    )


@rule("STATE_SPACE_ON_CPU", "warning", "Long rows of a state-space model on the processor")
def state_space_on_cpu(s: Situation, shape: ModelShape, resolved: Resolved) -> Hit | None:
    tokens = s.config.data.max_length
    if s.data is not None and s.data.length_percentiles:
        tokens = min(tokens, s.data.length_percentiles[-1])
    if shape.model_type not in STATE_SPACE_TARGETS or resolved.device != "cpu" or tokens <= STATE_SPACE_TOKENS:
        return None
    return Hit(
        "data.max_length",
        f"{tokens:,} tokens on the CPU, {shape.model_type}",
        "Without its GPU kernels the scan runs token by token: a step of a small model took 2.4 s at 128 tokens, 8.6 s at 256 "
        f"and 101 s at 512. Here rows have up to {tokens:,}.",
        {"data.max_length": STATE_SPACE_TOKENS},
    )
