"""Rewards from outside the reward folder are not run, by whatever path they are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.config import Reinforcement
from finetuneflow.errors import ConfigError
from finetuneflow.evaluation.rewards import load_rewards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward folder beside a file that leaves a trace where it is run, and with a link to it."""
    (tmp_path / "outside.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef f(completion): return 1.0\n")
    folder = tmp_path / "rewards"
    (folder / "deep").mkdir(parents=True)
    (folder / "link.py").symlink_to("../outside.py")
    (folder / "up").symlink_to("..")
    return folder


@pytest.mark.parametrize("name", ["../outside.py", "deep/../../outside.py", "link.py", "up/outside.py", "{parent}/outside.py"])
def test_nothing_outside_is_run(name: str, folder: Path) -> None:
    text = name.format(parent=folder.parent) + ":f"
    with pytest.raises(ConfigError) as caught:
        load_rewards(Reinforcement(reward=[text], reward_folder=str(folder)))
    assert caught.value.code == "REWARD_INVALID"
    assert not (folder.parent / "trace").exists()
