"""From what the run file asks for to what this machine can do: device, precision, optimizer, threads.

The rules themselves are in `knowledge/resolve.py`; here they meet the device that torch really finds.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.errors import HardwareError
from finetuneflow.knowledge.objectives import traits_of
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
    fuse_loops: bool = False

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


# Seconds that fused loops save per token, layer and unit of hidden width, of two cores of a server; only to tell whether measuring
# them on this machine can be worth its own compile time.
TYPICAL_SAVING = 5e-9
FUSING_FILE = "fusing.json"


def settle_fusing(
    config: RunConfig, setup: Setup, num_tokens: int, cache_dir: Path, *, earlier: bool | None = None
) -> tuple[Setup, Decision]:
    """Whether loops are compiled in this run of `num_tokens` tokens. `earlier` repeats the choice of the attempt before, for compiled
    loops round in another order."""
    chosen, reason = _fusing(config, setup, num_tokens, cache_dir) if earlier is None else (earlier, "As before.")
    return replace(setup, fuse_loops=chosen), Decision("training.fuse_loops", "on" if chosen else "off", reason)


def _fusing(config: RunConfig, setup: Setup, num_tokens: int, cache_dir: Path) -> tuple[bool, str]:
    wanted = config.training.fuse_loops
    if config.training.speed == "reference" or traits_of(config).family != "supervised":
        return False, "Only the fast path of sft and pretrain has loops to fuse."
    if wanted != "auto":
        return wanted == "on", "As asked."
    if setup.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return False, "No C++ compiler is installed here (g++ or clang++)."
    work = num_tokens * _model_figure(config, LAYERS, TYPICAL_LAYERS) * _hidden_size(config)
    if work * TYPICAL_SAVING < 3 * COMPILE_SECONDS:
        return False, f"The run is short: compiling would cost more than the {work * TYPICAL_SAVING:.0f} s it saves."
    measured = _measured_fusing(setup, cache_dir / FUSING_FILE)
    saved, cost = work * measured["saved_per_unit"], measured["compile_seconds"]
    told = f"it saves about {saved:.0f} s of this run and takes {cost:.0f} s once (measured on this machine)"
    return (True, f"{told[0].upper()}{told[1:]}.") if saved > 2 * cost else (False, f"Not worth it: {told}.")


def _measured_fusing(setup: Setup, path: Path) -> dict[str, float]:
    """What fusing saves here, from the file of earlier runs or measured now."""
    import torch

    from finetuneflow.hardware import probe
    from finetuneflow.kernels.elementwise import measure_fusing
    from finetuneflow.workspace import write_json

    key = f"{torch.__version__} {probe(ask_torch=False).cpu.model} {setup.device} {setup.threads} {setup.compute_dtype}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or not isinstance(known.get(key), dict):
        before = torch.get_num_threads()
        torch.set_num_threads(setup.threads)
        measured = measure_fusing(torch.device(setup.device), getattr(torch, setup.compute_dtype))
        torch.set_num_threads(before)
        known = {**(known if isinstance(known, dict) else {}), key: measured}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return dict(known[key])


def apply_setup(setup: Setup, *, seed: int) -> None:
    """Set what is global in a process: threads and random state."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(setup.threads)
    set_seed(seed)


CALIBRATION_TOKENS = 1024
TYPICAL_HIDDEN_SIZE, TYPICAL_LAYERS = 1024, 24
WIDTH, LAYERS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer")
COMPILE_SECONDS = 12.0  # of all loops, on two cores of a server


def _hidden_size(config: RunConfig) -> int:
    return _model_figure(config, WIDTH, TYPICAL_HIDDEN_SIZE)


def _model_figure(config: RunConfig, names: tuple[str, ...], typical: int) -> int:
    """A figure of the base model's config, where it lies on this disk; a typical one where it is still to be downloaded."""
    from finetuneflow.models.starter import starter_path

    folder = starter_path() if config.model.base == "starter" else Path(config.model.base)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return typical
    return int(next((values[name] for name in names if values.get(name)), typical))
