"""From what the run file asks for to what this machine can do: device, precision, optimizer, threads.

The rules themselves are in `knowledge/resolve.py`; here they meet the device that torch really finds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.errors import HardwareError
from finetuneflow.knowledge.resolve import Decision, resolve_on
from finetuneflow.models.new import is_fresh


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


def choose_setup(config: RunConfig, *, threads: int | None = None) -> Setup:
    """Decide everything that depends on the hardware. `threads` repeats an earlier choice (resume)."""
    device = _choose_device(config)
    resolved = resolve_on(config, device, bf16=bf16_is_fast(device), fresh=is_fresh(config.model.base))
    decisions = list(resolved.decisions)
    return Setup(
        device=device,
        compute_dtype=resolved.compute_dtype,
        storage_dtype=resolved.storage_dtype,
        optimizer=resolved.optimizer,
        gradient_checkpointing=resolved.gradient_checkpointing,
        learning_rate=resolved.learning_rate,
        threads=_choose_threads(config, device, threads, decisions),
        decisions=tuple(decisions),
    )


def _choose_device(config: RunConfig) -> Literal["cuda", "cpu"]:
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
