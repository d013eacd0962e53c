"""A disk without room: what was complete stays, the error says so, and the run goes on once there is room."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.errors import StorageError
from finetuneflow.training.checkpoints import find_damage, list_complete
from finetuneflow.training.status import run_status
from training.workbench import Bench, assert_same_result, at


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel then answers EFBIG where a full disk answers ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one_and_a_clear_error(bench: Bench, kind: str) -> None:
    """LoRA fails in torch's writer (the optimizer), full fine-tuning in that of safetensors (the weights)."""
    settings = {"method__kind": kind, "method__r": 64, "training__learning_rate": 1e-4}
    straight = bench.train(**settings).run_dir
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: dict[str, Any]) -> None:
        if at("checkpoint", step=4)(event):
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))

    try:
        with pytest.raises(StorageError) as caught:
            bench.train(**settings, sinks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run_dir = bench.newest()
    assert caught.value.code == "STORAGE_DISK_FULL" and "resume" in str(caught.value) and "step-000008" in str(caught.value.where)
    assert run_status(run_dir) == "failed" and bench.seen("failed")[0]["code"] == "STORAGE_DISK_FULL"
    assert [c.step for c in list_complete(run_dir / "checkpoints")] == [4] and not list((run_dir / "checkpoints").glob(".*"))
    assert find_damage(run_dir / "checkpoints" / "step-000004") is None
    bench.resume(run_dir)
    assert_same_result(straight, run_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root and permission to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_the_run_keeps_its_checkpoint_and_goes_on_when_there_is_room(bench: Bench, small_disk: Path) -> None:
    straight = bench.train().run_dir
    bench.root = small_disk
    filler = small_disk / "filler"

    def fill(event: dict[str, Any]) -> None:
        if at("checkpoint", step=4)(event):
            free = os.statvfs(small_disk)
            filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - 40_000))

    with pytest.raises(StorageError) as caught:
        bench.train(sinks=[fill])
    assert (
        caught.value.code == "STORAGE_DISK_FULL"
        and "MB are needed" in caught.value.message
        and "MB are free" in caught.value.message
    )
    run_dir = bench.newest()
    assert run_status(run_dir) == "failed" and find_damage(run_dir / "checkpoints" / "step-000004") is None
    filler.unlink()
    bench.resume(run_dir)
    assert_same_result(straight, run_dir)


def test_an_event_that_cannot_be_written_ends_the_run_cleanly(bench: Bench, small_disk: Path) -> None:
    """Not one byte is left: even the word that the run failed has no room, and the error still comes out."""
    bench.root = small_disk
    filler = small_disk / "filler"

    def fill(event: dict[str, Any]) -> None:
        if at("log", step=6)(event):
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x"):
                    pass

    with pytest.raises(StorageError) as caught:
        bench.train(sinks=[fill], training__log_steps=1)
    assert caught.value.code == "STORAGE_DISK_FULL"
    run_dir = bench.newest()
    filler.unlink()
    assert find_damage(run_dir / "checkpoints" / "step-000004") is None
    assert bench.resume(run_dir).status == "succeeded"


def test_too_little_room_is_said_before_the_first_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuneflow.workspace.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError) as caught:
        bench.train()
    assert caught.value.code == "STORAGE_DISK_FULL" and caught.value.context["needed_bytes"] > 1000
    assert not bench.seen("phase", name="training")


def test_a_result_that_cannot_be_written_leaves_no_half_adapter(bench: Bench) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "phase" and event["name"] == "saving" and "step" not in event:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    straight = bench.train(method__r=32).run_dir
    try:
        with pytest.raises(StorageError):
            bench.train(method__r=32, sinks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run_dir = bench.newest()
    assert not (run_dir / "adapter").exists()
    bench.resume(run_dir)
    assert_same_result(straight, run_dir)
