"""Rules about the method and its adapter: rank, scaling, targets, what is frozen. Sources on each page (`rules/CODE.md`)."""

from __future__ import annotations

import math
import re
from typing import Any

from finetuneflow.config import Method
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.resolve import Resolved
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape
from finetuneflow.knowledge.shapes.targets import STATE_SPACE_TARGETS, adapter_parameters, target_linears, trains_fused_experts
from finetuneflow.knowledge.situation import LORA_KINDS, Hit, Situation, count, gb, many, percent, rule
from finetuneflow.knowledge.values import DataFacts, Machine, ModelFacts

# The chapter's guideline table (13.1.7): examples -> lowest advised rank.
GUIDELINE = ((1_000_000, 64), (100_000, 32), (10_000, 16), (0, 8))
SMALLEST_RANK = 8
TRAINED_BYTES = 16  # weight, gradient and two Adam moments in 32 bits
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0  # Allen-Zhu and Li 2024; Schulman et al. 2025

HEADS = ("lm_head", "embed_out", "output_layer", "output_projection")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# Settings that a method does not read.
IGNORED: dict[str, tuple[str, ...]] = {
    "lora": ("num_virtual_tokens", "double_quantization"),
    "dora": ("num_virtual_tokens", "double_quantization"),
    "qlora": ("num_virtual_tokens",),
    "ia3": ("r", "alpha", "dropout", "rslora", "num_virtual_tokens", "double_quantization"),
    "prefix": ("r", "alpha", "dropout", "rslora", "target_modules", "modules_to_save", "double_quantization"),
    "full": ("num_virtual_tokens", "double_quantization"),
}


def scaling(method: Method) -> float:
    """The factor on the adapter's output: alpha / r, with rsLoRA alpha / sqrt(r)."""
    return method.alpha / (math.sqrt(method.r) if method.rslora else method.r)


def targets_of(s: Situation, shape: ModelShape, wanted: str | list[str] | None = None) -> tuple[Linear, ...]:
    """The layers the adapter goes on, or would with `wanted`; none where a name fits nothing."""
    try:
        return target_linears(shape, wanted or s.config.method.target_modules, kind=s.config.method.kind)
    except FineTuneFlowError:
        return ()


def leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def named_targets(method: Method) -> list[str]:
    """Targets given by name: a list, or one plain name; none for auto, all-linear and patterns."""
    wanted = method.target_modules
    if isinstance(wanted, list):
        return wanted
    return [wanted] if wanted not in ("auto", "all-linear") and re.fullmatch(r"[\w.]+", wanted) else []


def lowest_rank(examples: int) -> int:
    return next((rank for size, rank in GUIDELINE if examples >= size), SMALLEST_RANK)


# --- rank and scaling ---------------------------------------------------------------------------------


def _with_rank(s: Situation, rank: int) -> dict[str, Any]:
    """Another rank at the same scaling; at 2 where only the rank was chosen and that made it larger."""
    method = s.config.method
    scale = scaling(method) if s.chosen("method.alpha") else min(scaling(method), 2.0)
    alpha = scale * (math.sqrt(rank) if method.rslora else rank)
    return {"method.r": rank, "method.alpha": float(f"{alpha:.4g}")}


@rule("RANK_TOO_SMALL", "warning", "A rank too small for the task")
def rank_too_small(s: Situation) -> Hit | None:
    method = s.config.method
    if method.kind not in LORA_KINDS or method.r >= SMALLEST_RANK or (s.data is not None and s.data.examples < 1000):
        return None
    room = _bits(s)
    if room is not None and room[0] >= 2 * room[1]:
        return None
    rank = max(16, lowest_rank(s.data.examples) if s.data else 0)
    fix = _with_rank(s, rank)
    return Hit(
        "method.r",
        f"{method.r}",
        f"{_capacity(s)}Too small a rank shows as a loss that stops falling early. {rank} costs "
        f"{rank / method.r:.0f} times the adapter, still a small share of the model.",
        fix,
        safe=s.still_fits(fix),
    )


@rule("RANK_BELOW_GUIDELINE", "advice", "A rank below the guideline for this much data")
def rank_below_guideline(s: Situation, data: DataFacts) -> Hit | None:
    method, lowest = s.config.method, lowest_rank(data.examples)
    if method.kind not in LORA_KINDS or not SMALLEST_RANK <= method.r < lowest:
        return None
    return Hit(
        "method.r",
        f"{method.r} for {data.examples:,} examples",
        f"The guideline for this much data is {lowest} and more. {_capacity(s)}".strip(),
        _with_rank(s, lowest),
    )


def _bits(s: Situation) -> tuple[float, float] | None:
    """(what the adapter can hold, what the data brings) in bits, where both are known."""
    size, tokens = s.adapter_size(modules_to_save=[]), s.supervised_tokens
    return (BITS_PER_PARAMETER * size, BITS_PER_TOKEN * tokens) if size and tokens and tokens > 0 else None


def _capacity(s: Situation) -> str:
    if (room := _bits(s)) is None:
        return ""
    verdict = "By that count the rank would do. " if room[0] >= 2 * room[1] else ""
    return (
        f"The adapter's {count(room[0] / BITS_PER_PARAMETER)} parameters hold about {count(room[0])} bits; the "
        f"{count(room[1] / BITS_PER_TOKEN)} supervised tokens bring about {count(room[1])}. {verdict}"
    )


@rule("RANK_EXCEEDS_LAYER", "warning", "An adapter larger than the layer it adapts")
def rank_exceeds_layer(s: Situation, shape: ModelShape) -> Hit | None:
    method = s.config.method
    if method.kind not in LORA_KINDS:
        return None
    narrow = [t for t in targets_of(s, shape) if method.r * (t.inputs + t.outputs) >= t.inputs * t.outputs]
    if not narrow:
        return None
    worst = min(narrow, key=lambda t: t.inputs * t.outputs / (t.inputs + t.outputs))
    break_even = worst.inputs * worst.outputs / (worst.inputs + worst.outputs)
    rank = 2 ** max(0, math.floor(math.log2(break_even / 4))) if break_even >= 4 else 1
    return Hit(
        "method.r",
        f"{method.r} on {worst.name} ({worst.inputs:,} x {worst.outputs:,})",
        f"Rank {method.r} takes {count(method.r * (worst.inputs + worst.outputs))} parameters there; the layer itself has "
        f"{count(worst.inputs * worst.outputs)}. Above rank {break_even:.0f} nothing is saved, and above "
        f"{min(worst.inputs, worst.outputs)} nothing is gained.",
        _with_rank(s, rank),
        safe=True,
    )


@rule("ALPHA_NOT_DOUBLE_RANK", "advice", "A scaling of one or less")
def alpha_not_double_rank(s: Situation) -> Hit | None:
    method = s.config.method
    if method.kind not in LORA_KINDS or method.rslora or not s.chosen("method.alpha", "method.r"):
        return None
    if not 0.1 <= scaling(method) <= 1:
        return None
    return Hit(
        "method.alpha",
        f"alpha {method.alpha:g}, r {method.r}: scaling {scaling(method):.3g}",
        f"The rule of thumb is alpha = 2 r, a scaling of 2. Yours acts about like the documented setting at "
        f"{scaling(method) / 2:.2g} times the learning rate, so raise one or the other if the loss falls slowly.",
        {"method.alpha": 2 * method.r},
    )


@rule("SCALING_EXTREME", "warning", "An adapter scaled far up or down")
def scaling_extreme(s: Situation) -> Hit | None:
    method, scale = s.config.method, scaling(s.config.method)
    if method.kind not in LORA_KINDS or 0.1 <= scale <= 8:
        return None
    formula = "alpha / sqrt(r)" if method.rslora else "alpha / r"
    usual = round(2 * (math.sqrt(method.r) if method.rslora else method.r), 2)
    return Hit(
        "method.alpha",
        f"{formula} = {scale:.3g}",
        f"The adapter's output is multiplied by {scale:.3g} where 2 is usual, which acts like {scale / 2:.2g} times the learning "
        f"rate: {'training becomes unstable' if scale > 8 else 'the adapter hardly has an effect'}.",
        {"method.alpha": usual},
        safe=True,
    )


# --- targets ------------------------------------------------------------------------------------------


@rule("TARGETS_HEAD_OR_EMBEDDING", "error", "A low-rank adapter on the output layer or the embeddings")
def targets_head_or_embedding(s: Situation) -> Hit | None:
    method = s.config.method
    if method.kind not in (*LORA_KINDS, "ia3"):
        return None
    named = named_targets(method)
    extra = (s.shape.head_name, s.shape.embedding_name) if s.shape else ()
    wrong = [name for name in named if leaf(name) in (*HEADS, *EMBEDDINGS, *extra)]
    if not wrong:
        return None
    kept = [name for name in named if name not in wrong]
    size = f" ({count(s.shape.vocab)} x {s.shape.hidden:,} values)" if s.shape else ""
    return Hit(
        "method.target_modules",
        ", ".join(wrong),
        f"{' and '.join(wrong)}{size} cannot carry a low-rank adapter: the run stops when the model is loaded. Where new tokens "
        "have to be learned, train them in full through method.modules_to_save.",
        {"method.target_modules": kept or "auto"},
        safe=True,
    )


@rule("TARGETS_MISSING", "error", "Target modules that the model does not have")
def targets_missing(s: Situation, shape: ModelShape) -> Hit | None:
    method = s.config.method
    if method.kind not in (*LORA_KINDS, "ia3") or shape.certainty == "typical":
        return None
    wanted: str | list[str] = method.target_modules
    if named := named_targets(method):  # head and embeddings are another rule's matter
        wanted = [name for name in named if leaf(name) not in (*HEADS, *EMBEDDINGS, shape.head_name, shape.embedding_name)]
        if not wanted:
            return None
    if (problem := _target_problem(shape, wanted, method.kind)) is None:
        return None
    usable = wanted != "auto" and bool(targets_of(s, shape, "auto"))
    names = ", ".join(sorted({linear.name for linear in shape.linears if linear.is_linear_module}))
    return Hit(
        "method.target_modules",
        repr(method.target_modules),
        f"{problem} The run would stop once the model is loaded. This model has: {names}.",
        {"method.target_modules": "auto"} if usable else {},
        safe=usable,
    )


def _target_problem(shape: ModelShape, wanted: str | list[str], kind: str) -> str | None:
    try:
        found = target_linears(shape, wanted, kind=kind)
    except FineTuneFlowError as error:
        return error.message
    return None if found else f"target_modules fits no layer of this {shape.model_type} model."


@rule("TARGETS_TOO_FEW", "advice", "Adapters on attention alone, with much to learn")
def targets_too_few(s: Situation, shape: ModelShape, data: DataFacts) -> Hit | None:
    method = s.config.method
    if method.kind not in LORA_KINDS or data.examples < 10_000:
        return None
    now, wide = targets_of(s, shape), targets_of(s, shape, "all-linear")
    if not now or any(t.part == "mlp" for t in now) or not any(t.part == "mlp" for t in wide):
        return None
    small, large = s.adapter_size(modules_to_save=[]), s.adapter_size(target_modules="all-linear", modules_to_save=[])
    if not small or not large:
        return None
    share = sum(t.num_parameters for t in now) / shape.linear_parameters
    return Hit(
        "method.target_modules",
        ", ".join(sorted({t.name for t in now})),
        f"Only {percent(share)} of the linear weights can be adapted ({count(small)} trained parameters; all-linear: "
        f"{count(large)}). With the feed-forward layers LoRA reaches full fine-tuning; on attention alone it stays behind, "
        "even at the same number of parameters.",
        {"method.target_modules": "all-linear"},
    )


@rule("TARGETS_STATE_SPACE", "error", "A target that gets no gradient in a state-space model")
def targets_state_space(s: Situation, shape: ModelShape) -> Hit | None:
    if shape.model_type not in STATE_SPACE_TARGETS or s.config.method.kind not in (*LORA_KINDS, "ia3"):
        return None
    wrong = [name for name in named_targets(s.config.method) if leaf(name) in ("dt_proj", "out_proj")]
    if not wrong:
        return None
    return Hit(
        "method.target_modules",
        ", ".join(wrong),
        f"The fused kernels of {shape.model_type} read these weights directly: an adapter on dt_proj gets no gradient and one "
        f"on out_proj is refused. {', '.join(STATE_SPACE_TARGETS[shape.model_type])} can be trained.",
        {"method.target_modules": "auto"},
        safe=True,
    )


@rule("EXPERTS_WITH_DROPOUT", "error", "Dropout on adapters of fused experts")
def experts_with_dropout(s: Situation, shape: ModelShape) -> Hit | None:
    method = s.config.method
    try:
        reaches = method.dropout > 0 and trains_fused_experts(shape, method)
    except FineTuneFlowError:
        return None
    if not reaches or method.kind == "dora":
        return None
    return Hit(
        "method.dropout",
        f"{method.dropout:g} on the experts of {shape.model_type}",
        f"The {shape.num_experts} experts are stored as one tensor, and PEFT puts no dropout on such an adapter: the run "
        "would stop once the model is loaded.",
        {"method.dropout": 0.0},
        safe=True,
    )


# --- method -------------------------------------------------------------------------------------------


@rule("BASE_NOT_FROZEN", "warning", "LoRA settings, but the whole model is trained")
def base_not_frozen(s: Situation) -> Hit | None:
    method = s.config.method
    named = [key for key in ("r", "alpha", "dropout", "target_modules", "rslora") if s.chosen(f"method.{key}")]
    if method.kind != "full" or not named:
        return None
    size = ""
    if s.shape is not None:
        size = (
            f" All {count(s.shape.num_parameters)} parameters get gradients and optimizer states, "
            f"{gb(TRAINED_BYTES * s.shape.num_parameters)} before activations."
        )
    return Hit(
        "method.kind",
        f"full, with method.{', method.'.join(named)} set",
        f"With method full no adapter is made and the base is not frozen: {many(len(named), 'setting')} without effect.{size}",
        {"method.kind": "lora"},
    )


@rule("METHOD_SETTING_WITHOUT_EFFECT", "advice", "A setting that the method does not read")
def method_setting_without_effect(s: Situation) -> Hit | None:
    kind = s.config.method.kind
    # A complete run file names every setting: only one that was changed was meant to do something.
    named = [f"method.{key}" for key in IGNORED[kind] if s.chosen(f"method.{key}") and s.differs(f"method.{key}")]
    if not named:
        return None
    return Hit(
        named[0],
        f"{', '.join(named)} with method {kind}",
        f"Method {kind} does not use {'it' if len(named) == 1 else f'these {len(named)} settings'}; the run is the same without.",
    )


@rule("MODULES_TO_SAVE_LARGE", "advice", "Embeddings or head trained in full beside a small adapter")
def modules_to_save_large(s: Situation, shape: ModelShape) -> Hit | None:
    method = s.config.method
    whole = [n for n in method.modules_to_save if leaf(n) in (*HEADS, *EMBEDDINGS, shape.head_name, shape.embedding_name)]
    adapter = s.adapter_size(modules_to_save=[])
    if method.kind not in LORA_KINDS or not whole or not adapter or s.config.data.template not in ("auto", "own"):
        return None  # a new template may bring tokens that have to be learned
    size = shape.embedding_parameters * (1 if shape.tied else len({leaf(n) for n in whole}))
    if size < adapter:
        return None
    return Hit(
        "method.modules_to_save",
        ", ".join(whole),
        f"{count(size)} parameters are trained in full beside an adapter of {count(adapter)}: "
        f"{gb(TRAINED_BYTES * size)} more in training and {gb(4 * size)} more in every adapter file. "
        "Only tokens that the base model never saw need it.",
        {"method.modules_to_save": [n for n in method.modules_to_save if n not in whole]},
    )


@rule("MODULES_TO_SAVE_WITH_FULL", "error", "modules_to_save with full fine-tuning")
def modules_to_save_with_full(s: Situation) -> Hit | None:
    method = s.config.method
    if method.kind != "full" or not method.modules_to_save:
        return None
    return Hit(
        "method.modules_to_save",
        ", ".join(method.modules_to_save),
        "With method full every layer is trained and saved; the run refuses the contradiction.",
        {"method.modules_to_save": []},
        safe=True,
    )


@rule("DORA_WITH_DROPOUT", "advice", "DoRA slowed down by dropout")
def dora_with_dropout(s: Situation) -> Hit | None:
    method = s.config.method
    if method.kind != "dora" or method.dropout == 0:
        return None
    before, after = s.estimate, s.memory_with({"method.dropout": 0.0})
    saved = before.total_bytes - after.total_bytes if before and after else 0
    size = f" and {gb(saved)} of memory" if saved > 1e7 else ""
    return Hit(
        "method.dropout",
        f"{method.dropout:g} with method dora",
        f"Without dropout PEFT reuses the base layer's result; with {method.dropout:g} each adapted layer is multiplied a "
        f"second time. Setting it to 0 saves that time{size}.",
        {"method.dropout": 0.0},
        safe=True,
    )


@rule("PREFIX_WITH_CHECKPOINTING", "error", "Prefix tuning with gradient checkpointing")
def prefix_with_checkpointing(s: Situation, resolved: Resolved) -> Hit | None:
    if s.config.method.kind != "prefix" or not resolved.gradient_checkpointing:
        return None
    return Hit(
        "training.gradient_checkpointing",
        s.config.training.gradient_checkpointing,
        f"The {s.config.method.num_virtual_tokens} trained positions are handed over as cached keys and values, and "
        "checkpointing throws the cache away: the first step fails.",
        {"training.gradient_checkpointing": "off"},
        safe=True,
    )


@rule("METHOD_NOT_FOR_ARCHITECTURE", "error", "A method that the architecture does not allow")
def method_not_for_architecture(s: Situation, shape: ModelShape) -> Hit | None:
    try:
        adapter_parameters(shape, s.config.method)
    except FineTuneFlowError as error:
        if error.code != "ADAPTER_UNSUPPORTED":
            return None
        lora = s.adapter_size(kind="lora", target_modules="auto")
        size = f" LoRA would train {count(lora)} parameters." if lora else ""
        return Hit(
            "method.kind",
            f"{s.config.method.kind} on {shape.model_type}",
            f"{error.message}{size}",
            {"method.kind": "lora", "method.target_modules": "auto"} if lora else {},
        )
    return None


# --- quantised bases ----------------------------------------------------------------------------------


@rule("QLORA_WITHOUT_BITSANDBYTES", "error", "QLoRA where bitsandbytes is missing")
def qlora_without_bitsandbytes(s: Situation, machine: Machine) -> Hit | None:
    if s.config.method.kind != "qlora" or machine.bitsandbytes:
        return None
    after = s.memory_with({"method.kind": "lora"})
    size = f"; LoRA without it needs {gb(after.total_bytes)} of {gb(after.usable_bytes)}" if after else ""
    return Hit(
        "method.kind",
        "qlora without bitsandbytes",
        f"bitsandbytes packs the base into 4 bits and is not installed{size}. Install it (pip install bitsandbytes), or use LoRA.",
        {"method.kind": "lora"},
    )


@rule("QLORA_NOT_NEEDED", "advice", "QLoRA where LoRA fits")
def qlora_not_needed(s: Situation, estimate: Estimate, resolved: Resolved) -> Hit | None:
    if s.config.method.kind != "qlora" or resolved.device != "cuda":
        return None
    after = s.memory_with({"method.kind": "lora"})
    if after is None or after.verdict != "fits":
        return None
    return Hit(
        "method.kind",
        f"qlora, {gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)}",
        f"LoRA with 16-bit weights would need {gb(after.total_bytes)} and fit. It saves unpacking every layer at every step "
        "(QLoRA takes about 1.4 times as long) and the rounding of 4 bits.",
        {"method.kind": "lora"},
    )


@rule("QLORA_UNPAGED_OPTIMIZER", "warning", "QLoRA in tight memory with an optimizer that cannot leave the card")
def qlora_unpaged_optimizer(s: Situation, estimate: Estimate, resolved: Resolved) -> Hit | None:
    fix = {"training.optimizer": "paged_adamw_8bit"}
    if s.config.method.kind != "qlora" or resolved.device != "cuda" or resolved.optimizer == "paged_adamw_8bit":
        return None
    after = s.memory_with(fix)
    if after is None or estimate.verdict == "fits":
        return None
    states = estimate.breakdown.get("optimizer", 0)
    return Hit(
        "training.optimizer",
        f"{resolved.optimizer}, {gb(estimate.total_bytes)} of {gb(estimate.usable_bytes)}",
        f"{gb(states)} of optimizer states stay on the card. In 8 bits and paged the run needs {gb(after.total_bytes)}, "
        f"{gb(after.breakdown.get('optimizer_paged', 0))} of which may move to main memory when a long row needs the room.",
        fix,
        safe=True,
    )


@rule("BASE_ALREADY_QUANTIZED", "error", "A base that is stored quantised")
def base_already_quantized(s: Situation, model: ModelFacts) -> Hit | None:
    kind = s.config.method.kind
    if not model.quantized_as or kind not in ("qlora", "full"):
        return None
    reason = "is not quantised a second time" if kind == "qlora" else "takes no gradient in its few-bit weights"
    ours = model.quantized_as == "bitsandbytes"
    return Hit(
        "model.base",
        f"{model.name} ({model.quantized_as}) with method {kind}",
        f"A base stored as {model.quantized_as} {reason}: the run stops once it is loaded. Name the original 16-bit model"
        + (", or put LoRA on this one." if ours else "."),
        {"method.kind": "lora"} if ours else {},
    )
