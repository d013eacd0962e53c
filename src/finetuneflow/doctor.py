"""`ftf doctor`: what is ready, what is not, and what to do about it. One line per finding; works without torch.

Judges the value `hardware.probe` returns; only the workspace's write access and the hub (when asked) are tried out here.
Secrets are reported as present or absent, never shown.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetuneflow.hardware import Gpu, Hardware, probe

Status = Literal["ok", "warn", "fail"]

PYTHON_RANGE = ((3, 11), (3, 14))  # from, up to but without
# Oldest versions that work; older torch runs code found in checkpoint files. `train` extra in pyproject.toml says the same.
MINIMUM_VERSIONS = {
    "torch": "2.10", "transformers": "5.20", "safetensors": "0.7", "huggingface_hub": "2.0", "peft": "0.21", "trl": "1.15",
    "accelerate": "1.14", "datasets": "5.0", "bitsandbytes": "0.50", "matplotlib": "3.10",
}  # fmt: skip
CORE_PACKAGES = ("tokenizers", "pydantic", "pyarrow")
GPU_MEMORY_WARN_BYTES = 6 * 2**30  # the documented least for QLoRA of a small model
MEMORY_WARN_BYTES, MEMORY_FAIL_BYTES = 4 * 2**30, 2**30
DISK_WARN_BYTES, DISK_FAIL_BYTES = 10 * 2**30, 2**30
CUDA_INSTALL = "pip install --force-reinstall torch (on Linux that is the CUDA build; elsewhere choose one on pytorch.org)"
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it stands, what was found, what to do ("" where nothing needs doing)."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def checks(
    workspace: Path | str,
    *,
    hardware: Hardware | None = None,
    network: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[Check]:
    """Look over machine, installation and workspace. `network=True` also asks whether the model hub answers."""
    workspace = Path(workspace)
    environment = os.environ if environment is None else environment
    hardware = hardware or probe(workspace)
    found = [
        check_python(sys.version_info[:2], hardware.python),
        *check_packages(hardware.packages),
        check_torch(hardware),
        *check_gpus(hardware),
        check_bitsandbytes(hardware),
        check_cpu(hardware),
        check_cores(hardware),
        check_threads(hardware, environment),
        check_memory(hardware),
        check_disk(hardware, workspace),
        check_workspace(workspace),
        check_token(environment),
    ]
    return [*found, check_hub(environment)] if network else found


def worst(found: list[Check]) -> Status:
    """The gravest status of a list: what the exit code of `ftf doctor` goes by."""
    statuses = {check.status for check in found}
    return "fail" if "fail" in statuses else "warn" if "warn" in statuses else "ok"


def to_json(found: list[Check], hardware: Hardware) -> dict[str, Any]:
    """The form of `ftf doctor --json`."""
    return {"status": worst(found), "checks": [check.to_dict() for check in found], "hardware": hardware.to_dict()}


# --- installation ------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...], text: str) -> Check:
    (first, end) = PYTHON_RANGE
    if first <= version[:2] < end:
        return Check("Python", "ok", text)
    return Check("Python", "fail", text, "Use Python 3.11, 3.12 or 3.13: `python3.11 -m venv .venv`.")


def check_packages(packages: Mapping[str, str]) -> list[Check]:
    """One line for what is there, one for each package that is too old, one for all that are missing."""
    old = {name: least for name, least in MINIMUM_VERSIONS.items() if name in packages and _is_older(packages[name], least)}
    missing_core = [name for name in CORE_PACKAGES if name not in packages]
    missing = [name for name in MINIMUM_VERSIONS if name not in packages]
    lines = [
        Check(f"Package {name}", "fail", packages[name], f"pip install --upgrade '{name}>={least}'")
        for name, least in old.items()
    ]
    if missing_core:
        lines.append(
            Check("Core packages", "fail", f"not installed: {', '.join(missing_core)}", "pip install --upgrade finetuneflow")
        )
    if missing:
        lines.append(
            Check(
                "Packages for training",
                "warn",
                f"not installed: {', '.join(missing)}",
                "pip install 'finetuneflow[train]'; checking data and planning work without.",
            )
        )
    fine = [
        f"{name} {packages[name]}"
        for name in ("transformers", "peft", "trl", "accelerate", "datasets")
        if name in packages and name not in old
    ]
    return [Check("Packages", "ok", ", ".join(fine)), *lines] if fine else lines


def _is_older(version: str, least: str) -> bool:
    return _numbers(version) < _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", version, maxsplit=1)[0])[:3])


def check_torch(hardware: Hardware) -> Check:
    """Whether torch is there, works, and is the build that fits the GPUs."""
    torch = hardware.torch
    if torch.version is None:
        return Check("PyTorch", "warn", "not installed", "pip install 'finetuneflow[train]'")
    if torch.problem:
        return Check(
            "PyTorch",
            "fail",
            f"{torch.version}, does not start: {torch.problem}",
            "Install it again: pip install --force-reinstall torch",
        )
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else f"ROCm {torch.hip_build}" if torch.hip_build else "CPU build"
    found = f"{torch.version} ({build})"
    nvidia = [gpu for gpu in hardware.gpus if gpu.kind == "cuda"]
    if nvidia and not torch.cuda_build:
        return Check(
            "PyTorch", "warn", f"{found}, but there is a GPU: {nvidia[0].name}", f"Training would use the CPU: {CUDA_INSTALL}."
        )
    if nvidia and not torch.cuda_available:
        return Check(
            "PyTorch",
            "warn",
            f"{found} finds no usable GPU, nvidia-smi lists {nvidia[0].name} (driver {nvidia[0].driver})",
            "Look at CUDA_VISIBLE_DEVICES; if it is not the cause, update the NVIDIA driver or install a build for an older CUDA.",
        )
    return Check("PyTorch", "ok", found)


# --- GPUs ----------------------------------------------------------------------------------------------


def check_gpus(hardware: Hardware) -> list[Check]:
    """One line per GPU, or one that says what its absence means."""
    if hardware.gpu_problem:
        text = hardware.gpu_problem
        reboot = (
            "Restart the machine: the driver was updated while loaded."
            if "mismatch" in text.lower()
            else "Reinstall the NVIDIA driver and restart."
        )
        return [Check("GPU", "fail", text, reboot)]
    if not hardware.gpus:
        return [
            Check(
                "GPU",
                "warn",
                "none",
                "Small models train on the CPU; for more than about a billion parameters use a machine with a GPU.",
            )
        ]
    return [_check_gpu(gpu, number, len(hardware.gpus)) for number, gpu in enumerate(hardware.gpus)]


def _check_gpu(gpu: Gpu, number: int, count: int) -> Check:
    name = "GPU" if count == 1 else f"GPU {number}"
    parts = [gpu.name]
    if gpu.memory_total_bytes is not None:
        free = f", {_gib(gpu.memory_free_bytes)} free" if gpu.memory_free_bytes is not None else ""
        parts.append(f"{_gib(gpu.memory_total_bytes)}{free}")
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.bf16 is not None:
        parts.append("bf16" if gpu.bf16 else "no bf16")
    found = ", ".join(parts)
    if gpu.memory_total_bytes is not None and gpu.memory_total_bytes < GPU_MEMORY_WARN_BYTES:
        return Check(name, "warn", found, "Use QLoRA, batch size 1, short sequences and a model below 1B parameters, or the CPU.")
    busy = gpu.memory_free_bytes is not None and gpu.memory_total_bytes and gpu.memory_free_bytes < 0.5 * gpu.memory_total_bytes
    if busy:
        return Check(
            name, "warn", found, "Other processes hold most of its memory: see `nvidia-smi`, and end what is not needed."
        )
    return Check(name, "ok", found)


def check_bitsandbytes(hardware: Hardware) -> Check:
    version = hardware.bitsandbytes
    if version:
        return Check("bitsandbytes", "ok", f"{version}: QLoRA and 8-bit optimizers can be used")
    return Check("bitsandbytes", "warn", "not installed: no QLoRA, no 8-bit optimizers", "pip install 'bitsandbytes>=0.50'")


# --- processor, memory, disk ------------------------------------------------------------------------------


def check_cpu(hardware: Hardware) -> Check:
    cpu = hardware.cpu
    features = ", ".join(cpu.features) or "no vector extensions known"
    found = f"{cpu.model or 'unknown model'} ({features})"
    if cpu.bf16:
        return Check("CPU", "ok", f"{found}; computes in bf16")
    if hardware.gpus:
        return Check("CPU", "ok", found)
    return Check(
        "CPU", "warn", f"{found}; bf16 would be emulated", "On this CPU train in fp32 (`training.precision: auto` does so)."
    )


def check_cores(hardware: Hardware) -> Check:
    cpu = hardware.cpu
    found = f"{cpu.cores_granted:g} of {cpu.cores_seen} granted" + (
        "" if cpu.granted_by == "machine" else f" (limited by {cpu.granted_by})"
    )
    if cpu.cores_granted < cpu.cores_seen:
        return Check(
            "Cores",
            "warn",
            found,
            "Threads beyond the granted cores slow training down; leave `training.threads` empty, it is measured.",
        )
    return Check("Cores", "ok", found)


def check_threads(hardware: Hardware, environment: Mapping[str, str]) -> Check:
    """OpenMP settings: too many threads, or idle ones that spin, take the cores from the working ones."""
    threads, policy = environment.get("OMP_NUM_THREADS", ""), environment.get("OMP_WAIT_POLICY", "")
    found = f"OMP_NUM_THREADS {threads or 'not set'}, OMP_WAIT_POLICY {policy or 'not set'}"
    if threads and (not threads.isdigit() or int(threads) > max(1.0, hardware.cpu.cores_granted)):
        return Check(
            "OpenMP", "warn", found, f"Unset OMP_NUM_THREADS, or set it to at most {max(1, int(hardware.cpu.cores_granted))}."
        )
    if policy.upper() == "ACTIVE":
        return Check(
            "OpenMP", "warn", found, "Set OMP_WAIT_POLICY=PASSIVE: waiting threads that spin can cost tenfold on shared cores."
        )
    return Check("OpenMP", "ok", found)


def check_memory(hardware: Hardware) -> Check:
    memory = hardware.memory
    limit = "" if memory.limited_by == "machine" else f" ({memory.limited_by})"
    found = f"{_gib(memory.available_bytes)} available of {_gib(memory.total_bytes)}{limit}"
    if memory.available_bytes < MEMORY_FAIL_BYTES:
        return Check(
            "Memory",
            "fail",
            found,
            "Close other programs or raise the container's limit: loading torch and a small model needs about 1 GiB.",
        )
    if memory.available_bytes < MEMORY_WARN_BYTES:
        return Check(
            "Memory", "warn", found, "Enough for small models only; close other programs or raise the container's limit."
        )
    return Check("Memory", "ok", found)


def check_disk(hardware: Hardware, workspace: Path) -> Check:
    found = f"{_gib(hardware.disk_free_bytes)} free for {workspace}"
    if hardware.disk_free_bytes < DISK_FAIL_BYTES:
        return Check(
            "Disk", "fail", found, "Free some space or choose another folder with --workspace: checkpoints would not fit."
        )
    if hardware.disk_free_bytes < DISK_WARN_BYTES:
        return Check("Disk", "warn", found, "A 7B model takes 15 GB and each export a copy: free some space or use --workspace.")
    return Check("Disk", "ok", found)


def check_workspace(workspace: Path) -> Check:
    """Try to write where runs would be written; a folder that was not there is not left behind."""
    nearest = workspace.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".ftf-doctor-"):
            pass
    except OSError as error:
        who = f", owned by {_owner(nearest)}" if nearest.exists() else ""
        return Check(
            "Workspace",
            "fail",
            f"{nearest} cannot be written ({error.strerror}{who})",
            "Give this user write access, or use --workspace.",
        )
    return Check("Workspace", "ok", f"{workspace} can be written" + ("" if workspace.exists() else " (will be created)"))


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError, NotImplementedError):
        return "another user"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:,.1f} GiB"


# --- the hub --------------------------------------------------------------------------------------------


def check_token(environment: Mapping[str, str]) -> Check:
    """Whether a hub token is there. Its value is not read from the file and never shown."""
    home = Path(environment.get("HF_HOME") or Path(os.path.expanduser(environment.get("HOME") or "~")) / ".cache/huggingface")
    path = Path(environment.get("HF_TOKEN_PATH") or home / "token")
    if environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"):
        return Check("Hub token", "ok", "present (environment)")
    try:
        present = path.is_file() and path.stat().st_size > 0
    except OSError:
        present = False
    return Check(
        "Hub token",
        "ok",
        "present (saved login)" if present else "none; needed only for gated or private models: `hf auth login`",
    )


def check_hub(environment: Mapping[str, str], connect: Callable[[str, int], None] | None = None) -> Check:
    """Whether a connection to the hub can be opened; nothing is sent."""
    from urllib.parse import urlsplit

    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Check(
            "Hub",
            "warn",
            "offline mode (HF_HUB_OFFLINE)",
            "Only models in the cache, local folders and the bundled model can be used.",
        )
    address = urlsplit(environment.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
    try:
        (connect or _connect)(host, port)
    except OSError as error:
        return Check(
            "Hub",
            "warn",
            f"{host} does not answer ({error.strerror or error})",
            "Check network and proxy, or use a local model folder.",
        )
    return Check("Hub", "ok", f"{host} answers")


def _connect(host: str, port: int) -> None:
    import socket

    socket.create_connection((host, port), timeout=HUB_TIMEOUT_SECONDS).close()
