"""Base models and their tokenizers: from a name to something that can be trained or asked.

    resolve (source.py)  ->  screen (screening.py)  ->  load_base  ->  attach_adapter (adapters.py)

Weights come from safetensors only; a layer that the file does not hold is an error, never
silently random. What was substituted (precision, padding token) is written into the notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetuneflow.errors import HardwareError, ModelError
from finetuneflow.models import screening
from finetuneflow.models.adapters import (
    check_adapter_dir,
    is_quantized,
    load_adapters,
    merge_into,
    require_mergeable,
    trainable_parameters,
)
from finetuneflow.models.source import ModelSource, Snapshot, resolve
from finetuneflow.models.targets import STATE_SPACE_TARGETS
from finetuneflow.models.tokenizer import load_tokenizer, quiet_transformers
from finetuneflow.models.trial import check_model, without_checkpointing
from finetuneflow.workspace import read_json_object

Quantize = Literal["nf4", "fp4", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Where a loaded model came from and what it is: enough to load the same again.

    `digest` covers the names and contents of all model files; `num_parameters` counts a 4-bit weight as one
    and tied weights once.
    """

    base: str
    path: str
    revision: str | None
    commit: str
    digest: str
    architecture: str
    model_type: str
    num_parameters: int
    dtype: str
    quantize: str | None
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A model in memory (evaluation mode), its tokenizer, its origin, and what had to be substituted."""

    model: Any
    tokenizer: Any
    facts: SourceFacts
    notes: tuple[str, ...] = ()


def load_base(
    source: ModelSource | str,
    *,
    quantize: Quantize | None = None,
    double_quant: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
) -> LoadedBase:
    """Load a base model and its tokenizer.

    `dtype` is the storage type of the weights (of the unquantised ones, and of the arithmetic, when quantised):
    "auto", "fp32", "bf16", "fp16" or a torch dtype.
    Raises `ModelError` with a code per cause, `HardwareError` for a device that is not there.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    target = choose_device(device)
    chosen, reason = choose_dtype(dtype, target)
    snapshot = resolve(source)
    tokenizer, tokenizer_notes = load_tokenizer(snapshot.path, run_own_code=snapshot.run_own_code)
    model = _load_model(
        snapshot,
        quantize=quantize,
        double_quant=double_quant,
        dtype=chosen,
        device=target,
        attn_implementation=attn_implementation,
    )
    own_notes = _checked_own(model, snapshot)
    pad_notes = align_padding(model, tokenizer)
    facts = _facts(source, snapshot, model, dtype=chosen, quantize=quantize, device=target)
    return LoadedBase(model, tokenizer, facts, (*snapshot.notes, reason, *own_notes, *tokenizer_notes, *pad_notes))


def _checked_own(model: Any, snapshot: Snapshot) -> tuple[str, ...]:
    """A model of the user's module, tried out; what it lacks is noted."""
    if snapshot.module is None:
        return ()
    check_model(model, snapshot.module)
    note = without_checkpointing(model)
    return (note,) if note else ()


def _facts(
    source: ModelSource, snapshot: Snapshot, model: Any, *, dtype: torch.dtype, quantize: str | None, device: torch.device
) -> SourceFacts:
    return SourceFacts(
        base=source.base,
        path=str(snapshot.path),
        revision=source.revision,
        commit=snapshot.commit,
        digest=snapshot.digest,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        num_parameters=trainable_parameters(model).total,
        dtype=next(name for name, value in DTYPES.items() if value == dtype),
        quantize=quantize or ("bitsandbytes" if is_quantized(model) else None),
        device=str(device),
    )


# --- where and in which precision -----------------------------------------------------------------


def choose_device(requested: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU; a GPU asked for by name must be there."""
    if requested == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(requested)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise HardwareError(
            "GPU_NOT_AVAILABLE",
            f"The device {requested!r} was asked for; PyTorch sees {torch.cuda.device_count()} GPUs here.",
            remedy="Use device 'auto' or 'cpu', or run `ftf doctor` to see what is missing.",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_dtype(requested: str | torch.dtype, device: torch.device | str) -> tuple[torch.dtype, str]:
    """The storage type to use on `device`, and a sentence that says why."""
    device = torch.device(device)
    if requested != "auto" and requested not in (*DTYPES, *DTYPES.values()):
        raise ModelError(
            "MODEL_BAD_DTYPE", f"{requested!r} is not a precision.", remedy=f"Choose among auto, {', '.join(DTYPES)}."
        )
    wanted = DTYPES.get(requested) if isinstance(requested, str) else requested
    has_bf16 = _supports_bf16(device)
    if wanted is None:
        return _automatic_dtype(device, has_bf16)
    if wanted is torch.bfloat16 and not has_bf16:
        substitute = torch.float16 if device.type == "cuda" else torch.float32
        return substitute, f"bf16 was asked for, but {device.type} here has no fast bf16: {_name(substitute)} is used instead."
    if wanted is torch.float16 and device.type == "cpu":
        return torch.float32, "fp16 was asked for, but it is slow and overflows on a CPU: fp32 is used instead."
    return wanted, f"{_name(wanted)} as asked."


def dtype_of_run(run: Path) -> str:
    """The storage type a run computed with (full fine-tuning: fp32), as `load_base` takes it; "auto" where it is not recorded."""
    setup = read_json_object(run / "environment.json").get("setup")
    stored = setup.get("storage_dtype") if isinstance(setup, dict) else None
    return {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}.get(str(stored), "auto")


def _automatic_dtype(device: torch.device, has_bf16: bool) -> tuple[torch.dtype, str]:
    if has_bf16:
        return torch.bfloat16, f"bf16: the {device.type} computes in it fast, and it has the range of fp32."
    if device.type == "cuda":
        return torch.float16, "fp16: this GPU has no bf16."
    return torch.float32, f"fp32: the {device.type} has no fast bf16."


def _supports_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without AVX-512 the product is emulated, some twenty times slower than fp32.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


# --- the model ------------------------------------------------------------------------------------


def _load_model(
    snapshot: Snapshot,
    *,
    quantize: Quantize | None,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": {"": device}} if quantize or device.type != "cpu" else {}
    if quantize:
        _refuse_requantization(snapshot, quantize)
        skipped = _never_quantized(snapshot.config.get("model_type"))
        options["quantization_config"] = quantization_config(quantize, dtype, double_quant=double_quant, skip_modules=skipped)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    loader: Any = AutoModelForCausalLM  # its annotations leave out the pair that output_loading_info gives
    with _loading_errors(snapshot), quiet_transformers():
        model, loading = loader.from_pretrained(
            str(snapshot.path),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=snapshot.run_own_code,
            output_loading_info=True,
            **options,
        )
    _require_complete(snapshot, loading)
    _keep_weights_in_place(model)
    model.name_or_path = model.config._name_or_path = snapshot.base
    return model


@contextlib.contextmanager
def _loading_errors(snapshot: Snapshot) -> Iterator[None]:
    """What transformers raises about a screened folder, told as a `ModelError`; out of memory passes through."""
    try:
        yield
    except ImportError as error:
        raise screening.unsupported(snapshot.base, f"a package it needs is missing ({_first_line(error)})", None) from error
    except (RuntimeError, ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(
            sign in str(error) for sign in ("allocate memory", "start new thread")
        ):
            raise
        raise screening.corrupt(snapshot.path, f"could not be loaded: {_first_line(error)}") from error


def _keep_weights_in_place(model: Any) -> None:
    """Forbid bitsandbytes to repack 4-bit weights during an evaluation, as it does on CPUs with AVX-512 BF16.

    Repacked weights answer with other rounding than training saw, give garbage when merged or dequantised, and fail
    for layers whose width is no multiple of 32. Without it, decoding one token at a time is slower on such a CPU,
    longer inputs are faster.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _refuse_requantization(snapshot: Snapshot, quantize: str) -> None:
    if snapshot.config.get("quantization_config"):
        raise ModelError(
            "MODEL_UNSUPPORTED_ARCH",
            f"{snapshot.base} is quantised already and cannot be quantised again to {quantize}.",
            remedy="Leave quantize out, or name the original model.",
        )


def _never_quantized(model_type: object) -> list[str] | None:
    """State-space blocks multiply by these weights directly, which packed ones do not allow; None is the library's choice."""
    return ["lm_head", "dt_proj", "out_proj"] if model_type in STATE_SPACE_TARGETS else None


def quantization_config(
    quantize: Quantize, dtype: torch.dtype, *, double_quant: bool, skip_modules: list[str] | None = None
) -> Any:
    """The bitsandbytes settings: NF4 (or FP4) in blocks of 64 with double quantisation, or 8-bit integers."""
    import transformers

    settings: Any = transformers.BitsAndBytesConfig
    if quantize == "int8":
        return settings(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return settings(
        llm_int8_skip_modules=skip_modules,  # despite its name, it holds for 4 bits too
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _require_complete(snapshot: Snapshot, loading: Mapping[str, Any]) -> None:
    """Refuse weights that do not fill the model exactly: a missing tensor would be left random."""
    missing, surplus = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    mismatched = sorted(str(item[0]) for item in loading.get("mismatched_keys", ()))
    trouble = [
        f"{len(names)} {what} (e.g. {names[0]})"
        for names, what in ((missing, "missing"), (surplus, "that fit nowhere"), (mismatched, "of another shape"))
        if names
    ]
    if trouble:
        raise ModelError(
            "MODEL_CORRUPT",
            f"The weights of {snapshot.base} do not fit its config.json: tensors {', '.join(trouble)}.",
            where=str(snapshot.path),
            remedy="Copy config.json and the weights from the same release; a missing layer would start at random values.",
            context={"missing": missing[:20], "unexpected": surplus[:20], "mismatched": mismatched[:20]},
        )


def align_padding(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Tell generation which token pads, and check that the tokenizer's ids have a row in the embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            "MODEL_CORRUPT",
            f"The tokenizer knows {len(tokenizer):,} tokens, the model's embedding has {rows:,} rows.",
            remedy="Use the tokenizer that belongs to these weights.",
        )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None and tokenizer.eos_token_id is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return (f"The model names no end token; the tokenizer's {tokenizer.eos_token!r} ends generation.",)
    return ()


# --- with saved adapters --------------------------------------------------------------------------


def load_with_adapters(
    source: ModelSource | str, adapters: Mapping[str, Path], *, below: Path | None = None, **options: Any
) -> LoadedBase:
    """A base with one or several saved adapters, the first active; `options` as for `load_base`.

    `below`: an adapter that is written into the base in memory first: the others were trained on top of it.

    `adapters.switch_adapter` changes the active one, `adapters.base_only` turns them off for a while.
    """
    for adapter_dir in adapters.values():
        check_adapter_dir(adapter_dir)
    base = load_base(source, **options)
    trunk = merge_into(base.model, below) if below is not None else base.model
    model = load_adapters(trunk, adapters).eval() if adapters else trunk
    return LoadedBase(model, base.tokenizer, base.facts, base.notes)


def merged_copy(
    source: ModelSource | str, adapter_dir: Path, *, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> LoadedBase:
    """The base with the adapter's change written into its weights, as an ordinary model.

    The base is always loaded anew and unquantised: merging into 4-bit weights would round the change away, and
    4-bit weights that an evaluation has repacked (see `_keep_weights_in_place`) would give garbage.
    """
    require_mergeable(adapter_dir)
    base = load_base(source, dtype=dtype, device=device)
    if is_quantized(base.model):
        raise ModelError(
            "ADAPTER_NOT_MERGEABLE",
            f"{base.facts.base} exists in quantised form only; an adapter is merged into full-precision weights.",
            remedy="Name the original, unquantised model as the base of the merge.",
        )
    merged = merge_into(base.model, adapter_dir).eval()
    return LoadedBase(merged, base.tokenizer, base.facts, base.notes)
