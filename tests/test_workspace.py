"""Names, paths, atomic writes and locks: what keeps a run's files where and as they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuneflow.errors import StorageError
from finetuneflow.workspace import (
    ProcessIdentity,
    Workspace,
    check_name,
    directory_lock,
    lock_owner,
    require_free_bytes,
    safe_join,
    write_atomic,
)

HOSTILE_NAMES = [
    "../x", "..", "a/../../b", "/etc/passwd", "..\\x", "%2e%2e/x", "a\0b", "a" * 300, "\u2025/x", "con", "nul.txt", "com1",
    "", ".hidden", "-rf", "a b", "a;rm -rf /", "a\nb", "é", "a..b", "A",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(StorageError) as caught:
        check_name(name)
    assert caught.value.code == "STORAGE_BAD_NAME"


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_joined_path_never_leaves_its_folder(first: str, second: str) -> None:
    root = Path("/tmp/ftf-root")
    try:
        joined = safe_join(root, first, second)
    except (StorageError, ValueError):
        return
    assert joined.resolve().is_relative_to(root.resolve())


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to("/etc")
    with pytest.raises(StorageError):
        safe_join(tmp_path / "inside", "link", "passwd")


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError) as caught:
        write_atomic(path, "new")
    assert caught.value.code == "STORAGE_DISK_FULL" and path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_too_little_space_is_told_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"MB are needed, .* MB are free"):
        require_free_bytes(tmp_path / "not" / "yet", 10**18)


def test_runs_are_numbered_and_found_by_name_beginning_or_latest(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = workspace.new_run_dir("demo"), workspace.new_run_dir("demo")
    assert first != second
    for path in (first, second):
        (path / "run.yaml").write_text("version: 1\n")
    assert workspace.run_dir(first.name) == first
    assert workspace.run_dir("latest") == second
    with pytest.raises(StorageError, match="fits several runs"):
        workspace.run_dir("demo")
    with pytest.raises(StorageError, match="There is no run 'other'"):
        workspace.run_dir("other")


def test_a_second_process_cannot_take_a_held_run_and_learns_who_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom finetuneflow.workspace import directory_lock\n"
        "with directory_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=str(holder.pid)) as caught, directory_lock(tmp_path):
        pass
    assert caught.value.code == "RUN_BUSY"
    owner = lock_owner(tmp_path)
    assert owner is not None and owner.pid == holder.pid
    holder.kill()
    holder.wait()
    assert lock_owner(tmp_path) is None  # a killed holder leaves no stale lock
    with directory_lock(tmp_path):
        assert lock_owner(tmp_path) == ProcessIdentity.current()


def test_a_recycled_pid_is_not_its_predecessor() -> None:
    me = ProcessIdentity.current()
    assert me.is_alive()
    assert not ProcessIdentity(me.pid, me.started - 1000).is_alive()


def test_an_unreadable_lock_file_means_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"pid": "x"}))
    assert lock_owner(tmp_path) is None
