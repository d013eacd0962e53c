"""The doctor: every line has a remedy where one is needed, and none ever shows a secret."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finetuneflow import doctor
from finetuneflow.doctor import Check, checks, worst
from finetuneflow.hardware import Cpu, Gpu, Hardware, Memory, Torch

GIB = 2**30
T4 = Gpu("Tesla T4", "cuda", 16 * GIB, 15 * GIB, "550.54", "7.5", False)
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.8.0", "huggingface_hub": "2.4.0", "peft": "0.21.2", "trl": "1.16.0",
            "accelerate": "1.15.0", "datasets": "5.2.0", "bitsandbytes": "0.50.2", "matplotlib": "3.11.2", "tokenizers": "0.23", "pydantic": "2.14",
            "pyarrow": "26.0"}  # fmt: skip


def machine(**changes: object) -> Hardware:
    """A machine on which everything is in order, changed as a test wants it."""
    fine = Hardware(
        gpus=(T4,),
        gpu_problem=None,
        torch=Torch("2.13.0", cuda_build="12.8", cuda_available=True, gpus=(T4,)),
        cpu=Cpu("Xeon", ("AVX-512", "AVX-512 BF16"), 16, 16.0, "machine"),
        memory=Memory(64 * GIB, 60 * GIB, "machine"),
        disk_free_bytes=500 * GIB,
        python="3.11.7",
        system="Linux",
        packages=dict(VERSIONS),
    )
    return dataclasses.replace(fine, **changes)  # type: ignore[arg-type]


def line(found: list[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


def examine(tmp_path: Path, environment: dict[str, str] | None = None, **changes: object) -> list[Check]:
    return checks(tmp_path, hardware=machine(**changes), environment=environment or {})


def test_a_machine_in_order_gets_only_ok(tmp_path: Path) -> None:
    found = examine(tmp_path)
    assert worst(found) == "ok", [check for check in found if check.status != "ok"]


def test_every_warning_and_failure_has_a_remedy(tmp_path: Path) -> None:
    bad = examine(
        tmp_path / "closed" / "deeper",
        {"OMP_NUM_THREADS": "64", "HF_HUB_OFFLINE": "1"},
        gpus=(),
        gpu_problem="Driver/library version mismatch",
        torch=Torch("2.13.0", problem="ImportError"),
        cpu=Cpu(None, (), 16, 0.5, "cgroup quota"),
        memory=Memory(GIB, GIB // 4, "cgroup limit"),
        disk_free_bytes=0,
        packages={"torch": "2.1"},
    )
    assert worst(bad) == "fail"
    assert [check.name for check in bad if check.status != "ok" and not check.remedy] == []
    assert len({check.name for check in bad}) == len(bad)


def test_a_gpu_with_a_cpu_build_of_torch_is_told_with_the_install_command(tmp_path: Path) -> None:
    check = line(examine(tmp_path, torch=Torch("2.13.0+cpu")), "PyTorch")
    assert check.status == "warn" and "Tesla T4" in check.found and "pip install" in check.remedy


def test_a_gpu_that_the_cuda_build_cannot_use_is_told(tmp_path: Path) -> None:
    check = line(examine(tmp_path, torch=Torch("2.13.0", cuda_build="12.8")), "PyTorch")
    assert check.status == "warn" and "driver" in check.remedy and "CUDA_VISIBLE_DEVICES" in check.remedy


def test_a_machine_without_torch_or_gpu_is_usable_with_warnings(tmp_path: Path) -> None:
    core = {name: VERSIONS[name] for name in doctor.CORE_PACKAGES}
    found = examine(tmp_path, gpus=(), torch=Torch(), packages=core)
    assert worst(found) == "warn"
    assert line(found, "PyTorch").status == "warn" and "finetuneflow[train]" in line(found, "PyTorch").remedy


def test_a_broken_driver_fails_and_says_restart(tmp_path: Path) -> None:
    check = line(examine(tmp_path, gpus=(), gpu_problem="Failed to initialize NVML: Driver/library version mismatch"), "GPU")
    assert check.status == "fail" and "Restart" in check.remedy


def test_a_small_and_a_busy_gpu_are_warned_about(tmp_path: Path) -> None:
    small = dataclasses.replace(T4, memory_total_bytes=4 * GIB, memory_free_bytes=4 * GIB)
    busy = dataclasses.replace(T4, memory_free_bytes=GIB)
    found = examine(tmp_path, gpus=(small, busy))
    assert (line(found, "GPU 0").status, line(found, "GPU 1").status) == ("warn", "warn")
    assert "nvidia-smi" in line(found, "GPU 1").remedy


def test_a_gpu_that_does_not_tell_its_memory_is_no_problem(tmp_path: Path) -> None:
    unknown = dataclasses.replace(T4, memory_total_bytes=None, memory_free_bytes=None)
    assert line(examine(tmp_path, gpus=(unknown,)), "GPU").status == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [("5.19.9", "fail"), ("5.20.0", "ok"), ("5.20.0.dev1", "ok"), ("6.0", "ok"), ("5.3", "fail")]
)
def test_versions_are_compared_as_numbers(tmp_path: Path, version: str, status: str) -> None:
    found = examine(tmp_path, packages=VERSIONS | {"transformers": version})
    assert worst(found) == status


def test_the_minimum_versions_are_those_of_the_package(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = dict(re.match(r"([\w-]+)>=([\d.]+)", item).groups() for item in project["optional-dependencies"]["train"])  # type: ignore[union-attr]
    assert {name: wanted[name] for name in doctor.MINIMUM_VERSIONS} == doctor.MINIMUM_VERSIONS


@pytest.mark.parametrize(("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")])
def test_python_versions(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version, "x").status == status


def test_fewer_granted_cores_than_seen_are_told(tmp_path: Path) -> None:
    check = line(examine(tmp_path, cpu=Cpu("Xeon", (), 64, 1.5, "cgroup quota")), "Cores")
    assert check.status == "warn" and "1.5 of 64" in check.found and "cgroup quota" in check.found


@pytest.mark.parametrize(
    ("environment", "status"),
    [({}, "ok"), ({"OMP_NUM_THREADS": "16"}, "ok"), ({"OMP_NUM_THREADS": "17"}, "warn"), ({"OMP_NUM_THREADS": "many"}, "warn"),
     ({"OMP_WAIT_POLICY": "active"}, "warn"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "ok")],
)  # fmt: skip
def test_openmp_settings_that_waste_cores_are_warned_about(tmp_path: Path, environment: dict[str, str], status: str) -> None:
    assert line(examine(tmp_path, environment), "OpenMP").status == status


def test_bf16_is_told_as_useful_or_not(tmp_path: Path) -> None:
    assert "computes in bf16" in line(examine(tmp_path), "CPU").found
    old = line(examine(tmp_path, gpus=(), torch=Torch("2.13.0"), cpu=Cpu("i5", ("AVX2",), 4, 4.0, "machine")), "CPU")
    assert old.status == "warn" and "fp32" in old.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workspace_without_write_access_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.check_workspace(tmp_path).status == "fail"


def test_a_workspace_that_is_a_file_or_on_a_system_folder_fails_with_its_place(tmp_path: Path) -> None:
    check = doctor.check_workspace(Path("/proc/nothing"))
    assert check.status == "fail" and "/proc" in check.found and "--workspace" in check.remedy
    (tmp_path / "file").write_text("")
    assert doctor.check_workspace(tmp_path / "file" / "below").status == "fail"


def test_looking_at_a_workspace_creates_nothing(tmp_path: Path) -> None:
    assert doctor.check_workspace(tmp_path / "new").status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_present_or_absent_and_never_shown(tmp_path: Path) -> None:
    secret = "hf_PlantedSecretPlantedSecret"
    (tmp_path / "token").write_text(secret)
    for environment in ({"HF_TOKEN": secret}, {"HF_HOME": str(tmp_path)}):
        found = checks(tmp_path, hardware=machine(), environment=environment)
        assert "present" in line(found, "Hub token").found
        assert secret not in json.dumps(doctor.to_json(found, machine()))
    assert "none" in doctor.check_token({"HF_HOME": str(tmp_path / "elsewhere")}).found


def test_the_hub_is_asked_only_when_wanted_and_its_silence_is_a_warning(tmp_path: Path) -> None:
    assert "Hub" not in {check.name for check in examine(tmp_path)}
    asked = []

    def refuse(host: str, port: int) -> None:
        asked.append((host, port))
        raise OSError(101, "Network is unreachable")

    check = doctor.check_hub({"HF_ENDPOINT": "https://hub.example:8443"}, refuse)
    assert asked == [("hub.example", 8443)] and check.status == "warn" and check.remedy
    assert doctor.check_hub({}, lambda host, port: None).status == "ok"


def test_the_json_form_is_complete(tmp_path: Path) -> None:
    found = examine(tmp_path)
    form = json.loads(json.dumps(doctor.to_json(found, machine())))
    assert form["status"] == "ok" and form["hardware"]["gpus"][0]["name"] == "Tesla T4"
    assert all(set(check) == {"name", "status", "found", "remedy"} for check in form["checks"])


def test_the_doctor_works_where_torch_is_not_installed(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.metadata as metadata, json\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'peft'): raise ImportError('blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from finetuneflow import doctor\n"
        f"found = doctor.checks({str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([check.to_dict() for check in found]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["PyTorch"]["found"] == "not installed" and found["Workspace"]["status"] == "ok"
