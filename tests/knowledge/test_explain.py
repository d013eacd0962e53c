"""Causes and remedies: real messages of every case, figures of every format, computed remedies, hostile output."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuneflow.config import RunConfig, build_config
from finetuneflow.errors import CODES, ConfigError, ModelError
from finetuneflow.knowledge import explain
from finetuneflow.knowledge.explain import Diagnosis, Remedy, cases, diagnose, explain_code, what_to_do
from finetuneflow.knowledge.memory import estimate
from finetuneflow.knowledge.remedies import memory_figures
from finetuneflow.knowledge.run_warnings import WARNINGS
from finetuneflow.knowledge.shapes import shape_from_size
from finetuneflow.knowledge.values import GB, Device, Machine
from finetuneflow.training.watch import CONCERNS

GIB, MIB = 2**30, 2**20

# As PyTorch printed them over the years; users' reports of these versions.
OOM_1_0 = (
    "RuntimeError: CUDA out of memory. Tried to allocate 16.00 GiB (GPU 0; 11.93 GiB total capacity; "
    "4.00 GiB already allocated; 7.33 GiB free; 179.00 KiB cached)"
)
OOM_1_13 = (
    "RuntimeError: CUDA out of memory. Tried to allocate 1.71 GiB (GPU 0; 6.00 GiB total capacity; 3.49 GiB already allocated; "
    "1.04 GiB free; 3.50 GiB reserved in total by PyTorch) If reserved memory is >> allocated memory try setting "
    "max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
)
OOM_2_1 = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacty of 23.65 GiB of which "
    "1.66 GiB is free. Including non-PyTorch memory, this process has 20.81 GiB memory in use. Of the allocated memory 12.09 GiB "
    "is allocated by PyTorch, and 4.84 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large "
    "try setting max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
)
OOM_2_5 = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 876.00 MiB. GPU 0 has a total capacity of 23.68 GiB of which "
    "251.06 MiB is free. Process 2612630 has 458.00 MiB memory in use. Including non-PyTorch memory, this process has 22.98 GiB "
    "memory in use. Of the allocated memory 22.65 GiB is allocated by PyTorch, and 77.68 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management"
)
OOM_CONTAINER = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.44 GiB. GPU 0 has a total capacity of 23.69 GiB of which "
    "3.87 GiB is free. Process 1175851 has 19.81 GiB memory in use. Of the allocated memory 13.90 GiB is allocated by PyTorch, "
    "and 5.61 GiB is reserved by PyTorch but unallocated."
)
OOM_MPS = (
    "RuntimeError: MPS backend out of memory (MPS allocated: 3.13 GB, other allocations: 220.17 MB, max allowed: 3.40 GB). "
    "Tried to allocate 85.83 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit."
)
OOM_HIP = (
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.98 GiB of which "
    "1.21 GiB is free. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)

MESSAGES = [
    *[("cuda-out-of-memory", text) for text in (OOM_1_0, OOM_1_13, OOM_2_1, OOM_2_5, OOM_CONTAINER, OOM_MPS, OOM_HIP)],
    ("cuda-out-of-memory", "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ("cuda-out-of-memory", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (
        "cuda-out-of-memory",
        'RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838',
    ),
    ("cuda-out-of-memory", "ValueError: Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM"),
    (
        "host-out-of-memory",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
    ),
    ("host-out-of-memory", "RuntimeError: DefaultCPUAllocator: not enough memory: you tried to allocate 301989888 bytes."),
    ("host-out-of-memory", "MemoryError"),
    ("host-out-of-memory", "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"),
    (
        "host-out-of-memory",
        "numpy.exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array with shape (1000000000,)",
    ),
    ("host-out-of-memory", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1234.batch"),
    ("host-out-of-memory", "OSError: [Errno 12] Cannot allocate memory"),
    (
        "shared-memory",
        "RuntimeError: DataLoader worker (pid 23904) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
    ),
    ("shared-memory", "RuntimeError: unable to write to file </torch_29919_1396182366>: No space left on device (28)"),
    ("disk-full", "OSError: [Errno 28] No space left on device: 'checkpoints/step-000200/model.safetensors'"),
    ("disk-full", "RuntimeError: [enforce fail at inline_container.cc:603] . unexpected pos 1664 vs 1558"),
    ("disk-full", "safetensors_rust.SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)"),
    ("disk-full", "OSError: [Errno 122] Disk quota exceeded"),
    ("no-kernel-image", "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"),
    (
        "no-kernel-image",
        "NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.\n"
        "The current PyTorch install supports CUDA capabilities sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90.",
    ),
    ("driver", "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"),
    ("driver", "Failed to initialize NVML: Driver/library version mismatch"),
    ("driver", "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment"),
    ("driver", "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    ("no-gpu", "AssertionError: Torch not compiled with CUDA enabled"),
    ("no-gpu", "RuntimeError: No CUDA GPUs are available"),
    (
        "device-assert",
        "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1369: indexSelectLargeIndex: block: [219,0,0], thread: [64,0,0] "
        "Assertion `srcIndex < srcSelectDimSize` failed.\nRuntimeError: CUDA error: device-side assert triggered",
    ),
    ("device-assert", "IndexError: index out of range in self"),
    ("gpu-lost", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    ("gpu-lost", "RuntimeError: CUDA error: unspecified launch failure"),
    ("gpu-lost", "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."),
    ("illegal-access", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    (
        "gated-model",
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/meta-llama/Llama-3.2-1B.\n"
        "401 Client Error. (Request ID: Root=1-66)\n\nCannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.2-1B/"
        "resolve/main/config.json.\nAccess to model meta-llama/Llama-3.2-1B is restricted. You must have access to it and be authenticated.",
    ),
    ("gated-model", "huggingface_hub.errors.GatedRepoError: 403 Client Error."),
    (
        "rate-limited",
        "huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://huggingface.co/api",
    ),
    (
        "hub-offline",
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
    ),
    (
        "hub-offline",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and outgoing "
        "traffic has been disabled.",
    ),
    ("hub-offline", "httpx.ConnectError: [Errno -3] Temporary failure in name resolution"),
    (
        "untrusted-certificate",
        "ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed",
    ),
    ("connection-reset", "ConnectionResetError: [Errno 104] Connection reset by peer"),
    ("connection-reset", "requests.exceptions.ChunkedEncodingError: ('Connection broken: IncompleteRead(1024 bytes read)')"),
    ("connection-reset", "urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='cdn', port=443): Read timed out."),
    ("no-bitsandbytes", "ModuleNotFoundError: No module named 'bitsandbytes'"),
    (
        "no-bitsandbytes",
        "ImportError: Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`",
    ),
    ("no-bitsandbytes", "importlib.metadata.PackageNotFoundError: No package metadata was found for bitsandbytes"),
    ("no-bitsandbytes", "AttributeError: 'NoneType' object has no attribute 'cget_managed_ptr'"),
    ("no-bitsandbytes", "OSError: libbitsandbytes_cuda121.so: cannot open shared object file: No such file or directory"),
    (
        "no-safetensors",
        "OSError: org/model does not appear to have a file named model.safetensors. Checkout 'https://huggingface.co/org/model'",
    ),
    ("no-safetensors", "OSError: Error no file named model.safetensors found in directory /models/x."),
    ("no-safetensors", "ValueError: Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True`"),
    ("damaged-weights", "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge"),
    ("damaged-weights", "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
    (
        "unknown-architecture",
        "ValueError: The checkpoint you are trying to load has model type `qwen9` but Transformers does not "
        "recognize this architecture.",
    ),
    ("remote-code", "ValueError: The repository x/y contains custom code which must be executed to correctly load the model."),
    ("non-finite", "{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 0.0002, 'epoch': 0.01}"),
    ("non-finite", "The loss became nan at step 12 (learning rate 0.0002); the weights were not changed by it."),
    ("non-finite", "eval_loss: inf"),
    ("non-finite", "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"),
    ("non-finite", "RuntimeError: Function 'MmBackward0' returned nan values in its 0th output."),
    ("fp16-gradients", "ValueError: Attempting to unscale FP16 gradients."),
    (
        "no-bf16",
        "ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the model on CPU.",
    ),
    ("no-bf16", "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
    ("dtype-mismatch", "RuntimeError: expected scalar type Half but found Float"),
    ("dtype-mismatch", "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16"),
    ("dtype-mismatch", "RuntimeError: Input type (float) and bias type (c10::Half) should be the same"),
    (
        "device-mismatch",
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    ),
    ("no-gradient", "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
    ("no-padding-token", "ValueError: Asking to pad but the tokenizer does not have a padding token."),
    (
        "no-padding-token",
        "ValueError: Unable to create tensor, you should probably activate truncation and/or padding with "
        "'padding=True' 'truncation=True' to have batched tensors with the same length.",
    ),
    ("no-padding-token", "ValueError: Cannot handle batch sizes > 1 if no padding token is defined."),
    ("no-chat-template", "ValueError: Cannot use chat template functions because tokenizer.chat_template is not set"),
    ("bad-tokenizer", "ValueError: Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library file"),
    ("adapter-mismatch", "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: copying a param"),
    (
        "target-missing",
        "ValueError: Target modules {'q_projj'} not found in the base model. Please check the target modules and try again.",
    ),
    ("not-writable", "PermissionError: [Errno 13] Permission denied: '/data/runs'"),
    ("too-many-files", "OSError: [Errno 24] Too many open files"),
    (
        "broken-package",
        "ImportError: /x/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEi",
    ),
    ("broken-package", "ImportError: /lib/x86_64-linux-gnu/libm.so.6: version `GLIBC_2.32' not found"),
    ("missing-package", "ModuleNotFoundError: No module named 'peft'"),
    (
        "port-in-use",
        "RuntimeError: The server socket has failed to listen on any local network address. EADDRINUSE: address already in use",
    ),
    (
        "nccl-timeout",
        "[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for 600060 milliseconds",
    ),
    ("nccl-error", "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1331, unhandled system error"),
    ("segmentation-fault", "Fatal Python error: Segmentation fault\n\nCurrent thread 0x00007f (most recent call first):"),
    ("killed", "Loading weights: 40%\nKilled"),
    ("terminated", "slurmstepd: error: *** JOB 4711 ON node7 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"),
]


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {"data": {"train": ["a.jsonl"]}}
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return build_config(values)[0]


def card(memory_gb: float = 24, *, bf16: bool = True, kind: Any = "cuda", bitsandbytes: bool = True) -> Machine:
    device = Device("A device", kind, round(memory_gb * GB), bf16=bf16)
    return Machine((device,), host_memory_bytes=round(memory_gb * GB) if kind == "cpu" else 64 * GB, bitsandbytes=bitsandbytes)


def predictor(run: RunConfig, machine: Machine, size: str = "7B") -> Any:
    """What planning passes as `what_if`: the memory estimate of the run with other settings."""
    shape = shape_from_size(size)

    def what_if(settings: dict[str, Any]) -> int:
        values = run.model_dump()
        for name, value in settings.items():
            section, key = name.split(".")
            values[section][key] = value
        return estimate(shape, build_config(values)[0], machine).total_bytes

    return what_if


# --- every case from its real message ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), MESSAGES, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MESSAGES)])
def test_the_message_leads_to_its_case(name: str, text: str) -> None:
    trace = f'Traceback (most recent call last):\n  File "train.py", line 12, in <module>\n    train()\n{text}\n'
    found = diagnose(None, trace, 1)
    assert found.case == name
    assert found.remedies and found.cause.endswith(".") and found.code in CODES
    assert any(found.evidence[:40] in " ".join(line.split()) for line in text.split("\n"))


def test_every_case_is_shown_by_a_message_or_a_status() -> None:
    by_status = {case.name for case in cases() if case.signals or case.statuses}
    assert {case.name for case in cases()} <= {name for name, _ in MESSAGES} | by_status


def test_every_case_is_whole() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) >= 40
    for case in cases():
        assert case.code in CODES and case.remedies and case.cause.endswith(".")
        assert case.words or case.patterns or case.signals or case.statuses
        assert all(word == word.lower() for word in case.words)
        assert case.computed is None or case.computed in explain.COMPUTED
        for remedy in case.remedies:
            assert set(remedy) <= {"text", "settings", "command"} and remedy["text"].endswith(".")


def test_settings_of_all_remedies_exist_and_are_valid() -> None:
    for case in cases():
        for remedy in case.remedies:
            for name, value in remedy.get("settings", {}).items():
                section, key = name.split(".")
                build_config({section: {key: value}})


@pytest.mark.parametrize(
    ("status", "name"),
    [
        *((-9, "killed"), (137, "killed"), (-11, "segmentation-fault"), (139, "segmentation-fault")),
        *((-15, "terminated"), (143, "terminated"), (-7, "shared-memory"), (135, "shared-memory")),
        *((-4, "illegal-instruction"), (-6, "aborted"), (134, "aborted"), (124, "time-limit"), (130, "interrupted")),
        *((-2, "interrupted"), (127, "command-not-found"), (1, "unknown")),
    ],
)
def test_an_exit_status_alone(status: int, name: str) -> None:
    found = diagnose(None, "", status)
    assert found.case == name and str(status) in found.evidence


def test_a_clean_end_is_no_failure() -> None:
    assert diagnose(None, "", 0).case == "no-failure"


# --- what wins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "status", "name"),
    [
        (None, f"UserWarning: Connection reset by peer, retrying\n{OOM_2_5}", 1, "cuda-out-of-memory"),
        (None, "ConnectionResetError: [Errno 104]\nretried, fine\nstep 100 loss 1.2\n", -9, "killed"),
        (None, "NCCL WARN\n", -15, "terminated"),
        (None, OOM_2_5, -6, "cuda-out-of-memory"),
        (None, "NCCL error in: x\n", -6, "nccl-error"),
        (None, f"{OOM_2_5}\n[rank1] Watchdog caught collective operation timeout: WorkNCCL", 1, "cuda-out-of-memory"),
        ("TRAINING_FAILED", "RuntimeError: expected scalar type Half but found Float", 6, "dtype-mismatch"),
        ("TRAINING_NON_FINITE", "", 6, "non-finite"),
        ("MODEL_ACCESS_DENIED", "The hub refuses access", 4, "gated-model"),
        ("OUT_OF_MEMORY", "Memory ran out: 3.10 GB were used", 6, "cuda-out-of-memory"),
        ("MODEL_OFFLINE", "httpx.ReadTimeout: read timed out", 4, "connection-reset"),
        ("EXTRA_MISSING", "This needs the package 'gguf', which is not installed.", 1, "error-code"),
        ("DATASET_EMPTY", "The file is empty. [DATASET_EMPTY]", 3, "error-code"),
    ],
)
def test_the_root_cause_wins(code: str | None, text: str, status: int, name: str) -> None:
    assert diagnose(code, text, status).case == name


def test_out_of_memory_of_a_run_on_the_processor_is_about_main_memory() -> None:
    assert diagnose("OUT_OF_MEMORY", "Memory ran out.", 6, machine=card(8, kind="cpu")).case == "host-out-of-memory"


@pytest.mark.parametrize(
    "text", ["Finance is a banana: nothing inf or nan here", "loss of information", "step 3, loss 2.31, eval_loss 2.2"]
)
def test_ordinary_words_are_no_cause(text: str) -> None:
    assert diagnose(None, text, 1).case == "unknown"


def test_an_error_code_without_a_case_says_what_to_do() -> None:
    found = diagnose("DATASET_EMPTY", "", 3)
    assert found.cause == CODES["DATASET_EMPTY"] and found.remedies[0].text == what_to_do("DATASET_EMPTY")


def test_os_errors_of_this_machine_are_recognised() -> None:
    for number, name in ((errno.ENOSPC, "disk-full"), (errno.ENOMEM, "host-out-of-memory"), (errno.EMFILE, "too-many-files")):
        assert diagnose(None, repr(str(OSError(number, os.strerror(number), "/x"))), 1).case == name


def test_real_exceptions_of_torch_are_recognised() -> None:
    torch = pytest.importorskip("torch")
    raised = []
    for failing in (
        lambda: torch.nn.Embedding(4, 2)(torch.tensor([7])),
        lambda: torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.float64),
        lambda: torch.ones(2).sum().backward(),
        lambda: torch.empty(2**56),
    ):
        with pytest.raises((RuntimeError, IndexError)) as error:
            failing()
        raised.append(diagnose(None, f"{error.type.__name__}: {error.value}", 1).case)
    assert raised == ["device-assert", "dtype-mismatch", "no-gradient", "host-out-of-memory"]


def test_a_real_damaged_file_is_recognised(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 5)
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.safe_open(path, framework="np")
    assert diagnose(None, f"SafetensorError: {error.value}", 1).case == "damaged-weights"


# --- figures of memory messages -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted", "capacity", "free", "allocated", "foreign"),
    [
        (OOM_1_0, 16 * GIB, 11.93 * GIB, 7.33 * GIB, 4 * GIB, 0),
        (OOM_1_13, 1.71 * GIB, 6 * GIB, 1.04 * GIB, 3.49 * GIB, (6 - 1.04 - 3.5) * GIB),
        (OOM_2_1, 3 * GIB, 23.65 * GIB, 1.66 * GIB, 12.09 * GIB, 0),
        (OOM_2_5, 876 * MIB, 23.68 * GIB, 251.06 * MIB, 22.65 * GIB, 458 * MIB),
        (OOM_CONTAINER, 6.44 * GIB, 23.69 * GIB, 3.87 * GIB, 13.9 * GIB, None),
        (OOM_HIP, 2 * GIB, 23.98 * GIB, 1.21 * GIB, 20 * GIB, 23.98 * GIB - 1.21 * GIB - 21 * GIB),
    ],
)
def test_figures_of_every_format(
    text: str, wanted: float, capacity: float, free: float, allocated: float, foreign: float | None
) -> None:
    figures = memory_figures(f"some output\n{text}\nmore")
    assert figures.wanted == pytest.approx(wanted) and figures.capacity == pytest.approx(capacity)
    assert figures.free == pytest.approx(free) and figures.allocated == pytest.approx(allocated)
    assert figures.foreign == (None if foreign is None else pytest.approx(foreign, abs=10))


def test_figures_of_apples_message() -> None:
    figures = memory_figures(OOM_MPS)
    assert figures.wanted == 85_830_000 and figures.capacity == 3_400_000_000 and figures.allocated == 3_130_000_000
    assert figures.free == pytest.approx(49_830_000)


def test_the_last_message_counts_and_none_is_none() -> None:
    assert memory_figures(f"{OOM_1_0}\nretrying\n{OOM_2_5}").wanted == 876 * MIB
    assert memory_figures("nothing of the kind") == memory_figures("")
    assert memory_figures("").wanted is None


def test_needed_is_what_was_held_and_what_was_wanted() -> None:
    figures = memory_figures(OOM_2_5)
    assert figures.needed == pytest.approx((23.68 - 251.06 / 1024 - 458 / 1024 + 876 / 1024) * GIB)


# --- remedies for memory ------------------------------------------------------------------------------------------


def memory_remedies(text: str, run: RunConfig, machine: Machine, size: str = "7B") -> tuple[Remedy, ...]:
    what_if = predictor(run, machine, size)
    found = diagnose(
        None, text, 1, config=run, estimate=estimate(shape_from_size(size), run, machine), machine=machine, what_if=what_if
    )
    assert found.memory is not None
    return found.remedies


def test_memory_remedies_state_predicted_savings_and_what_suffices() -> None:
    run, machine = config(training__batch_size=16, training__gradient_accumulation=1), card()
    what_if = predictor(run, machine)
    found = memory_remedies(OOM_2_5, run, machine)
    batch = next(r for r in found if "training.batch_size" in r.settings)
    assert batch.settings["training.batch_size"] * batch.settings["training.gradient_accumulation"] == 16
    assert batch.enough is True and batch.saves is not None and "GB" in batch.saves
    assert what_if(batch.settings) <= 23.68 * GIB
    # The mildest that suffices: the next larger micro-batch of the same effective batch would not.
    larger = {"training.batch_size": batch.settings["training.batch_size"] * 2, "training.gradient_accumulation": 1}
    assert what_if(larger) > 23.68 * GIB * 0.9
    assert batch.command == (
        f"ftf train run.yaml --set training.batch_size={batch.settings['training.batch_size']} "
        f"--set training.gradient_accumulation={batch.settings['training.gradient_accumulation']}"
    )
    assert any(r.enough is False for r in found), "a lower rank alone cannot be enough"


def test_a_token_budget_that_was_asked_for_is_lowered_instead_of_the_micro_batch() -> None:
    run = config(training__batch_size=16, training__gradient_accumulation=1, training__token_budget=16_384)
    found = memory_remedies(OOM_2_5, run, card())
    assert not any("training.batch_size" in r.settings for r in found)
    budget = next(r for r in found if "training.token_budget" in r.settings)
    assert budget.settings["training.token_budget"] in (8192, 4096, 2048, 1024, 512, 256) and budget.saves
    plain = memory_remedies(
        OOM_2_5, run.model_copy(update={"training": run.training.model_copy(update={"speed": "reference"})}), card()
    )
    assert any("training.batch_size" in r.settings for r in plain)
    assert not any("training.token_budget" in r.settings for r in plain)


def test_harmless_remedies_come_first() -> None:
    found = memory_remedies(OOM_2_5, config(training__batch_size=16, training__gradient_accumulation=1), card())
    order = [next(iter(r.settings), r.command) for r in found]
    assert order[0] == "nvidia-smi"  # 458 MiB belong to another process
    assert (
        order.index("training.batch_size") < order.index("data.max_length") < order.index("method.kind") < order.index("method.r")
    )


def test_a_message_above_the_prediction_raises_it() -> None:
    """The message proves a need of 23.8 GB; a prediction of 12 GB is then wrong by two, and so are its remedies."""
    run, machine = config(training__batch_size=2, training__gradient_accumulation=8), card()
    halves = {(): 12 * GB, ("training.batch_size", "training.gradient_accumulation"): 11 * GB}

    def what_if(settings: dict[str, Any]) -> int:
        return halves.get(tuple(settings), 12 * GB)

    text = OOM_2_5.replace("Process 2612630 has 458.00 MiB memory in use. ", "")
    found = diagnose(None, text, 1, config=run, machine=machine, what_if=what_if).remedies
    batch = next(r for r in found if r.settings.get("training.batch_size") == 1)
    assert batch.enough is (11 / 12 * memory_figures(text).needed <= 0.95 * 23.68 * GIB)  # type: ignore[operator]
    scarce = diagnose(None, text.replace("876.00 MiB", "9.00 GiB"), 1, config=run, machine=machine, what_if=what_if).remedies
    assert next(r for r in scarce if r.settings.get("training.batch_size") == 1).enough is False


def test_changes_that_suffice_only_together_are_joined() -> None:
    run = config(
        training__batch_size=4, training__gradient_accumulation=1, training__gradient_checkpointing="off", data__max_length=4096
    )
    machine = card(11)
    found = memory_remedies(OOM_1_0, run, machine)
    assert found[0].enough is True and len(found[0].settings) > 2
    assert not any(r.enough for r in found[1:])
    assert predictor(run, machine)(found[0].settings) <= 11.93 * GIB * 0.95


def test_when_nothing_suffices_it_says_what_would() -> None:
    found = memory_remedies(OOM_1_13, config(method__kind="full", training__batch_size=1), card(6), "70B")
    told = next(r for r in found if "smaller base model" in r.text)
    needed = re.search(r"a device with at least (\d+) GB", told.text)
    assert needed and 35 <= int(needed[1]) < 100  # 4 bits for each of 70e9 parameters and what comes on top
    assert not any(r.enough for r in found if r.settings)


def test_full_fine_tuning_is_offered_an_adapter_at_its_rate() -> None:
    run = config(method__kind="full", training__learning_rate=1e-5)
    settings = [r.settings for r in memory_remedies(OOM_2_5, run, card())]
    assert any(s.get("method.kind") in ("lora", "qlora") and s["training.learning_rate"] >= 1e-4 for s in settings)


def test_without_bitsandbytes_nothing_that_needs_it_is_offered() -> None:
    found = memory_remedies(OOM_2_5, config(training__optimizer="adamw_torch"), card(bitsandbytes=False))
    assert not any("8bit" in str(r.settings) or "qlora" in str(r.settings) for r in found)


def test_pieces_that_do_not_fit_are_joined_first() -> None:
    found = diagnose(None, OOM_2_1, 1).remedies
    assert "expandable_segments:True" in (found[0].command or "") and found[0].saves == "up to 5.2 GB"


def test_remedies_without_a_prediction_take_one_mild_step() -> None:
    found = diagnose(None, OOM_2_5, 1, config=config(training__batch_size=8, training__gradient_accumulation=2)).remedies
    batch = next(r for r in found if "training.batch_size" in r.settings)
    assert batch.settings == {"training.batch_size": 4, "training.gradient_accumulation": 4}
    assert batch.saves is None and batch.enough is None


def test_a_prediction_that_is_refused_is_no_failure() -> None:
    def what_if(settings: dict[str, Any]) -> int:
        if settings:
            raise ModelError("MODEL_UNSUPPORTED_ARCH", "no")
        return 30 * GB

    found = diagnose(None, OOM_2_5, 1, config=config(), machine=card(), what_if=what_if)
    assert found.remedies and not any(r.enough for r in found.remedies if r.settings)


def test_killed_on_the_processor_gets_computed_remedies() -> None:
    run, machine = config(training__batch_size=8, training__gradient_accumulation=1, data__max_length=2048), card(8, kind="cpu")
    what_if = predictor(run, machine, "1.5B")
    found = diagnose(
        None, "", -9, config=run, estimate=estimate(shape_from_size("1.5B"), run, machine), machine=machine, what_if=what_if
    )
    assert found.case == "killed"
    assert any("training.gradient_checkpointing" in r.settings and r.saves for r in found.remedies)
    assert any("dmesg" in (r.command or "") for r in found.remedies)


# --- other computed remedies ------------------------------------------------------------------------------------------


def test_nan_remedies_follow_the_run() -> None:
    bad = config(training__learning_rate=2e-3, training__precision="fp16", training__max_grad_norm=0, training__warmup_ratio=0)
    found = diagnose("TRAINING_NON_FINITE", "", 6, config=bad, machine=card())
    merged = {key: value for r in found.remedies for key, value in r.settings.items()}
    assert merged == {
        "training.max_grad_norm": 1.0,
        "training.precision": "bf16",
        "training.warmup_ratio": 0.03,
        "training.learning_rate": 3e-4,
    }
    good = diagnose("TRAINING_NON_FINITE", "", 6, config=config(), machine=card())
    assert {key: value for r in good.remedies for key, value in r.settings.items()} == {"training.learning_rate": 2e-5}


def test_a_card_without_bf16_is_offered_32_bits() -> None:
    found = diagnose("TRAINING_NON_FINITE", "", 6, config=config(training__precision="fp16"), machine=card(bf16=False))
    assert {"training.precision": "fp32"} in [r.settings for r in found.remedies]


def test_the_gated_model_and_its_page_are_named() -> None:
    text = dict((name, text) for name, text in reversed(MESSAGES))["gated-model"]
    found = diagnose(None, text, 1, config=config(model__base="other/model"))
    assert "meta-llama/Llama-3.2-1B" in found.cause
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B," in found.remedies[0].text
    named = diagnose("MODEL_ACCESS_DENIED", "", 4, config=config(model__base="org/name"))
    assert "org/name" in named.cause and "https://huggingface.co/org/name" in named.remedies[0].text


def test_the_compute_capability_is_told() -> None:
    text = next(text for name, text in MESSAGES if "sm_120" in text)
    assert "it is sm_120; built for sm_50 sm_60" in diagnose(None, text, 1).cause


def test_qlora_without_bitsandbytes_may_become_lora_with_its_memory() -> None:
    run, machine = config(method__kind="qlora"), card()
    found = diagnose(
        None, "No module named 'bitsandbytes'", 1, config=run, machine=machine, what_if=predictor(run, machine, "1.5B")
    )
    assert found.remedies[0].settings == {"method.kind": "lora"} and re.search(r"\d GB of memory", found.remedies[0].text)


def test_a_full_disk_keeps_fewer_checkpoints() -> None:
    assert diagnose(None, "[Errno 28]", 1, config=config()).remedies[0].settings == {"training.keep_checkpoints": 1}
    few = diagnose(None, "[Errno 28]", 1, config=config(training__keep_checkpoints=1))
    assert not any(r.settings for r in few.remedies)


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_code_says_what_it_means_and_what_to_do(code: str) -> None:
    page = explain_code(code.lower())
    assert CODES[code] in page
    advice = page.split("What to do: ")[1].split("\n")[0]
    assert len(advice) > 20 and advice.endswith(".")


def emitted_warnings() -> set[str]:
    """Every code that the sources warn with, wherever it is a literal: in the event, or on the way to it."""
    found: set[object] = set()
    for path in (Path(__file__).parents[2] / "src" / "finetuneflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                first = getattr(node.args[0], "value", None) if node.args else None
                keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                found |= {keywords.get("warning"), keywords.get("code") if first == "warning" else None}
                found |= {first} if name in ("warn", "_warn", "_warning", "_concern", "AuditFinding") else set()
            elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and path.name == "preferences.py":
                found.add(getattr(node.value.elts[0], "value", None))
    return {code for code in found if isinstance(code, str) and code.isupper()} - {"TEMPLATE_NOTE"}


def test_every_warning_that_is_emitted_is_explained_and_every_explained_one_is_emitted() -> None:
    assert emitted_warnings() == set(WARNINGS) and set(WARNINGS) >= CONCERNS
    assert not set(WARNINGS) & set(CODES)


@pytest.mark.parametrize("code", sorted(WARNINGS))
def test_every_warning_says_what_it_means_and_what_to_do(code: str) -> None:
    page = explain_code(code.lower())
    meaning, advice = WARNINGS[code]
    assert page == f"{code}: {meaning}\n\nWhat to do: {advice}"
    assert len(meaning) > 20 and meaning.endswith(".") and advice.endswith(".")


def test_help_names_no_code_or_group_that_is_gone() -> None:
    data = explain._help()
    assert set(data["codes"]) <= set(CODES)
    assert set(data["groups"]) == {code.split("_")[0] for code in CODES}


def test_pages_list_typical_causes() -> None:
    page = explain_code("OUT_OF_MEMORY")
    assert "Typical causes:" in page and "accelerator ran out of memory" in page and "{" not in page


def test_rule_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "RATE_TOO_HIGH.md").write_text("# The learning rate is too high\n")
    monkeypatch.setattr(explain.resources, "files", lambda package: tmp_path)
    assert explain_code("rate_too_high").startswith("# The learning rate")
    with pytest.raises(ConfigError) as unknown:
        explain_code("RATE_TO_HIGH")
    assert "RATE_TOO_HIGH" in str(unknown.value)


@pytest.mark.parametrize(
    "code", ["OUT_OF_MEMROY", "", "../../etc/passwd", "x" * 10_000, "\x1b[31mRED\x00", "rules/../x", "\ud800"]
)
def test_unknown_codes_are_refused_with_near_names(code: str) -> None:
    with pytest.raises(ConfigError) as unknown:
        explain_code(code)
    assert unknown.value.code == "CONFIG_INVALID_VALUE" and "\x1b" not in str(unknown.value)
    assert len(str(unknown.value)) < 400
    if code == "OUT_OF_MEMROY":
        assert "OUT_OF_MEMORY" in str(unknown.value)


# --- hostile output -----------------------------------------------------------------------------------------------------


HOSTILE = {
    "10 MB of one letter": "a" * 10_000_000,
    "10 MB of newlines": "\n" * 10_000_000,
    "10 MB of escapes": "\x1b[" * 5_000_000,
    "10 MB of open OSC": "\x1b]0;" * 2_500_000,
    "10 MB of numbers": "1" * 10_000_000,
    "repeated starts": "tried to allocate " * 500_000,
    "repeated losses": "loss " * 2_000_000,
    "repeated size mismatch": "size mismatch for " * 500_000,
    "repeated importerror": "importerror " * 800_000,
    "repeated xid": "xid (" * 2_000_000,
    "repeated processes": "process 1 has " * 700_000,
    "binary": bytes(range(256)).decode("latin-1") * 40_000,
    "every plane": "".join(map(chr, range(0x20, 0x11000, 7))) * 5,
    "lone surrogates": "\ud800\udfff" * 100_000,
    "letters that grow in lower case": "İ" * 100_000 + "CUDA out of memory",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_output_is_handled_fast(name: str) -> None:
    started = time.perf_counter()
    found = diagnose(None, HOSTILE[name], 1, config=config())
    assert time.perf_counter() - started < 5  # tenths of a second on a quiet machine; a catastrophic pattern takes hours
    assert len(found.evidence) <= 300


def test_the_error_at_the_end_of_a_huge_output_is_found() -> None:
    assert diagnose(None, "step ok\n" * 2_000_000 + OOM_2_5, 1).case == "cuda-out-of-memory"


def test_colours_progress_bars_and_direction_marks_are_taken_off() -> None:
    text = "\r 10%|#\r 20%|##\n\x1b[1;31mRuntimeError:\x1b[0m \u202eCUDA out \x1b[Kof memory.\x07\x00 Tried to allocate 2.00 GiB"
    found = diagnose(None, text, 1)
    assert found.case == "cuda-out-of-memory"
    assert found.evidence == "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_secrets_do_not_get_into_evidence() -> None:
    token = "hf_" + "A1b2C3d4" * 4
    found = diagnose(None, f"401 Client Error: Bearer {token} was refused {token}", 1)
    assert found.case == "gated-model" and token not in json.dumps(found.to_dict())


def test_braces_in_a_name_are_not_expanded() -> None:
    found = diagnose("MODEL_ACCESS_DENIED", "", 4, config=config(model__base="{page.__class__}"))
    assert "{page.__class__}" in found.cause


@given(st.text(max_size=2_000), st.none() | st.sampled_from([*CODES, "NO_SUCH_CODE"]), st.none() | st.integers(-(2**40), 2**40))
@settings(max_examples=200, deadline=None)
def test_nothing_makes_it_fail(text: str, code: str | None, status: int | None) -> None:
    found = diagnose(code, text, status)
    assert isinstance(found, Diagnosis) and found.cause
    json.dumps(found.to_dict(), allow_nan=False).encode()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", found.evidence)
