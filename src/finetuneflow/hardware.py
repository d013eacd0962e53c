"""The probe: what this machine really offers -> `Hardware`, a plain value.

GPUs and driver, torch and CUDA, bitsandbytes, CPU features, cores and memory *granted* (a container
often gets less than it sees), disk, versions. Nothing here raises because a machine is odd: what cannot
be found out is `None`, with the reason beside it where there is one. This module imports without torch and
asks torch in a child process unless it is loaded already, so a broken driver cannot take the caller down.
All sizes are bytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from finetuneflow.workspace import free_bytes

GPU_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
NVIDIA_SMI_TIMEOUT_SECONDS = 10.0
TORCH_TIMEOUT_SECONDS = 60.0  # importing torch from a cold network disk
TORCH_QUESTION = "import json, torch; from finetuneflow.hardware import describe_torch; print(json.dumps(describe_torch(torch)))"
PACKAGES = (
    "finetuneflow", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "trl", "accelerate",
    "datasets", "bitsandbytes", "pydantic", "pyarrow", "matplotlib",
)  # fmt: skip
# Flag in /proc/cpuinfo -> the name people know. The first group is x86, the second Arm.
CPU_FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX", "amx_bf16": "AMX BF16", "amx_int8": "AMX INT8",
    "asimd": "NEON", "sve": "SVE", "bf16": "Arm BF16", "i8mm": "Arm I8MM",
}  # fmt: skip
BF16_FEATURES = frozenset({"AVX-512 BF16", "AMX BF16", "Arm BF16"})
UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator. `seen_by` says who reported it: nvidia-smi, torch or the system."""

    name: str
    kind: Literal["cuda", "rocm", "mps"]
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    driver: str | None = None
    capability: str | None = None
    bf16: bool | None = None
    seen_by: str = "nvidia-smi"


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says about itself. `version` None: not installed; `problem`: installed but it does not answer."""

    version: str | None = None
    cuda_build: str | None = None
    hip_build: str | None = None
    cuda_available: bool = False
    mps_available: bool = False
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. `cores_granted` may be a fraction (a cgroup quota); `granted_by` names what limits it."""

    model: str | None
    features: tuple[str, ...]
    cores_seen: int
    cores_granted: float
    granted_by: str

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 matrix products have instructions of their own here."""
        return bool(BF16_FEATURES & set(self.features))


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory this process may use: `total_bytes` is the smaller of the machine's and the container's limit."""

    total_bytes: int
    available_bytes: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine as FineTuneFlow may use it."""

    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    torch: Torch
    cpu: Cpu
    memory: Memory
    disk_free_bytes: int
    python: str
    system: str
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values (for `environment.json`, `--json`)."""
        return dataclasses.asdict(self)

    @property
    def bitsandbytes(self) -> str | None:
        return self.packages.get("bitsandbytes")


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    errors: str = ""


Runner = Callable[[Sequence[str], float], Finished]


def run_command(arguments: Sequence[str], timeout_seconds: float) -> Finished:
    """Run an argument list (never a shell string). Raises OSError or `subprocess.TimeoutExpired`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "LC_ALL": "C"}
    done = subprocess.run(
        list(arguments), capture_output=True, text=True, errors="replace", timeout=timeout_seconds, env=environment, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def probe(disk_path: Path | str = ".", *, ask_torch: bool = True, run: Runner = run_command, root: Path = Path("/")) -> Hardware:
    """Look at this machine. Never raises.

    `ask_torch=False` skips the seconds that importing torch takes (its version is still told). `run` and
    `root` (the folder that holds `proc` and `sys`) exist so that tests can play other machines.
    """
    packages = package_versions()
    torch = probe_torch(packages.get("torch"), run) if ask_torch else Torch(version=packages.get("torch"))
    nvidia, gpu_problem = probe_nvidia(run)
    return Hardware(
        gpus=_merge_gpus(nvidia, torch.gpus),
        gpu_problem=gpu_problem,
        torch=torch,
        cpu=probe_cpu(run, root),
        memory=probe_memory(root),
        disk_free_bytes=_free_bytes_or_zero(Path(disk_path)),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that matter, read from their metadata without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
            continue
        if version:
            found[name] = version
    return found


# --- GPUs ----------------------------------------------------------------------------------------


def probe_nvidia(run: Runner) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs as nvidia-smi lists them, and what is wrong when it is there but does not work."""
    try:
        done = run(GPU_QUERY, NVIDIA_SMI_TIMEOUT_SECONDS)
    except FileNotFoundError:
        return (), None  # no NVIDIA driver: the usual case on a laptop, nothing to complain about
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi gave no answer in {NVIDIA_SMI_TIMEOUT_SECONDS:.0f} s; the driver hangs"
    except OSError as error:
        return (), f"nvidia-smi cannot be run: {error.strerror or error}"
    if done.code != 0:
        text = " ".join((done.output or done.errors).split())
        return (), text[:300] or f"nvidia-smi ended with code {done.code}"
    return tuple(gpu for line in done.output.splitlines() if (gpu := _parse_gpu(line))), None


def _parse_gpu(line: str) -> Gpu | None:
    """One CSV line of `GPU_QUERY`; sizes are MiB, `[N/A]` where a device does not tell (unified memory, MIG)."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) < 4 or not parts[0]:
        return None
    total, free, driver = parts[-3:]
    name = ", ".join(parts[:-3])  # a name may hold commas, the other columns cannot
    return Gpu(name, "cuda", _mebibytes(total), _mebibytes(free), None if driver.startswith("[") else driver)


def _mebibytes(text: str) -> int | None:
    try:
        return int(float(text.removesuffix("MiB")) * 2**20)
    except (ValueError, OverflowError):
        return None


def _merge_gpus(nvidia: tuple[Gpu, ...], torch: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Both views of the same cards: torch knows capability and bf16, nvidia-smi the driver.

    The lists are matched only when they agree on the names in order, since CUDA_VISIBLE_DEVICES may hide or reorder cards.
    """
    if not nvidia or not torch:
        return nvidia or torch
    if [g.name for g in nvidia] != [g.name for g in torch]:
        return torch
    pairs = zip(nvidia, torch, strict=True)
    return tuple(dataclasses.replace(n, capability=t.capability, bf16=t.bf16, seen_by="nvidia-smi, torch") for n, t in pairs)


def probe_torch(installed: str | None, run: Runner) -> Torch:
    """Ask torch about itself: in this process if it is loaded already, else in a child process."""
    if installed is None:
        return Torch()
    loaded = sys.modules.get("torch")
    try:
        if loaded is not None and run is run_command:
            return _torch_from(describe_torch(loaded))
        done = run([sys.executable, "-c", TORCH_QUESTION], TORCH_TIMEOUT_SECONDS)
        if done.code != 0:
            return Torch(version=installed, problem=_last_line(done.errors) or f"importing torch ended with code {done.code}")
        return _torch_from(json.loads(_last_line(done.output)))
    except subprocess.TimeoutExpired:
        return Torch(version=installed, problem=f"importing torch took more than {TORCH_TIMEOUT_SECONDS:.0f} s")
    except Exception as error:
        return Torch(version=installed, problem=f"{type(error).__name__}: {str(error)[:200]}")


def describe_torch(torch: Any) -> dict[str, Any]:
    """What the loaded module `torch` knows, as JSON values. Runs in the child process of `probe_torch`."""
    hip = getattr(torch.version, "hip", None)
    described: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": hip,
        "cuda_available": bool(torch.cuda.is_available()),
        "mps_available": bool(torch.backends.mps.is_available()),
        "gpus": [],
    }
    if described["cuda_available"]:
        described["gpus"] = [_describe_gpu(torch, index, "rocm" if hip else "cuda") for index in range(torch.cuda.device_count())]
    elif described["mps_available"]:
        total = psutil.virtual_memory().total  # Apple's GPU shares main memory
        described["gpus"] = [{"name": "Apple GPU", "kind": "mps", "memory_total_bytes": total, "bf16": True, "seen_by": "torch"}]
    return described


def _describe_gpu(torch: Any, index: int, kind: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    try:
        free = int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:  # a card that another process has in exclusive mode
        free = None
    return {
        "name": properties.name,
        "kind": kind,
        "memory_total_bytes": int(properties.total_memory),
        "memory_free_bytes": free,
        "capability": f"{properties.major}.{properties.minor}",
        "bf16": kind == "rocm" or properties.major >= 8,  # older cards emulate it, slowly
        "seen_by": "torch",
    }


def _torch_from(values: dict[str, Any]) -> Torch:
    return Torch(**{**values, "gpus": tuple(Gpu(**gpu) for gpu in values["gpus"])})


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


# --- processor and memory --------------------------------------------------------------------------


def probe_cpu(run: Runner, root: Path) -> Cpu:
    """Model, instruction sets, and how many cores this process really gets."""
    model, flags = _cpuinfo(root)
    if model is None and platform.system() == "Darwin":
        model = _ask(run, ["sysctl", "-n", "machdep.cpu.brand_string"])
    seen = os.cpu_count() or 1
    granted, granted_by = granted_cores(root, seen)
    features = tuple(name for flag, name in CPU_FEATURES.items() if flag in flags)
    return Cpu(model or platform.processor() or None, features, seen, granted, granted_by)


def _cpuinfo(root: Path) -> tuple[str | None, set[str]]:
    model: str | None = None
    flags: set[str] = set()
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and model is None:
            model = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
    return model, flags


def granted_cores(root: Path = Path("/"), seen: int | None = None) -> tuple[float, str]:
    """Cores this process may use and what limits them: the machine, its affinity, a cpuset or a cgroup quota."""
    limits = [(float(seen or os.cpu_count() or 1), "machine")]
    if hasattr(os, "sched_getaffinity"):
        limits.append((float(len(os.sched_getaffinity(0))), "affinity"))
    for directory in _cgroup_directories(root, "cpuset"):
        names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
        limits += [(float(count), "cpuset") for name in names if (count := _count_cpus(_read(directory / name)))]
    limits += [(quota, "cgroup quota") for quota in _cpu_quotas(root)]
    return min(limits, key=lambda limit: limit[0])


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores by time quota, version 2 (`cpu.max`: "quota period") and version 1 (two files); -1 and "max" mean none."""
    for directory in _cgroup_directories(root, "cpu"):
        pair = _read(directory / "cpu.max").split()
        if len(pair) != 2:
            pair = [_read(directory / "cpu.cfs_quota_us").strip(), _read(directory / "cpu.cfs_period_us").strip()]
        try:
            quota, period = float(pair[0]), float(pair[1])
        except ValueError:
            continue
        if quota > 0 and period > 0:
            yield quota / period


def _count_cpus(text: str) -> int:
    """The size of a list such as "0-3,8"; 0 when it is empty or unreadable."""
    count = 0
    for part in text.strip().split(","):
        ends = part.split("-")
        try:
            count += int(ends[-1]) - int(ends[0]) + 1
        except ValueError:
            return 0
    return max(count, 0)


def probe_memory(root: Path = Path("/")) -> Memory:
    """Memory of the machine, cut to the smallest cgroup limit above this process."""
    system = psutil.virtual_memory()
    total, available, limited_by = int(system.total), int(system.available), "machine"
    for directory in _cgroup_directories(root, "memory"):
        limit = _first_number(directory, ("memory.max", "memory.limit_in_bytes"))
        if limit is None or not 0 < limit < min(UNLIMITED_BYTES, total):
            continue
        used = _first_number(directory, ("memory.current", "memory.usage_in_bytes")) or 0
        total, limited_by = limit, "cgroup limit"
        available = min(available, max(0, limit - used + _reclaimable_bytes(directory)))
    return Memory(total, available, limited_by)


def _first_number(directory: Path, names: Sequence[str]) -> int | None:
    for name in names:
        if (text := _read(directory / name).strip()).isdigit():
            return int(text)
    return None


def _reclaimable_bytes(directory: Path) -> int:
    """File cache that the kernel gives back under pressure: counted as used, free in truth."""
    values = dict(line.split()[:2] for line in _read(directory / "memory.stat").splitlines() if len(line.split()) >= 2)
    text = values.get("total_inactive_file") or values.get("inactive_file") or "0"
    return int(text) if text.isdigit() else 0


def _cgroup_directories(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and all groups above it that exist, for cgroup versions 2 and 1.

    Inside a container the path in /proc/self/cgroup is often the host's and not visible; the mount itself then holds the limit.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controllers, mounts / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in bases:
            yield from (folder for n in range(len(parts), -1, -1) if (folder := base.joinpath(*parts[:n])).is_dir())


def _read(path: Path) -> str:
    """A small system file, or "" where it is missing or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _ask(run: Runner, arguments: Sequence[str]) -> str | None:
    try:
        done = run(arguments, 5.0)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.output.strip() or None if done.code == 0 else None


def _free_bytes_or_zero(path: Path) -> int:
    try:
        return free_bytes(path.absolute())
    except OSError:
        return 0


# --- thread count ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """The thread count to train with. `timings`: threads -> median milliseconds of one calibration step."""

    threads: int
    timings: dict[int, float]
    reason: str


# Turns that GNU's OpenMP waits for work before a thread sleeps, some microseconds. Waking a thread costs more than that, and a step has
# thousands of short parallel loops: on two idle cores a step of a 135M model took 1.21 s instead of 1.45 s. Ten times as many
# turns gain little more, and on cores that others use they cost several times the step.
SPIN_TURNS = 1_000


def prefer_passive_waiting() -> bool:
    """Let OpenMP threads without work sleep instead of spinning on; call before torch is loaded. True if it takes effect or was set
    already.

    On shared cores a spinning thread takes the core from the one it waits for, which can cost tenfold. Where the cores are idle
    now, threads spin for a moment before they sleep (`SPIN_TURNS`). What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if _cores_are_idle():
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_TURNS))
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def _cores_are_idle() -> bool:
    try:
        return os.getloadavg()[0] < 0.75 * granted_cores()[0]
    except OSError:  # Windows has no such figure
        return False


def thread_candidates(cores_granted: float) -> list[int]:
    """Powers of two up to the granted cores, and the granted cores themselves."""
    most = max(1, math.ceil(cores_granted))
    return sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | {most})


def measure_threads(
    candidates: Sequence[int] | None = None, *, hidden: int = 256, tokens: int = 192, seconds: float = 0.6
) -> ThreadChoice:
    """Time a step that resembles training at each thread count; choose the fewest within 5 % of the fastest.

    `hidden` is the model's width and `tokens` those of one micro-batch: small models gain nothing from threads that
    large ones need. The counts take turns, and medians are compared, so that a neighbour's short burst of work does
    not decide. Takes about `seconds` plus a warm-up; the thread count of the process is left as it was.
    """
    wanted = sorted(set(candidates)) if candidates else thread_candidates(granted_cores()[0])
    if len(wanted) == 1:
        return ThreadChoice(wanted[0], {}, f"{wanted[0]} thread(s): the only choice here")
    torch = importlib.import_module("torch")  # by name: this module itself must stand without torch
    step = _calibration_step(torch, hidden, tokens)
    before = torch.get_num_threads()
    try:
        timings = _time_in_turns(wanted, step, torch.set_num_threads, seconds)
    finally:
        torch.set_num_threads(before)
    return choose_threads(timings)


def choose_threads(timings: dict[int, float]) -> ThreadChoice:
    """The fewest threads whose time is within 5 % of the best: more would only take cores from others."""
    best = min(timings.values())
    threads = min(count for count, value in timings.items() if value <= 1.05 * best)
    told = ", ".join(f"{count}: {value:.2f} ms" for count, value in timings.items())
    return ThreadChoice(threads, timings, f"{threads} thread(s): measured per step {told}")


def _time_in_turns(
    wanted: list[int], step: Callable[[], None], set_threads: Callable[[int], None], seconds: float
) -> dict[int, float]:
    """Median milliseconds per step for each count; three rounds, the first step after a switch not counted."""
    rounds = 3
    share = seconds / (rounds * len(wanted))
    samples: dict[int, list[float]] = {count: [] for count in wanted}
    for _ in range(rounds):
        for count in wanted:
            set_threads(count)
            step()
            deadline = time.perf_counter() + share
            while True:
                started = time.perf_counter()
                step()
                ended = time.perf_counter()
                samples[count].append(1000 * (ended - started))
                if ended >= deadline:
                    break
    return {count: statistics.median(values) for count, values in samples.items()}


def _calibration_step(torch: Any, hidden: int, tokens: int) -> Callable[[], None]:
    """Forward and backward of one gated layer: a few matrix products between many small element-wise operations.

    The size is capped where one step takes some 50 ms on one core, for the whole measurement must stay near a second.
    """
    width = min(max(hidden, 64), 1024)
    length = min(max(tokens, 32), max(64, 50_000_000 // width**2))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(length, width, generator=generator)
    up = [(torch.randn(width, 5 * width // 2, generator=generator) / width**0.5).requires_grad_() for _ in range(2)]
    down = (torch.randn(5 * width // 2, width, generator=generator) / (2.5 * width) ** 0.5).requires_grad_()

    def step() -> None:
        normed = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-6)
        out = inputs + (torch.nn.functional.silu(normed @ up[0]) * (normed @ up[1])) @ down
        scores = torch.softmax(out @ out.T / width**0.5, dim=-1)
        loss = (scores @ out).pow(2).mean()
        torch.autograd.grad(loss, [*up, down])

    return step
