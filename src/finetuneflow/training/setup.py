"""From what the run file asks for to what this machine can do: device, precision, optimizer, threads.

Each substitution is returned as a `Decision`, so that it can be shown, logged and kept with the run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuneflow.config import RunConfig
from finetuneflow.errors import HardwareError


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice made for the user. `warning` is the code of a warning where it goes against what was asked for."""

    setting: str
    value: Any
    reason: str
    warning: str | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """How the run will compute. Types are names, not torch objects, so that it can be written down."""

    device: str
    compute_dtype: str  # autocast type: bfloat16, float16 or float32 (no autocast)
    storage_dtype: str  # type of the base weights
    optimizer: str
    gradient_checkpointing: bool
    learning_rate: float
    threads: int
    decisions: tuple[Decision, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Learning rates that suit adapters wreck full fine-tuning. The documented rule: from 2e-4 on, 2e-5 is used instead.
ADAPTER_SIZED_RATE = 2e-4
FULL_RATE = 2e-5


def choose_setup(config: RunConfig, *, threads: int | None = None) -> Setup:
    """Decide everything that depends on the hardware. `threads` repeats an earlier choice (resume)."""
    decisions: list[Decision] = []
    device = _choose_device(config)
    compute = _choose_precision(config, device, decisions)
    return Setup(
        device=device,
        compute_dtype=compute,
        storage_dtype=_choose_storage(config, compute, decisions),
        optimizer=_choose_optimizer(config, device, decisions),
        gradient_checkpointing=_choose_checkpointing(config, device, decisions),
        learning_rate=_choose_rate(config, decisions),
        threads=_choose_threads(config, device, threads, decisions),
        decisions=tuple(decisions),
    )


def _choose_device(config: RunConfig) -> str:
    import torch

    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise HardwareError(
            "GPU_NOT_AVAILABLE",
            "training.device is cuda, but PyTorch finds no usable GPU.",
            remedy="`ftf doctor` says why. To train on the CPU, set training.device to cpu or auto.",
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def bf16_is_fast(device: str) -> bool:
    """Whether bfloat16 products run on this device's own units rather than emulated ones."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _choose_precision(config: RunConfig, device: str, decisions: list[Decision]) -> str:
    wanted = config.training.precision
    if wanted == "fp16" and device == "cpu":
        decisions.append(Decision("training.precision", "fp32", "fp16 training needs a GPU; fp32 is used on the CPU."))
        return "float32"
    if wanted == "bf16" and not bf16_is_fast(device):
        other = "fp16" if device == "cuda" else "fp32"
        decisions.append(
            Decision("training.precision", other, f"This {device} has no bf16 units; emulated bf16 would be many times slower.")
        )
        return {"fp16": "float16", "fp32": "float32"}[other]
    if wanted != "auto":
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[wanted]
    if bf16_is_fast(device):
        decisions.append(Decision("training.precision", "bf16", f"This {device} computes in bfloat16."))
        return "bfloat16"
    chosen = "float16" if device == "cuda" else "float32"
    decisions.append(Decision("training.precision", chosen, f"This {device} has no bfloat16 units."))
    return chosen


def _choose_storage(config: RunConfig, compute: str, decisions: list[Decision]) -> str:
    wanted = config.model.dtype
    if config.method.kind == "full":
        if wanted in ("bfloat16", "float16"):
            decisions.append(
                Decision(
                    "model.dtype",
                    "float32",
                    "Full fine-tuning updates the weights themselves: small updates would be rounded away in 16 bits.",
                )
            )
        return "float32"
    return compute if wanted == "auto" else wanted


def _choose_optimizer(config: RunConfig, device: str, decisions: list[Decision]) -> str:
    wanted = config.training.optimizer
    if wanted == "auto":
        if device == "cuda":
            return "paged_adamw_8bit"
        decisions.append(
            Decision(
                "training.optimizer",
                "adamw_torch_fused",
                "The default paged_adamw_8bit needs CUDA (paged memory); 32-bit AdamW is used on the CPU.",
            )
        )
        return "adamw_torch_fused"
    if wanted == "paged_adamw_8bit" and device == "cpu":
        decisions.append(
            Decision(
                "training.optimizer",
                "adamw_8bit",
                "Paged memory needs CUDA; the same 8-bit AdamW keeps its state in ordinary memory.",
            )
        )
        return "adamw_8bit"
    return wanted


def _choose_checkpointing(config: RunConfig, device: str, decisions: list[Decision]) -> bool:
    wanted = config.training.gradient_checkpointing
    if wanted != "auto":
        return wanted == "on"
    if device == "cpu":
        decisions.append(
            Decision(
                "training.gradient_checkpointing",
                "off",
                "Recomputing activations costs about a third of the time; ordinary memory is rarely what runs out on a CPU.",
            )
        )
    return device == "cuda"


def _choose_rate(config: RunConfig, decisions: list[Decision]) -> float:
    rate = config.training.learning_rate
    if config.method.kind == "full" and rate >= ADAPTER_SIZED_RATE:
        decisions.append(
            Decision(
                "training.learning_rate",
                FULL_RATE,
                f"{rate:g} is a learning rate for adapters; full fine-tuning with it forgets what the model knew, so {FULL_RATE:g} is used.",
                warning="LEARNING_RATE_LOWERED",
                advice=f"Set training.learning_rate yourself: a value below {ADAPTER_SIZED_RATE:g} is taken as it is.",
            )
        )
        return FULL_RATE
    return rate


def _choose_threads(config: RunConfig, device: str, earlier: int | None, decisions: list[Decision]) -> int:
    import torch

    if earlier is not None:  # the same number splits sums the same way: a resumed run stays bit-exact
        return earlier
    if config.training.threads is not None:
        return config.training.threads
    if device == "cuda":
        return torch.get_num_threads()
    from finetuneflow.hardware import measure_threads

    # Small models gain little from a second thread, large ones much: calibrate with products of the run's own size.
    tokens = min(config.training.batch_size * config.data.max_length, CALIBRATION_TOKENS)
    choice = measure_threads(hidden=_hidden_size(config), tokens=tokens)
    decisions.append(Decision("training.threads", choice.threads, choice.reason))
    return choice.threads


def apply_setup(setup: Setup, *, seed: int) -> None:
    """Set what is global in a process: threads and random state."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(setup.threads)
    set_seed(seed)


CALIBRATION_TOKENS = 1024
TYPICAL_HIDDEN_SIZE = 1024


def _hidden_size(config: RunConfig) -> int:
    """The base model's width, where its config lies on this disk; a typical one where it is still to be downloaded."""
    from finetuneflow.models.starter import starter_path

    folder = starter_path() if config.model.base == "starter" else Path(config.model.base)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return TYPICAL_HIDDEN_SIZE
    return int(values.get("hidden_size") or values.get("n_embd") or values.get("d_model") or TYPICAL_HIDDEN_SIZE)
