"""The model a run starts from: base, adapter (fresh, continued or stacked), reward head, and what it is measured against.

    start_model   ->  Started(model, reference)
    merged_base   the base that a run with `model.adapter_start: merge` trains on, written into its directory

What becomes of an earlier adapter (`model.adapter_start`):

- `continue` trains it further. dpo, kto and the reward methods are then measured against a frozen copy of it.
- `merge` writes it into the base first; the new adapter alone is the result, and needs that merged base.
- `stack` writes it into the base in memory alone; the result is one adapter on the original base that adds up both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuneflow.config import RunConfig
from finetuneflow.errors import ModelError
from finetuneflow.events import Emit
from finetuneflow.knowledge.objectives import reference_of
from finetuneflow.training.setup import Setup
from finetuneflow.workspace import Workspace, sha256_file

if TYPE_CHECKING:
    from finetuneflow.models.adapters import AdapterSpec


@dataclass(frozen=True, slots=True)
class Started:
    """`model` is ready to train, on its device. `reference`: frozen weights of a model without adapters, where one is needed."""

    model: Any
    reference: Any | None = None


def adapter_folder(named: str, workspace: Workspace | None = None) -> Path:
    """The folder of an adapter named by itself, by its run's folder, or by its run's name."""
    folder = Path(named)
    if not folder.exists() and workspace is not None:
        folder = workspace.run_dir(named)
    return folder / "adapter" if (folder / "run.yaml").is_file() else folder


def with_folders(config: RunConfig, workspace: Workspace) -> RunConfig:
    """The same with an earlier adapter and reward models named by their folders, which must be there: a run finds them again
    from anywhere, and a mistake in a name shows before anything is loaded."""
    from finetuneflow.models.adapters import check_adapter_dir

    model, reinforcement = config.model, config.reinforcement
    if model.adapter is not None:
        folder = adapter_folder(model.adapter, workspace).resolve()
        check_adapter_dir(folder)
        model = model.model_copy(update={"adapter": str(folder)})
    rewards = [
        f"model:{_run_folder(text.removeprefix('model:'), workspace)}" if text.startswith("model:") else text
        for text in reinforcement.reward
    ]
    return config.model_copy(update={"model": model, "reinforcement": reinforcement.model_copy(update={"reward": rewards})})


def _run_folder(named: str, workspace: Workspace) -> Path:
    return Path(named).resolve() if Path(named).exists() else workspace.run_dir(named)


def shaping_files(config: RunConfig) -> dict[str, str]:
    """What beside data and base shapes a run and could change under it: name -> hash of the earlier adapter and of each reward."""
    from finetuneflow.models.adapters import ADAPTER_WEIGHTS

    found = {}
    if config.model.adapter is not None:
        weights = adapter_folder(config.model.adapter) / ADAPTER_WEIGHTS
        found["earlier adapter"] = f"SHA-256 {sha256_file(weights)[:16]}"
    for text in config.reinforcement.reward:
        for path in _reward_files(text, config.reinforcement.reward_folder):
            found[f"reward {text}"] = f"SHA-256 {sha256_file(path)[:16]}"
    return found


def _reward_files(text: str, folder: str | None) -> list[Path]:
    if text.startswith("model:"):
        return sorted(Path(text.removeprefix("model:")).glob("*/*.safetensors"))[:1]
    own = Path(folder or ".") / text.partition(":")[0]
    return [own] if own.suffix == ".py" and own.is_file() else []


def merged_base(config: RunConfig, run_dir: Path, workspace: Workspace) -> RunConfig:
    """With `adapter_start: merge`, write base and adapter as one model into `run_dir/base` and start from that."""
    model = config.model
    if model.adapter is None or model.adapter_start != "merge" or config.method.kind == "full":
        return config
    from finetuneflow.models.load import merged_copy
    from finetuneflow.models.source import source_of
    from finetuneflow.workspace import translate_os_errors

    target = run_dir / "base"
    dtype = "fp32" if config.training.precision == "fp32" else "auto"  # 16 bits would round what fp32 is to keep
    merged = merged_copy(source_of(config.model), adapter_folder(model.adapter, workspace), dtype=dtype, device="cpu")
    with translate_os_errors(target):
        merged.model.save_pretrained(target)
        merged.tokenizer.save_pretrained(target)
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
    return config.model_copy(update={"model": model.model_copy(update={"base": str(target), "adapter": None, "revision": None})})


def start_model(config: RunConfig, setup: Setup, tokenizer: Any, base_commit: str | None, emit: Emit) -> Started:
    """Load and prepare everything in memory that is trained or compared with."""
    import torch
    from transformers import set_seed

    from finetuneflow.models.load import load_base
    from finetuneflow.models.source import source_of

    method = config.method

    def load() -> Any:
        return load_base(
            source_of(config.model),
            quantize="nf4" if method.kind == "qlora" else None,
            double_quant=method.double_quantization,
            dtype=getattr(torch, setup.storage_dtype),
            device=setup.device,
        )

    loaded = load()
    for note in loaded.notes:
        emit("decision", setting="model", value=config.model.base, reason=note)
    model = loaded.model
    if config.training.objective == "reward":
        from finetuneflow.models.reward import scoring_model

        model = scoring_model(model, tokenizer, seed=config.training.seed)
    set_seed(config.training.seed)  # initial adapter weights depend on the seed alone, not on what ran before
    model = _with_adapter(model, config, base_commit, emit)
    model.config.use_cache = False  # keys and values of past tokens are of no use in training
    reference = None
    if reference_of(config) == "model":
        reference = load().model
        if config.model.adapter is not None:
            reference = _merged(reference, config, emit=None)
        reference.requires_grad_(False).eval()
        reference.config.use_cache = False
    return Started(model, reference)


def _with_adapter(model: Any, config: RunConfig, base_commit: str | None, emit: Emit) -> Any:
    from finetuneflow.models.adapters import attach_adapter

    if config.model.adapter is not None and (config.method.kind == "full" or config.model.adapter_start == "stack"):
        model = _merged(model, config, emit)
    elif config.model.adapter is not None:
        return _continued(model, config, emit)
    return attach_adapter(model, adapter_spec(config), base_revision=base_commit)


def adapter_spec(config: RunConfig) -> AdapterSpec:
    from finetuneflow.models.adapters import AdapterSpec

    method = config.method
    scored = config.training.objective == "reward"
    return AdapterSpec(
        kind=method.kind,
        r=method.r,
        alpha=method.alpha,
        dropout=method.dropout,
        target_modules=method.target_modules,
        modules_to_save=[*method.modules_to_save, *(["score"] if scored else [])],
        rslora=method.rslora,
        num_virtual_tokens=method.num_virtual_tokens,
        task="score" if scored else "generate",
    )


def _merged(model: Any, config: RunConfig, emit: Emit | None) -> Any:
    """Base and earlier adapter as one, in memory."""
    from finetuneflow.models.adapters import is_quantized, merge_into

    folder = adapter_folder(str(config.model.adapter))
    if is_quantized(model):
        raise ModelError(
            "ADAPTER_NOT_MERGEABLE",
            "An adapter cannot be stacked on a base in 4 bits: writing it into such weights would round it away.",
            where="model.adapter_start",
            remedy="Use model.adapter_start: continue, or method.kind: lora.",
        )
    if emit is not None:
        why = (
            "full fine-tuning trains them together"
            if config.method.kind == "full"
            else "the new adapter is trained on top of both"
        )
        emit(
            "decision", setting="model.adapter_start", value=config.model.adapter_start, reason=f"{folder} is in the base: {why}."
        )
    return merge_into(model, folder)


def _continued(model: Any, config: RunConfig, emit: Emit) -> Any:
    """The earlier adapter, trainable again; its own rank, scaling and targets hold."""
    import functools

    from finetuneflow.models.adapters import TRAINED, check_adapter_dir, load_adapters
    from finetuneflow.models.reward import adapter_for_scoring

    folder = adapter_folder(str(config.model.adapter))
    saved = check_adapter_dir(folder)
    if config.training.objective == "reward":
        model = adapter_for_scoring(model, folder, adapter_spec(config))
    else:
        model = load_adapters(model, {TRAINED: folder}, is_trainable=True)
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    shape = f"rank {saved['r']}, alpha {saved['lora_alpha']}" if "r" in saved else str(saved["peft_type"])
    emit(
        "decision",
        setting="model.adapter_start",
        value="continue",
        reason=f"{folder} is trained further as it was made ({shape}); the settings of method that shape an adapter have no effect.",
    )
    return model
