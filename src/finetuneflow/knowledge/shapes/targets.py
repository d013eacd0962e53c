"""Which linear layers of a shape an adapter goes on, and how many parameters it trains: what PEFT does, as arithmetic.

The tables are PEFT 0.21's `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`, `…_IA3_TARGET_MODULES_MAPPING` and
`…_IA3_FEEDFORWARD_MODULES_MAPPING` for every model type; a test holds them equal to the installed release. The rules are
those of `models/targets.py`, which needs a loaded model: state-space models have targets of their own, a model type
that PEFT does not list gets every linear layer, the output head is never a target.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

from finetuneflow.config import Method
from finetuneflow.errors import ModelError
from finetuneflow.knowledge.shapes.shape import Linear, ModelShape

_QV = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
LORA_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral"), _QV),
    **dict.fromkeys(("opt", "qwen2", "qwen3", "stablelm", "bart"), _QV),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), _FUSED),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("mt5", "t5"), ("q", "v")),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
IA3_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "falcon", "gpt_neox"), ("query_key_value", "dense_4h_to_h")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
    **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
    **dict.fromkeys(("bart", "phi"), ("q_proj", "v_proj", "fc2")),
    **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "mt5": ("k", "v", "wi_1"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "t5": ("k", "v", "wo"),
}
IA3_FEEDFORWARD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "llama4", "mistral", "qwen2", "qwen3"), ("down_proj",)),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "falcon", "gpt_neox"), ("dense_4h_to_h",)),
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "roberta"), ("output.dense",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    **dict.fromkeys(("bart", "opt", "phi"), ("fc2",)),
    "bloom": ("mlp.dense_4h_to_h",),
    "gpt_neo": ("c_proj",),
    "gptj": ("fc_out",),
    "mixtral": ("w2",),
    "mt5": (),
    "t5": ("wo",),
}
# An adapter on `dt_proj` gets no gradient and one on `out_proj` is refused: fused kernels read those weights directly.
STATE_SPACE_TARGETS = {"mamba": ("in_proj", "x_proj"), "mamba2": ("in_proj",), "falcon_mamba": ("in_proj", "x_proj")}

_USUAL_FEEDFORWARD = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")

# Mixtures whose experts transformers 5 fused into one tensor. For these PEFT 0.21 moves a LoRA named after the former layers of
# an expert onto the fused tensors, away from dense layers and shared experts of the same name
# (`peft.utils.transformers_weight_conversion`, `transformers.conversion_mapping`). Such an adapter allows no dropout.
_QWEN_STYLE = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj", "gate": "gate"}
_MIXTRAL_STYLE = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate"}
_MIXTRAL_KIN = ("minimax", "minimax_m2", "mixtral")
_QWEN_KIN = (
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
)  # fmt: skip
FUSED_EXPERTS = dict.fromkeys(_QWEN_KIN, _QWEN_STYLE) | dict.fromkeys(_MIXTRAL_KIN, _MIXTRAL_STYLE)

# PEFT reads the number of heads under three names, and these families have none of them or hand back no cache.
_NO_PREFIX = ("mpt", "xglm", "openai-gpt")


def target_linears(shape: ModelShape, wanted: str | Sequence[str] = "auto", *, kind: str = "lora") -> tuple[Linear, ...]:
    """The linear layers an adapter goes on; `count` and `layer_indices` are those that fit.

    `wanted`: "auto", "all-linear", names, or a regular expression for whole module paths. Fused expert tensors are among them
    only for the low-rank kinds and only where PEFT puts an adapter on them (`FUSED_EXPERTS`). Raises `ModelError`
    (ADAPTER_TARGET_MISSING, ADAPTER_TARGET_HEAD) where a name or the expression fits nothing, and (ADAPTER_UNSUPPORTED)
    where it names one half of a fused pair.
    """
    found = _by_name(shape, wanted, kind)
    renamed = FUSED_EXPERTS.get(shape.model_type) if kind != "ia3" else None
    return _onto_experts(shape, wanted, found, renamed) if renamed and shape.num_experts else found


def trains_fused_experts(shape: ModelShape, method: Method) -> bool:
    """Whether `method` puts low-rank adapters on fused expert tensors, which PEFT refuses unless dropout is 0 (and for DoRA)."""
    if method.kind not in ("lora", "qlora", "dora"):
        return False
    return any(linear.part == "expert" for linear in target_linears(shape, method.target_modules, kind=method.kind))


def _onto_experts(
    shape: ModelShape, wanted: str | Sequence[str], found: tuple[Linear, ...], renamed: dict[str, str]
) -> tuple[Linear, ...]:
    """What PEFT makes of a LoRA on a mixture with fused experts: leaf names, those of former expert layers moved."""
    names = {linear.name for linear in found}
    fused = [linear for linear in shape.linears if linear.name in renamed.values() and linear.part in ("expert", "router")]
    if isinstance(wanted, str) and wanted not in ("auto", "all-linear", *names):
        for linear in fused:  # a pattern may still spell the paths that the layers had before they were fused
            before = [path.rsplit(".", 1)[0] for path in linear.paths]
            names |= {
                old for old, new in renamed.items() if new == linear.name and any(_fits(f"{b}.{old}", wanted) for b in before)
            }
            names |= {linear.name} if _fitting([linear], wanted) else set()
    modules = tuple(linear for linear in shape.linears if linear.is_linear_module)
    moved = names & renamed.keys()
    if not moved:
        # PEFT goes by the last parts of the names that a pattern finds, in whichever layer.
        return found if isinstance(wanted, list | tuple) else _fitting(modules, sorted(names))
    pair = {old for old, new in renamed.items() if new == "gate_up_proj"}
    if 0 < len(moved & pair) < len(pair):
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"The experts of this {shape.model_type} model hold {' and '.join(sorted(pair))} in one tensor; only one is named.",
            remedy="Name both in target_modules, or neither.",
        )
    kept = names - renamed.keys()
    onto = {renamed[name] for name in moved}
    return (_fitting(modules, sorted(kept)) if kept else ()) + tuple(linear for linear in fused if linear.name in onto)


def _by_name(shape: ModelShape, wanted: str | Sequence[str], kind: str) -> tuple[Linear, ...]:
    """The linear modules that fit; names and patterns are checked."""
    available = tuple(linear for linear in shape.linears if linear.is_linear_module)
    names = sorted({linear.name for linear in available})
    if isinstance(wanted, str) and wanted in ("auto", "all-linear"):
        known = _known_targets(shape.model_type, kind) if wanted == "auto" or shape.model_type in STATE_SPACE_TARGETS else None
        return _fitting(available, known or names)
    if isinstance(wanted, str) and wanted not in names:
        try:
            found = _fitting(available, wanted)
        except re.error as error:
            raise ModelError(
                "ADAPTER_TARGET_MISSING",
                f"target_modules {wanted!r} is not a valid regular expression: {error}.",
                remedy="Give module names as a list, or a Python regular expression that matches whole module paths.",
            ) from error
        if not found:
            raise _no_such_target(shape, wanted, names)
        return found
    chosen = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in chosen:
        if name == shape.head_name:
            raise ModelError(
                "ADAPTER_TARGET_HEAD",
                f"{name!r} is the model's output layer; a low-rank adapter on it is not supported.",
                remedy=f"Take {name!r} out of target_modules and, to train it in full, put it into modules_to_save.",
            )
        if not _fitting(available, [name]):
            raise _no_such_target(shape, name, names)
    return _fitting(available, chosen)


def _known_targets(model_type: str, kind: str) -> tuple[str, ...] | str | None:
    if model_type in STATE_SPACE_TARGETS:
        return STATE_SPACE_TARGETS[model_type]
    return (IA3_TARGETS if kind == "ia3" else LORA_TARGETS).get(model_type)


def _fits(path: str, targets: Sequence[str] | str) -> bool:
    """PEFT's rule: a pattern matches the whole path, a name its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _fitting(linears: Sequence[Linear], targets: Sequence[str] | str) -> tuple[Linear, ...]:
    """The linears with at least one fitting path, each reduced to the layers that fit."""
    found = []
    for linear in linears:
        kept = [place for place, path in enumerate(linear.paths) if _fits(path, targets)]
        if kept and len(kept) < len(linear.paths):
            indices = tuple(linear.layer_indices[place] for place in kept)
            linear = replace(linear, count=linear.count * len(kept) // len(linear.paths), layer_indices=indices)
        if kept:
            found.append(linear)
    return tuple(found)


def _no_such_target(shape: ModelShape, name: str, available: list[str]) -> ModelError:
    nearest = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ModelError(
        "ADAPTER_TARGET_MISSING",
        f"target_modules {name!r} fits no linear layer of this {shape.model_type} model.{hint}",
        remedy=f"Choose among: {', '.join(available)}; or 'all-linear', or 'auto'.",
        context={"available": available},
    )


def adapter_parameters(shape: ModelShape, method: Method) -> int:
    """Parameters that `method` trains on a model of this shape, as PEFT 0.21 counts them.

    LoRA and QLoRA r x (in + out) per layer (arXiv:2106.09685); DoRA one magnitude per output more (arXiv:2402.09353); IA3
    one scale per key, value and feed-forward input (arXiv:2205.05638); prefix tuning a key and a value per virtual token
    and layer (arXiv:2101.00190). `modules_to_save` are whole layers. Raises as `target_linears` does, and `ModelError`
    (ADAPTER_UNSUPPORTED) for a prefix on a model whose cache takes none.
    """
    if method.kind == "full":
        return shape.num_parameters
    if method.kind == "prefix":
        return _prefix_parameters(shape, method.num_virtual_tokens)
    linears = _without_saved(target_linears(shape, method.target_modules, kind=method.kind), method.modules_to_save)
    saved = sum(_saved_parameters(shape, method.modules_to_save))
    if method.kind == "dora" and trains_fused_experts(shape, method):
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"These target_modules reach the fused experts of this {shape.model_type} model, which take no DoRA.",
            remedy="Name the attention layers in target_modules, or use the method lora.",
        )
    if method.kind == "ia3":
        return saved + _ia3_parameters(shape, linears)
    per_layer = sum(linear.count * _rank(linear, method.r) * (linear.inputs + linear.outputs) for linear in linears)
    magnitudes = sum(linear.count * linear.outputs for linear in linears) if method.kind == "dora" else 0
    return saved + per_layer + magnitudes


def _rank(linear: Linear, rank: int) -> int:
    """A fused pair of expert layers gets twice the rank, once for each."""
    return 2 * rank if linear.part == "expert" and linear.name == "gate_up_proj" else rank


def _prefix_parameters(shape: ModelShape, num_tokens: int) -> int:
    """PEFT's own width: key/value heads x head width, for Falcon the whole width."""
    latent = any(linear.name == "kv_b_proj" for linear in shape.linears)
    shared_head = shape.model_type == "falcon" and shape.key_value_width is None and shape.kv_heads != shape.heads
    if shape.attention_layers is not None or latent or shared_head or shape.model_type in _NO_PREFIX:
        what = "has no attention" if shape.attention_layers == 0 else "does not take keys and values from outside"
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            f"Prefix tuning puts keys and values before the text, and {shape.model_type} {what}.",
            remedy="Use the method lora.",
        )
    width = shape.hidden if shape.model_type == "falcon" else shape.kv_heads * shape.head_dim
    return num_tokens * shape.layers * 2 * width


def _ia3_parameters(shape: ModelShape, linears: Sequence[Linear]) -> int:
    known = IA3_FEEDFORWARD.get(shape.model_type) or _USUAL_FEEDFORWARD
    feedforward = tuple(name for name in known if any(_fits(path, [name]) for linear in linears for path in linear.paths))
    total = 0
    for linear in linears:
        # As PEFT does, by the bare end of the path: "c_proj" also ends "attn.c_proj".
        scaled_inputs = any(path.endswith(feedforward) for path in linear.paths) if feedforward else False
        total += linear.count * (linear.inputs if scaled_inputs else linear.outputs)
    return total


def _without_saved(linears: Sequence[Linear], saved: Sequence[str]) -> tuple[Linear, ...]:
    """A layer that is trained in full gets no adapter besides."""
    if not saved:
        return tuple(linears)
    pattern = rf"(?!.*(^|\.)({'|'.join(map(re.escape, saved))})($|\.)).*"
    return _fitting(linears, pattern)


def _saved_parameters(shape: ModelShape, wanted: Sequence[str]) -> list[int]:
    """Parameters of each layer trained in full. A shared embedding and head count once, whichever is named."""
    counts, shared_counted = [], False
    for name in dict.fromkeys(wanted):
        leaf = name.rsplit(".", 1)[-1]
        found = sum(linear.num_parameters for linear in _fitting(shape.linears, [name]))
        if found:
            counts.append(found)
        elif leaf in (shape.head_name, shape.embedding_name):
            bias = shape.vocab if shape.head_bias and leaf == shape.head_name else 0
            counts.append(bias + (0 if shape.tied and shared_counted else shape.embedding_parameters))
            shared_counted = True
        elif "norm" in leaf or leaf.startswith("ln_"):
            counts.append(shape.layers * shape.hidden)  # one vector per layer: what nearly all norms are
        else:
            raise ModelError(
                "ADAPTER_TARGET_MISSING",
                f"modules_to_save {name!r} fits no module of this {shape.model_type} model.",
                remedy=f"The usual ones here: {shape.head_name}, {shape.embedding_name}.",
            )
    return counts
