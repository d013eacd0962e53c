"""Checkpoints are whole or not there; damage of any file is found before it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.errors import ResumeError, StorageError
from finetuneflow.training import checkpoints
from finetuneflow.training.checkpoints import find_damage, find_valid, list_complete, prune, remove_leftovers, write_checkpoint


def save(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "sub").mkdir()
    (folder / "sub" / "optimizer").write_bytes(b"o" * 500)


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    def look(folder: Path) -> None:
        save(folder)
        assert list_complete(tmp_path) == []  # not visible while it is written

    made = write_checkpoint(tmp_path, 20, look)
    assert list_complete(tmp_path) == [made] and find_damage(made.path) is None


def test_a_failed_save_leaves_nothing_behind_and_the_older_one_whole(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 10, save)

    def fails(folder: Path) -> None:
        save(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError):
        write_checkpoint(tmp_path, 20, fails)
    assert [p.name for p in tmp_path.iterdir()] == [first.path.name]


@pytest.mark.parametrize("name", ["weights", "sub/optimizer", checkpoints.MARKER])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_any_damaged_file_makes_the_next_older_one_count(tmp_path: Path, name: str, damage: str) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step, save)
    path = tmp_path / "step-000020" / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(
            {"flip": data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :], "truncate": data[:middle], "empty": b""}[
                damage
            ]
        )
    found, skipped = find_valid(tmp_path)
    assert found.step == 10
    assert [d.path.name for d in skipped] == ["step-000020"] and skipped[0].reason


def test_without_any_whole_checkpoint_the_error_names_each_and_why(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10, save)
    (tmp_path / "step-000010" / "weights").unlink()
    with pytest.raises(ResumeError, match="step-000010: weights is missing"):
        find_valid(tmp_path)
    with pytest.raises(ResumeError, match="none was completed"):
        find_valid(tmp_path / "nowhere")


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10, save)
    (tmp_path / ".step-000020.partial").mkdir()
    assert remove_leftovers(tmp_path) == [".step-000020.partial"]
    assert [c.step for c in list_complete(tmp_path)] == [10]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(tmp_path, step, save)
    prune(tmp_path, keep=2, protect=20)
    assert [c.step for c in list_complete(tmp_path)] == [20, 40, 50]
