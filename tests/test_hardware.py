"""The probe: other machines are played by fake commands and fake /proc and /sys trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from finetuneflow import hardware
from finetuneflow.hardware import (
    Finished,
    choose_threads,
    granted_cores,
    measure_threads,
    probe,
    probe_cpu,
    probe_memory,
    probe_nvidia,
    probe_torch,
    thread_candidates,
)

GIB = 2**30


def answering(output: str, code: int = 0, errors: str = "") -> Callable[[Sequence[str], float], Finished]:
    return lambda arguments, timeout: Finished(code, output, errors)


def raising(error: Exception) -> Callable[[Sequence[str], float], Finished]:
    def run(arguments: Sequence[str], timeout: float) -> Finished:
        raise error

    return run


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# --- nvidia-smi ----------------------------------------------------------------------------------------


def test_one_gpu_is_read_in_bytes() -> None:
    (gpu,), problem = probe_nvidia(answering("NVIDIA GeForce RTX 4090, 24564, 23987, 550.54.14\n"))
    assert problem is None
    assert (gpu.name, gpu.memory_total_bytes, gpu.memory_free_bytes) == ("NVIDIA GeForce RTX 4090", 24564 * 2**20, 23987 * 2**20)
    assert gpu.driver == "550.54.14"


def test_several_gpus_keep_their_order() -> None:
    gpus, _ = probe_nvidia(answering("NVIDIA A100-SXM4-80GB, 81920, 81000, 535.1\nTesla T4, 15360, 15000, 535.1\n"))
    assert [gpu.name for gpu in gpus] == ["NVIDIA A100-SXM4-80GB", "Tesla T4"]


@pytest.mark.parametrize("word", ["[N/A]", "[Not Supported]", "[Insufficient Permissions]", "", "nan"])
def test_a_size_that_is_not_told_is_none(word: str) -> None:
    (gpu,), _ = probe_nvidia(answering(f"NVIDIA GB10, {word}, {word}, 580.95\n"))
    assert gpu.memory_total_bytes is None and gpu.memory_free_bytes is None
    assert gpu.driver == "580.95"


def test_a_comma_in_the_name_does_not_shift_the_columns() -> None:
    (gpu,), _ = probe_nvidia(answering("Vendor, Model X, 8192, 8000, 550.1\n"))
    assert (gpu.name, gpu.memory_total_bytes, gpu.driver) == ("Vendor, Model X", 8192 * 2**20, "550.1")


@pytest.mark.parametrize("garbage", ["", "\n\n", "No devices were found\n", ",,,\n", "\x00\xff"])
def test_text_without_gpus_gives_none(garbage: str) -> None:
    assert probe_nvidia(answering(garbage)) == ((), None)


def test_a_broken_driver_is_reported_in_its_own_words() -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54"
    gpus, problem = probe_nvidia(answering(words, code=18))
    assert gpus == () and problem is not None and "version mismatch" in problem


def test_without_nvidia_smi_there_is_no_complaint() -> None:
    assert probe_nvidia(raising(FileNotFoundError())) == ((), None)


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError(13, "Permission denied")])
def test_a_hanging_or_closed_nvidia_smi_is_a_finding_not_a_crash(error: Exception) -> None:
    gpus, problem = probe_nvidia(raising(error))
    assert gpus == () and problem


# --- torch ------------------------------------------------------------------------------------------------


def torch_answer(**changes: object) -> str:
    gpu = {
        "name": "Tesla T4",
        "kind": "cuda",
        "memory_total_bytes": 16 * GIB,
        "capability": "7.5",
        "bf16": False,
        "seen_by": "torch",
    }
    values = {
        "version": "2.13.0", "cuda_build": "12.8", "hip_build": None, "cuda_available": True, "mps_available": False, "gpus": [gpu],
    }  # fmt: skip
    return "a warning that torch printed\n" + json.dumps(values | changes) + "\n"


def test_torch_and_nvidia_smi_are_joined_to_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "package_versions", lambda: {"torch": "2.13.0"})

    def run(arguments: Sequence[str], timeout: float) -> Finished:
        return Finished(0, "Tesla T4, 16384, 16000, 550.1\n" if arguments[0] == "nvidia-smi" else torch_answer())

    (gpu,) = probe(run=run).gpus
    assert (gpu.driver, gpu.capability, gpu.bf16, gpu.seen_by) == ("550.1", "7.5", False, "nvidia-smi, torch")


def test_what_torch_can_use_counts_where_cards_are_hidden() -> None:
    two, _ = probe_nvidia(answering("Tesla T4, 1, 1, 5\nA100, 1, 1, 5\n"))
    seen = probe_torch("2.13.0", answering(torch_answer())).gpus
    assert [gpu.name for gpu in hardware._merge_gpus(two, seen)] == ["Tesla T4"]


@pytest.mark.parametrize(
    "run",
    [
        answering("", code=1, errors="Traceback\nImportError: libcudart.so.12: cannot open shared object file"),
        answering("no json here"),
        answering('{"version": "2.13.0"}'),
        answering("", code=-11),
        raising(subprocess.TimeoutExpired("python", 60)),
        raising(OSError("no memory")),
    ],
)
def test_a_torch_that_does_not_start_is_reported_with_its_version(run: Callable[[Sequence[str], float], Finished]) -> None:
    torch = probe_torch("2.13.0", run)
    assert torch.version == "2.13.0" and torch.problem and not torch.cuda_available


def test_an_absent_torch_is_never_started() -> None:
    assert probe_torch(None, raising(AssertionError("was run"))).version is None


def test_total_memory_is_read_by_its_name_of_today() -> None:
    """The attribute `total_mem` does not exist and once hid every CUDA card."""
    from types import SimpleNamespace as Space

    properties = Space(name="Tesla T4", total_memory=16 * GIB, major=7, minor=5)
    cuda = Space(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda i: properties,
        mem_get_info=lambda i: (GIB, 16 * GIB),
    )
    torch = Space(
        __version__="2.13.0",
        version=Space(cuda="12.8", hip=None),
        cuda=cuda,
        backends=Space(mps=Space(is_available=lambda: False)),
    )
    (gpu,) = hardware.describe_torch(torch)["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_free_bytes"], gpu["bf16"]) == (16 * GIB, GIB, False)


def test_rocm_and_apple_gpus_are_named_as_such() -> None:
    amd = {"name": "AMD Instinct MI300X", "kind": "rocm", "memory_total_bytes": 192 * GIB, "bf16": True, "seen_by": "torch"}
    apple = {"name": "Apple GPU", "kind": "mps", "memory_total_bytes": 32 * GIB, "bf16": True, "seen_by": "torch"}
    for gpu in (amd, apple):
        assert probe_torch("2.13.0", answering(torch_answer(gpus=[gpu]))).gpus[0].kind == gpu["kind"]


# --- processor ------------------------------------------------------------------------------------------------


def test_cpu_features_are_named_from_cpuinfo(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {"proc/cpuinfo": "processor : 0\nmodel name\t: Xeon 9\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"},
    )
    cpu = probe_cpu(answering(""), root)
    assert cpu.model == "Xeon 9"
    assert set(cpu.features) == {"AVX2", "AVX-512", "AVX-512 BF16", "AMX", "AMX BF16"}
    assert cpu.bf16


def test_an_old_cpu_has_no_bf16(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/cpuinfo": "model name : i5\nflags : sse avx2\n"})
    assert not probe_cpu(answering(""), root).bf16


def test_arm_features_stand_under_another_key(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd sve bf16 i8mm\n"})
    assert probe_cpu(answering(""), root).features == ("NEON", "SVE", "Arm BF16", "Arm I8MM")


# --- cgroups --------------------------------------------------------------------------------------------------


def test_a_version_2_quota_grants_a_fraction_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
    }
    assert granted_cores(write_tree(tmp_path, files), 8) == (1.5, "cgroup quota")


def test_a_version_1_quota_counts_where_the_group_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert granted_cores(write_tree(tmp_path, files), 64) == (0.5, "cgroup quota")


def test_no_quota_means_the_cores_this_process_may_run_on(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    assert granted_cores(write_tree(tmp_path, files), 10_000) == (float(len(os.sched_getaffinity(0))), "affinity")


def test_a_cpuset_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    root = write_tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpuset.cpus.effective": "0-3,8\n"})
    assert granted_cores(root, 64) == (5.0, "cpuset")


@pytest.mark.parametrize("text", ["", "max", "garbage here and there", "\x00", "1-\n"])
def test_unreadable_limits_limit_nothing(tmp_path: Path, text: str) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": text,
        "sys/fs/cgroup/cpuset.cpus.effective": text,
        "sys/fs/cgroup/memory.max": text,
    }
    root = write_tree(tmp_path, files)
    assert granted_cores(root, 10_000)[1] == "affinity"
    assert probe_memory(root).limited_by == "machine"


def test_a_memory_limit_above_this_group_counts_and_cache_is_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/job\n",
        "sys/fs/cgroup/box/memory.max": str(64 * 2**20),
        "sys/fs/cgroup/box/memory.current": str(60 * 2**20),
        "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {16 * 2**20}\n",
        "sys/fs/cgroup/box/job/memory.max": "max",
    }
    memory = probe_memory(write_tree(tmp_path, files))
    assert (memory.total_bytes, memory.available_bytes, memory.limited_by) == (64 * 2**20, 20 * 2**20, "cgroup limit")


def test_version_1_without_limit_is_the_machine(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:memory:/x\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    memory = probe_memory(write_tree(tmp_path, files))
    assert (memory.total_bytes, memory.limited_by) == (psutil.virtual_memory().total, "machine")


# --- the whole probe ---------------------------------------------------------------------------------------------


def test_the_probe_of_this_machine_is_plain_json(tmp_path: Path) -> None:
    found = probe(tmp_path / "not there yet", ask_torch=False)
    assert json.loads(json.dumps(found.to_dict()))["python"] == found.python
    assert found.cpu.cores_granted > 0 and found.memory.available_bytes > 0 and found.disk_free_bytes > 0


def test_a_machine_where_nothing_can_be_read_is_still_probed(tmp_path: Path) -> None:
    found = probe(tmp_path, run=raising(OSError("nothing works")), root=tmp_path)
    assert found.gpus == () and found.gpu_problem is not None


def test_the_probe_works_where_torch_cannot_be_imported() -> None:
    code = (
        "import sys, json\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from finetuneflow import hardware\n"
        "found = hardware.probe(ask_torch=False)\n"
        "assert 'torch' not in sys.modules\n"
        "print(found.cpu.cores_seen)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == os.cpu_count()


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "wanted"), [(0.5, [1]), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5.5, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_candidates_are_powers_of_two_and_all_cores(cores: float, wanted: list[int]) -> None:
    assert thread_candidates(cores) == wanted


def test_fewer_threads_win_a_near_tie() -> None:
    assert choose_threads({1: 10.0, 2: 5.2, 4: 5.0, 8: 9.0}).threads == 2


def test_a_spinning_second_thread_is_not_chosen() -> None:
    choice = choose_threads({1: 4.0, 2: 41.0})
    assert choice.threads == 1 and "41.00 ms" in choice.reason


def test_measuring_chooses_a_candidate_quickly_and_leaves_the_process_as_it_was() -> None:
    import torch

    before = torch.get_num_threads()
    measure_threads([1, 2], seconds=0.05)  # loads what is loaded at first use
    started = time.perf_counter()
    choice = measure_threads([1, 2], seconds=0.3)
    assert time.perf_counter() - started < 3.0
    assert choice.threads in (1, 2) and set(choice.timings) == {1, 2} and min(choice.timings.values()) > 0
    assert torch.get_num_threads() == before


def test_a_slow_thread_count_is_measured_as_slow() -> None:
    """The clock sees what the step costs at each count, whatever the order."""
    current = [1]

    def step() -> None:
        time.sleep(0.004 if current[0] == 2 else 0.001)

    timings = hardware._time_in_turns([1, 2], step, lambda count: current.__setitem__(0, count), 0.12)
    assert timings[2] > 2 * timings[1]


def test_one_candidate_needs_no_measurement() -> None:
    assert measure_threads([3]).threads == 3 and measure_threads([3]).timings == {}


def test_passive_waiting_is_set_once_and_respects_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert hardware.prefer_passive_waiting() is False
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert hardware.prefer_passive_waiting() is True


@pytest.mark.parametrize(("load", "turns"), [(0.1, "1000"), (1.9, None)])
def test_threads_spin_for_a_moment_only_where_the_cores_are_idle(
    monkeypatch: pytest.MonkeyPatch, load: float, turns: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "put back afterwards, whatever is set below")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(hardware, "granted_cores", lambda: (2.0, "all"))
    hardware.prefer_passive_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == turns


def test_how_long_threads_spin_is_what_the_user_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "put back afterwards")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    hardware.prefer_passive_waiting()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
